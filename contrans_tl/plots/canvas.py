"""An empty figure, and text that is drawn as it is written."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
