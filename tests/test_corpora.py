"""Choosing sentences: those that say most about the concept, from a pool that is streamed."""

import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import unchecked

import contrans_tl.corpora
from contrans_tl import ConceptVector, ContrastPairs, LayerMaps, collect, load_model, read_sentences, refine
from contrans_tl.corpora import select_sentences
from contrans_tl.demo import demo_data

N = 8
"""Sentences that speak of the concept."""
NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo".split()


@pytest.fixture(scope="module")
def source() -> Any:
    """The embedded source."""
    return load_model(demo_data() / "pair" / "source", device="cpu")


@pytest.fixture(scope="module")
def concept(source) -> ConceptVector:
    pairs = ContrastPairs.load(demo_data() / "concepts" / "happiness.json")
    return refine(source, replace(pairs, positive=pairs.positive[:25], negative=pairs.negative[:25]))


@pytest.fixture(scope="module")
def neutral() -> list[str]:
    return read_sentences(demo_data() / "neutral.txt")[:120]


@pytest.fixture(scope="module")
def planted() -> list[str]:
    return [text for text in read_sentences(demo_data() / "generic.txt") if "happiness" in text][:N]


@pytest.fixture(scope="module")
def pool(neutral, planted) -> list[str]:
    lines = [*neutral, *planted]
    random.Random(0).shuffle(lines)
    return lines


def unseen(source: Any, concept: ConceptVector, texts: list[str]) -> torch.Tensor:
    """1 - coverage."""
    x = collect(source, texts, rows="words", layers=concept.layers)
    return 1 - LayerMaps.fit(x, x).coverage(concept)


def test_the_sentences_that_show_the_concept_are_found_and_come_in_the_order_of_the_pool(source, concept, pool, planted):
    chosen = select_sentences(source, concept, pool, 2 * N)
    assert set(planted) < set(chosen)
    assert chosen == [text for text in pool if text in chosen]


def test_they_are_those_that_concept_weights_count_most(source, concept, pool):
    for asked in (concept.only(2, 3), concept.only(0)):
        x = collect(source, pool, rows="words", layers=asked.layers)
        weights = LayerMaps.fit(x, x, ridge=1e-3).reweighted(asked).weights.double().mean(0)  # of mean one in each layer
        sums, words = torch.zeros(len(pool)).double().index_add_(0, x.sentence, weights), x.sentence.bincount()
        expected = (sums / words).topk(30).indices.sort().values.tolist()
        assert select_sentences(source, asked, pool, 30) == [pool[i] for i in expected]


def test_selected_sentences_cover_the_concept_better_than_random_ones(source, concept, pool):
    chosen = unseen(source, concept, select_sentences(source, concept, pool, 30))
    drawn = [unseen(source, concept, random.Random(seed).sample(pool, 30)) for seed in range(5)]
    assert (chosen < 0.7 * torch.stack(drawn).min(0).values).all()


class Streamed:
    """Texts made anew at each reading, which tells how many of them are alive at once."""

    class Text(str):
        __slots__ = ("__weakref__",)

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.alive, self.most = texts, 0, 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            made = self.Text(text)
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(made, self._gone)
            yield made

    def _gone(self) -> None:
        self.alive -= 1


def test_a_file_and_a_stream_give_what_a_list_gives(source, concept, pool, tmp_path):
    concept = concept.only(0)
    file = tmp_path / "pool.txt"
    file.write_text("\n\n".join(pool) + "\n", encoding="utf-8")
    expected = select_sentences(source, concept, pool, 20)
    assert select_sentences(source, concept, file, 20) == expected
    assert select_sentences(source, concept, str(file), 20) == expected
    # float32 in batches of other lengths differs by 1e-6 of a score: the twentieth is further from the next than that
    assert select_sentences(source, concept, Streamed(pool), 20, batch_size=11) == expected


def test_memory_does_not_grow_with_the_pool(source, concept, neutral, monkeypatch):
    rows, most = [], []
    read_rows = contrans_tl.corpora.read_rows

    def counted(*args: Any) -> torch.Tensor:
        values = read_rows(*args)
        rows.append(len(values))
        return values

    monkeypatch.setattr(contrans_tl.corpora, "read_rows", counted)
    longest = max(len(text.split()) for text in neutral)
    for n in (40, 120):
        stream = Streamed(neutral[:n])
        select_sentences(source, concept.only(0), stream, 10, batch_size=4)
        most.append(stream.most)
    assert max(rows) <= 16 * longest  # sixteen texts at a time
    # two lots of sixteen, while one takes the other's place, the ten that are kept, and one that is being read
    assert max(most) <= 2 * 16 + 10 + 1


def test_no_sentence_is_chosen_twice(source, concept, pool):
    [best] = select_sentences(source, concept, pool, 1)
    chosen = select_sentences(source, concept, [*([best, f"  {best} "] * 5), *pool], N)
    assert len({" ".join(text.split()) for text in chosen}) == N


def test_of_many_near_copies_few_are_chosen(source, concept, neutral, planted):
    # what the pool is full of, its second moments have seen
    copies = [f"{name} won the ring in a contest and felt happiness by {other}." for name in NAMES for other in NAMES]
    few = select_sentences(source, concept, [*neutral, *copies[::36]], 4)
    assert set(few) == set(copies[::36])  # where there are few, they are the best there is
    many = select_sentences(source, concept, [*neutral, *planted, *copies], N)
    assert len(set(many) & set(copies)) <= N // 4 < len(set(many) & set(planted))


def test_a_text_without_words_is_passed_over(source, concept):
    assert select_sentences(source, concept, ["...", "the ring", "the book"], 2) == ["the ring", "the book"]
    with pytest.raises(ValueError, match="expected 3 sentences with a token that ends where a word ends; the pool has 2"):
        select_sentences(source, concept, ["...", "the ring", "the book"], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 5}, "at least 5 different sentences; got 4"),
        ({"pool": []}, "at least 2 different sentences; got 0"),
        ({"pool": ["one ", "One"]}, "at least 2 different sentences; got 1"),
        ({"pool": iter(["one", "two"])}, "got an iterator. Give a list"),
        ({"pool": "no/such/file.txt"}, "there is no file 'no/such/file.txt'"),
        ({"n": 0}, "at least one sentence; got n = 0"),
    ],
)
def test_mistakes_are_told_before_the_model_runs(source, concept, monkeypatch, change, message):
    arguments = {"pool": ["one", "two", "three", "four"], "n": 2} | change
    monkeypatch.setattr(contrans_tl.corpora, "read_rows", lambda *args: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message), unchecked():
        select_sentences(source, concept, arguments["pool"], arguments["n"])


def test_a_concept_of_another_model_is_refused(source, concept):
    foreign = replace(concept, model=replace(concept.model, fingerprint="another"))
    with pytest.raises(ValueError, match="the concept 'happiness' lives in .* refine it there"):
        select_sentences(source, foreign, ["one", "two"], 1)


def test_a_file_that_is_not_utf_8_is_refused(source, concept, tmp_path):
    (tmp_path / "pool.txt").write_bytes("café\ntwo\n".encode("latin-1"))
    with pytest.raises(ValueError, match="expected UTF-8"):
        select_sentences(source, concept, tmp_path / "pool.txt", 1)


def test_a_concept_of_which_no_row_says_anything_is_refused(source, concept, pool):
    nothing = replace(concept, vectors=torch.zeros_like(concept.vectors))
    with pytest.raises(ValueError, match="no row says anything"):
        select_sentences(source, nothing, pool[:20], 2)
