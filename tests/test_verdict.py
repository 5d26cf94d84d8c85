"""Verdicts: presence is what its formula says, depends on nothing it should not, and tells the two corpora apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contrans_tl import ContrastPairs, collect, load_model, read_sentences, refine
from contrans_tl.demo import demo_data
from contrans_tl.models import ModelId
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import LayerMaps
from contrans_tl.solvers import COVERAGE_RIDGE
from contrans_tl.verdict import ABSENT, LOW_COVERAGE, PRESENT, Verdict

shapes = pytest.mark.parametrize("shape", [(60, 12), (24, 40)], ids=["more rows than dimensions", "fewer"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def concept_in(maps: LayerMaps, v: Tensor) -> ConceptVector:
    return ConceptVector(v[None].float(), (0,), "calm", maps.source.model)


def presence(x: Tensor, v: Tensor, **options: Any) -> float:
    maps = LayerMaps.fit(x[:, None], draw(len(x), 1, 3, seed=5), **options)
    return maps.verdict(concept_in(maps, v), 0).presence


@shapes
def test_presence_is_how_many_times_the_showing_rows_hold_the_concept(shape: tuple[int, int]) -> None:
    x, v = draw(*shape) + 3, draw(shape[1], seed=1).float().double()
    rows = x - x.mean(0)
    gram = rows.T @ rows
    inverse = torch.linalg.inv(gram + COVERAGE_RIDGE * gram.trace() / shape[1] * torch.eye(shape[1]).double())
    s = rows @ inverse @ v
    times = (s.pow(4).sum() / s.square().sum()).sqrt() / (v @ inverse @ v)
    expected = float(times * v.norm() / rows.square().sum(1).mean().sqrt())
    assert presence(x, v) == pytest.approx(expected, rel=1e-9)  # float64 throughout
    assert presence(x, v, standardise=True) == pytest.approx(expected, rel=1e-9), "it looks at the rows as they are"
    maps = LayerMaps.fit(x[:, None], draw(len(x), 1, 3, seed=5))
    verdict = maps.verdict(concept_in(maps, v))
    assert verdict.effective_rows == pytest.approx(float(s.square().sum() ** 2 / s.pow(4).sum()), rel=1e-9)
    assert verdict.coverage == pytest.approx(float(maps.coverage(concept_in(maps, v))[0]), rel=1e-6)  # float32 of the latter


@shapes
def test_presence_does_not_change_with_scales_or_repeated_rows(shape: tuple[int, int]) -> None:
    x, v = draw(*shape) + 3, draw(shape[1], seed=1)
    expected = presence(x, v)
    for same in (presence(x, 7 * v), presence(x, -v), presence(0.01 * x, v), presence(torch.cat([x, x]), v)):
        assert same == pytest.approx(expected, rel=1e-6)  # v is kept in float32


def test_a_few_rows_that_speak_of_a_concept_show_it_more_than_many_that_brush_it() -> None:
    noise, v = 0.3 * draw(400, 20), torch.eye(20).double()[0]
    few, many = noise.clone(), noise.clone()
    few[:16] += 5 * v * torch.tensor([1.0, -1.0] * 8)[:, None]
    many += v * torch.tensor([1.0, -1.0] * 200)[:, None]  # the same variance along v
    assert presence(few, v) > 3 * presence(many, v)


def test_the_layer_is_the_one_that_predicts_the_target_best() -> None:
    x, y = draw(60, 2, 8), draw(60, 1, 5, seed=2)
    y[:, 0] = x[:, 1] @ draw(8, 5, seed=3)
    maps = LayerMaps.fit(x, y)
    concept = ConceptVector(draw(2, 8, seed=4).float(), (0, 1), "calm", maps.source.model)
    assert maps.verdict(concept).source_layer == 1
    assert maps.verdict(concept, 0).source_layer == 0


@pytest.mark.parametrize(
    ("presence", "coverage", "outlook", "said"),
    [
        (PRESENT, 0.99, "arrives", "calm: arrives. the corpus shows this concept: coverage 0.990, presence 0.120"),
        (ABSENT, 0.99, "doubtful", "shows this concept faintly"),
        (ABSENT - 1e-6, LOW_COVERAGE - 0.01, "does not arrive", "hardly shows this concept: coverage 0.974"),
        (ABSENT - 1e-6, LOW_COVERAGE, "does not arrive", "only brushes this concept, or speaks of its relatives"),
    ],
)
def test_a_verdict_says_why_and_what_to_do(presence: float, coverage: float, outlook: str, said: str) -> None:
    verdict = Verdict("calm", 3, presence, coverage, 20.0, 300, 64)
    assert verdict.outlook == outlook and said in str(verdict)
    assert ("add text that mentions it" in str(verdict)) == (outlook != "arrives")


def test_fewer_rows_than_dimensions_are_named_as_the_reason() -> None:
    verdict = Verdict("calm", 3, 0.01, 0.5, 20.0, 63, 64)
    assert "63 rows cannot show every direction of 64 dimensions" in str(verdict) and "more sentences" in str(verdict)


def test_a_concept_of_another_model_gets_no_verdict() -> None:
    maps = LayerMaps.fit(draw(60, 1, 8), draw(60, 1, 5, seed=2))
    elsewhere = ConceptVector(torch.ones(1, 8), (0,), "calm", ModelId("other", None, "other", 1, 8, "raw"))
    with pytest.raises(ValueError, match="these maps start in source"):
        maps.verdict(elsewhere)


def test_on_the_embedded_pair_the_verdict_tells_the_corpora_apart() -> None:
    data: Path = demo_data()
    source = load_model(data / "pair" / "source", device="cpu")
    outlooks = {}
    for corpus in ("generic", "neutral"):
        rows = collect(source, read_sentences(data / f"{corpus}.txt")[:300], rows="words", layers=[3])
        maps = LayerMaps.fit(rows, rows)
        for name in ("sadness", "disgust"):
            concept = refine(source, ContrastPairs.load(data / "concepts" / f"{name}.json"), layers=[3])
            outlooks[corpus, name] = maps.verdict(concept).outlook
    assert {outlook for (corpus, _), outlook in outlooks.items() if corpus == "generic"} == {"arrives"}
    assert {outlook for (corpus, _), outlook in outlooks.items() if corpus == "neutral"} == {"does not arrive"}
