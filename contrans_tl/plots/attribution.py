"""Figures of what carries an effect: attributions, their agreement with true effects, sweeps, patching."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from contrans_tl.diagnostics.attribution import Attribution
from contrans_tl.diagnostics.patching import Patching
from contrans_tl.diagnostics.sweeps import Sweep
from contrans_tl.plots.canvas import GRID, colour_bar, heat_map, new_figure, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = {
    "layer": ("a layer, all positions", "#0072b2", "o"),
    "position": ("a layer and position", "#777777", "D"),
    "head": ("a head's output", "#d55e00", "X"),
}
_LINES = (("#0072b2", "o", "-"), ("#777777", "D", "--"), ("#d55e00", "X", ":"), ("#56b4e9", "s", "-."), ("#111111", "v", "-"))
_NEGATIVE = "a dash, or a minus: negative"
_APART = 8
"""Lines that can be told apart; of more curves than these a sweep shows a map."""


def attribution_figure(report: Attribution) -> "Figure":
    """Attributions of every layer and position, and of every head."""
    rows, columns = report.scores.values.shape
    n_layers, n_heads = report.heads.values.shape
    figure = new_figure(width=min(15.0, 4.0 + 0.13 * columns + 0.16 * n_heads), height=2.1 + 0.2 * min(n_layers, 40))
    widths = [max(3.0, 0.13 * min(columns, 60) + 1), max(2.0, 0.16 * min(n_heads, 64) + 1)]
    places, by_head = figure.subplots(1, 2, width_ratios=widths)
    unit = _unit(report)
    _map(
        places, report.scores.values, report.scores.axes["layer"], _places(report.scores.axes["position"], report.tokens), unit
    )
    places.set_xlabel("position, from the last token", fontsize=8)
    places.set_title("the concept added after a block, at one position", fontsize=8)
    _map(by_head, report.heads.values, report.heads.axes["layer"], report.heads.axes["head"], unit)
    by_head.set_xlabel("head", fontsize=8)
    by_head.set_title(f"head outputs under the transplant at L{report.layer}", fontsize=8)
    for axis in (places, by_head):
        axis.set_ylabel("layer", fontsize=8)
    _say(figure, f"Attribution: {report.about}\n{_NEGATIVE}")
    return figure


def agreement_figure(report: Attribution) -> "Figure":
    """Attributed against true effects of the places that were measured; on the dotted line they agree.

    Raises:
        ValueError: for a report of which none was measured.
    """
    kinds = [kind for kind in _KINDS if any(one.kind == kind for one in report.checked)]
    if not kinds:
        raise ValueError("no true effects were measured; attribute with check of 1 or more.")
    figure = new_figure(width=1.0 + 3.0 * len(kinds), height=3.3)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        name, colour, marker = _KINDS[kind]
        some = [one for one in report.checked if one.kind == kind]
        xs, ys = [one.attributed for one in some], [one.true for one in some]
        span = [min(*xs, *ys, 0.0), max(*xs, *ys, 0.0)]
        axis.plot(span, span, color="#111111", linewidth=0.8, linestyle=(0, (1, 2)))
        axis.plot(xs, ys, color=colour, marker=marker, linestyle="none", markersize=5, alpha=0.8)
        far = [one for one in some if abs(one.true - one.attributed) > 0.05 * (span[1] - span[0])]
        far = sorted(far, key=lambda one: -abs(one.true - one.attributed))[:2]
        for one, up in zip(far, (4, -9), strict=False):
            left = one.attributed > sum(span) / 2
            style = {"ha": "right" if left else "left", "xytext": (-5 if left else 5, up), "textcoords": "offset points"}
            axis.annotate(one.place, (one.attributed, one.true), fontsize=6, **style)
        axis.set_title(f"{name}\nrank correlation {report.rank_correlation[kind]:+.2f} of {len(some)}", fontsize=8)  # type: ignore[index]
        axis.set_xlabel(f"attributed effect ({_unit(report)})", fontsize=8)
        axis.set_ylabel("true effect", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(0.12)
        axis.locator_params(nbins=5)
        axis.grid(**GRID)
    _say(figure, f"{report.about}\ndotted: attributed = true; named: up to two that are far from it")
    return figure


def strengths_figure(report: Sweep) -> "Figure":
    """The change of the metric over strength, one line a layer or head with its standard error over prompts, one panel a
    position; where there are too many to tell apart, as maps."""
    effect, error = report.effect, report.error
    place, strengths = next(iter(effect.axes)), [float(label[1:]) for label in effect.axes["strength"]]
    names, kinds = effect.axes[place], effect.axes["positions"]
    as_lines = len(names) <= _APART
    height = 3.2 if as_lines else 1.8 + 0.16 * min(len(names), 48)
    figure = new_figure(width=1.2 + 3.4 * len(kinds), height=height)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    limit = float(effect.values.abs().max())
    for k, (axis, kind) in enumerate(zip(axes, kinds, strict=True)):
        axis.set_title(f"at {'the ' * (kind == 'last')}{kind}{_tokens(kind)}", fontsize=8)
        if not as_lines:
            labels = [f"{strength:g}" for strength in strengths]
            image = heat_map(axis, effect.values[:, :, k].numpy(), names, labels, signed=True, span=(-limit, limit), unit=None)
            axis.set_xlabel("strength (× concept vector)", fontsize=8)
            if axis is axes[-1]:
                colour_bar(image, axes.tolist(), f"change of {_unit(report)}")
            continue
        axis.axhline(0.0, color="#111111", linewidth=0.8)
        for i, name in enumerate(names):
            colour, marker, line = _LINES[i % len(_LINES)]
            inside = colour if i < len(_LINES) else "white"
            order = sorted(range(len(strengths)), key=strengths.__getitem__)
            x, mean, half = [strengths[o] for o in order], effect.values[i, order, k], error.values[i, order, k]
            if not half.isnan().any():
                axis.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
            style: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": line, "markerfacecolor": inside}
            axis.plot(x, mean, label=name, markersize=4, linewidth=1.2, **style)
        axis.set_xlabel("strength (× concept vector)", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(**GRID)
    axes[0].set_ylabel(f"change of {_unit(report)}" if as_lines else place, fontsize=8)
    if as_lines:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=7, frameon=False, loc="outside right center")
    note = "bands: standard error over prompts" if as_lines else _NEGATIVE
    _say(figure, f"Sweep: {report.about}\n{note}")
    return figure


def patching_figure(report: Patching) -> "Figure":
    """Share of the effect that layers and heads carry: whole, by head, and by position."""
    n_layers, n_heads = report.scores.values.shape
    sites, positions = report.by_position.axes["site"], report.by_position.axes["position"]
    by_position = bool(report.by_position.values.any())
    row = 1.3 + 0.2 * min(n_layers, 40)
    width = max(7.0, 3.0 + 0.16 * min(n_heads, 64) + 2.0, 1.5 + len(sites) * max(2.0, 0.09 * min(len(positions), 60)))
    figure = new_figure(width=min(width, 14.0), height=0.7 + row * (2 if by_position else 1))
    parts: Any = figure.subfigures(2, 1) if by_position else (figure, None)
    above, below = parts
    whole, by_head = above.subplots(1, 2, width_ratios=[1.6, max(2.4, 0.16 * min(n_heads, 64))])
    layers = report.scores.axes["layer"]
    _map(whole, report.by_layer.values, layers, [site.replace("_", "\n") for site in sites], "")
    whole.set_title("all positions", fontsize=8)
    whole.set_xlabel("activation", fontsize=8)
    _map(by_head, report.scores.values, layers, report.scores.axes["head"], "")
    by_head.set_title("head outputs, all positions", fontsize=8)
    by_head.set_xlabel("head", fontsize=8)
    axes = [whole, by_head]
    if below is not None:
        panels = below.subplots(1, len(sites), squeeze=False)[0]
        most = int(figure.get_figwidth() * 0.6 * 6.5 / len(sites))
        for axis, site, grid in zip(panels, sites, report.by_position.values, strict=True):
            _map(axis, grid, layers, _places(positions, report.tokens), "", most)
            axis.set_title(f"{site.replace('_', ' ')}, one position", fontsize=8)
            axis.set_xlabel("position, from the last token", fontsize=8)
        axes += [*panels]
    for axis in axes:
        axis.set_ylabel("layer", fontsize=8)
    verb = "transplanted into plain: share brought" if report.direction == "denoise" else "plain into transplanted: share lost"
    title = f"Patching {verb}, of {report.effect:+.2f} ({_unit(report)})"
    _say(figure, f"{title}\n{report.about}; each map on its own scale; {_NEGATIVE}")
    return figure


def _map(axis: "Axes", values: Tensor, rows: Sequence[str], columns: Sequence[str], unit: str, fit: int | None = None) -> None:
    digits = 1 if float(values.abs().max()) >= 10 else 2
    heat_map(axis, values.float().numpy(), rows, columns, signed=True, unit=unit, digits=digits, fit=fit)
    axis.invert_yaxis()  # the first layer below, as the stream flows up


def _places(labels: Sequence[str], tokens: Sequence[str]) -> list[str]:
    """Positions with the token that stands there in all prompts."""
    shown = [token.strip() or token.replace("\n", "\\n") for token in tokens]
    return [f"{token} {label}" if token else label for label, token in zip(labels, shown, strict=True)]


def _unit(report: "Attribution | Patching | Sweep") -> str:
    unit = "" if isinstance(report, Patching) else report.scores.unit
    return written(report.metric.replace("_", " "), 24) + (f", {unit}" if unit else "")


def _tokens(kind: str) -> str:
    return {"all": " positions", "last": " token"}.get(kind, " from the last token")


def _say(figure: "Figure", text: str) -> None:
    figure.suptitle("\n".join(written(line, 130) for line in text.split("\n")), fontsize=9)
