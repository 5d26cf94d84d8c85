"""Markup: what the pages are put together from. All text that comes from data is escaped."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1.2rem; color: #111; }
h1 { font-size: 1.6rem; margin-bottom: .3rem; } h2 { margin-top: 2.6rem; border-bottom: 2px solid #111; }
h3 { margin: 2.2rem 0 .3rem; font-size: 1.15rem; } h4 { margin: 1.2rem 0 .2rem; }
p, li { max-width: 52rem; } dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; max-width: 60rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #444; padding-bottom: .2rem; }
th, td { padding: .2rem .55rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; vertical-align: middle; }
th { border-bottom: 1px solid #111; font-weight: 600; vertical-align: bottom; white-space: normal; }
.text { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 4.5rem; max-width: 34rem; }
td .low { display: block; font-size: 11px; line-height: 1.2; }
tr.moved td { background: #eaf3fa; font-weight: 600; } tr.null td { background: #f5f2ed; }
small, .low { color: #555; font-weight: 400; font-size: 12px; } figure { margin: .8rem 0; } img { max-width: 100%; }
figcaption { font-size: 13px; color: #444; max-width: 60rem; }
code, pre { font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; }
pre, .prompt { background: #f6f6f6; padding: .35rem .6rem; border-left: 3px solid #ccc; margin: .3rem 0; }
.prompt { white-space: pre-wrap; }
.badge { border: 1px solid #111; border-radius: 1em; padding: 0 .6em; font-size: 12px; white-space: nowrap; font-weight: 600; }
.yes { background: #0072b2; border-color: #0072b2; color: #fff; } .no { background: #fff; } .open { border-style: dashed; }
.banner { border: 2px solid #b34700; border-left-width: 10px; padding: .5rem .9rem; margin: 1rem 0; max-width: 60rem; }
details { margin: .5rem 0; } summary { cursor: pointer; font-weight: 600; }
@media print { body { font-size: 11px; margin: 0; max-width: none; } h3, figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 9px; } th, td { padding: .1rem .3rem; } a { color: inherit; } }
"""


def opening(title: str) -> str:
    """What a page begins with."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"\n<title>{escape(title)}</title><style>{CSS}</style>"
    )


def figure(draw: Callable[[], Any], alt: str, caption: str = "") -> str:
    """The drawn figure as an image; a line that says what is missing where there is no matplotlib."""
    try:
        drawn = draw()
    except ImportError as error:
        return f'<p class="low">No figure: {escape(str(error))}</p>'
    return image(png(drawn), alt, caption)


def png(drawn: Any) -> bytes:
    """A matplotlib figure as a PNG of 256 colours."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    drawn.savefig(buffer, format="png")
    # By coverage: the median cut would turn the rarer shades of a map into another colour.
    few = Image.open(buffer).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def image(content: bytes, alt: str, caption: str = "") -> str:
    """A PNG within the page."""
    data = base64.b64encode(content).decode()
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">{below}</figure>'


def table(heads: Sequence[str], rows: Sequence[str], caption: str, *, left: int = 1) -> str:
    """Rows of cells that are escaped already."""
    cells = "".join(f"<th{' class=text' if i < left else ''}>{escape(head)}" for i, head in enumerate(heads))
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{above}<thead><tr>{cells}<tbody>{"".join(rows)}</table></div>'


def td(content: Any) -> str:
    """A cell of numbers, or of what is escaped already."""
    return f"<td>{content}"


def td_text(text: str, *, safe: bool = False) -> str:
    return f'<td class="text">{text if safe else escape(text)}'
