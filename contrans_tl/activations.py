"""Activations: texts -> rows of the residual stream, at the last token or at the end of every word.

    x = collect(source, sentences, rows="words")
    y = collect(target, sentences, rows="words")
    x, y = pair(x, y)                       # the same words in both, whatever the tokenizers

Layer l is the output of block l, `blocks.{l}.hook_resid_post`, before the final norm. (Hugging Face's `hidden_states[-1]` is
behind that norm: it is not the output of the last block.) One forward pass a batch collects every requested layer and keeps
only the requested rows, in float32 on the CPU or, with `file=`, in a memory-mapped file.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.models import HookedModel, ModelId, check_layers, check_ready, hook_name, identify, run_blocks
from contrans_tl.progress import track
from contrans_tl.tokens import by_length, encode, pad, prepends_bos, word_ends

Rows = Literal["last", "words"]


@dataclass(frozen=True, eq=False)
class Activations:
    """Rows of the residual stream of one model."""

    values: Float[Tensor, "row layer d_model"]
    layers: tuple[int, ...]
    sentence: Int[Tensor, " row"]
    """Which text a row comes from."""
    end: Int[Tensor, " row"]
    """Character of that text at which the row's token ends; -1 for the last token."""
    model: ModelId
    rows: Rows
    prepend_bos: bool
    texts_hash: str
    """Hash of the texts, so that activations of different corpora are never paired."""

    def __len__(self) -> int:
        return len(self.values)

    def at(self, layer: int) -> Float[Tensor, "row d_model"]:
        """The rows of one layer. ValueError if it was not collected."""
        if layer not in self.layers:
            raise ValueError(f"expected a collected layer {self.layers}; got {layer}.")
        return self.values[:, self.layers.index(layer)]

    def only(self, layers: Sequence[int]) -> "Activations":
        """These layers only."""
        if tuple(layers) == self.layers:
            return self
        return replace(self, values=torch.stack([self.at(layer) for layer in layers], dim=1), layers=tuple(layers))

    def take(self, rows: Int[Tensor, " kept"]) -> "Activations":
        """These rows only."""
        return replace(self, values=self.values[rows], sentence=self.sentence[rows], end=self.end[rows])


def collect(
    model: HookedModel,
    texts: Sequence[str],
    *,
    rows: Rows = "last",
    layers: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    file: str | os.PathLike[str] | None = None,
) -> Activations:
    """The residual stream after the given blocks, at the last real token of every text or at the end of every word.

    Args:
        rows: `last` (the paper's) or `words`: tokens that end where a word ends. With `words`, a text longer than the
            context is cut and loses the words beyond; with `last` it is an error, as its last token would be another.
        layers: block outputs to keep, counted from 0; all by default.
        prepend_bos: begin every text with the bos token; None is the family's policy in TransformerLens. It is recorded.
        file: keep the values in this memory-mapped file instead of memory.

    Raises:
        ValueError: no texts, a layer the model does not have, a model in training mode, a text beyond the context.
    """
    if rows not in get_args(Rows):
        raise ValueError(f"expected rows 'last' or 'words'; got {rows!r}.")
    if isinstance(texts, str):
        raise ValueError(f"expected a list of texts; got one text, {texts[:40]!r}. Put it in a list.")
    texts = list(texts)
    if not texts:
        raise ValueError("expected at least one text; got none.")
    check_ready(model)
    layers = check_layers(layers, model.cfg.n_layers, str(model.cfg.model_name))
    encodings = encode(model, texts, prepend_bos=prepend_bos, truncate=rows == "words")
    if rows == "last":
        places = [{-1: len(encoding.ids) - 1} for encoding in encodings]
    else:
        places = [word_ends(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]
    if not any(places):
        raise ValueError("in none of the texts does a token end where a word ends; use rows='last'.")

    first_row = torch.tensor([0, *map(len, places)]).cumsum(0).tolist()
    values = _allocate((first_row[-1], len(layers), model.cfg.d_model), file)
    device = next(iter(model.parameters())).device
    batches = by_length([len(encoding.ids) for encoding in encodings], batch_size)

    def keep(resid: Tensor, hook: Any, *, slot: int, prompt: Tensor, position: Tensor, row: Tensor) -> None:
        values[row, slot] = resid[prompt.to(resid.device), position.to(resid.device)].float().cpu()

    for batch in track(batches, f"activations of {model.cfg.model_name}", len(batches)):
        tokens, mask = pad([encodings[i].ids for i in batch], device)
        where = {
            "prompt": torch.tensor([k for k, i in enumerate(batch) for _ in places[i]], dtype=torch.long),
            "position": torch.tensor([p for i in batch for p in places[i].values()], dtype=torch.long),
            "row": torch.tensor([first_row[i] + k for i in batch for k in range(len(places[i]))], dtype=torch.long),
        }
        hooks = [(hook_name(layer), partial(keep, slot=slot, **where)) for slot, layer in enumerate(layers)]
        run_blocks(model, tokens, mask, hooks, max(layers))

    return Activations(
        values=values,
        layers=layers,
        sentence=torch.tensor([i for i, place in enumerate(places) for _ in place], dtype=torch.long),
        end=torch.tensor([end for place in places for end in place], dtype=torch.long),
        model=identify(model),
        rows=rows,
        prepend_bos=prepends_bos(model, prepend_bos),
        texts_hash=hash_texts(texts),
    )


def pair(source: Activations, target: Activations) -> tuple[Activations, Activations]:
    """The rows that both models have: the same text up to the same character, in the same order.

    Raises:
        ValueError: different texts or kinds of rows, or no row in common.
    """
    if (source.texts_hash, source.rows) != (target.texts_hash, target.rows):
        raise ValueError("expected activations of the same texts at the same kind of rows; collect both again alike.")
    keys = [list(zip(a.sentence.tolist(), a.end.tolist(), strict=True)) for a in (source, target)]
    if keys[0] == keys[1]:
        return source, target
    column = {key: row for row, key in enumerate(keys[1])}
    shared = [(row, column[key]) for row, key in enumerate(keys[0]) if key in column]
    if not shared:
        raise ValueError("the two tokenizers end no token at the same character of any word; use rows='last'.")
    kept = torch.tensor(shared)
    return source.take(kept[:, 0]), target.take(kept[:, 1])


def hash_texts(texts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that stand for these texts in this order."""
    return hashlib.sha256("\x00".join(texts).encode()).hexdigest()[:16]


def _allocate(shape: tuple[int, int, int], file: str | os.PathLike[str] | None) -> Float[Tensor, "row layer d_model"]:
    if file is None:
        return torch.empty(shape)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    flat = torch.from_file(os.fspath(file), shared=True, size=shape[0] * shape[1] * shape[2], dtype=torch.float32)
    return flat.view(shape)
