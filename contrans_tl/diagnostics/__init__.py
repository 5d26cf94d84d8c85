"""Diagnostics: where a concept is, who writes and who reads it, and what a transplant changes on the way to the logits.

Each is a function from models, concepts and prompts to a frozen report: `.scores` with named axes, `.top(k)`,
`.to_dataframe()`, a short printed form, and a figure in `plots`. Each takes a model and a concept of that model, so that the
source with its vector, the target with its own and the target with the carried one can be laid side by side.
"""

from contrans_tl.diagnostics.attribution import Attribution, attribute
from contrans_tl.diagnostics.grids import Grids, grids
from contrans_tl.diagnostics.layers import Projections, Survival, projections, survival
from contrans_tl.diagnostics.metrics import Metric
from contrans_tl.diagnostics.patching import Patching, patch
from contrans_tl.diagnostics.paths import PathEffects, patch_paths
from contrans_tl.diagnostics.probes import HeadProbes, probe_heads
from contrans_tl.diagnostics.reading import PatternChanges, Readers, pattern_changes, readers
from contrans_tl.diagnostics.readout import Readout, readout
from contrans_tl.diagnostics.scores import Diagnosis, Scores
from contrans_tl.diagnostics.separability import Separability, separability
from contrans_tl.diagnostics.sweeps import Sweep, sweep
from contrans_tl.diagnostics.whole import Examination, diagnose
from contrans_tl.diagnostics.writing import Writers, writers

__all__ = [
    "Attribution",
    "Diagnosis",
    "Examination",
    "Grids",
    "HeadProbes",
    "Metric",
    "Patching",
    "PathEffects",
    "PatternChanges",
    "Projections",
    "Readers",
    "Readout",
    "Scores",
    "Separability",
    "Survival",
    "Sweep",
    "Writers",
    "attribute",
    "diagnose",
    "grids",
    "patch",
    "patch_paths",
    "pattern_changes",
    "probe_heads",
    "projections",
    "readers",
    "readout",
    "separability",
    "survival",
    "sweep",
    "writers",
]
