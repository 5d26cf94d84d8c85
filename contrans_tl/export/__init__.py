"""Export: a transplant in a form that other programs serve.

    h^l <- h^l + strength * v^l    at every token    is a bias of the last linear map of block l

    from contrans_tl import export_folder

    export_folder(moved, "EleutherAI/pythia-410m", "pythia-anger", strength=2.0)

writes an ordinary Hugging Face folder, to be opened by whatever opens the target. The logits are those of `transplant`, up to
the rounding of one sum, and no hook runs. Llama (also Mistral and Qwen2 without a sliding window, which are written as Llamas),
GPT-2, GPT-NeoX and OPT; what has no such bias is refused with the reason. `contrans export --format` offers `FORMATS`: this,
and the vectors alone as `contrans_tl.exchange` writes them.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from contrans_tl.exchange import Format, write_exchange
from contrans_tl.export.folder import ExportedFolder as ExportedFolder
from contrans_tl.export.folder import export_folder as export_folder
from contrans_tl.export.target import ModelFolder as ModelFolder
from contrans_tl.heads import HeadVectors
from contrans_tl.models import check_model_name
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import Concept, Positions


def export_file(
    concept: Concept,
    target: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: Format,
    strength: float = 1.0,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
    revision: str | None = None,
) -> Path:
    """Write strength * v alone, for engines that add it themselves: `write_exchange`, with the target's sizes checked before.

    Whether the target's weights are those that the concept lives in is not looked at: the file will be used beside weights of
    another format. Without `layers` all of the concept's are written.

    Raises:
        ValueError: vectors of heads, layers that the concept does not have, a target of other sizes, or as `write_exchange`.
    """
    from transformers import AutoConfig

    if isinstance(concept, HeadVectors):
        raise ValueError(f"{concept.name!r} is of single heads, which no {format} can say: use transplant(..., heads=...).")
    check_model_name(os.fspath(target))
    config = AutoConfig.from_pretrained(target, revision=revision, trust_remote_code=False).get_text_config()
    if (sizes := (config.num_hidden_layers, config.hidden_size)) != (concept.model.n_layers, concept.model.d_model):
        raise ValueError(
            f"the concept {concept.name!r} lives in {concept.model}; {os.path.basename(target)} has {sizes[0]} layers x "
            f"{sizes[1]}: reformulate it first."
        )
    chosen = concept if layers is None else concept.only(*layers)
    return write_exchange(chosen, out, format, strength=strength, positions=positions)


FILES: tuple[Format, ...] = ("gguf", "npy", "npz", "safetensors", "spec")
FORMATS: dict[str, Callable[..., Any]] = {"hf": export_folder} | {name: partial(export_file, format=name) for name in FILES}
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
