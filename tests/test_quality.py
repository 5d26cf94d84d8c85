"""Theorems of what a map is worth: planted maps score 1, unrelated rows score nothing, sink rows inflate R2 and nothing else.

Tolerances: maps and predictions are float32, hence 1e-5 of a share or cosine; a cosine of 1 - 1e-7 is an angle of 0.03 degrees.
"""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXTS, unchecked
from torch import Tensor

from contrans_tl import ContrastPairs, refine
from contrans_tl.activations import SINK, sink_rows
from contrans_tl.quality import (
    ALIKE,
    assess,
    cone_angle,
    cycle_cosine,
    effective_rank,
    linear_cka,
    retrieval,
    split_half,
)
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import LayerMaps, Method


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(n: int = 200, d_source: int = 12, d_target: int = 16, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Source rows, and target rows that are an affine map of them with noise."""
    x = draw(n, d_source, seed=seed) + 3
    y = x @ draw(d_source, d_target, seed=seed + 1) + 5
    return x, y + noise * (y - y.mean(0)).std() * draw(n, d_target, seed=seed + 2)


def fitted(x: Tensor, y: Tensor, method: Method = "ridge", rows_each: int = 4, **options: Any) -> LayerMaps:
    sentence = torch.arange(len(x)) // rows_each
    return LayerMaps.fit(x[:, None], y[:, None], sentence=sentence, method=method, **options)


def concept(maps: LayerMaps, vector: Tensor | None = None, side: str = "source") -> ConceptVector:
    model = getattr(maps, side).model
    vector = draw(model.d_model, seed=9) if vector is None else vector
    return ConceptVector(vector[None].float(), (0,), "calm", model)


def r2(predicted: Tensor, actual: Tensor) -> float:
    return float(1 - (actual - predicted).square().sum() / (actual - actual.mean(0)).square().sum())


# --- the whole report -----------------------------------------------------------------------------------------------


def test_a_planted_map_is_worth_all_there_is() -> None:
    x, y = planted()
    maps = fitted(x, y, ridge=0.0)
    v = draw(12, seed=9)
    native = concept(maps, draw(12, 16, seed=1).T @ v, side="target")
    quality = assess(maps, (0, 0), concept=concept(maps, v), native=native, ceiling=0.9)
    assert quality.concept is not None
    ones = (quality.r2, quality.r2_median, quality.cosine, quality.retrieval, quality.retrieval_back, quality.cycle_r2)
    assert ones == pytest.approx([1] * 6, abs=1e-5)
    carried = (quality.concept.energy, quality.concept.cycle, quality.concept.cosine_to_native, quality.concept.norm_to_native)
    assert carried == pytest.approx([1] * 4, abs=1e-5)
    assert quality.concept.cone < 0.1, "no resample of the sentences fits another map"
    assert quality.concept.norm_ratio == pytest.approx(float(native.vectors.norm() / v.norm()), rel=1e-5)
    assert quality.concept.coverage == pytest.approx(float(maps.coverage(concept(maps, v))))
    assert quality.sink_rows == 0 and quality.r2_with_sinks == quality.r2 == quality.r2_refitted


def test_unrelated_rows_are_worth_nothing() -> None:
    maps = fitted(draw(300, 12), draw(300, 16, seed=1))
    quality = assess(maps, (0, 0), concept=concept(maps))
    assert quality.concept is not None
    assert quality.r2 < 0.02 and quality.cycle_r2 < 0.02  # what the widest ridge leaves of noise
    assert quality.cosine < 0.1 and quality.retrieval < 0.05 and quality.retrieval_back < 0.05
    assert quality.concept.cone > 45


def test_r2_is_that_of_the_maps_where_no_row_is_a_sink() -> None:
    maps = fitted(*planted(noise=0.5))
    quality = assess(maps, (0, 0))
    assert quality.r2 == pytest.approx(float(maps.r2), abs=1e-4)  # theirs may be scanned in float32
    y, p = maps.target.at(0).double(), maps.held_out(0, 0).double()
    one_by_one = torch.tensor([r2(p[:, [k]], y[:, [k]]) for k in range(y.shape[1])])
    assert torch.allclose(quality.r2_by_dimension, one_by_one.float(), atol=1e-6)
    assert quality.r2_median == pytest.approx(float(one_by_one.median()), abs=1e-6)
    assert 0.5 < quality.r2 < 0.95, "or this test says nothing"


def test_a_constant_dimension_has_no_r2_and_does_not_count_in_the_median() -> None:
    x, y = planted(noise=0.5)
    y[:, 3] = 7.0
    quality = assess(fitted(x, y), (0, 0))
    assert bool(quality.r2_by_dimension[3].isnan()) and int(quality.r2_by_dimension.isnan().sum()) == 1
    assert quality.r2_median == pytest.approx(float(quality.r2_by_dimension.nanmedian()))


@pytest.mark.parametrize("method", ["ridge", "paper", "pcr", "reduced_rank", "procrustes"])
def test_maps_of_every_method_can_be_assessed(method: Method) -> None:
    maps = fitted(*planted(n=80, d_source=6, noise=0.3), method=method)
    quality = assess(maps, (0, 0), concept=concept(maps))
    assert quality.concept is not None and quality.method == method
    assert quality.r2 > 0.2 and 0 < quality.concept.cone < 60 and quality.concept.cycle > 0.5


def test_weighted_maps_are_assessed_as_they_are_weighted() -> None:
    maps = fitted(*planted(noise=0.5))
    v = concept(maps)
    plain, weighted = assess(maps, (0, 0), concept=v), assess(maps.reweighted(v), (0, 0), concept=v)
    assert plain.concept is not None and weighted.concept is not None
    assert weighted.weighted and not plain.weighted
    assert weighted.r2 < plain.r2, "all rows count alike in the score, and the plain map was fitted for that"
    assert weighted.concept.coverage == plain.concept.coverage
    assert weighted.concept.cone != plain.concept.cone


def test_a_report_is_short_to_print_and_plain_to_save() -> None:
    maps = fitted(*planted(noise=0.5))
    native = concept(maps, draw(16, seed=3), side="target")
    quality = assess(maps, (0, 0), concept=concept(maps), native=native, ceiling=0.9)
    lines = str(quality).splitlines()
    assert len(lines) <= 14 and max(map(len, lines)) <= 128
    assert all(
        word in str(quality) for word in ("R2", "retrieval@1", "linear CKA", "effective rank", "cone", "calm", "ceiling 0.900")
    )
    content = json.loads(json.dumps(quality.to_dict()))
    assert content["concept"]["cosine_to_native"] == quality.concept.cosine_to_native  # type: ignore[union-attr]
    assert len(content["r2_by_dimension"]) == 16 and content["r2_median"] == quality.r2_median
    assert "calm" not in str(assess(maps, (0, 0)))


def test_the_same_seed_gives_the_same_report() -> None:
    maps = fitted(*planted(noise=0.5))
    once, again = (assess(maps, (0, 0), concept=concept(maps), seed=4).to_dict() for _ in range(2))
    assert once == again


def test_what_cannot_be_assessed_is_said() -> None:
    maps = fitted(*planted())
    with pytest.raises(ValueError, match="expected a collected layer"):
        assess(maps, (0, 5))
    with pytest.raises(ValueError, match="at least five sentences"):
        assess(fitted(*planted(n=16)), (0, 0))
    native = concept(maps, side="target")
    with pytest.raises(ValueError, match="pass those as well"):
        assess(maps, (0, 0), native=native)
    with pytest.raises(ValueError, match="pass those as well"):
        assess(maps, (0, 0), concept=concept(maps), ceiling=0.9)
    with pytest.raises(ValueError, match="expected native= in target.*lives in source"):
        assess(maps, (0, 0), concept=concept(maps), native=concept(maps))
    with pytest.raises(ValueError, match="expected concept= in source.*lives in target"):
        assess(maps, (0, 0), concept=native)


# --- sink rows ------------------------------------------------------------------------------------------------------


def with_sinks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A twentieth of the rows, of 30 times the median norm in one direction of each model: which rows, and the rows."""
    sinks = torch.zeros(len(x), dtype=torch.bool)
    sinks[:: len(x) // (len(x) // 20)] = True
    x, y = x.clone(), y.clone()
    for rows, seed in ((x, 5), (y, 6)):
        direction = torch.nn.functional.normalize(draw(rows.shape[1], seed=seed), dim=0)
        rows[sinks] += 30 * rows.norm(dim=1).median() * direction
    return x, y, sinks


def test_sink_rows_are_found() -> None:
    x, y, sinks = with_sinks(*planted(noise=0.8))
    assert torch.equal(sink_rows(x), sinks) and torch.equal(sink_rows(y), sinks)
    assert not sink_rows(planted(noise=0.8)[0]).any()
    both = LayerMaps.fit(torch.stack([planted(noise=0.8)[0], x], dim=1), y[:, None], sinks="keep")
    assert torch.equal(both.source.sinks(), sinks), "in any layer"
    just = torch.ones(9, 4)
    just[0] *= SINK
    assert not sink_rows(just).any() and sink_rows(torch.cat([just, 1.01 * just[:1]])).tolist() == [False] * 9 + [True]


def test_sink_rows_inflate_r2_with_them_and_not_without() -> None:
    x, y = planted(n=400, noise=0.8)
    clean = assess(fitted(x, y), (0, 0))
    x, y, sinks = with_sinks(x, y)
    maps = fitted(x, y, sinks="keep")
    quality = assess(maps, (0, 0))
    assert quality.sink_rows == int(sinks.sum()) == 20
    assert quality.r2_with_sinks > 0.98 and quality.r2 < 0.75 and clean.r2 < 0.75
    assert quality.r2_refitted == pytest.approx(clean.r2, abs=0.02)  # 380 of the 400 rows
    assert quality.r2_with_sinks == pytest.approx(r2(maps.held_out(0, 0).double(), maps.target.at(0).double()), abs=1e-6)
    assert quality.cka.value == pytest.approx(clean.cka.value, abs=0.1), "other rows are drawn of each sentence"
    without = assess(fitted(x, y), (0, 0))
    assert (without.sink_rows, without.rows) == (quality.sink_rows, quality.rows)
    assert "R2 with them" in str(quality) and "R2 with them" not in str(clean)
    assert without.r2_with_sinks < without.r2 == without.r2_refitted == quality.r2_refitted


@pytest.mark.parametrize("kind", ["of one direction", "scaled", "in the source only", "unrelated"])
def test_sink_rows_change_nothing_that_the_default_says_of_other_rows(kind: str) -> None:
    x, y = planted(n=400, noise=0.8)
    clean = fitted(x, y)
    with_them, y_with, sinks = with_sinks(x, y)
    content = ~sinks
    if kind != "of one direction":
        with_them, y_with = x.clone(), y.clone()
        with_them[sinks] *= 30
    if kind == "scaled":
        y_with[sinks] *= 30
    elif kind == "unrelated":
        y_with[sinks] = 30 * y[sinks].norm(dim=1).mean() * draw(int(sinks.sum()), y.shape[1], seed=8)
    maps = fitted(with_them, y_with)
    held_out = maps.held_out(0, 0).double()
    # content rows by the fit beside sinks, against the same rows by the fit of all rows before any was a sink
    before = clean.held_out(0, 0)[content].double()
    assert r2(held_out, y[content]) == pytest.approx(r2(before, y[content]), abs=0.01)
    assert maps[0, 0].fit.sinks == int(sinks.sum())


@pytest.mark.parametrize("sinks", ["drop", "keep"])
def test_the_way_back_is_fitted_on_the_rows_of_the_way_there(sinks: Any) -> None:
    # Lengths so spread that without the sinks of the first look the median is lower, and a second look finds more.
    x, y = planted(n=400)
    x = x / x.norm(dim=1, keepdim=True) * torch.logspace(0, 3, 400).double()[:, None]
    maps = fitted(x, y, sinks=sinks)
    assert (len(maps.source) < 400) == (sinks == "drop") and bool(maps.source.sinks().any())
    back = maps.reverse()
    assert torch.equal(back.source.values, maps.target.values) and torch.equal(back.target.values, maps.source.values)
    assert back[0, 0].fit.sinks == maps[0, 0].fit.sinks
    v = concept(maps)
    assert np.isfinite(cycle_cosine(maps.reweighted(v), (0, 0), v)), "row weights, too, belong to these rows"


# --- retrieval ------------------------------------------------------------------------------------------------------


def test_retrieval_is_what_comparing_every_row_with_every_other_gives() -> None:
    y = draw(700, 6)  # more rows than are compared at once
    p = y + 0.7 * draw(700, 6, seed=1)
    unit = [torch.nn.functional.normalize(rows - y.mean(0), dim=1) for rows in (p, y)]
    scores = unit[0] @ unit[1].T
    expected = [float((scores.argmax(dim) == torch.arange(700)).double().mean()) for dim in (1, 0)]
    assert retrieval(p, y) == pytest.approx(expected) and 0.05 < expected[0] < 0.9


def test_equal_rows_do_not_compete_and_a_constant_prediction_finds_nothing() -> None:
    y = draw(20, 6).repeat(3, 1)
    assert retrieval(y, y) == (1.0, 1.0)
    assert retrieval(y + 1e-6 * draw(60, 6, seed=1), y) == (1.0, 1.0), "nor do rows that differ by rounding"
    assert retrieval(y.mean(0).expand(60, 6), y) == (0.0, 0.0)
    assert all(map(np.isnan, retrieval(torch.full((60, 6), torch.nan), y)))
    assert ALIKE < 1e-6, "or rows that differ would count as one"


# --- CKA ------------------------------------------------------------------------------------------------------------


def test_cka_is_one_for_a_rotation_and_its_null_is_apart() -> None:
    x = draw(60, 12)
    rotated = x @ torch.linalg.qr(draw(12, 12, seed=1)).Q * 3 + 2
    found = linear_cka(x, rotated)
    assert found.value == pytest.approx(1) and found.debiased == pytest.approx(1)
    assert found.null_95 < 0.5 and found.p_value == 1 / 200 and found.rows == 60


def test_the_permutation_null_does_not_reject_unrelated_rows_though_raw_cka_is_large() -> None:
    found = [linear_cka(draw(40, 100, seed=2 * k), draw(40, 120, seed=2 * k + 1), permutations=99) for k in range(40)]
    assert min(a.value for a in found) > 0.6, "more dimensions than rows"
    assert np.mean([a.debiased for a in found]) == pytest.approx(0, abs=0.02)
    # p is uniform on (0, 1]: of 40, 2 are expected at 0.05 or below, and more than 7 once in a thousand; seeds are fixed.
    assert sum(a.p_value <= 0.05 for a in found) <= 7
    assert np.mean([a.p_value for a in found]) == pytest.approx(0.5, abs=0.15)
    assert all(a.null_mean < a.null_95 and abs(a.value - a.null_mean) < 0.1 for a in found)


def test_cka_is_that_of_the_maps_on_one_row_a_sentence() -> None:
    x, y = planted(n=40, noise=0.5)
    maps = fitted(x, y, rows_each=1)
    quality = assess(maps, (0, 0))
    assert quality.cka.value == pytest.approx(float(maps.cka), abs=1e-5) and quality.cka.rows == 40
    assert assess(fitted(x, y, rows_each=4), (0, 0)).cka.rows == 10
    with pytest.raises(ValueError, match="at least four rows"):
        linear_cka(x[:3], y[:3])


def test_debiased_cka_uses_the_unbiased_estimator_of_hsic() -> None:
    x, y = planted(n=20, noise=0.5)

    def hsic(k: Tensor, m: Tensor) -> Tensor:  # Song et al. 2012, eq. 5
        n = len(k)
        k, m = k - k.diagonal().diag(), m - m.diagonal().diag()
        ends = k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)
        return ((k @ m).trace() + ends) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    assert linear_cka(x, y).debiased == pytest.approx(float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()), abs=1e-9)


# --- spectrum, energy, cone, cycle ----------------------------------------------------------------------------------


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert 1 < effective_rank(torch.tensor([5.0, 1.0])) < 1.3
    maps = fitted(*planted(noise=0.5))
    quality = assess(maps, (0, 0))
    singular = torch.linalg.svdvals(maps[0, 0].weight.double())
    # Squaring loses what is below the root of float64's precision; the smallest here is a tenth of the largest.
    assert torch.allclose(quality.spectrum[: len(singular)].double(), singular, rtol=1e-5)


def test_a_vector_outside_the_rows_has_no_energy_in_their_span() -> None:
    x, y = planted(n=40, d_source=12)
    x = torch.cat([x, torch.full((40, 3), 2.0)], dim=1)  # three dimensions that never change
    maps = fitted(x, y)

    def energy(vector: Tensor) -> float:
        quality = assess(maps, (0, 0), concept=concept(maps, vector)).concept
        assert quality is not None
        return quality.energy

    inside, outside = torch.eye(15)[0], torch.eye(15)[14]
    assert energy(inside) == pytest.approx(1) and energy(outside) == pytest.approx(0, abs=1e-12)
    assert energy(inside + 2 * outside) == pytest.approx(1 / 5)


def test_energy_with_fewer_rows_than_dimensions_is_the_share_of_their_span() -> None:
    x, y = planted(n=20, d_source=50)
    maps = fitted(x, y, rows_each=1)
    v = draw(50, seed=9)
    basis = torch.linalg.qr((x - x.mean(0)).float().double().T).Q[:, :19]
    quality = assess(maps, (0, 0), concept=concept(maps, v)).concept
    assert quality is not None and quality.energy == pytest.approx(
        float((basis.T @ v).square().sum() / v.square().sum()), abs=1e-5
    )


def test_the_cone_narrows_as_sentences_are_added() -> None:
    x, y = planted(n=6400, noise=1.0)
    angles = []
    for n in (400, 1600, 6400):
        maps = fitted(x[:n], y[:n], ridge=1e-3)
        angles.append(cone_angle(maps, (0, 0), concept(maps)))
    # An angle of a mean: half at four times the sentences; 60 resamples know their 95th percentile to about a tenth.
    assert angles[0] / angles[1] == pytest.approx(2, rel=0.35) and angles[1] / angles[2] == pytest.approx(2, rel=0.35)


def test_the_cone_knows_that_rows_of_one_sentence_are_one_draw() -> None:
    x, y = planted(n=100, noise=1.0)
    single = fitted(x, y, rows_each=1, ridge=1e-3)
    fourfold = fitted(x.repeat_interleave(4, 0), y.repeat_interleave(4, 0), rows_each=4, ridge=1e-3)
    apart = fitted(x.repeat_interleave(4, 0), y.repeat_interleave(4, 0), rows_each=1, ridge=1e-3)
    angles = [cone_angle(maps, (0, 0), concept(maps)) for maps in (single, fourfold, apart)]
    assert angles[0] == pytest.approx(angles[1], rel=0.02), "four copies of every row in its sentence say nothing new"
    assert angles[2] < 0.75 * angles[0], "as sentences of their own they would"


def test_the_cone_is_that_of_maps_fitted_on_the_rows_of_sentences_drawn_with_replacement() -> None:
    maps = fitted(*planted(n=120, noise=0.5), ridge=1e-2)
    v = concept(maps)
    carried, generator, angles = maps.carry(v.vectors)[0, 0].double(), torch.Generator().manual_seed(7), []
    for _ in range(40):
        rows = torch.cat([torch.arange(4 * k, 4 * k + 4) for k in torch.randint(30, (30,), generator=generator).tolist()])
        again = LayerMaps.fit(maps.source.values[rows], maps.target.values[rows], ridge=1e-2).carry(v.vectors)[0, 0].double()
        angles.append(torch.nn.functional.cosine_similarity(again, carried, dim=0).arccos().rad2deg())
    assert cone_angle(maps, (0, 0), v, resamples=40, seed=7) == pytest.approx(
        float(torch.stack(angles).quantile(0.95)), rel=1e-3
    )
    # The paper's solver has no weights: rows are repeated. Without ridge and bias to tell them apart the two agree.
    x, y = maps.source.values[:, 0], maps.target.values[:, 0]
    both = (
        fitted(x - x.mean(0), y - y.mean(0), method=method, ridge=ridge) for method, ridge in (("ridge", 1e-9), ("paper", None))
    )
    angle, papers = (cone_angle(each, (0, 0), concept(each)) for each in both)
    assert papers == pytest.approx(angle, rel=0.1)


def test_a_cycle_returns_what_the_target_has_kept() -> None:
    x, y = planted(n=400, d_source=12, d_target=6)  # half of the source's directions are lost on the way
    maps = fitted(x, y, ridge=1e-6)
    kept, lost = torch.linalg.svd(draw(12, 6, seed=1)).U[:, 0], torch.linalg.svd(draw(12, 6, seed=1)).U[:, 11]
    assert cycle_cosine(maps, (0, 0), concept(maps, kept)) == pytest.approx(1, abs=0.01)  # what comes back is regressed on
    assert cycle_cosine(maps, (0, 0), concept(maps, lost + kept)) == pytest.approx(0.5**0.5, abs=0.1)
    assert assess(maps, (0, 0)).cycle_r2 == pytest.approx(0.5, abs=0.1)  # 6 of 12 equal dimensions


def test_the_way_back_has_the_weights_of_the_way_there() -> None:
    x, y = planted(n=100)
    y[50:] = y[50:].flip(0)  # half of the rows are paired wrongly, and count for nothing
    weights = torch.cat([torch.ones(50), torch.full((50,), 1e-9)])[None]
    plain = fitted(x, y, ridge=1e-6)
    v = concept(plain)
    assert cycle_cosine(replace(plain, weights=weights, _memo={}), (0, 0), v) == pytest.approx(1, abs=1e-3)
    assert cycle_cosine(plain, (0, 0), v) < 0.99


def test_the_cycle_is_scored_on_sentences_that_no_map_was_fitted_on() -> None:
    maps = fitted(draw(40, 50), draw(40, 50, seed=1), ridge=1e-6)
    there_and_back = maps.reverse()[0, 0].point(maps[0, 0].point(maps.source.at(0).float()))
    assert r2(there_and_back.double(), maps.source.at(0)) > 0.99, "rows that maps were fitted on return, whatever they are"
    # Unrelated rows, and yet: what lies in the span of fewer rows than dimensions comes back; of others the part that does.
    assert 0.2 < assess(maps, (0, 0)).cycle_r2 < 0.8


# --- the target's own vector ----------------------------------------------------------------------------------------


def test_the_split_half_ceiling_of_prompts_that_agree_is_one(bridges: dict[str, Any]) -> None:
    pairs = ContrastPairs("x", positive=(TEXTS[0],) * 4, negative=(TEXTS[3],) * 4)
    ceiling = split_half(bridges["llama"], pairs, splits=4)
    assert ceiling.shape == (3,) and torch.allclose(ceiling, torch.ones(3), atol=1e-5)
    assert len(split_half(bridges["llama"], pairs, layers=[1], splits=2)) == 1
    with pytest.raises(ValueError, match="at least two prompts on each side"):
        split_half(bridges["llama"], ContrastPairs("x", positive=("a dog",), negative=("quick", "brown")))


def test_the_split_half_ceiling_is_the_cosine_to_the_endless_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, errors = 30, 40, []
    signal = torch.nn.functional.normalize(draw(1, d), dim=-1)

    def prompts(seed: int) -> Tensor:
        return 0.9 * draw(2 * n, 1, d, seed=seed) / d**0.5 + torch.cat([signal.expand(n, 1, d), torch.zeros(n, 1, d)])

    pairs = ContrastPairs("x", positive=("a",) * n, negative=("b",) * n)
    for seed in range(20):
        values = prompts(seed + 10)
        monkeypatch.setattr("contrans_tl.quality.collect", lambda *_, rows=values, **__: SimpleNamespace(values=rows))
        native = values[:n].mean(0) - values[n:].mean(0)
        truth = torch.nn.functional.cosine_similarity(native, signal)
        with unchecked():  # no model is looked at
            errors.append(float(split_half(None, pairs, splits=20) - truth))  # type: ignore[arg-type]
    # 20 sets of prompts: the ceiling is right on average, within what one set is off.
    assert abs(np.mean(errors)) < 0.01 and max(map(abs, errors)) < 0.05


def test_the_ceiling_belongs_to_the_vector_that_refine_gives(bridges: dict[str, Any]) -> None:
    pairs = ContrastPairs("x", positive=tuple(TEXTS[:2]), negative=tuple(TEXTS[2:4]))
    assert refine(bridges["llama"], pairs).vectors.shape[0] == len(split_half(bridges["llama"], pairs))
