"""Corpora: which sentences of a large pool to fit maps on, so that they carry a concept.

    sentences = select_sentences(source, concept, "pool.txt", 200)       # a file, or texts that can be read more than once
    maps = fit_maps(source, target, sentences)
    maps.coverage(concept)

A map carries what its corpus shows of a concept v: 1 - coverage is lambda v^T (M + lambda I)^-1 v / |v|^2, M the second
moments of the centred rows. To choose rows that make v^T (M + lambda I)^-1 v small is c-optimal design. Its gradient by the
weight of row i is -s_i^2,

    s_i = (x_i - mean)^T (M + lambda I)^-1 v ,

the number that `LayerMaps.reweighted` weights rows by. Chosen are the sentences of the largest mean s^2 a word, M and lambda
those of the whole pool: the first step of that design. What the pool is full of makes M large and s small, so that of
hundreds of copies of a sentence few or none are chosen.

Further steps of the design, choosing sentence after sentence by what those before leave unseen, were tried and raise coverage
but not the effect. `data/studies/sentences.py` measures the rule beside sentences drawn at random.

It looks at the source alone, and at no labels. The pool is streamed: memory holds n sentences, the rows of a few batches, and
8 d_model^2 bytes for each layer of the concept. It does not choose for several concepts at once; choose for each, and join.
"""

import heapq
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.activations import locate, read_rows, row_index
from contrans_tl.data import normalised
from contrans_tl.models import HookedModel, check_layers, check_ready, identify
from contrans_tl.moments import Moments, said_about
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector

BATCHES = 4
"""Batches of texts that run together, so that texts of like length share one."""


def select_sentences(
    source: HookedModel,
    concept: ConceptVector,
    pool: Iterable[str] | str | os.PathLike[str],
    n: int,
    *,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> list[str]:
    """The n sentences of the pool that say most about the concept, in the order of the pool, none twice.

    Args:
        concept: of the source; all its layers count alike. `concept.only(8, 9)` chooses for these.
        pool: texts, or the path of a file with one a line. They are read three times, first without the model.

    Raises:
        ValueError: before any model runs: a concept of another model, texts that can be read only once, fewer than n
            different ones. Afterwards: no row says anything about the concept, fewer than n sentences with the end of a
            word, or NaN.
    """
    if not concept.model.same_space(here := identify(source)):
        raise ValueError(f"the concept {concept.name!r} lives in {concept.model}, the model is {here}: refine it there.")
    check_ready(source)
    check_layers(concept.layers, source.cfg.n_layers, str(source.cfg.model_name))
    if n < 1:
        raise ValueError(f"expected to select at least one sentence; got n = {n}.")
    if isinstance(pool, Iterator):
        raise ValueError("expected texts that can be read more than once; got an iterator. Give a list, or a file's path.")
    total = _check_size(pool, n)

    def rows(doing: str) -> Iterator[tuple[list[str], Float[Tensor, "row layer d_model"], Int[Tensor, " row"]]]:
        """A few batches at a time: texts, their rows at the ends of words, and which text each is of."""
        chunks = _chunks(_texts(pool), BATCHES * batch_size)
        for texts in track(chunks, doing, -(-total // (BATCHES * batch_size))):
            encodings, places = locate(source, texts, "words", prepend_bos)
            values = read_rows(source, encodings, places, concept.layers, batch_size)
            yield texts, values, row_index(places)[0]

    moments = [Moments(source.cfg.d_model, 0) for _ in concept.layers]
    for _, values, _ in rows("what the pool shows"):
        for slot, layer_moments in enumerate(moments):
            layer_moments.update(values[:, slot], values[:, slot, :0])
    if not all(bool(torch.isfinite(layer_moments.x_mean).all()) for layer_moments in moments):
        raise ValueError(f"activations of {here.name} hold NaN or infinity; try another dtype.")
    weigh = [said_about(*each) for each in zip(moments, concept.vectors, strict=True)]

    best: list[tuple[float, int, str]] = []  # (score, -number, text), the least of them first
    kept: set[str] = set()
    number = 0
    for texts, values, sentence in rows(f"choosing for {concept.name}"):
        said = torch.stack([weights(values[:, slot].double()) for slot, weights in enumerate(weigh)]).mean(0)
        words = sentence.bincount(minlength=len(texts))
        scores = torch.zeros(len(texts)).double().index_add_(0, sentence, said) / words
        for text, score, has_words in zip(texts, scores.tolist(), words.tolist(), strict=True):
            number += 1
            if not has_words or normalised(text) in kept:
                continue
            kept.add(normalised(text))
            heapq.heappush(best, (score, -number, text))
            if len(best) > n:
                kept.remove(normalised(heapq.heappop(best)[2]))
    if len(best) < n:
        raise ValueError(f"expected {n} sentences with a token that ends where a word ends; the pool has {len(best)}.")
    return [text for _, _, text in sorted(best, key=lambda item: -item[1])]


def _check_size(pool: Iterable[str] | str | os.PathLike[str], n: int) -> int:
    """How many texts the pool has. ValueError for fewer than n different ones."""
    different: set[int] = set()
    total = 0
    for text in _texts(pool):
        total += 1
        if len(different) < n:
            different.add(hash(normalised(text)))
    if len(different) < n:
        raise ValueError(f"expected a pool of at least {n} different sentences; got {len(different)}.")
    return total


def _texts(pool: Iterable[str] | str | os.PathLike[str]) -> Iterator[str]:
    if not isinstance(pool, (str, os.PathLike)):
        yield from pool
        return
    if not Path(pool).is_file():
        raise ValueError(f"there is no file {str(pool)!r}.")
    with open(pool, encoding="utf-8-sig") as lines:
        try:
            yield from (line.strip() for line in lines if line.strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{pool}: expected UTF-8 text. Convert it: iconv -t UTF-8.") from error


def _chunks(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    while chunk := list(islice(texts, size)):
        yield chunk
