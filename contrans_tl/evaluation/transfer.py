"""Transfer: what an evaluation found, and what its controls allow to say.

The concept arrived if the transplanted arm is apart from the base and from every vector of every null arm, each by its own
paired 95% interval, in the direction that is wanted. With n null vectors, one that is no better than they are passes at most
once in n + 1 times, whatever the data: of n + 1 vectors at most one is apart from all the others. That bound is for vectors of
one setting; where layers and strengths were swept, the transplanted vector was the best of several on the select split, and
the report holds the whole sweep. `data/studies/nulls.py` measures both.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from contrans_tl.evaluation.arms import NULLS
from contrans_tl.evaluation.intervals import Estimate
from contrans_tl.evaluation.selection import Setting
from contrans_tl.evaluation.steerability import Steerability
from contrans_tl.leakage import Leak

ENOUGH = 19
"""Null vectors that let at most one in twenty through."""


class Interrupted(KeyboardInterrupt):
    """An evaluation was stopped; what had been measured by then is in `report`, which says that it is partial."""

    def __init__(self, report: Any):
        super().__init__("interrupted; what had been measured is in .report")
        self.report = report


@dataclass(frozen=True)
class TransferReport:
    """One concept carried into one target, beside its controls."""

    concept: str
    target: str
    metric: str
    wanted: str
    """`higher` or `lower`: which way the concept should move the metric."""
    task: dict[str, Any]
    layer_source: int
    layer_target: int
    strength: float
    """Of the carried vector."""
    dose: dict[str, float]
    """The same in units of the native vector's norm and of the mean norm of the target's rows at the layer."""
    coverage: float
    """Of the concept by the fit corpus, at the source layer."""
    presence: float
    foreseen: str
    """What `LayerMaps.verdict` said at that layer, before anything was transplanted."""
    r2: float
    """Held-out R2 of the uniform map between the two layers."""
    arms: dict[str, dict[str, Estimate]]
    """Arm -> metric -> estimate, on the test split. Metrics that begin with `own_` are of the concept's own prompts;
    `loss_increase` and `kl` of neutral text, nats a token."""
    differences: dict[str, Estimate]
    """Arm -> transplanted - arm, paired, in the direction that is wanted; of an arm of several vectors, the nearest one."""
    transfer_rate: Estimate | None
    """(transplanted - base) / (native - base); None where the native vector is not apart from the base."""
    steerability: dict[str, Steerability]
    geometry: dict[str, dict[str, float]]
    """Arm -> cosine to the target's native vector, and norm; means over vectors."""
    sweep: tuple[Setting, ...]
    search: dict[str, Any]
    held_out: dict[str, int]
    """How many prompts and texts of each kind, and what they were kept apart from."""
    items: dict[str, list[float]]
    """Arm -> the metric of every test prompt, mean over vectors: what paired comparisons between reports need."""
    items_hash: str
    """Of the test prompts, in order."""
    groups: tuple[str, ...] = ()
    """Of the test prompts, in order: those of one group are resampled together."""
    prompts: tuple[str, ...] = ()
    """The first few test prompts, so that a reader sees what was asked; `texts` continue them."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    """Arm -> the first few continuations, where the task has such."""
    leaks: tuple[Leak, ...] = ()
    """Evaluation prompts that were seen before, where that was allowed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Arm -> why it could not be measured."""
    missing: tuple[str, ...] = ()
    """Arms that were asked for and not reached, as the evaluation was interrupted."""
    null_vectors: int = 0
    """Vectors of all null arms together."""

    @property
    def in_sample(self) -> bool:
        """Whether prompts it reports on had been seen when concept, maps or layers were made."""
        return bool(self.leaks)

    @property
    def partial(self) -> bool:
        return bool(self.missing)

    @property
    def rivals(self) -> list[str]:
        """Base and nulls that the transplanted arm is not apart from."""
        return [arm for arm in ("base", *NULLS) if arm in self.differences and self.differences[arm].low <= 0]

    @property
    def transferred(self) -> bool:
        """Whether the transplanted arm is apart from the base and every null, in the direction that is wanted."""
        nulls = [arm for arm in NULLS if arm in self.differences]
        undecided = {"base", "transplanted", *NULLS} & {*self.failures, *self.missing}
        return "base" in self.differences and bool(nulls) and not self.rivals and not undecided

    @property
    def verdict(self) -> str:
        """One sentence on what the controls allow to say."""
        name, notes = f"{self.concept} into {self.target}", self._notes()
        if not {"base", "transplanted"} <= set(self.arms):
            lost = "; ".join(f"{arm}: {why}" for arm, why in self.failures.items()) or "not reached"
            return f"{name}: nothing can be said ({lost}).{notes}"
        effect, base = (self.arms[arm][self.metric] for arm in ("transplanted", "base"))
        said = f"{name}: {self.metric} {base} -> {effect}"
        if self.transferred:
            return f"{said}; apart from the base and every null control, each by its paired interval.{notes}"
        if self.rivals:
            return f"{said}; no transfer beyond controls: not apart from {', '.join(self.rivals)}.{notes}"
        return f"{said}; undecided: {self._unmeasured()}.{notes}"

    def _unmeasured(self) -> str:
        lost = [arm for arm in ("base", *NULLS) if arm in self.failures or arm in self.missing]
        return f"{', '.join(lost)} not measured" if lost else "no null control was run"

    def _notes(self) -> str:
        notes, n = [], self.null_vectors
        if 0 < n < ENOUGH:
            notes.append(
                f"Null vectors: {n} only; one no better than they are is apart from all of them up to once in {n + 1}."
            )
        if self.in_sample:
            notes.append(f"In-sample: prompts had been seen before, {len(self.leaks)} in all.")
        if self.partial:
            notes.append(f"Partial: interrupted before {', '.join(self.missing)}.")
        if self.failures:
            notes.append(f"Failed: {'; '.join(f'{arm} ({why})' for arm, why in self.failures.items())}.")
        return "".join(f" {note}" for note in notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to report.json."""
        said = {"verdict": self.verdict, "transferred": self.transferred}
        return asdict(self) | said | {"in_sample": self.in_sample, "partial": self.partial}
