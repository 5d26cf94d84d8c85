"""Tokens: texts -> token ids, with the character at which every token ends.

Padding is always on the right and the mask is made from the lengths, never from `ids != pad`: when pad == eos == bos
(GPT-2) that comparison drops real tokens, and it depends on nothing the tokenizer is set to (its padding side, its special
tokens). A causal model gives the same activations at a real token with and without padding to its right.

Two tokenizers share no tokens, but they share the text: a word ends at the same character in both (`word_ends`). A word is a
run of letters, digits and underscores with all that extends them - accents, vowel signs, joiners - so that none ends amid
what a reader sees as one character. Scripts that write no spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) have no such
runs to go by: there every character may end a word, and the two tokenizers decide which do, by ending a token there both.
Punctuation, symbols and emoji end no word. Rows are aligned or dropped, never shifted: a token counts as ending at a
character only if it, and nothing behind that character, has been read.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from jaxtyping import Int
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from contrans_tl.models import HookedModel

ALIGNED = 0.25
"""The least share of words that have to align. Where fewer than .24 of the tokens are equal, linear maps between models fail,
and from .67 on they do well (arXiv 2603.18908); on the embedded pair, too, the effect was lost between 36% and 16% of words,
kept by tokenizers that run across words - and not with as many rows at random: it is which words are lost."""
_ASCII_WORD = re.compile(r"\w+")
_EXTENDS = re.compile("[\u200c\u200d\uff9e\uff9f\u0e33\u0eb3\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
"""What Unicode's grapheme clusters (UAX 29) attach to the character before, beside combining marks: the joiners, the voicing
marks of halfwidth katakana, Thai and Lao AM, the skin tones and the tags of emoji."""
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""The blocks of Thai and Lao, Burmese, Khmer, kana, and Chinese characters."""
_VIRAMA = 9
"""Combining class of the signs that join two consonants into one character."""
_JOINS = frozenset(
    "\u200d\u0d4e\U000111c2\U000111c3\U0001193f\U00011941\U00011a84\U00011a85\U00011a86\U00011a87\U00011a88\U00011a89\U00011d46"
)
"""What belongs to whatever follows it: the zero-width joiner and the letters that Unicode prepends."""


@dataclass(frozen=True)
class Encoding:
    """One text as a model reads it."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]
    """Character at which each token ends in the text: 0 for the beginning-of-sequence token, -1 for a token that ends at none,
    because it ends amid a character of several tokens, in whitespace, or where the tokenizer's offsets cannot be trusted."""


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
    read = _read(model, texts)
    bos = (model.tokenizer.bos_token_id,) if prepends_bos(model, prepend_bos) else ()
    room = model.cfg.n_ctx - len(bos)
    encodings = []
    for text, (ids, offsets, ends) in zip(texts, read, strict=True):
        if len(ids) > room and not truncate:
            raise ValueError(
                f"a text of {len(ids) + len(bos)} tokens does not fit the context of {model.cfg.model_name} "
                f"({model.cfg.n_ctx}): {text[:60]!r}... Shorten it."
            )
        kept = min(room, len(ids))
        while 0 < kept < len(ids) and offsets[kept - 1][1] == offsets[kept][1]:
            kept -= 1  # the cut would split a character of several byte tokens, which all end where it ends
        encodings.append(Encoding((*bos, *ids[:kept]), (0,) * len(bos) + tuple(ends[:kept])))
    return encodings


def _read(model: HookedModel, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]], list[int]]]:
    """Of every text, the tokens' ids, their offsets as the tokenizer gives them, and where they truly end."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer; load it with one.")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; use the fast tokenizer of this model.")
    # verbose=False: a text beyond the context is our error or our truncation, not a warning of the tokenizer.
    batch = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    loses, read = _loses_characters(tokenizer), []
    for i, (text, ids, offsets) in enumerate(zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)):
        if not ids:
            raise ValueError(f"expected text, got {text!r}, which has no tokens.")
        unsure = loses and _loses_some_of(text, tokenizer)
        read.append((ids, offsets, [-1] * len(ids) if unsure else _ends(batch.tokens(i), offsets)))
    return read


def _ends(tokens: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The character at which each token ends, if it ends at one. Byte tokens have the offsets of the whole character, which
    only the last of them has read; a space (`Ġ`) at the end of a token is left out of its offsets, but has been read."""
    following = [start for start, _ in offsets[1:]] + [offsets[-1][1]]
    return [
        end if start < end <= after and not (token[-1:] == "Ġ" or token[-1:].isspace()) else -1
        for token, (start, end), after in zip(tokens, offsets, following, strict=True)
    ]


def _loses_characters(tokenizer: Any) -> bool:
    """Whether characters may be skipped without a token: in a BPE with neither all bytes nor an unknown token. Its offsets
    count tokens only, so that behind such a character they are too small."""
    backend = tokenizer.backend_tokenizer
    if getattr(backend.model, "unk_token", "") is not None:  # a BPE's; other models have none and lose nothing
        return False
    spellings = [ByteLevel.alphabet(), [f"<0x{byte:02X}>" for byte in range(256)]]
    return not any(all(backend.token_to_id(byte) is not None for byte in spelling) for spelling in spellings)


def _loses_some_of(text: str, tokenizer: Any) -> bool:
    backend = tokenizer.backend_tokenizer
    text = backend.normalizer.normalize_str(text) if backend.normalizer else text
    pieces = backend.pre_tokenizer.pre_tokenize_str(text) if backend.pre_tokenizer else [(text, None)]
    return any(backend.token_to_id(character) is None for character in set("".join(piece for piece, _ in pieces)))


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

    A word that ends within a token, or that truncation cut off, is left out.
    """
    position = {end: position for position, end in enumerate(encoding.ends)}
    return {end: position[end] for end in words(text) if end in position}


def words(text: str) -> list[int]:
    """The characters at which the words of the text end; see the top of this module."""
    if text.isascii():
        return [match.end() for match in _ASCII_WORD.finditer(text)]
    ends, inside, alone, linked = [], False, False, False  # in a word; of a script without spaces; behind a virama
    for i, character in enumerate(text):
        if unicodedata.category(character)[0] == "M" or _EXTENDS.match(character):
            linked = linked or unicodedata.combining(character) == _VIRAMA
            continue
        word, unspaced = character.isalnum() or character == "_", _UNSPACED.match(character) is not None
        goes_on = word and (linked or not (alone or unspaced))
        if inside and not goes_on and text[i - 1] not in _JOINS:
            ends.append(i)
        inside, alone, linked = word, unspaced, False
    return [*ends, len(text)] if inside and text[-1] not in _JOINS else ends


@dataclass(frozen=True)
class Alignment:
    """How much of some texts two tokenizers read at the same places."""

    words: int
    """Words of the texts."""
    kept: int
    """Words at whose end both end a token: the rows that maps are fitted on, but for those beyond a context."""
    dropped_by_source: int
    """Words at whose end only the target ends a token."""
    dropped_by_target: int
    """Words at whose end only the source ends a token. At the ends of the remaining words neither does."""
    equal_ends: float
    """Of all characters at which either ends a token, at a word's end or not, the share at which both do."""
    equal_tokens: float
    """Of the tokens of both, the share that span the same characters in the other."""

    @property
    def share(self) -> float:
        """Of the words at whose end either ends a token, the share kept. (Where neither does, there is nothing to align: a
        phrase that is one token in both, or two characters of Chinese.)"""
        return self.kept / max(self.kept + self.dropped_by_source + self.dropped_by_target, 1)

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of words align: {self.kept} of {self.words} kept, {self.dropped_by_source} dropped by the "
            f"source, {self.dropped_by_target} by the target; equal are {self.equal_ends:.1%} of token ends, "
            f"{self.equal_tokens:.1%} of tokens"
        )


def alignment(source: HookedModel, target: HookedModel, texts: Sequence[str]) -> Alignment:
    """How the two models' tokenizers align on these texts, whatever the contexts hold. No model runs.

    Raises:
        ValueError: no tokenizer, a slow one, or a text without tokens.
    """
    counts: Counter[str] = Counter()
    reads = [[ends for *_, ends in _read(model, texts)] for model in (source, target)]
    for text, *both in zip(texts, *reads, strict=True):
        ends, (x, y) = set(words(text)), ({end for end in ends if end > 0} for ends in both)
        # A token spans what lies between its end and the one before: whether the space goes with it makes no difference.
        spans = [set(pairwise([0, *sorted(there)])) for there in (x, y)]
        counts["words"] += len(ends)
        counts["kept"] += len(ends & x & y)
        counts["source"] += len((ends & y) - x)
        counts["target"] += len((ends & x) - y)
        counts["equal ends"] += len(x & y)
        counts["all ends"] += len(x | y)
        counts["equal tokens"] += 2 * len(spans[0] & spans[1])
        counts["all tokens"] += len(spans[0]) + len(spans[1])
    return Alignment(
        words=counts["words"],
        kept=counts["kept"],
        dropped_by_source=counts["source"],
        dropped_by_target=counts["target"],
        equal_ends=counts["equal ends"] / max(counts["all ends"], 1),
        equal_tokens=counts["equal tokens"] / max(counts["all tokens"], 1),
    )


def check_alignment(source: HookedModel, target: HookedModel, texts: Sequence[str]) -> Alignment:
    """The alignment of these texts, or ValueError if less than `ALIGNED` of their words align. No model runs; a thousand texts
    of a large corpus will do."""
    found = alignment(source, target, texts)
    if found.share < ALIGNED:
        raise ValueError(
            f"the tokenizers of {source.cfg.model_name} and {target.cfg.model_name} part these texts differently: {found}. "
            f"Expected at least {ALIGNED:.0%} of words: those left are a biased sample, and maps fitted on them carry little. "
            "Use other texts, if these are in a script that one of the tokenizers hardly knows, or rows='last'."
        )
    return found


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
