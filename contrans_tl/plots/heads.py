"""Figures of heads: who writes a concept, who reads it, whose attention it moves, through whom it acts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from contrans_tl.diagnostics.paths import PathEffects
from contrans_tl.diagnostics.reading import PatternChanges, Readers
from contrans_tl.diagnostics.scores import Scores, signed
from contrans_tl.diagnostics.writing import Writers
from contrans_tl.evaluation.intervals import Estimate
from contrans_tl.plots.canvas import GRID, NUMBERED, colour_bar, heat_map, new_figure, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_SHOWN = 12
"""Places that have a bar."""
_PLACES = {"all": "the vector stands at all positions", "last": "the vector stands at the last token"}
_ABOVE, _BELOW = "#542788", "#b35806"
"""As in the maps: purple above 0, orange below."""


def writers_figure(report: Writers) -> "Figure":
    """What every head and MLP adds to the concept, layer by layer, and the largest parts with 95% intervals."""
    heads, mlps = report.heads, _mlps(report)
    rows = heads.axes["layer"]
    figure, (grid, mlp, bars) = _panels(len(rows), [len(heads.axes["head"]), 1.6])
    limit = float(max(heads.values.abs().max(), np.nanmax(np.abs(mlps), initial=0.0))) or 1.0
    image = _map(grid, heads, limit, "attention heads")
    heat_map(mlp, mlps, rows, [""], signed=True, span=(-limit, limit), unit=None, digits=_digits(limit))
    mlp.invert_yaxis()
    mlp.tick_params(left=False, labelleft=False, bottom=False)
    mlp.set_xlabel("MLP", fontsize=8)
    colour_bar(image, [grid, mlp], heads.unit)
    _bars(bars, report.scores, report.intervals)
    bars.set_xlabel("projection, positive less negative prompts", fontsize=8)
    bars.set_title(f"largest of {len(report.intervals)} parts, 95% intervals", fontsize=9)
    whole = report.whole
    _title(figure, f"Who writes it (all parts together {signed(whole)})\n{report.about}")
    return figure


def readers_figure(report: Readers) -> "Figure":
    """How many deviations more of the vector every head's q, k and v read than of random directions."""
    grids = [report.scores.at(by=by) for by in report.scores.axes["by"]]
    figure, axes = _panels_of(grids)
    limit = float(report.scores.values.abs().max()) or 1.0
    for axis, by, grid in zip(axes, report.scores.axes["by"], grids, strict=False):
        image = _map(axis, grid, limit, f"by {by}")
        beyond = np.argwhere(report.family.at(by=by).values.numpy() <= 0.05)
        axis.plot(beyond[:, 1], beyond[:, 0], linestyle="none", **_ring(grid))
    colour_bar(image, list(axes[:-1]), "deviations of the null")
    _bars(axes[-1], report.scores, None, by="value")
    axes[-1].set_xlabel(written(f"deviations ({report.scores.unit})"), fontsize=8)
    axes[-1].set_title("read most", fontsize=9)
    _title(figure, f"Who reads it (ringed: more than any place reads of 95% of random directions)\n{report.about}")
    return figure


def patterns_figure(report: PatternChanges) -> "Figure":
    """How far the transplant moves every head's attention, and the farthest with 95% intervals, random directions beside."""
    figure, (grid, bars) = _panels_of([report.scores])
    image = _map(grid, report.scores, None, "attention heads")
    colour_bar(image, [grid], "KL(clean || transplanted), nats")
    order = _bars(bars, report.scores, report.intervals)
    null = report.random.values.flatten()[order].numpy()
    bars.plot(null, range(len(order)), marker="x", color="#111111", markersize=5, linestyle="none")
    bars.set_xlabel("KL in nats (x: random directions of the same length)", fontsize=8)
    bars.set_title("moved most, 95% intervals", fontsize=9)
    _title(figure, f"Whose attention it moves ({_PLACES[report.positions]})\n{report.about}")
    return figure


def paths_figure(report: PathEffects) -> "Figure":
    """What the vector does to the metric through each head alone, and the largest effects with 95% intervals."""
    ways = report.scores.axes["by"]
    grids = [report.scores.at(by=by) for by in ways]
    figure, axes = _panels_of(grids)
    limit = float(report.scores.values.abs().nan_to_num(0.0).max()) or 1.0
    for axis, by, grid in zip(axes, ways, grids, strict=False):
        image = _map(axis, grid, limit, "by q, k and v" if by == "qkv" else f"by {by}")
    colour_bar(image, list(axes[:-1]), report.scores.unit)
    _bars(axes[-1], report.scores, report.intervals)
    axes[-1].set_xlabel(written(report.scores.unit), fontsize=8)
    axes[-1].set_title("largest, 95% intervals", fontsize=9)
    _title(figure, f"Through which head it acts (the transplant itself {signed(report.whole)})\n{report.about}")
    return figure


def _panels(n_rows: int, columns: Sequence[int | float]) -> tuple["Figure", np.ndarray]:
    """Maps of so many rows and columns in a line, and room for bars at the right."""
    widths = [float(np.clip(0.42 * n, 0.5, 4.2)) for n in columns]
    height = float(np.clip(1.6 + 0.3 * n_rows, 3.4, 8.0))
    figure = new_figure(width=sum(widths) + 5.4, height=height)
    axes = figure.subplots(1, len(columns) + 1, width_ratios=[*widths, 3.2], squeeze=False)[0]
    return figure, axes


def _panels_of(grids: Sequence[Scores]) -> tuple["Figure", np.ndarray]:
    return _panels(len(grids[0].axes["layer"]), [len(grid.axes["head"]) for grid in grids])


def _map(axis: "Axes", grid: Scores, limit: float | None, title: str) -> "AxesImage":
    """Layers upwards, heads to the right; signed up to a limit, or, without one, from 0 on."""
    values, rows, columns = grid.values.numpy(), grid.axes["layer"], [head[1:] for head in grid.axes["head"]]
    top = limit or float(np.nanmax(values, initial=0.0)) or 1.0
    span = (-top if limit else 0.0, top)
    image = heat_map(axis, values, rows, columns, signed=limit is not None, span=span, unit=None, digits=_digits(top))
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("head", fontsize=8)
    if axis.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axis.set_ylabel("layer", fontsize=8)
    return image


def _digits(largest: float) -> int:
    """Behind the point: the largest number has two digits, and none is too long for its cell."""
    return int(np.clip(1 - np.floor(np.log10(largest)), 0, 2 if largest >= 0.05 else 3))


def _bars(axis: "Axes", scores: Scores, intervals: Sequence[Estimate] | None, *, by: str = "magnitude") -> list[int]:
    """A bar for each of the largest places, with its interval; which they are, the largest first."""
    labels = [scores.label(place) for place in range(scores.values.numel())]
    order = [labels.index(label) for label, _ in scores.top(_SHOWN, by=by)]
    values = scores.values.flatten()[order].tolist()
    axis.barh(range(len(order)), values, color=[_ABOVE if v > 0 else _BELOW for v in values], height=0.62, alpha=0.55)
    for row, place in enumerate(order if intervals is not None else ()):
        one = intervals[place]  # type: ignore[index]
        axis.plot([one.low, one.high], [row, row], color="#111111", linewidth=1.3, solid_capstyle="butt")
    axis.axvline(0, color="#111111", linewidth=0.7)
    axis.set_yticks(range(len(order)), [labels[place] for place in order], fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.locator_params(axis="x", nbins=5)
    axis.invert_yaxis()
    axis.grid(axis="x", **GRID)
    axis.set_axisbelow(True)
    return order


def _mlps(report: Writers) -> Float[np.ndarray, "layer 1"]:
    parts = report.scores.axes["part"]
    names = [f"L{layer} MLP" for layer in range(report.layer + 1)]
    return np.array([[report.scores.at(part=name) if name in parts else np.nan] for name in names])


def _ring(grid: Scores) -> dict[str, Any]:
    """A mark around a cell, smaller where cells are."""
    size = 13 if max(grid.values.shape) <= NUMBERED else 5
    return {"marker": "s", "markersize": size, "markerfacecolor": "none", "markeredgecolor": "#d55e00", "markeredgewidth": 1.3}


def _title(figure: "Figure", text: str) -> None:
    figure.suptitle("\n".join(written(line, 110) for line in text.splitlines()), fontsize=10)
