"""Page: an examination as diagnosis.json, one self-contained diagnosis.html, and a figure a diagnostic.

write_examination(diagnose(target, moved, pairs, layer=3, strength=2.0), "out")
"""

import os
from collections.abc import Mapping
from html import escape
from pathlib import Path

from contrans_tl.artifacts import versions, write_atomically, write_json
from contrans_tl.diagnostics.scores import Diagnosis
from contrans_tl.diagnostics.whole import Examination
from contrans_tl.markup import image, opening, png

SAYS = {
    "separability": "How well the concept tells positive prompts from negative ones, layer by layer, on prompts that it was "
    "not made from. Dotted: what 95% of permuted labels stay below.",
    "probes": "How accurately a linear probe on each single head does the same; ringed: beyond the best head of 95% of "
    "permuted labellings.",
    "readout": "Which tokens the vector raises and lowers when it is read through the final norm and the unembedding.",
    "writers": "What embedding, heads and MLPs each add to the concept's projection at this layer, positive prompts less "
    "negative ones. The parts sum to the whole.",
    "survival": "What becomes of the injected vector at each later layer, beside vectors drawn at random: its size, and where "
    "it points.",
    "projections": "The stream's projection on the concept, token by token, as the model is and with the vector injected.",
    "readers": "How much more strongly each later head reads the vector than it reads directions drawn at random, to first "
    "order, by query, key and value.",
    "patterns": "How far the vector moves the attention of each later head.",
    "attribution": "By gradients: what the concept at one layer and position, and each head's change under it, does to the "
    "answer.",
    "patching": "What is left of the transplant's effect when one layer or head alone is as it is under the transplant.",
    "paths": "The effect of the vector when it enters one head's input only, for the heads that read it most.",
}
"""What each diagnostic shows, for a reader who has not read the paper."""


def write_examination(found: Examination, folder: str | os.PathLike[str], *, command: str = "") -> None:
    """diagnosis.json, diagnosis.html and, with matplotlib, NAME.png for each diagnostic."""
    folder = Path(folder)
    about = {"kind": "contrans diagnosis", "format": 1, "versions": versions(), "command": command}
    pictures = _pictures(found)
    write_json(folder / "diagnosis.json", {**about, **found.to_dict()})
    write_atomically(folder / "diagnosis.html", render_examination(found, pictures, command=command).encode())
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture)


def render_examination(found: Examination, pictures: Mapping[str, bytes], *, command: str = "") -> str:
    """The page, with a PNG inside for each diagnostic that has one."""
    parts = [opening(f"contrans diagnosis: {found.about}"), f"<h1>{escape(found.about)}</h1>"]
    parts += [f'<p class="banner">{name}: not done. {escape(why)}</p>' for name, why in found.refused.items()]
    if not pictures:
        parts.append("<p class=\"low\">No figures: they need matplotlib, pip install 'contrans-tl[plots]'.")
    for name, report in found.reports.items():
        parts += [
            f"<h2>{name.capitalize()}</h2><p>{escape(SAYS[name])}</p>",
            image(pictures[name], f"{name} of {report.about}: {_told(report)}") if name in pictures else "",
            f"<details><summary>In numbers</summary><pre>{escape(str(report))}</pre></details>",
        ]
    said = f"<code>{escape(command)}</code>; " if command else ""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts.append(f"<p><small>{said}{escape(made)}. All numbers are in diagnosis.json beside this page.</small>")
    return "\n".join(parts) + "\n"


def _pictures(found: Examination) -> dict[str, bytes]:
    """Of every report, its figure; none without matplotlib."""
    from contrans_tl import plots

    try:
        return {name: png(plots.figure_of(report)) for name, report in found.reports.items()}
    except ImportError:
        return {}


def _told(report: Diagnosis) -> str:
    return ", ".join(f"{label} {value:+.2g}" for label, value in report.top(3))
