"""Activations: texts -> rows of the residual stream, at the last token or at the end of every word.

    x = collect(source, sentences, rows="words")
    y = collect(target, sentences, rows="words")
    x, y = pair(x, y)                       # the same words in both, whatever the tokenizers

Layer l is the output of block l, `blocks.{l}.hook_resid_post`, before the final norm. (Hugging Face's `hidden_states[-1]` is
behind that norm: it is not the output of the last block.) One forward pass a batch collects every requested layer and keeps
only the requested rows, in float32 on the CPU. Rows that memory does not hold go to disk: `shards.store`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl.models import HookedModel, ModelId, Site, check_layers, check_ready, hook_name, identify
from contrans_tl.passes import run_blocks
from contrans_tl.progress import track
from contrans_tl.tokens import ALIGNED, Encoding, by_length, encode, pad, prepends_bos, word_ends
from contrans_tl.weights import device_of

Rows = Literal["last", "words"]
"""The last token of every text (the paper's), or the token at the end of every word."""

NO_WORD_ENDS = "in none of the texts does a token end where a word ends; use rows='last'."

SINK = 10.0
"""A row is a sink if its norm is more than this many times the median norm of its layer. Massive activations are entries of
1000 times the median magnitude (Sun et al., arXiv 2402.17762); one such entry makes a row of 4096 Gaussian ones
0.67 * 1000 / sqrt(4096) = 10.5 times as long."""


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

    def sinks(self) -> Bool[Tensor, " row"]:
        """Rows that are a sink in any layer."""
        return torch.stack([sink_rows(x) for x in self.values.unbind(1)]).any(0)

    def take(self, rows: Int[Tensor, " kept"]) -> "Activations":
        """These rows only."""
        return replace(self, values=self.values[rows], sentence=self.sentence[rows], end=self.end[rows])


def sink_rows(rows: Float[Tensor, "row d_model"]) -> Bool[Tensor, " row"]:
    """Which rows of a layer have a massive norm: more than `SINK` times the median."""
    norms = rows.float().norm(dim=-1).cpu()
    return norms.isfinite() & (norms > SINK * norms.median()) if len(norms) else norms.bool()


def collect(
    model: HookedModel,
    texts: Sequence[str],
    *,
    rows: Rows = "last",
    layers: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> Activations:
    """The residual stream after the given blocks, at the last real token of every text or at the end of every word.

    Args:
        rows: `last` (the paper's) or `words`: tokens that end where a word ends. With `words`, a text longer than the
            context is cut and loses the words beyond; with `last` it is an error, as its last token would be another.
        layers: block outputs to keep, counted from 0; all by default.
        prepend_bos: begin every text with the bos token; None is the family's policy in TransformerLens. It is recorded.

    Raises:
        ValueError: no texts, a layer the model does not have, a model in training mode, a text beyond the context.
    """
    texts = check_texts(texts, rows)
    check_ready(model)
    layers = check_layers(layers, model.cfg.n_layers, str(model.cfg.model_name))
    encodings, places = locate(model, texts, rows, prepend_bos)
    if not any(places):
        raise ValueError(NO_WORD_ENDS)
    sentence, end = row_index(places)
    return Activations(
        values=read_rows(model, encodings, places, layers, batch_size),
        layers=layers,
        sentence=sentence,
        end=end,
        model=identify(model),
        rows=rows,
        prepend_bos=prepends_bos(model, prepend_bos),
        texts_hash=hash_texts(texts),
    )


def check_texts(texts: Sequence[str], rows: Rows) -> list[str]:
    """The texts as a list. ValueError for none, for one text that is no list, and for an unknown kind of rows."""
    if rows not in get_args(Rows):
        raise ValueError(f"expected rows 'last' or 'words'; got {rows!r}.")
    if isinstance(texts, str):
        raise ValueError(f"expected a list of texts; got one text, {texts[:40]!r}. Put it in a list.")
    texts = list(texts)
    if not texts:
        raise ValueError("expected at least one text; got none.")
    return texts


def locate(
    model: HookedModel, texts: Sequence[str], rows: Rows, prepend_bos: bool | None
) -> tuple[list[Encoding], list[dict[int, int]]]:
    """Every text as the model reads it, and its rows: {character at which the token ends: the token's position}."""
    encodings = encode(model, texts, prepend_bos=prepend_bos, truncate=rows == "words")
    if rows == "last":
        return encodings, [{-1: len(encoding.ids) - 1} for encoding in encodings]
    return encodings, [word_ends(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]


def row_index(places: Sequence[dict[int, int]], first_text: int = 0) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """`sentence` and `end` of the rows that `locate` found, the texts counted from `first_text`."""
    sentence = [i for i, place in enumerate(places, start=first_text) for _ in place]
    end = [end for place in places for end in place]
    return torch.tensor(sentence, dtype=torch.long), torch.tensor(end, dtype=torch.long)


def read_rows(
    model: HookedModel,
    encodings: Sequence[Encoding],
    places: Sequence[dict[int, int]],
    layers: Sequence[int],
    batch_size: int,
    site: Site = "resid_post",
) -> Float[Tensor, "row layer *width"]:
    """Run the model over the texts that `locate` encoded and keep the rows it found: of width "d_model", or at the site `z`
    "head d_head"."""
    first_row = torch.tensor([0, *map(len, places)]).cumsum(0).tolist()
    width = (model.cfg.n_heads, model.cfg.d_head) if site == "z" else (model.cfg.d_model,)
    values = torch.empty(first_row[-1], len(layers), *width)
    device = device_of(model)
    batches = by_length([len(encoding.ids) for encoding in encodings], batch_size)

    def keep(x: Tensor, hook: Any, *, slot: int, prompt: Tensor, position: Tensor, row: Tensor) -> None:
        values[row, slot] = x[prompt.to(x.device), position.to(x.device)].float().cpu()

    for batch in track(batches, f"activations of {model.cfg.model_name}", len(batches)):
        tokens, mask = pad([encodings[i].ids for i in batch], device)
        where = {
            "prompt": torch.tensor([k for k, i in enumerate(batch) for _ in places[i]], dtype=torch.long),
            "position": torch.tensor([p for i in batch for p in places[i].values()], dtype=torch.long),
            "row": torch.tensor([first_row[i] + k for i in batch for k in range(len(places[i]))], dtype=torch.long),
        }
        hooks = [(hook_name(layer, site), partial(keep, slot=slot, **where)) for slot, layer in enumerate(layers)]
        run_blocks(model, tokens, mask, hooks, max(layers))
    return values


def pair(source: Activations, target: Activations) -> tuple[Activations, Activations]:
    """The rows that both models have: the same text up to the same character, in the same order.

    Raises:
        ValueError: different texts or kinds of rows, or too few rows in common.
    """
    if (source.texts_hash, source.rows) != (target.texts_hash, target.rows):
        raise ValueError("expected activations of the same texts at the same kind of rows; collect both again alike.")
    if torch.equal(source.sentence, target.sentence) and torch.equal(source.end, target.end):
        return source, target
    kept = shared_rows(source, target)
    check_shared(len(kept), len(source), len(target))
    return source.take(kept[:, 0]), target.take(kept[:, 1])


def check_shared(shared: int, of_source: int, of_target: int) -> None:
    """ValueError if the models share too few of the rows that either has, as `tokens.check_alignment` says before they run."""
    if shared < ALIGNED * (of_source + of_target - shared):
        raise ValueError(
            f"expected both tokenizers to end a token at {ALIGNED:.0%} of the words at least; they do at {shared}, of "
            f"{of_source} in the source and {of_target} in the target. Use other texts, or rows='last'."
        )


def shared_rows(source: Activations, target: Activations) -> Int[Tensor, "row 2"]:
    """Which row of the source goes with which of the target: the same text up to the same character."""
    keys = [zip(a.sentence.tolist(), a.end.tolist(), strict=True) for a in (source, target)]
    column = {key: row for row, key in enumerate(keys[1])}
    return torch.tensor([(row, column[key]) for row, key in enumerate(keys[0]) if key in column], dtype=torch.long).view(-1, 2)


def hash_texts(texts: Sequence[str]) -> str:
    """Sixteen hexadecimal digits that stand for these texts in this order."""
    digest = hashlib.sha256()
    for i, text in enumerate(texts):
        digest.update(("\x00" * (i > 0) + text).encode())
    return digest.hexdigest()[:16]
