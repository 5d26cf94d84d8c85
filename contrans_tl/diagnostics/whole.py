"""Whole: every diagnostic of one concept in one model, as `contrans diagnose` runs them.

    found = diagnose(target, moved, pairs, layer=3, strength=2.0, texts=neutral, native=refine(target, pairs))
    print(found)
    found.reports["writers"].top(5)

Where it is: `separability`, `probes`, `readout`. Who writes it there: `writers`. What becomes of it: `survival`, `projections`.
Who reads it: `readers`, `patterns`. What carries its effect: `attribution`, `patching`, `paths`. An architecture that one of
them cannot take apart is named in `refused`, with the reason; the others run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contrans_tl.data import ContrastPairs
from contrans_tl.diagnostics.attribution import attribute
from contrans_tl.diagnostics.layers import projections, survival
from contrans_tl.diagnostics.patching import patch
from contrans_tl.diagnostics.paths import patch_paths
from contrans_tl.diagnostics.probes import probe_heads
from contrans_tl.diagnostics.reading import pattern_changes, readers
from contrans_tl.diagnostics.readout import readout
from contrans_tl.diagnostics.runs import check_strength
from contrans_tl.diagnostics.scores import Diagnosis
from contrans_tl.diagnostics.separability import separability
from contrans_tl.diagnostics.writing import writers
from contrans_tl.models import HookedModel, check_layers, check_ready, identify
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import check_home, injections

ASKED = 48
"""Test questions that the causal diagnostics ask; each is asked once for every place that is patched."""
PATHS = 6
"""Heads that paths are patched into: those that read the concept most."""


@dataclass(frozen=True, eq=False)
class Examination:
    """What every diagnostic found."""

    about: str
    reports: Mapping[str, Diagnosis]
    refused: Mapping[str, str]
    """Diagnostic -> why it could not be done here."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as diagnosis.json holds them."""
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        return {"about": self.about, "reports": reports, "refused": dict(self.refused)}

    def __str__(self) -> str:
        refused = [f"{name}: not done. {why}" for name, why in self.refused.items()]
        return "\n\n".join([self.about, *map(str, self.reports.values()), *refused])


def diagnose(
    model: HookedModel,
    concept: ConceptVector,
    pairs: ContrastPairs,
    *,
    layer: int,
    strength: float = 1.0,
    texts: Sequence[str] | None = None,
    native: ConceptVector | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Examination:
    """Every diagnostic of a concept at one layer of a model.

    Args:
        pairs: the concept's; their test questions, `ASKED` of them, are what effects are measured on.
        layer: where the concept is looked at and injected.
        texts: that survival is measured on; the negative prompts by default.
        native: the model's own vector, to compare a carried one with.

    Raises:
        ValueError: a concept of another model, a layer that it or the model does not have, a strength of 0.
    """
    check_ready(model)
    here = identify(model)
    for vector in (concept, *([native] if native else [])):
        check_home(vector, here)
    check_layers([layer], model.cfg.n_layers, str(model.cfg.model_name))
    at = concept.only(layer)
    strength = check_strength(strength)
    some: dict[str, Any] = {"batch_size": batch_size}
    placed: dict[str, Any] = {"layer": layer, "strength": strength}
    texts = list(texts or pairs.negative)[:ASKED]
    questions = list(pairs.test[:ASKED])
    carried = "refined" in concept.provenance
    deepest = layer == model.cfg.n_layers - 1
    todo: dict[str, Callable[[], Diagnosis]] = {
        "separability": lambda: separability(
            model, pairs, concept=concept if carried else None, layers=concept.layers, seed=seed, **some
        ),
        "probes": lambda: probe_heads(model, pairs, seed=seed, **some),
        "readout": lambda: readout(model, at),
        "writers": lambda: writers(model, at, pairs, layer=layer, seed=seed, **some),
        "survival": lambda: survival(model, at, texts, native=native, seed=seed, **placed, **some),
        "projections": lambda: projections(
            model, native or concept, [pairs.negative[0]], injected=injections(at, strength=strength), seed=seed, **some
        ),
    }
    if not deepest:
        todo |= {
            "readers": lambda: readers(model, at, texts, seed=seed, **placed, **some),
            "patterns": lambda: pattern_changes(model, at, texts, seed=seed, **placed),
        }
    if questions:
        todo |= {
            "attribution": lambda: attribute(model, concept, questions, **placed, **some),
            "patching": lambda: patch(model, at, questions, **placed, **some),
        }
        if not deepest:
            todo["paths"] = lambda: patch_paths(model, at, questions, at=_foremost(reports.get("readers")), seed=seed, **placed)
    reports: dict[str, Diagnosis] = {}
    refused: dict[str, str] = {}
    for name in track(todo, f"{concept.name} in {here.name}", len(todo)):
        try:
            reports[name] = todo[name]()
        except ValueError as error:
            refused[name] = str(error)
    return Examination(f"{concept.name} in {here.name} at layer {layer}, × {strength:g}", reports, refused)


def _foremost(found: Diagnosis | None) -> list[tuple[int, int]]:
    """The heads that read most, by any of q, k and v. ValueError where that could not be told."""
    if found is None:
        raise ValueError("which heads read the concept could not be told, so none are chosen; `patch_paths` takes any.")
    best = found.scores.values.nan_to_num(0.0).abs().amax(list(found.scores.axes).index("by"))
    layers, heads = (found.scores.axes[axis] for axis in ("layer", "head"))
    order = best.flatten().argsort(descending=True)[:PATHS].tolist()
    return sorted((int(layers[i // len(heads)][1:]), i % len(heads)) for i in order)
