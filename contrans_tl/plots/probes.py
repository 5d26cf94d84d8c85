"""Figures of probes: which heads tell a concept apart."""

from typing import TYPE_CHECKING, Any

from contrans_tl.diagnostics.probes import HeadProbes
from contrans_tl.plots.canvas import GRID, cell_size, heat_map, new_figure, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def probes_figure(found: HeadProbes) -> "Figure":
    """Cross-validated accuracy of every head, and all in order beside what the best of them reaches on permuted labels."""
    layers, heads = found.scores.axes["layer"], found.scores.axes["head"]
    width, height = cell_size(len(layers), len(heads))
    figure = new_figure(width=4.6 + max(1.5, width * len(heads)), height=max(2.8, 1.5 + height * len(layers)))
    places, order = figure.subplots(1, 2, width_ratios=[max(1.5, width * len(heads)), 2.6])
    heat_map(places, found.scores.values.numpy(), layers, [head[1:] for head in heads], span=(0.5, 1.0), unit="accuracy")
    places.invert_yaxis()
    places.set_xlabel("head", fontsize=8)
    places.set_ylabel("layer", fontsize=8)
    places.set_title("accuracy (white: at most chance)", fontsize=9)

    ranked = found.scores.values.flatten().sort(descending=True).values.tolist()
    above = sum(value > found.threshold for value in ranked)
    many = len(ranked) > 60
    style: dict[str, Any] = {"markersize": 3 if many else 4, "linestyle": "none"}
    order.plot(range(1, above + 1), ranked[:above], color="#0072b2", marker="o", label=f"{above} above", **style)
    others: dict[str, Any] = {"color": "#777777", "marker": "x", "label": f"{len(ranked) - above} not"}
    order.plot(range(above + 1, len(ranked) + 1), ranked[above:], **others, **style)
    order.axhline(found.threshold, color="#d55e00", linewidth=1.2, linestyle="--", label="best head, 95% of permutations")
    order.axhline(0.5, color="#111111", linewidth=0.8, linestyle=(0, (1, 2)))
    order.set_ylim(min(0.4, ranked[-1] - 0.02), 1.02)
    order.set_xlabel("head, by accuracy", fontsize=8)
    order.set_ylabel("accuracy (dotted: chance)", fontsize=8)
    order.tick_params(labelsize=7)
    order.grid(**GRID)
    order.legend(fontsize=7, frameon=False, loc="lower left")
    figure.suptitle(written(found.about, 120), fontsize=9)
    return figure
