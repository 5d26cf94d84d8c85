"""Plots: reports -> figures (extra `plots`). Nothing else in the library needs them.

    arms_figure(reports).savefig("arms.png")              {concept: TransferReport} of one target, from `evaluate`
    differences_figure(reports)
    sweep_figure(report)                                  how strength and layers were chosen
    steerability_figure(report)
    grid_figure(maps, concept)                            every pair of layers
    quality_figure(assess(maps, (9, 18), concept=concept))
    learning_curve_figure(learning_curve(maps, (9, 18)))
    splice_figure(splice(source, target, maps, texts, layers=[(9, 18)]))
    writers_figure(writers(model, concept, pairs, layer=9))           who puts the concept into the stream
    readers_figure(readers(model, concept, prompts, layer=9))         who takes notice of it
    patterns_figure(pattern_changes(model, concept, prompts, layer=9))
    paths_figure(patch_paths(model, concept, questions, layer=9))     through which head it acts
    projections_figure, survival_figure, separability_figure, readout_figure, grids_figure, probes_figure
                                                          of the reports of `diagnostics`
    attribution_figure(attribute(model, concept, questions, layer=9)), agreement_figure(of the same)
    patching_figure(patch(model, concept, questions, layer=9))
    strengths_figure(sweep(model, concept, questions))
    acting_figure(survivals, attributions)                where several concepts act in one target
    figure_of(report)                                     of any report of `diagnostics`

Things are told apart by their place, marker and line first and by colour second, and maps of colour grow darker in one
direction, so that the figures read in grey and by colour-blind eyes.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from contrans_tl.diagnostics import (
    Attribution,
    Diagnosis,
    Grids,
    HeadProbes,
    Patching,
    PathEffects,
    PatternChanges,
    Projections,
    Readers,
    Readout,
    Separability,
    Survival,
    Sweep,
    Writers,
)
from contrans_tl.plots.acting import acting_figure
from contrans_tl.plots.attribution import agreement_figure, attribution_figure, patching_figure, strengths_figure
from contrans_tl.plots.evaluation import arms_figure, differences_figure, steerability_figure, sweep_figure
from contrans_tl.plots.heads import paths_figure, patterns_figure, readers_figure, writers_figure
from contrans_tl.plots.layers import (
    grids_figure,
    projections_figure,
    readout_figure,
    separability_figure,
    survival_figure,
)
from contrans_tl.plots.maps import grid_figure, learning_curve_figure, quality_figure, splice_figure
from contrans_tl.plots.probes import probes_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURES: dict[type[Diagnosis], Callable[..., Any]] = {
    Attribution: attribution_figure,
    Grids: grids_figure,
    HeadProbes: probes_figure,
    Patching: patching_figure,
    PathEffects: paths_figure,
    PatternChanges: patterns_figure,
    Projections: projections_figure,
    Readers: readers_figure,
    Readout: readout_figure,
    Separability: separability_figure,
    Survival: survival_figure,
    Sweep: strengths_figure,
    Writers: writers_figure,
}


def figure_of(report: Diagnosis) -> "Figure":
    """The figure of any report of `diagnostics`. ValueError for anything else, which has a function of its own here."""
    if type(report) not in _FIGURES:
        raise ValueError(f"expected a report of diagnostics; got {type(report).__name__}. The other figures are by name here.")
    return _FIGURES[type(report)](report)


__all__ = [
    "acting_figure",
    "agreement_figure",
    "arms_figure",
    "attribution_figure",
    "differences_figure",
    "figure_of",
    "grid_figure",
    "grids_figure",
    "learning_curve_figure",
    "patching_figure",
    "paths_figure",
    "patterns_figure",
    "probes_figure",
    "projections_figure",
    "quality_figure",
    "readers_figure",
    "readout_figure",
    "separability_figure",
    "splice_figure",
    "steerability_figure",
    "strengths_figure",
    "survival_figure",
    "sweep_figure",
    "writers_figure",
]
