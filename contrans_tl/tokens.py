"""Tokens: texts -> token ids, with the character at which every token ends.

Padding is always on the right and the mask is made from the lengths, never from `ids != pad`: when pad == eos == bos
(GPT-2) that comparison drops real tokens, and it depends on nothing the tokenizer is set to (its padding side, its special
tokens). A causal model gives the same activations at a real token with and without padding to its right.

Two tokenizers share no tokens, but they share the text: a word ends at the same character in both (`word_ends`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor

from contrans_tl.models import HookedModel

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Encoding:
    """One text as a model reads it."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    """Character at which each token ends in the text; 0 for the beginning-of-sequence token."""


def prepends_bos(model: HookedModel, prepend_bos: bool | None = None) -> bool:
    """Whether texts get a beginning-of-sequence token: as asked, else the policy TransformerLens has for the family."""
    if prepend_bos is None:
        prepend_bos = bool(getattr(model.cfg, "default_prepend_bos", True))
        return prepend_bos and model.tokenizer.bos_token_id is not None
    if prepend_bos and model.tokenizer.bos_token_id is None:
        raise ValueError(f"prepend_bos=True, but the tokenizer of {model.cfg.model_name} has no bos token.")
    return prepend_bos


def encode(
    model: HookedModel, texts: Sequence[str], *, prepend_bos: bool | None = None, truncate: bool = False
) -> list[Encoding]:
    """Token ids of every text and where each token ends.

    Raises:
        ValueError: no tokenizer, a slow one (no character offsets), a text without tokens, or, unless `truncate`, one
            longer than the model's context.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer; load it with one.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer of this model.")
    bos = (tokenizer.bos_token_id,) if prepends_bos(model, prepend_bos) else ()
    room = model.cfg.n_ctx - len(bos)
    # verbose=False: a text beyond the context is our error or our truncation, not a warning of the tokenizer.
    batch = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    encodings = []
    for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True):
        if not ids:
            raise ValueError(f"expected text, got {text!r}, which has no tokens.")
        if len(ids) > room and not truncate:
            raise ValueError(
                f"a text of {len(ids) + len(bos)} tokens does not fit the context of {model.cfg.model_name} "
                f"({model.cfg.n_ctx}): {text[:60]!r}... Shorten it."
            )
        kept = min(room, len(ids))
        while 0 < kept < len(ids) and offsets[kept - 1][1] == offsets[kept][1]:
            kept -= 1  # the cut would split a character of several byte tokens, which all end where it ends
        ends = (0,) * len(bos) + tuple(end for _, end in offsets[:kept])
        encodings.append(Encoding((*bos, *ids[:kept]), ends))
    return encodings


def pad(
    sequences: Sequence[Sequence[int]], device: torch.device | str | None = None
) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]]:
    """Right-padded ids and the mask of real tokens. Any id serves as padding: nothing reads those positions."""
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids.to(device), mask.to(device)


def word_ends(text: str, encoding: Encoding) -> dict[int, int]:
    """{character: position} of the tokens that end where a word of the text ends.

    A token that runs past the word, or a word cut off by truncation, is left out. A character spelled with several byte
    tokens gives all of them the same end; the last one has read the whole character.
    """
    last_token = {end: position for position, end in enumerate(encoding.ends)}
    return {end: last_token[end] for end in (m.end() for m in _WORD.finditer(text)) if end in last_token}


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that running out of memory happens at once or never."""
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1; got {batch_size}.")
    order = iter(sorted(range(len(lengths)), key=lambda i: -lengths[i]))
    return list(_chunks(order, batch_size))


def _chunks(items: Iterable[int], size: int) -> Iterator[list[int]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
