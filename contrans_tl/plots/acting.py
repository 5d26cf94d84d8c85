"""A figure of where carried concepts act in one target: layers and heads, all concepts side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from contrans_tl.diagnostics import Attribution, Survival
from contrans_tl.plots.canvas import GRID, heat_map, new_figure, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = 12
"""Heads that are shown: those of the largest share in any concept."""
_LINES = (("#0072b2", "o", "-"), ("#777777", "D", "--"), ("#d55e00", "X", ":"), ("#56b4e9", "s", "-."), ("#111111", "v", "-"))


def acting_figure(survivals: Mapping[str, Survival], attributions: Mapping[str, Attribution]) -> "Figure":
    """By layer, how near what is left of each injected concept is to the target's own vector; by head, the share of the effect
    that gradients attribute to it. Dotted: the highest of the random vectors of any concept."""
    panels = 1 + bool(attributions)
    figure = new_figure(width=4.2 + 5.4 * bool(attributions), height=max(2.8, 1.5 + 0.3 * len(survivals)))
    axes = figure.subplots(1, panels, squeeze=False, width_ratios=[1.0, 1.5][:panels])[0]
    names: dict[str, None] = {}
    for k, (concept, found) in enumerate(survivals.items()):
        colour, marker, line = _LINES[k % len(_LINES)]
        kept, layers = found.scores.at(vector="concept", measure="cosine to native"), found.scores.axes["layer"]
        names |= dict.fromkeys(layers)
        inside = colour if k < len(_LINES) else "white"
        style = {"color": colour, "marker": marker, "linestyle": line, "markerfacecolor": inside}
        axes[0].plot([int(name[1:]) for name in layers], kept.values, label=written(concept, 16), markersize=4, **style)
    highest = max(
        float(found.high.at(vector="random", measure="cosine to native").values.max()) for found in survivals.values()
    )
    axes[0].axhline(highest, color="#111111", linestyle=":", linewidth=0.8)
    axes[0].set_xticks(sorted(int(name[1:]) for name in names), sorted(names, key=lambda name: int(name[1:])), fontsize=7)
    axes[0].set_ylim(min(-0.1, axes[0].get_ylim()[0]), 1.04)
    axes[0].tick_params(labelsize=7)
    axes[0].grid(**GRID)
    axes[0].set_xlabel("after layer", fontsize=8)
    axes[0].set_ylabel("cosine to the target's own vector", fontsize=8)
    axes[0].set_title("what is left of the injection", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside lower left", ncols=4)
    if attributions:
        shares = torch.stack([found.heads.values / abs(found.effect) for found in attributions.values()])
        some = next(iter(attributions.values())).heads
        foremost = shares.abs().amax(0).flatten().argsort(descending=True)[:HEADS].sort().values
        labels = [some.label(int(place)) for place in foremost]
        concepts = [written(concept, 16) for concept in attributions]
        heat_map(axes[1], shares.flatten(1)[:, foremost].numpy(), concepts, labels, signed=True, unit="share of the effect")
        axes[1].set_title("heads that carry it, to first order", fontsize=9)
        axes[1].set_xlabel("head", fontsize=8)
    return figure
