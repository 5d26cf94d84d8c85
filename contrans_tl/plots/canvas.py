"""An empty figure, text that is drawn as it is written, and maps of signed numbers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED = (14, 12)
"""Rows and columns up to which a map has its numbers written in; beyond, they do not fit their cells."""
TICKS = 24
"""Labels that fit an axis of a map of common size."""
_MARKED = 0.15
"""Negative cells of a map without numbers have a dot if they are at least this share of its largest magnitude."""


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


def signed_map(
    axis: "Axes",
    values: Float[Tensor, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limit: float | None = None,
    ticks: int = TICKS,
) -> Any:
    """Numbers about zero as a map, purple above and orange below, white at 0 and as dark for -x as for x; the image, for its
    colour bar.

    What the colours cannot say in grey is written: small maps have their numbers in them, large ones a dot in each negative
    cell that stands out. NaN is left blank. `limit` is the magnitude of the darkest colour, the largest by default; `ticks` how
    many labels fit below.
    """
    grid = values.detach().float().cpu().numpy()
    known = np.abs(grid[np.isfinite(grid)])
    top = limit or float(known.max(initial=0.0)) or 1.0
    image = axis.imshow(grid, cmap="PuOr", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    if grid.shape[0] <= NUMBERED[0] and grid.shape[1] <= NUMBERED[1]:
        digits = 1 if top >= 10 else 2 if top >= 0.1 else 3
        for (row, column), value in np.ndenumerate(grid):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 * top else "black"
                text = f"{value:.{digits}f}".replace("-0." + "0" * digits, "0." + "0" * digits)
                axis.text(column, row, text, ha="center", va="center", fontsize=6, color=colour)
    else:
        at_row, at_column = np.nonzero(grid <= -_MARKED * top)
        colours = ["white" if grid[cell] < -0.6 * top else "black" for cell in zip(at_row, at_column, strict=True)]
        axis.scatter(at_column, at_row, s=4, c=colours, marker="o", linewidths=0)
    for place, labels, most in ((axis.set_xticks, columns, ticks), (axis.set_yticks, rows, TICKS)):
        shown = range(len(labels) - 1, -1, -len(labels) // most)[::-1]  # the last one always: the last token, the last layer
        place(shown, [written(labels[i], 14) for i in shown], fontsize=7)
    return image
