"""Figures of maps: which layers fit, what one map is worth, how it grows with rows, what it does to a forward pass."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from contrans_tl.learning import LearningCurve
from contrans_tl.plots.canvas import GRID, NUMBERED, cell_size, heat_map, new_figure
from contrans_tl.quality import MapQuality
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import LayerMaps
from contrans_tl.splicing import ARMS, SpliceReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METHODS = (("#0072b2", "o", "-"), ("#777777", "D", "--"), ("#d55e00", "x", ":"), ("#56b4e9", "s", "-."), ("#111111", "v", "-"))
"""Colour, marker and line of a learning curve's methods, in order."""
_SPLICED = {"clean": ("#111111", "*"), "spliced": ("#0072b2", "o"), "shuffled": ("#d55e00", "x"), "mean": ("#777777", "D")}
_LOWEST = -1.0
"""R2 below it is drawn at the edge, with its value: near n = d it can be -100."""


def grid_figure(maps: LayerMaps, concept: ConceptVector | None = None) -> "Figure":
    """Held-out R2 and CKA of every pair of layers and, for a concept, what each source layer's rows do not show of it."""
    panels = {"held-out R²": maps.r2, "linear CKA": maps.cka}
    layers = (maps.source.layers, maps.target.layers)
    widths = [1.0, 1.0] + ([0.6] if concept is not None else [])
    figure, axes = grid_axes(len(layers[0]), len(layers[1]), widths)
    for axis, (name, grid) in zip(axes, panels.items(), strict=False):
        # Shades span 0 to 1, not the grid's own range: layers that all fit alike shall look alike.
        heat_map(axis, grid.numpy(), *layers, span=(0.0, 1.0))
        axis.set_xlabel("target layer", fontsize=8)
        axis.set_title(name, fontsize=9)
    axes[0].set_ylabel("source layer", fontsize=8)
    if concept is not None:
        not_shown(axes[-1], maps.coverage(concept).tolist())
        axes[-1].set_title(f"{concept.name}: share not shown", fontsize=9)
    figure.suptitle(f"{maps.source.model.name} → {maps.target.model.name}: {maps.method}, {len(maps.source)} rows", fontsize=10)
    return figure


def grid_axes(rows: int, columns: int, widths: Sequence[float]) -> "tuple[Figure, Sequence[Axes]]":
    """Panels side by side for maps of colour of so many rows and columns, one of width 1 or some share of it."""
    width, height = cell_size(rows, columns)
    if max(rows, columns) > NUMBERED:
        width = min(0.16, 6.0 / columns)
    figure = new_figure(width=3.0 + width * columns * sum(widths), height=1.5 + height * rows)
    return figure, figure.subplots(1, len(widths), sharey=True, width_ratios=widths, squeeze=False)[0]


def not_shown(axis: "Axes", coverage: Sequence[float]) -> None:
    """What each source layer's rows do not show of a concept."""
    axis.plot([1 - share for share in coverage], range(len(coverage)), marker="o", color="#0072b2", linestyle="none")
    axis.set_xscale("log")
    axis.set_xlabel("1 − coverage", fontsize=8)
    axis.tick_params(axis="x", which="both", labelsize=7)
    axis.grid(**GRID)


def quality_figure(quality: MapQuality) -> "Figure":
    """What one map is worth: its scores beside their nulls, R2 of every dimension, its spectrum and what it does to a
    concept."""
    concept, cka = quality.concept, quality.cka
    figure = new_figure(width=11.0, height=2.9)
    scores, dimensions, spectrum, *more = figure.subplots(1, 4 if concept else 3, squeeze=False)[0]
    chance = 1 / quality.candidates
    _dots(
        scores,
        {
            "R²": (quality.r2, 0.0),
            "R², median dimension": (quality.r2_median, 0.0),
            "centred cosine": (quality.cosine, 0.0),
            f"retrieval of {quality.candidates}": (quality.retrieval, chance),
            "retrieval back": (quality.retrieval_back, chance),
            "linear CKA": (cka.value, cka.null_95),  # chance: 95% of permutations are below
            "debiased CKA": (cka.debiased, 0.0),
            "cycle R²": (quality.cycle_r2, 0.0),
        },
        second="x",
    )
    scores.set_xlabel("held-out score (x: chance)", fontsize=8)

    known = quality.r2_by_dimension[~quality.r2_by_dimension.isnan()].clamp_min(_LOWEST)
    dimensions.hist(known, bins=30, color="#56b4e9", edgecolor="white", linewidth=0.4)
    dimensions.axvline(max(quality.r2_median, _LOWEST), color="#111111", linewidth=1.2, label="median")
    dimensions.axvline(max(quality.r2, _LOWEST), color="#d55e00", linewidth=1.2, linestyle="--", label="all together")
    dimensions.set_xlabel("held-out R² of a target dimension", fontsize=8)
    dimensions.set_ylabel("dimensions", fontsize=8)
    dimensions.legend(fontsize=7, frameon=False)

    values = quality.spectrum[quality.spectrum > 0]
    spectrum.plot(range(1, len(values) + 1), values, color="#0072b2", linewidth=1.5)
    spectrum.axvline(quality.effective_rank, color="#111111", linewidth=1.0, linestyle=":")
    spectrum.annotate(
        f"effective rank {quality.effective_rank:.0f}",
        (quality.effective_rank, 0.96),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        xytext=(4, -6),
        fontsize=7,
    )
    spectrum.set_yscale("log")
    spectrum.set_xlabel("index", fontsize=8)
    spectrum.set_ylabel("singular value of W", fontsize=8)
    spectrum.grid(color="#dddddd", linewidth=0.6)

    if concept:
        marks: dict[str, tuple[float, float | None]] = {
            "coverage": (concept.coverage, None),
            "energy in the span": (concept.energy, None),
            "cycle cosine": (concept.cycle, None),
        }
        if concept.cosine_to_native is not None:
            marks["cosine to native"] = (concept.cosine_to_native, concept.ceiling)
        _dots(more[0], marks, second="|")
        more[0].set_xlabel("share or cosine" + (" (|: ceiling)" if concept.ceiling is not None else ""), fontsize=8)
        more[0].set_title(f"{concept.name}\ncone {concept.cone:.1f}°, norm × {concept.norm_ratio:.2f}", fontsize=9)
    s, t = quality.layers
    sinks = f"; {quality.sink_rows} sink rows left out" if quality.sink_rows else ""
    figure.suptitle(
        f"{quality.source} $L${s} → {quality.target} $L${t}: {quality.method}{', weighted' if quality.weighted else ''}, "
        f"{quality.rows} rows of {quality.sentences} sentences{sinks}",
        fontsize=10,
    )
    return figure


def learning_curve_figure(curve: LearningCurve) -> "Figure":
    """Held-out R2 and, for a concept, the carried vector against the number of rows, n = d marked; bands span the draws."""
    figure = new_figure(width=9.0 if curve.cosine is not None else 5.0, height=3.2)
    left, *right = figure.subplots(1, 1 if curve.cosine is None else 2, squeeze=False)[0]
    for i, method in enumerate(curve.methods):
        colour, marker, line = _METHODS[i % len(_METHODS)]
        style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.4}
        _band(left, curve.sizes, curve.r2[i].clamp_min(_LOWEST), style, method)
        for size, mean in zip(curve.sizes, curve.r2[i].mean(1).tolist(), strict=True):
            if mean < _LOWEST:
                left.annotate(f"{mean:.0f}", (size, _LOWEST), textcoords="offset points", xytext=(5, 3), fontsize=7)
        if curve.cosine is not None:
            _band(right[0], curve.sizes, curve.cosine[i], style, f"{method}, to that of all {curve.rows} rows")
        if curve.cosine_to_native is not None:
            open_style = style | {"markerfacecolor": "white", "linewidth": 0.9}
            _band(right[0], curve.sizes, curve.cosine_to_native[i], open_style, f"{method}, to native")
    for axis, name in zip([left, *right], ("held-out R²", "cosine of the carried concept"), strict=False):
        axis.axvline(curve.d_source, color="#111111", linewidth=0.9, linestyle=(0, (1, 2)))
        axis.annotate(
            f"n = d = {curve.d_source}",
            (curve.d_source, 1.0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            fontsize=7,
        )
        axis.set_xscale("log")
        axis.set_xlabel("rows fitted on", fontsize=8)
        axis.set_ylabel(name, fontsize=8)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.legend(fontsize=7, frameon=False, loc="lower right")
    s, t = curve.layers
    figure.suptitle(f"{curve.source} $L${s} → {curve.target} $L${t}: bands span {curve.r2.shape[-1]} draws", fontsize=10)
    return figure


def splice_figure(report: SpliceReport) -> "Figure":
    """Cross-entropy of every arm and what of it is recovered, with 95% bootstrap intervals over texts."""
    names = [f"$L${one.layers[0]} → $L${one.layers[1]}" for one in report.splices]
    figure = new_figure(width=9.0, height=1.5 + 0.5 * len(names))
    loss, recovered = figure.subplots(1, 2, sharey=True)
    for row, one in enumerate(report.splices):
        for axis, estimates in ((loss, one.loss), (recovered, one.recovered)):
            for k, arm in enumerate(ARMS):
                if arm not in estimates or (axis is recovered and arm == "mean"):
                    continue
                colour, marker = _SPLICED[arm]
                height, e = row + 0.15 * (k - 1.5), estimates[arm]
                axis.plot([e.low, e.high], [height, height], color=colour, linewidth=1.5, solid_capstyle="butt")
                label = arm if row == 0 and axis is loss else None
                axis.plot(e.value, height, marker=marker, color=colour, markersize=6, linestyle="none", label=label)
    for end in (0, 1):
        recovered.axvline(end, color="#111111", linewidth=0.8, linestyle=(0, (1, 2)))
    loss.set_yticks(range(len(names)), names)
    loss.invert_yaxis()
    loss.set_xlim(left=0)
    loss.set_xlabel("cross-entropy (nats/token)", fontsize=8)
    recovered.set_xlabel("cross-entropy recovered (0: mean ablation, 1: clean)", fontsize=8)
    for axis in (loss, recovered):
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    figure.legend(fontsize=7, frameon=False, loc="outside lower center", ncols=len(ARMS))
    figure.suptitle(
        f"{report.source} spliced into {report.target}: {report.texts} texts, {report.replaced:.0%} of tokens replaced, "
        "95% bootstrap intervals",
        fontsize=10,
    )
    return figure


def _dots(axis: "Axes", marks: Mapping[str, tuple[float, float | None]], second: str) -> None:
    """A row for each name, its value as a dot and what it is compared with as another mark."""
    for row, (value, other) in enumerate(marks.values()):
        # A score below 0 points out of the figure: how far below does not matter.
        axis.plot(max(value, -0.03), row, marker="<" if value < 0 else "o", color="#0072b2", markersize=6, linestyle="none")
        if other is not None:
            axis.plot(other, row, marker=second, color="#d55e00", markersize=7, linestyle="none")
    axis.set_yticks(range(len(marks)), list(marks), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(-0.06, 1.06)
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)


def _band(axis: "Axes", sizes: Sequence[int], values: Float[Tensor, "size draw"], style: dict[str, Any], label: str) -> None:
    """Means over draws, and the band between the lowest and the highest."""
    axis.fill_between(sizes, values.amin(1), values.amax(1), color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(sizes, values.mean(1), label=label, **style)
