"""Export: a transplant in a form that other programs serve.

    h^l <- h^l + strength * v^l    at every token    is a bias of the last linear map of block l

    from contrans_tl import export_folder

    export_folder(moved, "EleutherAI/pythia-410m", "pythia-anger", strength=2.0)

writes an ordinary Hugging Face folder, to be opened by whatever opens the target. The logits are those of `transplant`, up to
the rounding of one sum, and no hook runs. Llama (also Mistral and Qwen2 without a sliding window, which are written as Llamas),
GPT-2, GPT-NeoX and OPT; what has no such bias is refused with the reason. `FORMATS` is what `contrans export --format` offers.
"""

import os
from collections.abc import Callable
from typing import Any

from contrans_tl.export.folder import ExportedFolder as ExportedFolder
from contrans_tl.export.folder import export_folder as export_folder
from contrans_tl.export.target import ModelFolder as ModelFolder
from contrans_tl.heads import HeadVectors
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import Concept

FORMATS: dict[str, Callable[..., Any]] = {"hf": export_folder}
"""What writes each: (concept, target, out, *, strength, layers, positions, revision) -> what was written, to be printed."""


def read_concept(path: str | os.PathLike[str]) -> Concept:
    """A saved concept of either kind. ValueError for a file that is none."""
    try:
        return ConceptVector.load(path)
    except ValueError as error:
        try:
            return HeadVectors.load(path)
        except ValueError:
            raise error from None
