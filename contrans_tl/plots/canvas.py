"""An empty figure, text that is drawn as it is written, and maps of numbers that all figures draw alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_NUMBERED = 16
"""Rows or columns beyond which numbers do not fit their cells."""
_TICKS = 12
"""Labels along an axis, at most."""


def new_figure(width: float, height: float) -> "Figure":
    """Of this size in inches. ImportError, with the name of the extra, where there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'contrans-tl[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def written(text: str, most: int = 60) -> str:
    """A name from data for use in a figure: on one line, not too long, and never a formula."""
    line = " ".join(text.split())
    return (line if len(line) <= most else f"{line[: most - 1]}…").replace("$", r"\$")


def number_map(
    axis: "Axes",
    values: Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    signed: bool,
    limit: float | None = None,
) -> "AxesImage":
    """A cell for each number, the first row at the bottom where rows are layers ("L0", ...), NaN crossed out.

    Signed ones are orange above 0 and purple below, as dark as they are far from it up to `limit`; so that they differ in grey
    as well, those below 0 are written as numbers or, where there are too many cells, carry a bar. Others grow darker from 0.
    """
    known = np.abs(values[np.isfinite(values)])
    limit = limit or float(known.max(initial=0.0)) or 1.0
    image = axis.imshow(
        values,
        aspect="auto",
        origin="lower" if rows[0].startswith("L") else "upper",
        cmap="PuOr_r" if signed else "Greys",
        vmin=-limit if signed else 0.0,
        vmax=limit,
    )
    axis.set_facecolor("#f2f2f2")
    unknown = np.argwhere(np.isnan(values))
    if len(unknown):
        crosses = {"marker": "x", "color": "#bbbbbb", "markersize": 2.5, "markeredgewidth": 0.6, "linestyle": "none"}
        axis.plot(unknown[:, 1], unknown[:, 0], **crosses)  # type: ignore[arg-type]
    if max(values.shape) <= _NUMBERED:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                light = abs(value) > 0.6 * limit
                text = _short(float(value), limit)
                axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if light else "black")
    elif signed:
        below = np.argwhere(values < -0.2 * limit)
        axis.plot(below[:, 1], below[:, 0], marker="_", color="black", markersize=3, markeredgewidth=0.7, linestyle="none")
    for set_ticks, labels in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        step = -(-len(labels) // _TICKS)
        set_ticks(range(0, len(labels), step), [written(label) for label in labels[::step]], fontsize=7)
    return image


def _short(value: float, limit: float) -> str:
    """As many digits as the largest number of the map needs, so that small ones are short."""
    digits = int(np.clip(1 - np.floor(np.log10(limit)), 0, 3))
    text = f"{abs(value):.{digits}f}".removeprefix("0")
    sign = "−" if value < 0 else ""
    return sign + text if text.strip(".0") else "0"
