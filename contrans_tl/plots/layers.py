"""Figures by layer: projections, survival, separability, readout, grids."""

from typing import TYPE_CHECKING, Any

import numpy as np

from contrans_tl.diagnostics.grids import Grids
from contrans_tl.diagnostics.layers import Projections, Survival
from contrans_tl.diagnostics.readout import Readout
from contrans_tl.diagnostics.separability import MEASURES, Separability
from contrans_tl.plots.canvas import GRID, band, cell_size, colour_bar, heat_map, new_figure, ticks, written
from contrans_tl.plots.maps import grid_axes, not_shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS: dict[str, Any] = {"color": "#0072b2", "marker": "o", "linestyle": "-"}
_CLEAN: dict[str, Any] = {"color": "#111111", "marker": "s", "linestyle": "--"}
_NULL: dict[str, Any] = {"color": "#d55e00", "marker": "x", "linestyle": ":"}
_MOST_TOKENS = 6
"""Of a readout, drawn for each way."""


def projections_figure(found: Projections) -> "Figure":
    """Projection on the concept at every layer and position, and, with an injection, what it changed; beside them the last
    position by layer, with 95% intervals over prompts."""
    layers, positions = (found.scores.axes[axis] for axis in ("layer", "position"))
    maps = {"as it is": found.scores.at(run="clean").values.numpy()}
    if "transplanted" in found.scores.axes["run"]:
        maps["change under injection"] = found.change.values.numpy()
    width, height = cell_size(len(layers), len(positions))
    figure = new_figure(width=4.2 + (0.9 + width * len(positions)) * len(maps), height=max(2.8, 1.7 + height * len(layers)))
    widths = [max(1.5, width * len(positions))] * len(maps) + [2.6]
    *panels, last = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for axis, (name, values) in zip(panels, maps.items(), strict=True):
        digits = 0 if np.nanmax(np.abs(values)) >= 10 else 1
        names = [written(label, 16) for label in positions]
        heat_map(axis, values, layers, names, signed=True, unit=found.scores.unit, digits=digits)
        axis.invert_yaxis()  # as the stream runs, upwards
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("token" if found.prompts == 1 else "position, from the last token", fontsize=8)
    panels[0].set_ylabel("after layer", fontsize=8)
    for k, (run, style) in enumerate(zip(found.scores.axes["run"], (_CLEAN, _OURS), strict=False)):
        values, low, high = (x.values[k, :, -1].tolist() for x in (found.scores, found.low, found.high))
        band(last, values, low, high, style, run)
    _by_layer(last, layers)
    last.axhline(0.0, color="#111111", linewidth=0.8)
    last.set_ylabel(f"projection ({found.scores.unit})", fontsize=8)
    last.set_title("at the last token" + (", 95% intervals" if found.prompts > 1 else ""), fontsize=9)
    last.legend(fontsize=7, frameon=False)
    figure.suptitle(written(found.about, 140), fontsize=9)
    return figure


def survival_figure(found: Survival) -> "Figure":
    """Size of what an injection has become and its cosines, by layer, beside vectors drawn at random; bands are 95% over texts
    and, of the random ones, from the lowest to the highest."""
    measures, layers = found.scores.axes["measure"], found.scores.axes["layer"]
    figure = new_figure(width=1.0 + 2.5 * len(measures), height=2.9)
    for m, (axis, measure) in enumerate(zip(figure.subplots(1, len(measures)), measures, strict=True)):
        for k, (vector, style) in enumerate(zip(found.scores.axes["vector"], (_OURS, _NULL), strict=True)):
            values, low, high = (x.values[k, m].tolist() for x in (found.scores, found.low, found.high))
            band(axis, values, low, high, style, vector)
        _by_layer(axis, layers)
        axis.set_title({"size": "size (× injected)"}.get(measure, measure), fontsize=9)
        if measure.startswith("cosine"):
            axis.set_ylim(min(-0.1, axis.get_ylim()[0]), 1.06)
            axis.axhline(0.0, color="#111111", linewidth=0.8)
        else:
            axis.set_ylim(bottom=0)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(written(found.about, 120) + "; bands: 95% over texts, range of random vectors", fontsize=9)
    return figure


def separability_figure(found: Separability) -> "Figure":
    """d', AUROC, split-half cosine and norm by layer with 95% intervals; dotted: what 95% of permutations stay below."""
    layers = found.scores.axes["layer"]
    figure = new_figure(width=11.0, height=2.9)
    for m, (axis, measure) in enumerate(zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True)):
        values, low, high, null = (x.values[m].tolist() for x in (found.scores, found.low, found.high, found.null))
        band(axis, values, low, high, _OURS, "pairs")
        if not np.isnan(null).all():
            axis.plot(range(len(layers)), null, label="95% of permutations", markersize=4, linewidth=1.2, **_NULL)
        _by_layer(axis, layers)
        axis.set_title(measure, fontsize=9)
        if measure == "AUROC":
            axis.set_ylim(0.4, 1.03)
        else:
            axis.set_ylim(bottom=min(0.0, *(x for x in low if x == x), *values))
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(f"{written(found.about, 120)}; bands 95%", fontsize=9)
    return figure


def readout_figure(found: Readout) -> "Figure":
    """The tokens that every layer's vector raises and lowers most, the darker the more."""
    layers, k = found.scores.axes["layer"], min(_MOST_TOKENS, found.scores.values.shape[-1])
    figure = new_figure(width=1.0 + 2 * 0.95 * k, height=1.5 + 0.22 * len(layers))
    values = found.scores.values.abs().numpy()
    for way, (axis, name) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("raised", "lowered"), strict=True)):
        image = axis.imshow(values[:, way, :k], cmap="Greys", vmin=0, vmax=1.4 * values.max(), aspect="auto")
        for layer, tokens in enumerate(found.tokens):
            for rank, token in enumerate(tokens[way][:k]):
                dark = values[layer, way, rank] > 0.75 * 1.4 * values.max()
                text = written(token.strip() or repr(token), 12)
                axis.text(rank, layer, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        ticks(axis, layers, [str(i + 1) for i in range(k)])
        axis.set_xlabel("rank", fontsize=8)
        axis.set_title(f"{name} most", fontsize=9)
    figure.axes[0].invert_yaxis()
    figure.axes[0].set_ylabel("vector of layer", fontsize=8)
    colour_bar(image, figure.axes, "change of the logit")
    figure.suptitle(written(found.about, 120), fontsize=9)
    return figure


def grids_figure(found: Grids) -> "Figure":
    """R2, cosine to native and effect of every pair of layers, and what each source layer's rows do not show of the concept."""
    sources, targets = (tuple(label[1:] for label in found.scores.axes[axis]) for axis in ("source_layer", "target_layer"))
    shown = [measure for measure in found.scores.axes["measure"] if measure != "coverage"]
    figure, axes = grid_axes(len(sources), len(targets), [1.0] * len(shown) + [0.6])
    for axis, measure in zip(axes, shown, strict=False):
        signed = measure != "R2"
        span = (-1.0, 1.0) if measure.startswith("cosine") else None if signed else (0.0, 1.0)
        heat_map(axis, found.scores.at(measure=measure).values.numpy(), sources, targets, signed=signed, span=span)
        axis.set_xlabel("target layer", fontsize=8)
        title = f"gain in {found.metric.replace('_', ' ')}" if measure == "effect" else measure
        axis.set_title({"R2": "held-out R²"}.get(measure, written(title, 30)), fontsize=9)
    axes[0].set_ylabel("source layer", fontsize=8)
    not_shown(axes[-1], found.scores.at(measure="coverage").values[:, 0].tolist())
    axes[-1].set_title("share not shown", fontsize=9)
    figure.suptitle(written(found.about, 120), fontsize=9)
    return figure


def _by_layer(axis: "Axes", layers: tuple[str, ...]) -> None:
    step = 1 if len(layers) <= 8 else -(-len(layers) // 8)
    axis.set_xticks(range(0, len(layers), step), layers[::step], fontsize=7)
    axis.set_xlabel("after layer", fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(**GRID)
