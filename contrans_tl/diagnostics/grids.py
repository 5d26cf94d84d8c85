"""Grids: every source layer x every target layer, by what the maps promise and by what the carried vector does.

    found = grids(maps, concept, native=native)                                     no model runs
    found = grids(maps, concept, native=native, task=task, target=target)           and the effect, a run each

R2 is that of the maps, coverage that of the concept in the source (the same for every target layer), the cosine that of the
carried vector with the target's own of that layer. The effect is the task's metric under the carried vector less that of the
model as it is. It is where they disagree that a grid is worth looking at: high R2 promises no effect.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from contrans_tl.diagnostics.scores import Diagnosis, Scores
from contrans_tl.diagnostics.scores import layers as layer_labels
from contrans_tl.evaluation.arms import carried
from contrans_tl.evaluation.subjects import SteeredAt
from contrans_tl.evaluation.tasks import Split, Task, measured
from contrans_tl.models import HookedModel, identify
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import LayerMaps, Weighting


@dataclass(frozen=True, eq=False, kw_only=True)
class Grids(Diagnosis):
    """Axes: measure ("R2", "coverage" and, where asked for, "cosine to native", "effect"), source_layer, target_layer."""

    base: float | None = None
    """The task's metric without a transplant, which effects are counted from."""
    metric: str = ""

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The best pairs by the last of the measures."""
        last = self.scores.at(measure=self.scores.axes["measure"][-1])
        found = last.top(k, by="value")
        return [(label.replace(" ", " -> "), value) for label, value in found]

    def __str__(self) -> str:
        rows = [f"  {label:<12} {value:+.3g}" for label, value in self.top(6)]
        what = self.scores.axes["measure"][-1]
        return "\n".join([f"Grids: {self.about}; the highest by {what}", *rows, *(f"  {note}" for note in self.notes)])


def grids(
    maps: LayerMaps,
    concept: ConceptVector,
    *,
    native: ConceptVector | None = None,
    task: Task | None = None,
    target: HookedModel | None = None,
    strength: float = 1.0,
    split: Split = "select",
    weighting: Weighting = "concept",
) -> Grids:
    """R2, coverage, cosine to native and, with a task, the effect of every pair of layers.

    Args:
        native: the target's own vector; layers it does not have are NaN.
        task: measure every carried vector, at `strength` and all positions, on a split of it: a run of the blocks above the
            target layer for every cell. The select split, unless layers are not to be chosen by it.
        target: the model to measure in, with a task.
        weighting: as in `reformulate`.

    Raises:
        ValueError: concepts or a target that do not belong to the maps, a task without a target or prompts, unknown weighting.
    """
    if (task is None) != (target is None):
        raise ValueError("expected task= and target= together: an effect is measured by a task, in the model that is steered.")
    if task is not None and not task.prompts(split):
        raise ValueError(f"{task.name} has no prompts in the split {split!r}.")
    if weighting not in ("concept", "uniform"):
        raise ValueError(f"expected weighting 'concept' or 'uniform'; got {weighting!r}.")
    for home in (None if native is None else native.model, None if target is None else identify(target)):
        if home is not None and not home.same_space(maps.target.model):
            raise ValueError(f"these maps end in {maps.target.model}; got a native concept or a target of {home}.")
    concept = concept.only(*maps.source.layers)
    covered = maps.coverage(concept)
    used = maps.reweighted(concept) if weighting == "concept" else maps
    moved = carried(used, concept)
    sources, targets = maps.source.layers, maps.target.layers
    shown: dict[str, Float[Tensor, "source_layer target_layer"]] = {
        "R2": maps.r2,
        "coverage": covered[:, None].expand(-1, len(targets)),
    }
    if native is not None:
        shown["cosine to native"] = _by_pair(
            sources, targets, {pair: _cosine(vector, native, pair[1]) for pair, vector in moved.items()}
        )
    base, metric = None, ""
    if task is not None and target is not None:
        base, effects = _effects(task, target, moved, strength, split)
        shown["effect"], metric = _by_pair(sources, targets, effects), task.metric
    axes = {"measure": tuple(shown), "source_layer": layer_labels(sources), "target_layer": layer_labels(targets)}
    notes = (
        () if base is None else (f"effect: {metric} on the {split} split at strength {strength:g}, less {base:.3g} as it is.",)
    )
    return Grids(
        about=f"{concept.name}, {maps.source.model.name} -> {maps.target.model.name}, {maps.method}, {weighting} weighting",
        scores=Scores(torch.stack(list(shown.values())).float(), axes, "share or cosine"),
        base=base,
        metric=metric,
        notes=notes,
    )


def _cosine(vector: ConceptVector, native: ConceptVector, layer: int) -> float:
    if layer not in native.layers:
        return float("nan")
    return float(cosine_similarity(vector.vectors[0].double(), native.at(layer).double(), dim=0))


def _effects(
    task: Task, target: HookedModel, moved: dict[tuple[int, int], ConceptVector], strength: float, split: Split
) -> tuple[float, dict[tuple[int, int], float]]:
    """The metric of the model as it is, and what every carried vector adds to it. The blocks below a layer run once."""
    effects, base = {}, float("nan")
    for layer in track(sorted({t for _, t in moved}), f"{task.name}: layers", len({t for _, t in moved})):
        at = SteeredAt(target, layer)
        base = float(measured(task, at.base, split).metrics[task.metric].mean())
        for pair, vector in moved.items():
            if pair[1] == layer:
                marks = measured(task, at.subject(vector, strength), split)
                effects[pair] = float(marks.metrics[task.metric].mean()) - base
    return base, effects


def _by_pair(
    sources: Sequence[int], targets: Sequence[int], cells: dict[tuple[int, int], float]
) -> Float[Tensor, "source_layer target_layer"]:
    return torch.tensor([[cells[s, t] for t in targets] for s in sources])
