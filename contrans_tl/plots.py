"""Plots: reports -> figures (extra `plots`). Nothing else in the library needs them.

    arms_figure(reports).savefig("arms.png")

`reports` is {concept: TransferReport} of one target. Arms are told apart by their place and marker first and by colour second,
so that the figures read in grey and by colour-blind eyes.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from contrans_tl.evaluation import TransferReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = {
    "base": ("#111111", "|"),
    "native": ("#111111", "*"),
    "transplanted": ("#0072b2", "o"),
    "uniform": ("#56b4e9", "s"),
    "random_weighting": ("#56b4e9", "v"),
    "paper": ("#999999", "D"),
}
"""Colour and marker, in the order in which arms are drawn; controls follow."""
_CONTROL = ("#d55e00", "x")


def arms_figure(reports: Mapping[str, TransferReport]) -> "Figure":
    """Every arm of every concept on the test split, with its interval."""
    first = next(iter(reports.values()))
    arms = [arm for arm in _STYLE if arm in first.arms] + [arm for arm in first.arms if arm not in _STYLE]
    figure = _figure(width=11.0, height=0.9 + 0.26 * len(arms))
    axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axis, (name, report) in zip(axes, reports.items(), strict=True):
        for row, arm in enumerate(arms):
            if arm not in report.arms:
                continue
            estimate = report.arms[arm][report.metric]
            colour, marker = _STYLE.get(arm, _CONTROL)
            axis.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=1.5, solid_capstyle="butt")
            axis.plot(estimate.value, row, marker=marker, color=colour, markersize=7, linestyle="none")
        axis.set_title(f"{name}\n$L${report.layer_source} → $L${report.layer_target}, strength {report.strength:g}", fontsize=9)
        axis.set_xlim(-0.06, 1.06)
        axis.set_xticks([0, 0.5, 1])
        axis.set_xlabel(report.metric.replace("_", " "), fontsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes[0].set_yticks(range(len(arms)), [arm.replace("_", " ") for arm in arms])
    axes[0].invert_yaxis()
    figure.suptitle(f"{first.target}: test split, 95% bootstrap intervals", fontsize=10)
    return figure


def cost_figure(reports: Mapping[str, TransferReport]) -> "Figure":
    """Effect against the increase of neutral-text loss over strengths, on the select split, where strength was chosen."""
    figure = _figure(width=11.0, height=2.6)
    axes = figure.subplots(1, len(reports), sharey=True, squeeze=False)[0]
    for axis, (name, report) in zip(axes, reports.items(), strict=True):
        chosen = (report.layer_source, report.layer_target)
        points = [
            point
            for point in sorted(report.sweep, key=lambda point: point["strength"])
            if (point["layer_source"], point["layer_target"]) == chosen and "loss_increase" in point
        ]
        axis.plot([p["loss_increase"] for p in points], [p["effect"] for p in points], "-o", color="#0072b2", markersize=4)
        for point in points:
            taken = point["strength"] == report.strength
            axis.annotate(
                f"{point['strength']:g}",
                (point["loss_increase"], point["effect"]),
                textcoords="offset points",
                xytext=(3, -9),
                fontsize=7,
                fontweight="bold" if taken else "normal",
            )
        axis.set_title(name, fontsize=9)
        axis.set_ylim(-0.06, 1.06)
        axis.set_xlabel("loss increase (nats/token)", fontsize=8)
        axis.grid(color="#dddddd", linewidth=0.6)
    axes[0].set_ylabel("effect", fontsize=8)
    figure.suptitle("select split: effect against cost, labelled by strength (bold: chosen)", fontsize=10)
    return figure


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'contrans-tl[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)
