"""An empty figure, maps of colour, lines with their intervals, and text that is drawn as it is written."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

NUMBERED = 16
"""Rows or columns of a map of colour, beyond which numbers do not fit its cells."""
GRID: dict[str, Any] = {"color": "#dddddd", "linewidth": 0.6}


def new_figure(width: float, height: float) -> "Figure":
    """Of this size in inches. ImportError, with the name of the extra, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'contrans-tl[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def written(text: str, most: int = 60) -> str:
    """A name from data for use in a figure: on one line, not too long, never a formula, and without unprintable characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return (line if len(line) <= most else f"{line[: most - 1]}…").replace("$", r"\$")


def cell_size(rows: int, columns: int) -> tuple[float, float]:
    """Width and height in inches of a cell of a map of colour, so that its numbers fit, or the whole fits a page."""
    if max(rows, columns) <= NUMBERED:
        return 0.5, 0.4
    return max(0.12, min(0.32, 10.0 / columns)), max(0.12, min(0.32, 7.0 / rows))


def heat_map(
    axis: "Axes",
    values: Float[np.ndarray, "row column"],
    rows: Sequence[object],
    columns: Sequence[object],
    *,
    signed: bool = False,
    span: tuple[float, float] | None = None,
    unit: str | None = "",
    digits: int = 2,
    fit: int | None = None,
) -> "AxesImage":
    """A number for every cell, as a shade, and written where there is room.

    Without a sign it grows darker, over `span`. With one, zero is white, orange below and purple above, both darker with size;
    as they look alike in grey, a dash marks the cells below zero that have no number. NaN is left blank, with a cross.
    `fit` is how many labels fit below. Several maps of one span share a `colour_bar`: with `unit=None` none is drawn.
    """
    import matplotlib

    if signed:
        most = float(np.nanmax(np.abs(values), initial=0.0)) if span is None else max(map(abs, span))
        span, colours = (-(most or 1.0), most or 1.0), "PuOr"
    else:
        span, colours = span or (min(0.0, float(np.nanmin(values))), float(np.nanmax(values)) or 1.0), "Greys"
    image = axis.imshow(values, cmap=colours, vmin=span[0], vmax=span[1], aspect="auto")
    shades = matplotlib.colormaps[colours]
    numbered, unknown = max(values.shape) <= NUMBERED, np.argwhere(np.isnan(values))
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value) and len(unknown) <= NUMBERED**2:
            axis.text(column, row, "×", ha="center", va="center", fontsize=6, color="#777777")
        elif numbered and not math.isnan(value):
            red, green, blue, _ = shades((value - span[0]) / (span[1] - span[0]))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    if signed and not numbered:
        low = np.argwhere(values < -0.1 * span[1])  # near zero the shade is near white
        light = [shades((values[tuple(at)] - span[0]) / (span[1] - span[0]))[1] < 0.45 for at in low]
        axis.scatter(low[:, 1], low[:, 0], marker="_", s=9, linewidths=0.8, c=["white" if x else "black" for x in light])
    if len(unknown) > NUMBERED**2:  # at once: a text for each of thousands takes seconds
        axis.scatter(unknown[:, 1], unknown[:, 0], marker="x", s=3, linewidths=0.5, color="#bbbbbb")
    ticks(axis, rows, columns, fit)
    if unit is not None:
        colour_bar(image, [axis], unit + " (–: below 0)" * (signed and not numbered and len(low) > 0))
    return image


def colour_bar(image: Any, axes: "Sequence[Axes]", label: str) -> None:
    """What the shades mean, beside these axes; as slim beside a tall map as beside a low one."""
    figure = image.figure
    bar = figure.colorbar(image, ax=list(axes), shrink=0.9, aspect=max(20, 5 * figure.bbox.height / figure.dpi))
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)


def ticks(axis: "Axes", rows: Sequence[object], columns: Sequence[object], fit: int | None = None) -> None:
    """Names of rows and columns, each where there is room, else every so many; `fit` is how many fit below."""
    turned = max((len(str(name)) for name in columns), default=0) > 2
    below = fit or NUMBERED * (2 if turned else 1)
    for names, place, most in ((rows, axis.set_yticks, NUMBERED), (columns, axis.set_xticks, below)):
        step = max(1, math.ceil(len(names) / most))
        place(range(0, len(names), step), [str(name) for name in names][::step], fontsize=7)
    if turned:
        axis.tick_params(axis="x", labelrotation=90)


def band(
    axis: "Axes",
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    style: dict[str, Any],
    label: str,
) -> None:
    """A line with the interval around it, over 0, 1, 2, ..."""
    x = range(len(values))
    axis.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axis.plot(x, values, label=label, markersize=4, linewidth=1.4, **style)
