"""Selection: layers and strength, on the select split only.

    choice = choose(target, candidates, task, neutral, search=Search(budget=0.1, budget_on="kl"))
    choice.sweep          every setting that was tried, with what it did and what it cost

The largest effect within a budget, after Arditi et al. (2406.11717): target layers below 0.8 of the depth only, as a vector
that is written just before the head can add to a word's logit without any concept; and a bound on what neutral text may cost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from contrans_tl.evaluation.costs import side_effects, strength_for_kl
from contrans_tl.evaluation.subjects import SteeredAt, Subject
from contrans_tl.evaluation.tasks import Task, measured
from contrans_tl.models import HookedModel
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector

Unit = Literal["raw", "native", "resid", "kl"]
"""Of strengths: of the vector as it is, of the native vector's norm, of the stream's mean norm, or the KL it may cost."""
STRENGTHS: dict[Unit, tuple[float, ...]] = {
    "raw": (1.0, 2.0, 3.0, 5.0),
    "native": (0.5, 1.0, 2.0, 3.0),
    "resid": (0.25, 0.5, 1.0, 1.5),
    "kl": (0.03, 0.1, 0.3),
}


@dataclass(frozen=True)
class Search:
    """What is tried, and what it may cost."""

    strengths: tuple[float, ...] | None = None
    """In the unit; None for `STRENGTHS`."""
    unit: Unit = "raw"
    """`raw`: of the carried vector; `native`: of the target's own vector's norm; `resid`: of the mean norm of the target's
    residual rows at the layer; `kl`: nats of next-token KL on neutral text that the strength may cost."""
    budget: float = 0.5
    budget_on: Literal["loss", "kl"] = "loss"
    """Neutral-text loss or next-token KL, in nats a token."""
    max_depth: float = 0.8
    """Target layers l < max_depth * n_layers; where no map ends below, all."""
    keep: int = 2
    """Layer pairs that are tried at every strength, after all have been tried at the middle one."""

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"expected a unit among {', '.join(get_args(Unit))}; got {self.unit!r}.")
        if self.budget_on not in ("loss", "kl"):
            raise ValueError(f"expected budget_on 'loss' or 'kl'; got {self.budget_on!r}.")
        if not self.tried or not all(np.isfinite(self.tried)) or min(self.tried) <= 0:
            raise ValueError(f"expected strengths above 0; got {self.tried}. (Signs are told apart by the sign_flipped arm.)")
        if not 0 < self.max_depth <= 1 or self.keep < 1:
            raise ValueError(f"expected 0 < max_depth <= 1 and keep >= 1; got {self.max_depth}, {self.keep}.")

    @property
    def tried(self) -> tuple[float, ...]:
        return STRENGTHS[self.unit] if self.strengths is None else tuple(sorted(self.strengths))

    def allowed(self, target_layers: Sequence[int], n_layers: int) -> tuple[int, ...]:
        """The target layers that are looked at."""
        below = tuple(t for t in target_layers if t < self.max_depth * n_layers)
        return below or tuple(target_layers)


Setting = dict[str, float | int]
"""Layers, strength, effect and cost of one setting that was tried."""


@dataclass(frozen=True)
class Choice:
    """Where and how strongly to transplant, and the sweep it was chosen from."""

    layer_source: int
    layer_target: int
    strength: float
    """Of the carried vector."""
    setting: float
    """The same in the unit of the search."""
    sweep: tuple[Setting, ...]
    """Every setting tried: layers, setting, strength, and either `screened`, the metric on half of the select split, or
    `effect` on all of it with `loss_increase` and `kl`."""
    within_budget: bool
    """False where nothing was, and the least costly setting was taken."""

    @property
    def settings(self) -> int:
        """How many different ones were tried."""
        return len({tuple(setting[key] for key in ("layer_source", "layer_target", "strength")) for setting in self.sweep})


def choose(
    target: HookedModel,
    candidates: Mapping[tuple[int, int], ConceptVector],
    task: Task,
    neutral: Sequence[str],
    *,
    search: Search = Search(),  # noqa: B008 - frozen
    norms: Callable[[int], float] | None = None,
    batch_size: int = 64,
) -> Choice:
    """Layers and strength with the largest effect on the select split within the budget.

    All layer pairs are tried at the middle strength on `task.screening()`, the best `keep` of them (between equals those of the
    larger propensity) at all strengths on the whole split. Of equal effects the one is taken that costs less on neutral text;
    if nothing is within the budget, the one that costs least.

    Args:
        candidates: {(source layer, target layer): the carried concept}.
        neutral: texts that no map was fitted on.
        norms: with the units `native` and `resid`, the norm that counts as 1 at a target layer.

    Raises:
        ValueError: one of those units without norms.
    """
    if search.unit in ("native", "resid") and norms is None:
        raise ValueError(f"strengths in units of {search.unit!r} need the norms of each target layer; got none.")
    allowed = search.allowed(sorted({t for _, t in candidates}), target.cfg.n_layers)
    candidates = {pair: concept for pair, concept in candidates.items() if pair[1] in allowed}
    at = {layer: SteeredAt(target, layer) for layer in allowed}

    def strength(pair: tuple[int, int], setting: float) -> float:
        if search.unit == "raw":
            return setting
        if search.unit == "kl":
            return strength_for_kl(at[pair[1]], candidates[pair], neutral, setting, batch_size=batch_size)
        assert norms is not None
        return setting * norms(pair[1]) / max(float(candidates[pair].vectors.norm()), 1e-12)

    def subject(pair: tuple[int, int], strength: float) -> Subject:
        return at[pair[1]].subject(candidates[pair], strength)

    sign = 1.0 if task.wanted == "higher" else -1.0

    def effect(task: Task, subject: Subject) -> tuple[float, float]:
        marks = measured(task, subject, "select")
        leaning = 0.0 if marks.propensity is None else float(marks.propensity.mean())
        return float(marks.metrics[task.metric].mean()), leaning

    middle = search.tried[(len(search.tried) - 1) // 2]
    half, screened, sweep = task.screening(), {}, []
    for pair in track(candidates, f"{task.name}: layers", len(candidates)):
        # One pass a pair: a strength by KL takes a dozen, so there all pairs are looked at with strength 1.
        x = 1.0 if search.unit == "kl" else strength(pair, middle)
        screened[pair] = effect(half, subject(pair, x))
        sweep.append(_setting(pair, middle, x) | {"screened": screened[pair][0]})
    best = sorted(candidates, key=lambda pair: (sign * screened[pair][0], screened[pair][1]), reverse=True)[: search.keep]
    tried: list[tuple[tuple[int, int], float, float]] = [(p, k, strength(p, k)) for p in best for k in search.tried]
    results = []
    for pair, setting, x in track(tried, f"{task.name}: strengths", len(tried)):
        steered = subject(pair, x)
        cost = side_effects(at[pair[1]].base, neutral, [steered.forward], batch_size=batch_size)
        costs = {"loss_increase": float(cost.per_token(cost.loss_increase)[0]), "kl": float(cost.per_token(cost.kl)[0])}
        result = _setting(pair, setting, x) | {"effect": effect(task, steered)[0]} | costs
        results.append(result)
    spent = "loss_increase" if search.budget_on == "loss" else "kl"
    # A strength found by bisection spends its budget to within 1%.
    affordable = [result for result in results if result[spent] <= search.budget * (1.01 if search.unit == "kl" else 1.0)]
    if affordable:
        chosen = min(affordable, key=lambda result: (-sign * result["effect"], result[spent]))
    else:
        chosen = min(results, key=lambda result: result[spent])
    return Choice(
        int(chosen["layer_source"]),
        int(chosen["layer_target"]),
        chosen["strength"],
        chosen["setting"],
        (*sweep, *results),
        bool(affordable),
    )


def frontier(sweep: Sequence[Mapping[str, Any]], *, wanted: str = "higher", cost: str = "kl") -> list[Mapping[str, Any]]:
    """The settings of a sweep that no other beats in effect at the same or a lower cost, cheapest first."""
    sign = 1.0 if wanted == "higher" else -1.0
    best, kept = -np.inf, []
    for point in sorted((p for p in sweep if "effect" in p), key=lambda p: (p[cost], -sign * p["effect"])):
        if sign * point["effect"] > best:
            best = sign * point["effect"]
            kept.append(point)
    return kept


def _setting(pair: tuple[int, int], setting: float, strength: float) -> Setting:
    return {"layer_source": pair[0], "layer_target": pair[1], "setting": setting, "strength": strength}
