"""Measuring: every arm on the test split, prompt by prompt, and the numbers made of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from contrans_tl.evaluation.arms import DRAWN, Arm
from contrans_tl.evaluation.costs import SideEffects, side_effects
from contrans_tl.evaluation.intervals import Estimate, Lead, difference, estimate, lead, transfer_rate
from contrans_tl.evaluation.steerability import MULTIPLES, Steerability, steerability
from contrans_tl.evaluation.subjects import SteeredAt
from contrans_tl.evaluation.tasks import Marks, ScoringFailed, Task, measured
from contrans_tl.models import HookedModel
from contrans_tl.refinement import ConceptVector

COSTED = 5
"""Vectors of an arm whose cost on neutral text is measured: it stands beside their effect, and no verdict rests on it."""
SHOWN = 5
"""Prompts and continuations that a report holds word for word."""


@dataclass(eq=False)
class Measurements:
    """The test split, and what every arm did on it."""

    target: HookedModel
    task: Task
    neutral: Sequence[str]
    batch_size: int
    arms: dict[str, Arm] = field(default_factory=dict)
    marks: dict[str, list[Marks]] = field(default_factory=dict)
    """Arm -> of each of its vectors."""
    own: dict[str, list[Marks]] = field(default_factory=dict)
    costs: dict[str, SideEffects] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def measure(self, name: str, arm: Arm) -> None:
        """One arm; what fails is noted, and costs that arm only."""
        try:
            marks = [measured(self.task, subject, "test") for subject in arm.subjects]
            own = [measured(self.task, subject, "own") for subject in arm.subjects] if self.task.prompts("own") else []
        except ValueError as error:
            # What the base cannot be asked nobody can. Of another arm - an instruction that does not fit the context, a scorer
            # that fails - it is told beside its name: the arms measured before are not lost.
            if name == "base" and not isinstance(error, ScoringFailed):
                raise
            self.failures[name] = str(error)
            return
        if arm.reference is not None:
            forwards = [subject.forward for subject in arm.subjects[:COSTED]]
            self.costs[name] = side_effects(arm.reference, self.neutral, forwards, batch_size=self.batch_size)
        self.arms[name], self.marks[name] = arm, marks
        if own:
            self.own[name] = own

    def groups(self) -> list[str]:
        return list(self.task.groups("test"))

    def headline(self) -> dict[str, Float[np.ndarray, "vector item"]]:
        return {name: np.stack([one.metrics[self.task.metric] for one in marks]) for name, marks in self.marks.items()}

    def estimates(self, seed: int) -> dict[str, dict[str, Estimate]]:
        table: dict[str, dict[str, Estimate]] = {}
        for name, marks in self.marks.items():
            table[name] = {
                metric: estimate(np.stack([one.metrics[metric] for one in marks]), groups=self.groups(), seed=seed)
                for metric in marks[0].metrics
            }
            if name in self.own:
                groups, own = list(self.task.groups("own")), self.own[name]
                values = np.stack([one.metrics[self.task.metric] for one in own])
                table[name][f"own_{self.task.metric}"] = estimate(values, groups=groups, seed=seed)
            if (costs := self.costs.get(name)) is not None:
                for cost, sums in (("loss_increase", costs.loss_increase), ("kl", costs.kl)):
                    table[name][cost] = estimate(sums, counts=costs.tokens, seed=seed)
        return table

    def differences(self, sign: float, seed: int) -> dict[str, Estimate]:
        values = {name: sign * marked for name, marked in self.headline().items()}
        if "transplanted" not in values:
            return {}
        moved = values.pop("transplanted")[0]
        return {name: difference(moved, rival, groups=self.groups(), seed=seed) for name, rival in values.items()}

    def leads(self, sign: float, settings: int) -> dict[str, Lead]:
        """Of the transplanted arm on the vectors drawn at random; by propensity, which many vectors move that change no hit."""
        found = {}
        for name in DRAWN:
            if name in self.marks and "transplanted" in self.marks:
                marks = [*self.marks["transplanted"], *self.marks[name]]
                leanings = [one.propensity for one in marks if one.propensity is not None]
                if len(leanings) < len(marks):
                    leanings = [sign * one.metrics[self.task.metric] for one in marks]
                found[name] = lead(leanings[0], np.stack(leanings[1:]), settings=settings, groups=self.groups())
        return found

    def transfer_rate(self, seed: int) -> Estimate | None:
        values = self.headline()
        if not {"transplanted", "base", "native"} <= set(values):
            return None
        moved, base, native = (values[name][0] for name in ("transplanted", "base", "native"))
        return transfer_rate(moved, base, native, groups=self.groups(), seed=seed)

    def steered(self, name: str, at: SteeredAt, strength: float, seed: int) -> dict[str, Steerability]:
        """How propensity follows the strength of an arm's vector; nothing for a task without propensities."""
        base, [marks] = self.marks.get("base", [Marks({})])[0], self.marks[name]
        if base.propensity is None or marks.propensity is None:
            return {}
        curve = {0.0: base.propensity, strength: marks.propensity}
        for multiple in MULTIPLES:
            if multiple != 1.0:
                subject = at.subject(self.arms[name].vectors[0], multiple * strength)
                try:
                    propensity = measured(self.task, subject, "test").propensity
                except ScoringFailed as error:
                    self.failures[f"{name} at {multiple:g} of the strength"] = str(error)
                    continue
                assert propensity is not None
                curve[multiple * strength] = propensity
        strengths = sorted(curve)
        curves = np.stack([curve[x] for x in strengths])
        return {name: steerability(strengths, curves, groups=self.groups(), seed=seed)}

    def texts(self) -> dict[str, list[str]]:
        return {name: list(marks[0].texts[:SHOWN]) for name, marks in self.marks.items() if marks[0].texts}

    def geometry(self, native: ConceptVector) -> dict[str, dict[str, float]]:
        """Of every arm with vectors, cosine to the target's own vector and norm, means over its vectors."""
        return {
            name: {
                "cosine_to_native": float(torch.stack([vector.cosine(native) for vector in arm.vectors]).mean()),
                "norm": float(torch.stack([vector.vectors.norm() for vector in arm.vectors]).mean()),
            }
            for name, arm in self.arms.items()
            if arm.vectors
        }
