"""Figures of an evaluation: every arm with its interval, paired differences, the sweep, steerability."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from contrans_tl.evaluation import ARMS, NULLS, Estimate, TransferReport, frontier
from contrans_tl.plots.canvas import new_figure, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {
    "base": ("#111111", "P"),
    "transplanted": ("#0072b2", "o"),
    "native": ("#111111", "*"),
    "uniform": ("#56b4e9", "s"),
    "random_weighting": ("#56b4e9", "v"),
    "paper": ("#777777", "D"),
}
"""Colour and marker. Base, transplanted and native come first, then the rest, the nulls last."""
_NULL, _OTHER = ("#d55e00", "X"), ("#777777", "^")
_PAIRS = (("#0072b2", "o", "-"), ("#777777", "D", "--"), ("#56b4e9", "s", "-."), ("#111111", "v", ":"))
"""Colour, marker and line of the layer pairs of a sweep, in order."""
_SETTING = {
    "raw": "strength (× carried vector)",
    "native": "strength (× norm of the native vector)",
    "resid": "strength (× mean norm of the residual stream)",
    "kl": "strength, as the KL aimed at (nats/token)",
}
_GRID = {"color": "#dddddd", "linewidth": 0.6}


def arms_figure(reports: Mapping[str, TransferReport]) -> "Figure":
    """Every arm of every concept in one target on the test split, with its 95% interval; null controls on a shaded ground."""
    figure, axes, arms = _rows_of_arms(reports, leave_out=())
    for axis, report in zip(axes, reports.values(), strict=True):
        shown = {arm: values[report.metric] for arm, values in report.arms.items()}
        if "base" in shown:
            axis.axvline(shown["base"].value, color="#111111", linewidth=0.8, linestyle=(0, (1, 2)))
        for row, arm in enumerate(arms):
            if arm in shown:
                _interval(axis, row, shown[arm], *_style(arm))
        _scale(axis, list(shown.values()))
        axis.set_xlabel(_unit(report.metric), fontsize=7)
    _say(figure, f"{_target(reports)}: every arm on the test split, 95% intervals; dotted: base; shaded: null controls")
    return figure


def differences_figure(reports: Mapping[str, TransferReport]) -> "Figure":
    """The transplanted arm less every other, prompt by prompt, with 95% intervals. Drawn hollow: the interval holds 0, the two
    are not told apart."""
    figure, axes, arms = _rows_of_arms(reports, leave_out=("transplanted",))
    for axis, report in zip(axes, reports.values(), strict=True):
        axis.axvline(0.0, color="#111111", linewidth=0.8)
        for row, arm in enumerate(arms):
            if (gap := report.differences.get(arm)) is not None:
                _interval(axis, row, gap, *_style(arm), hollow=gap.low <= 0 <= gap.high)
        axis.margins(x=0.08)
        axis.set_xlabel("gain" if report.metric == "score" else "gain (share)", fontsize=7)
    _say(
        figure,
        f"{_target(reports)}: transplanted − arm, paired by prompt, 95% intervals; right of 0: more; hollow: not told apart",
    )
    return figure


def sweep_figure(report: TransferReport) -> "Figure":
    """Effect on the select split, where layers and strength were chosen, against strength and against what neutral text costs,
    with the frontier that no other setting beats."""
    figure = new_figure(width=10.0, height=2.9)
    by_strength, by_loss, by_kl = figure.subplots(1, 3, sharey=True)
    points = [point for point in report.sweep if "effect" in point]
    pairs = list(dict.fromkeys((int(point["layer_source"]), int(point["layer_target"])) for point in points))
    panels = {"setting": by_strength, "loss_increase": by_loss, "kl": by_kl}
    for cost, axis in panels.items():
        if cost != "setting":
            best = frontier(points, wanted=report.wanted, cost=cost)
            xs, ys = [p[cost] for p in best], [p["effect"] for p in best]
            axis.step(xs, ys, where="post", color="#bbbbbb", linewidth=5, solid_capstyle="round", label="frontier")
        for k, (s, t) in enumerate(pairs):
            colour, marker, line = _PAIRS[k % len(_PAIRS)]
            mine = sorted((p for p in points if (p["layer_source"], p["layer_target"]) == (s, t)), key=lambda p: p["strength"])
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.2}
            axis.plot([p[cost] for p in mine], [p["effect"] for p in mine], label=f"$L${s} → $L${t}", **style)
        if (chosen := _chosen(report, points)) is not None:
            ring: dict[str, Any] = {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgecolor": "#111111"}
            axis.plot(chosen[cost], chosen["effect"], linestyle="none", label="chosen", **ring)
        axis.grid(**_GRID)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.08, y=0.12)
    spent = {"loss": by_loss, "kl": by_kl}.get(report.search.get("budget_on", ""))
    if spent is not None and points:
        budget, key = report.search["budget"], "loss_increase" if spent is by_loss else "kl"
        if budget <= 1.5 * max(point[key] for point in points):  # one that is far off would squeeze all points
            spent.axvline(budget, color="#d55e00", linewidth=1.0, linestyle="--", label="budget")
    by_strength.set_ylabel(_unit(report.metric), fontsize=8)
    by_strength.set_xlabel(_SETTING.get(report.search.get("unit", "raw"), "strength"), fontsize=8)
    by_loss.set_xlabel("loss increase on neutral text (nats/token)", fontsize=8)
    by_kl.set_xlabel("KL on neutral text (nats/token)", fontsize=8)
    handles = {
        label: handle for axis in panels.values() for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(handles.values(), handles, fontsize=7, frameon=False, loc="outside lower center", ncols=len(handles))
    _say(figure, f"{written(report.concept)} into {written(report.target)}: how it was chosen, on the select split")
    return figure


def steerability_figure(report: TransferReport) -> "Figure":
    """How the propensity follows the strength, and on how many prompts it goes the other way.

    Raises:
        ValueError: for a task without propensities.
    """
    if not report.steerability:
        raise ValueError(f"{report.concept} into {report.target}: steerability was not measured.")
    figure = new_figure(width=9.0, height=2.7)
    curves, shares = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    for arm, one in report.steerability.items():
        colour, marker = _style(arm)
        label = f"{arm}: slope {one.slope.value:.2g} [{one.slope.low:.2g}, {one.slope.high:.2g}]"
        line = "-" if arm == "transplanted" else "--"
        curves.plot(one.strengths, one.propensity, color=colour, marker=marker, linestyle=line, markersize=5, label=label)
    curves.axvline(report.strength, color="#111111", linewidth=0.8, linestyle=(0, (1, 2)))
    curves.set_xlabel("strength (dotted: chosen)", fontsize=8)
    curves.set_ylabel("mean propensity (nats or score)", fontsize=8)
    curves.legend(fontsize=7, frameon=False, title="change with a unit of strength", title_fontsize=7)
    curves.grid(**_GRID)
    for axis in (curves, shares):
        axis.tick_params(axis="x", labelsize=7)
    curves.tick_params(axis="y", labelsize=7)
    names = {"anti_steerable": "anti-steerable", "spearman": "Spearman"}
    rows = [(arm, key) for key in names for arm in report.steerability]
    for row, (arm, key) in enumerate(rows):
        _interval(shares, row, getattr(report.steerability[arm], key), *_style(arm))
    shares.set_yticks(range(len(rows)), [f"{names[key]}, {arm}" for arm, key in rows], fontsize=8)
    shares.set_ylim(len(rows) - 0.4, -0.6)
    shares.set_xlim(-1.06, 1.06)
    shares.axvline(0.0, color="#111111", linewidth=0.8)
    shares.set_xlabel("share of prompts, or rank correlation", fontsize=8)
    shares.grid(axis="x", **_GRID)
    _say(figure, f"{written(report.concept)} into {written(report.target)}: steerability on the test split, 95% intervals")
    return figure


def _rows_of_arms(reports: Mapping[str, TransferReport], leave_out: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """A panel for each concept, a row for each arm that any of them has."""
    known = dict.fromkeys(arm for report in reports.values() for arm in report.arms if arm not in leave_out)
    first = ("base", "transplanted", "native")
    order = [*first, *(arm for arm in ARMS if arm not in NULLS), *(arm for arm in known if arm not in ARMS), *NULLS]
    arms = sorted(known, key=order.index)
    nulls = sum(arm in NULLS for arm in arms)
    # Between one wide panel and many narrow ones the whole stays as wide as a page.
    figure = new_figure(width=7.0 if len(reports) == 1 else 11.0, height=1.15 + 0.22 * max(len(arms), 3))
    axes = figure.subplots(1, max(len(reports), 1), sharey=True, squeeze=False)[0]
    for axis, (name, report) in zip(axes, reports.items(), strict=False):
        at = f"$L${report.layer_source} → $L${report.layer_target}, × {report.strength:.3g}"
        axis.set_title(f"{written(name, 60 if len(reports) == 1 else 18)}\n{at}", fontsize=8)
        axis.grid(axis="x", **_GRID)
        axis.tick_params(axis="x", labelsize=7)
        if nulls:
            axis.axhspan(len(arms) - nulls - 0.5, len(arms) - 0.5, color="#f1eee9", zorder=0)
    axes[0].set_yticks(range(len(arms)), [written(arm.replace("_", " "), 24) for arm in arms], fontsize=8)
    axes[0].set_ylim(max(len(arms), 1) - 0.5, -0.5)
    return figure, axes, arms


def _interval(axis: "Axes", row: int, estimate: Estimate, colour: str, marker: str, *, hollow: bool = False) -> None:
    axis.plot([estimate.low, estimate.high], [row, row], color=colour, linewidth=1.5, solid_capstyle="butt")
    inside = "white" if hollow else colour
    axis.plot(estimate.value, row, marker=marker, color=colour, markersize=6, markerfacecolor=inside, linestyle="none")


def _style(arm: str) -> tuple[str, str]:
    return _NULL if arm in NULLS else _STYLE.get(arm, _OTHER)


def _scale(axis: "Axes", shown: Sequence[Estimate]) -> None:
    """From 0 to 1 for shares, so that panels compare; for scores of any size their own range."""
    if all(0 <= one.low and one.high <= 1 for one in shown):
        axis.set_xlim(-0.06, 1.06)
        axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    else:
        axis.margins(x=0.08)


def _unit(metric: str) -> str:
    return written(metric.replace("_", " "), 22) + ("" if metric == "score" else " (share)")


def _target(reports: Mapping[str, TransferReport]) -> str:
    return written(next(iter(reports.values())).target) if reports else "nothing"


def _chosen(report: TransferReport, points: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    here = (report.layer_source, report.layer_target, report.strength)
    return next((p for p in points if (p["layer_source"], p["layer_target"], p["strength"]) == here), None)


def _say(figure: "Figure", text: str) -> None:
    figure.suptitle(text, fontsize=9)
