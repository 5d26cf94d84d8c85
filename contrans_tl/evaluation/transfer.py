"""Evaluation: did the concept arrive, and was it the concept that did it?

    report = evaluate(target, pairs, concept, maps, neutral=sentences)
    print(report.verdict)

Layers and strength are chosen on the select split under a budget (`selection`); everything reported is measured on the test
split, prompt by prompt the same for all arms (`arms`), so that differences are paired (`intervals`). The concept arrived if it
is apart from the base and from every vector of every null arm, each by its own paired 95% interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float

from contrans_tl.activations import hash_texts
from contrans_tl.data import ContrastPairs
from contrans_tl.evaluation.arms import ARMS, NULLS, Arm, Rivals, arms_of, carried
from contrans_tl.evaluation.costs import SideEffects, side_effects
from contrans_tl.evaluation.intervals import Estimate, difference, estimate, transfer_rate
from contrans_tl.evaluation.selection import Choice, Search, Setting, choose
from contrans_tl.evaluation.steerability import MULTIPLES, Steerability, steerability
from contrans_tl.evaluation.subjects import SteeredAt
from contrans_tl.evaluation.tasks import Marks, ScoringFailed, Split, Task, measured, task_of
from contrans_tl.leakage import Leak, check_leaks
from contrans_tl.models import HookedModel, identify
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector, refine
from contrans_tl.reformulation import UNWEIGHTED, LayerMaps, Weighting

SHOWN = 5
"""Prompts and continuations that a report holds word for word."""


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
        notes = []
        if self.in_sample:
            notes.append(f"In-sample: {len(self.leaks)} evaluation prompts had been seen.")
        if self.partial:
            notes.append(f"Partial: interrupted before {', '.join(self.missing)}.")
        if self.failures:
            notes.append(f"Failed: {'; '.join(f'{arm} ({why})' for arm, why in self.failures.items())}.")
        return "".join(f" {note}" for note in notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to report.json."""
        said = {"verdict": self.verdict, "transferred": self.transferred}
        return asdict(self) | said | {"in_sample": self.in_sample, "partial": self.partial}


def evaluate(
    target: HookedModel,
    pairs: ContrastPairs,
    concept: ConceptVector,
    maps: LayerMaps,
    *,
    neutral: Sequence[str],
    task: Task | None = None,
    arms: Sequence[str] | None = None,
    rivals: Rivals = Rivals(),  # noqa: B008 - frozen
    search: Search = Search(),  # noqa: B008 - frozen
    weighting: Weighting = "concept",
    known: Mapping[str, Sequence[str]] | None = None,
    allow_overlap: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> TransferReport:
    """Carry a concept into the target and measure it against every control.

    Args:
        pairs: what the concept was refined from; the native vector is refined from them in the target.
        concept: refined in the source, at the maps' source layers.
        neutral: texts that no map was fitted on; the first half serves the choice of strength, the second the report.
        task: what is asked; None is the pairs' own select and test questions.
        arms: names out of `arms.ARMS` and of `rivals.maps`; None is all that can be made. Base and transplanted always run.
        rivals: what further arms are made from.
        weighting: how the concept is carried; see `reformulate`.
        known: texts that the evaluation prompts must not occur in, beside the refine pairs and the select split; name the fit
            corpus here, {"the fit corpus": sentences}.
        allow_overlap: run although they do; the report is marked in-sample.
        stopped: asked between arms; true ends the evaluation as ^C does.

    Raises:
        ValueError: no select or test prompts, fewer than two neutral texts, an arm that cannot be made, maps that lead into
            another model, a concept of another model than the maps', evaluation prompts that were seen (`leakage`).
        Interrupted: ^C; a report of the arms measured so far is in its `.report`.
    """
    task = task_of(pairs) if task is None else task
    if not task.prompts("select") or not task.prompts("test"):
        raise ValueError(f"{task.name}: expected select and test questions to evaluate on; there are none of one of them.")
    if not maps.target.model.same_space(here := identify(target)):
        raise ValueError(f"these maps lead into {maps.target.model}, the model is {here}: fit maps into this one.")
    if len(neutral) < 2:
        raise ValueError("expected at least two neutral texts: half to choose the strength on, half to report on.")
    leaks = leaks_of(task, pairs, known or {}, allow_overlap=allow_overlap)
    neutral_select, neutral_test = neutral[: len(neutral) // 2], neutral[len(neutral) // 2 :]
    concept = concept.only(*maps.source.layers)
    weighted = weighting == "concept" and maps.method not in UNWEIGHTED
    native = refine(target, pairs, layers=maps.target.layers)
    wanted_arms = _check_arms(arms, rivals, weighted)

    def resid_norm(layer: int) -> float:
        return float(maps.target.at(layer).float().norm(dim=-1).mean())

    def native_norm(layer: int) -> float:
        return float(native.at(layer).norm())

    choice = choose(
        target,
        carried(maps.reweighted(concept) if weighted else maps, concept),
        task,
        neutral_select,
        search=search,
        norms=native_norm if search.unit == "native" else resid_norm,
        batch_size=batch_size,
    )
    s, t = choice.layer_source, choice.layer_target
    here_maps, steering = maps.only([s], [t]), SteeredAt(target, t)
    makers = arms_of(steering, choice, concept.only(s), native.only(t), here_maps, rivals, weighted=weighted, seed=seed)
    moved = makers["transplanted"]().vectors[0]
    names = [name for name in makers if name in wanted_arms]
    test = _Test(target, task, neutral_test, batch_size)
    foreseen = here_maps.verdict(concept.only(s), s)

    def report(missing: Sequence[str] = ()) -> TransferReport:
        sign = 1.0 if task.wanted == "higher" else -1.0
        return TransferReport(
            concept=pairs.name,
            target=maps.target.model.name,
            metric=task.metric,
            wanted=task.wanted,
            task=task.describe(),
            layer_source=s,
            layer_target=t,
            strength=choice.strength,
            dose={
                "native": choice.strength * float(moved.vectors.norm()) / max(native_norm(t), 1e-12),
                "resid": choice.strength * float(moved.vectors.norm()) / max(resid_norm(t), 1e-12),
            },
            coverage=foreseen.coverage,
            presence=foreseen.presence,
            foreseen=str(foreseen),
            r2=float(here_maps.r2),
            arms=test.estimates(seed),
            differences=test.differences(sign, seed),
            transfer_rate=test.transfer_rate(seed),
            steerability=curves,
            geometry=_geometry(test.arms, native.only(t)),
            sweep=choice.sweep,
            search=_describe(search, choice),
            held_out={
                "test_prompts": len(task.prompts("test")),
                "select_prompts": len(task.prompts("select")),
                "refine_prompts": len(pairs.positive) + len(pairs.negative),
                "neutral_texts_select": len(neutral_select),
                "neutral_texts_test": len(neutral_test),
                **{f"texts of {place}": len(texts) for place, texts in (known or {}).items()},
            },
            items={name: values.mean(0).round(6).tolist() for name, values in test.headline().items()},
            items_hash=hash_texts(list(task.prompts("test"))),
            groups=tuple(test.groups()),
            prompts=tuple(task.prompts("test")[:SHOWN]),
            texts=test.texts(),
            leaks=leaks,
            failures=dict(test.failures),
            missing=tuple(missing),
        )

    curves: dict[str, Steerability] = {}
    try:
        for name in track(names, f"{pairs.name} into {maps.target.model.name}", len(names)):
            if stopped():
                raise KeyboardInterrupt
            test.measure(name, makers[name]())
        for name in ("transplanted", "native"):
            if name in test.marks:
                curves |= test.steered(name, steering, choice.strength, seed)
    except KeyboardInterrupt as stop:
        missing = [name for name in names if name not in test.marks and name not in test.failures]
        raise Interrupted(report(missing or ["steerability"])) from stop
    return report()


def leaks_of(
    task: Task, pairs: ContrastPairs, known: Mapping[str, Sequence[str]], *, allow_overlap: bool = False
) -> tuple[Leak, ...]:
    """Prompts of the task that occur where they should not; see `check_leaks`."""
    splits = {split: task.prompts(split) for split in get_args(Split)}
    return check_leaks(pairs, known, splits=splits, demonstrations=task.demonstrations(), allow_overlap=allow_overlap)


@dataclass(eq=False)
class _Test:
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
        """One arm; a scorer that fails is noted, and costs that arm only."""
        try:
            marks = [measured(self.task, subject, "test") for subject in arm.subjects]
            own = [measured(self.task, subject, "own") for subject in arm.subjects] if self.task.prompts("own") else []
        except ScoringFailed as error:
            self.failures[name] = str(error)
            return
        if arm.reference is not None:
            forwards = [subject.forward for subject in arm.subjects]
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


def _check_arms(arms: Sequence[str] | None, rivals: Rivals, weighted: bool) -> set[str]:
    """The arms to run. ValueError for one that does not exist or that nothing was given for."""
    given = {
        "other_concept": rivals.other is not None,
        "source_own": rivals.source is not None,
        "instruction": bool(rivals.instruction),
        "aligned": rivals.aligned is not None,
        "proxy_tuning": rivals.proxy is not None,
        "uniform": weighted,
        "random_weighting": weighted,
    } | {name: name in rivals.maps for name in ("paper", "neutral_corpus")}
    available = {name for name in ARMS if given.get(name, True)} | set(rivals.maps)
    if arms is None:
        return available
    if unknown := [name for name in arms if name not in available]:
        raise ValueError(
            f"expected arms among {', '.join(sorted(available))}; got {', '.join(unknown)}. (Some need something in rivals=.)"
        )
    return {"base", "transplanted", *arms}


def _geometry(arms: Mapping[str, Arm], native: ConceptVector) -> dict[str, dict[str, float]]:
    return {
        name: {
            "cosine_to_native": float(torch.stack([vector.cosine(native) for vector in arm.vectors]).mean()),
            "norm": float(torch.stack([vector.vectors.norm() for vector in arm.vectors]).mean()),
        }
        for name, arm in arms.items()
        if arm.vectors
    }


def _describe(search: Search, choice: Choice) -> dict[str, Any]:
    """What was swept, so that a reader can tell how much choosing there was."""
    return {
        "unit": search.unit,
        "strengths": list(search.tried),
        "setting": choice.setting,
        "budget": search.budget,
        "budget_on": search.budget_on,
        "within_budget": choice.within_budget,
        "max_depth": search.max_depth,
        "layer_pairs": sum("screened" in setting for setting in choice.sweep),
        "settings": len(choice.sweep),
    }
