"""Theorems of the maps: what ridge, leave-one-sentence-out, coverage and weighting must equal, computed the long way round.

Tolerances: maps are solved in float64 and returned in float32, hence 1e-5 of the largest entry; R2 is measured in float32
where rows are far from dimensions, hence 1e-4.
"""

import warnings
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS, random_model, save_tokenizer, save_word_tokenizer, unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contrans_tl import ContrastPairs, load_model, refine
from contrans_tl.models import ModelId
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import (
    COVERAGE_RIDGE,
    RIDGES,
    AffineMap,
    LayerMaps,
    fit_affine,
    fit_maps,
    reformulate,
)
from contrans_tl.solvers import decompose, dual_coefficients, group_rows, leave_one_sentence_out

SHAPES = {"more rows than dimensions": (60, 12), "fewer rows than dimensions": (24, 40), "one row more": (21, 20)}
"""(rows, d_source)"""
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def related(n: int, d_source: int, d_target: int = 7, layers: tuple[int, int] = (1, 1), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of two models that see the same latent variables, with noise and a large mean in both."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    latent = draw(n, 6) * torch.logspace(0, -1, 6)
    sides = (
        torch.stack([latent @ draw(6, d) + 0.2 * draw(n, d) + 3 * draw(d) for _ in range(count)], dim=1)
        for count, d in zip(layers, (d_source, d_target), strict=True)
    )
    source, target = sides
    return source, target


def uneven(n: int) -> Tensor:
    """Sentences of one to four rows, not in order."""
    ids = torch.repeat_interleave(torch.arange(n), torch.tensor([1, 3, 2, 4] * n)[:n])[:n]
    return ids[torch.randperm(n, generator=torch.Generator().manual_seed(3))]


def textbook(x: Tensor, y: Tensor, ridge: float, weights: Tensor | None = None, centre: bool = True) -> tuple[Tensor, Tensor]:
    """W and b of weighted ridge by normal equations with an explicit column of ones, the bias unpenalised; ridge absolute."""
    weights = torch.ones(len(x), dtype=x.dtype) if weights is None else weights
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1) if centre else x
    penalty = ridge * torch.eye(ones.shape[1], dtype=x.dtype)
    if centre:
        penalty[-1, -1] = 0
    solution = torch.linalg.lstsq(ones.T @ (weights[:, None] * ones) + penalty, ones.T @ (weights[:, None] * y)).solution
    return (solution[:-1].T, solution[-1]) if centre else (solution.T, torch.zeros(y.shape[1], dtype=x.dtype))


def absolute(maps: LayerMaps, layer: int = 0) -> float:
    return maps.ridge(layer) * maps.decomposition(layer).scale


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    actual, expected = actual.double(), expected.double()
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1e-9))


def concept_of(maps: LayerMaps, vectors: Tensor, name: str = "calm") -> ConceptVector:
    return ConceptVector(vectors.float(), maps.source.layers, name, maps.source.model)


def random_concept(maps: LayerMaps, seed: int = 5) -> ConceptVector:
    shape = maps.source.values.shape[1:]
    return concept_of(maps, torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


# --- what a map is --------------------------------------------------------------------------------------------------


def test_a_planted_affine_map_is_recovered_point_with_bias_and_direction_without() -> None:
    x = torch.randn(200, 10, dtype=torch.float64)
    weight, bias = torch.randn(7, 10, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    found = fit_affine(x, x @ weight.T + bias)
    new = torch.randn(5, 10)
    assert close(found.weight, weight)
    assert close(found.point(new), new.double() @ weight.T + bias)
    assert close(found.direction(new), new.double() @ weight.T)
    assert found.fit.r2 > 1 - 1e-6
    assert (found.fit.rows, found.fit.sentences, found.fit.rank) == (200, 200, 10)


@given(seed=st.integers(0, 10_000), n=st.integers(8, 40), d=st.integers(2, 40))
@settings(max_examples=25, deadline=None)
def test_points_differ_by_directions(seed: int, n: int, d: int) -> None:
    x, y = related(n, d, seed=seed)
    found = fit_affine(x[:, 0], y[:, 0], ridge=1e-2)
    a, b = torch.randn(2, d, dtype=torch.float32)
    assert close(found.point(a) - found.point(b), found.direction(a - b), 1e-4)


@shapes
@pytest.mark.parametrize("ridge", [1e-5, 1e-2, 1.0])
def test_ridge_equals_the_textbook_normal_equations(shape: tuple[int, int], ridge: float) -> None:
    x, y = related(*shape)
    found = fit_affine(x[:, 0], y[:, 0], ridge=ridge)
    trace = (x[:, 0] - x[:, 0].mean(0)).square().sum()
    weight, bias = textbook(x[:, 0], y[:, 0], ridge * float(trace) / min(shape[0] - 1, shape[1]))
    assert close(found.weight, weight)
    assert close(found.bias, bias)


@given(seed=st.integers(0, 10_000), d=st.integers(3, 20), beyond=st.integers(-2, 3), log_ridge=st.floats(-4, 0))
@settings(max_examples=25, deadline=None)
def test_dual_equals_primal_where_rows_are_about_as_many_as_dimensions(
    seed: int, d: int, beyond: int, log_ridge: float
) -> None:
    x = related(d + beyond, d, seed=seed)[0][:, 0]
    rows, v, ridge = x - x.mean(0), torch.randn(d, dtype=torch.float64), 10**log_ridge
    primal = rows @ torch.linalg.solve(rows.T @ rows + ridge * torch.eye(d), v)
    dual = torch.linalg.solve(rows @ rows.T + ridge * torch.eye(len(rows)), rows @ v)
    assert close(dual, primal, 1e-6)
    assert close(dual_coefficients(rows, v, ridge), primal, 1e-6)
    assert close(decompose(x).dual(rows @ v, ridge), primal, 1e-6)


@shapes
def test_the_papers_solver_is_the_pseudo_inverse_without_bias(shape: tuple[int, int]) -> None:
    x, y = related(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = fit_affine(x[:, 0], y[:, 0], method="paper")
    u, s, vh = torch.linalg.svd(x[:, 0], full_matrices=False)
    assert close(found.weight, (vh.T @ torch.diag(1 / s) @ u.T @ y[:, 0]).T)
    assert not found.bias.any()


@pytest.mark.parametrize(("n", "warns"), [(9, False), (11, True), (20, True), (39, True), (41, False)])
def test_the_papers_solver_warns_where_rows_are_near_dimensions(n: int, warns: bool) -> None:
    x, y = related(n, 20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LayerMaps.fit(x, y, method="paper")
    assert any("minimum-norm" in str(warning.message) for warning in caught) == warns


@shapes
def test_a_constant_added_to_all_activations_changes_no_direction(shape: tuple[int, int]) -> None:
    x, y = related(*shape, layers=(2, 2))
    moved_x, moved_y = x + 5 * torch.randn(shape[1]), y + 5 * torch.randn(7)
    maps, moved = LayerMaps.fit(x, y), LayerMaps.fit(moved_x, moved_y)
    concept = random_concept(maps)
    assert close(moved.carry(concept.vectors), maps.carry(concept.vectors))
    assert close(moved.reweighted(concept).carry(concept.vectors), maps.reweighted(concept).carry(concept.vectors))
    assert close(moved[1, 1].weight, maps[1, 1].weight)
    assert not close(moved[1, 1].bias, maps[1, 1].bias)


@shapes
@pytest.mark.parametrize("kind", ["uniform", "weighted", "paper"])
def test_carrying_equals_the_maps_own_direction(shape: tuple[int, int], kind: str) -> None:
    x, y = related(*shape, layers=(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        maps = LayerMaps.fit(x, y, method="paper" if kind == "paper" else "ridge", sentence=uneven(shape[0]))
    concept = random_concept(maps)
    if kind == "weighted":
        maps = maps.reweighted(concept)
    carried = maps.carry(concept.vectors)
    for s in range(3):
        for t in range(2):
            assert close(carried[s, t], maps[s, t].direction(concept.at(s)))
    assert torch.equal(maps.carry(concept.vectors, targets=[1]), carried[:, 1:])


# --- held out -------------------------------------------------------------------------------------------------------


# Without ridge, a fit that lacks several rows is of another kind (it interpolates) than the one that has a row to spare.
UNDEFINED = ("one row more", "paper", "uneven sentences")
LEFT_OUT = set(product(SHAPES, ("uniform", "weighted", "paper"), ("single rows", "uneven sentences"))) - {UNDEFINED}


@pytest.mark.parametrize("shape, kind, sentence", sorted(LEFT_OUT))
def test_leaving_a_sentence_out_equals_refitting_without_it(shape: str, kind: str, sentence: str) -> None:
    n, d = SHAPES[shape]
    x, y = related(n, d)
    x, y = x[:, 0], y[:, 0]
    ids = torch.arange(n) if sentence == "single rows" else uneven(n)
    weights = torch.rand(n, dtype=torch.float64) + 0.05 if kind == "weighted" else None
    source = decompose(x, weights, centre=kind != "paper")
    ridge = 0.0 if kind == "paper" else 0.05 * source.scale
    root = 1.0 if weights is None else weights.sqrt()[:, None]
    if kind == "paper":
        prepared = y
    else:
        prepared = root * (y - (y.mean(0) if weights is None else weights @ y / weights.sum()))
    found = leave_one_sentence_out(source, ridge, group_rows(ids)).residuals(prepared)
    for one in ids.unique():
        rest, rows = ids != one, ids == one
        if kind == "paper":
            weight, bias = (torch.linalg.pinv(x[rest]) @ y[rest]).T, 0.0
        else:
            weight, bias = textbook(x[rest], y[rest], ridge, None if weights is None else weights[rest])
        factor = 1.0 if weights is None else root[rows]
        assert close(found[rows], factor * (y[rows] - x[rows] @ weight.T - bias), 1e-6)


def test_what_no_map_without_ridge_is_left_for_is_nan_not_a_number_by_rounding() -> None:
    n, d = SHAPES["one row more"]
    x, y = related(n, d)
    ids = uneven(n)
    found = leave_one_sentence_out(decompose(x[:, 0], centre=False), 0.0, group_rows(ids)).residuals(y[:, 0])
    several = (ids[:, None] == ids).sum(1) > 1  # without such a sentence, fewer rows than dimensions are left
    assert bool(found[several].isnan().all()) and not bool(found[~several].isnan().any())
    with pytest.warns(UserWarning, match="minimum-norm"):
        maps = LayerMaps.fit(x, y, method="paper", sentence=ids)
    assert bool(maps.r2.isnan().all()) and not bool(maps[0, 0].weight.isnan().any())


@shapes
@pytest.mark.parametrize("kind", ["uniform", "weighted", "paper"])
def test_the_r2_grid_equals_every_maps_own(shape: tuple[int, int], kind: str) -> None:
    x, y = related(*shape, layers=(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        method: Any = "paper" if kind == "paper" else "ridge"
        maps = LayerMaps.fit(x.float(), y.float(), method=method, sentence=uneven(shape[0]) if kind != "paper" else None)
    if kind == "weighted":
        maps = maps.reweighted(random_concept(maps))
    direct = torch.tensor([[maps[s, t].fit.r2 for t in range(3)] for s in range(2)])
    assert maps.r2.shape == (2, 3)
    assert close(maps.r2, direct, 1e-4)


@pytest.mark.parametrize("shape", [(130, 30), (60, 12), (30, 60), (61, 60)])
@pytest.mark.parametrize("d_target", [5, 300], ids=["all dimensions", "random mixtures"])
def test_the_ridge_is_the_best_of_all_by_leave_one_sentence_out(shape: tuple[int, int], d_target: int) -> None:
    # The scan goes from coarse to fine, over random mixtures of a wide target's dimensions, mostly in float32. Here all 17
    # strengths over all dimensions in float64: mixtures may pick another only if it is as good to within 1%.
    n, d = shape
    x, y = related(n, d, layers=(2, 4), d_target=d_target)
    maps = LayerMaps.fit(x.float(), y.float(), sentence=uneven(n))
    for s in range(2):
        source = decompose(x[:, s])
        errors = {}
        for ridge in RIDGES:
            centred = [y[:, t] - y[:, t].mean(0) for t in range(4)]
            left_out = leave_one_sentence_out(source, ridge * source.scale, group_rows(uneven(n)))
            errors[ridge] = sum(float((left_out.residuals(a) / a.norm()).square().sum()) for a in centred)
        best = min(errors, key=errors.__getitem__)
        assert errors[maps.ridge(s)] <= 1.01 * errors[best]
        if d_target == 5:
            assert maps.ridge(s) == best


@shapes
def test_cka_is_what_its_definition_says(shape: tuple[int, int]) -> None:
    x, y = related(*shape, layers=(2, 3))
    grid = LayerMaps.fit(x, y).cka
    for s in range(2):
        for t in range(3):
            a, b = x[:, s] - x[:, s].mean(0), y[:, t] - y[:, t].mean(0)
            expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
            assert float(grid[s, t]) == pytest.approx(float(expected), rel=1e-4)
    same = LayerMaps.fit(x, x).cka
    assert close(same.diagonal(), torch.ones(2), 1e-5)


@shapes
def test_shuffled_pairs_lose_r2_and_keep_ridge_and_rows(shape: tuple[int, int]) -> None:
    x, y = related(*shape, layers=(2, 2))
    maps = LayerMaps.fit(x, y)
    null = maps.shuffled(seed=1)
    assert bool((null.r2 < 0.1).all()) and bool((maps.r2 > 0.5).all())
    assert [null.ridge(s) for s in range(2)] == [maps.ridge(s) for s in range(2)]
    assert torch.equal(null.target.values.sort(0).values, maps.target.values.sort(0).values)
    assert torch.equal(null.source.values, maps.source.values)
    assert torch.equal(maps.shuffled(seed=1).target.values, null.target.values)
    assert not torch.equal(maps.shuffled(seed=2).target.values, null.target.values)


# --- coverage and weights -------------------------------------------------------------------------------------------


@shapes
def test_coverage_is_what_its_definition_says(shape: tuple[int, int]) -> None:
    x, y = related(*shape, layers=(2, 1))
    maps = LayerMaps.fit(x, y)
    concept = random_concept(maps)
    for s, found in enumerate(maps.coverage(concept).tolist()):
        rows, v = x[:, s] - x[:, s].mean(0), concept.at(s).double()
        gram = rows.T @ rows
        ridge = COVERAGE_RIDGE * gram.trace() / shape[1] * torch.eye(shape[1], dtype=torch.float64)
        assert found == pytest.approx(float(v @ gram @ torch.linalg.solve(gram + ridge, v) / v.square().sum()), abs=1e-6)


def test_coverage_is_one_where_the_corpus_is_rich_and_zero_off_its_span() -> None:
    x, y = related(400, 10)
    full = LayerMaps.fit(x, y)
    strongest = torch.linalg.svd(x[:, 0] - x[:, 0].mean(0), full_matrices=False).Vh[0]
    assert float(full.coverage(concept_of(full, strongest[None]))) > 0.999
    flat = x.clone()
    flat[..., 4] = 1.5
    silent = LayerMaps.fit(flat, y)
    off = concept_of(silent, torch.eye(10)[4][None])
    assert float(silent.coverage(off)) == pytest.approx(0, abs=1e-12)
    assert close(silent.carry(off.vectors) + 1, torch.ones(1, 1, 7))
    with pytest.raises(ValueError, match="no row says anything about 'calm'"):
        silent.reweighted(off)


def test_low_coverage_is_warned_about_in_plain_words() -> None:
    x, y = related(60, 40)
    x[:, :, 20:] *= 1e-3  # half of the dimensions hardly vary
    maps = LayerMaps.fit(x, y)
    with pytest.warns(UserWarning, match="calm: does not arrive. the corpus hardly shows this concept: coverage 0.*add text"):
        reformulate(random_concept(maps), maps)


@shapes
def test_concept_weights_are_what_the_rows_say_and_need_the_source_alone(shape: tuple[int, int]) -> None:
    x, y = related(*shape, layers=(2, 1))
    maps = LayerMaps.fit(x, y)
    concept = random_concept(maps)
    weighted = maps.reweighted(concept)
    assert weighted.weights is not None
    for s in range(2):
        rows = x[:, s] - x[:, s].mean(0)
        gram = rows.T @ rows
        ridge = COVERAGE_RIDGE * gram.trace() / shape[1] * torch.eye(shape[1], dtype=torch.float64)
        said = (rows @ torch.linalg.solve(gram + ridge, concept.at(s).double())) ** 2
        assert close(weighted.weights[s], (1 + said / said.mean()) / 2)  # half of the weight is uniform
        expected = weighted.weights[s].double().sum() ** 2 / weighted.weights[s].double().square().sum()
        assert close(weighted.effective_rows[s], expected)
    other = LayerMaps.fit(x, torch.randn_like(y)).reweighted(concept).weights
    assert other is not None and torch.equal(other, weighted.weights)


@shapes
def test_a_weighted_map_equals_brute_force_weighted_ridge(shape: tuple[int, int]) -> None:
    x, y = related(*shape)
    maps = LayerMaps.fit(x, y)
    concept = random_concept(maps)
    weighted = maps.reweighted(concept)
    assert weighted.weights is not None
    weights = weighted.weights[0].double()
    centred = weights.sqrt()[:, None] * (x[:, 0] - weights @ x[:, 0] / weights.sum())
    ridge = maps.ridge(0) * float(centred.square().sum()) / min(shape[0] - 1, shape[1])
    weight, bias = textbook(x[:, 0], y[:, 0], ridge, weights)
    assert close(weighted[0, 0].weight, weight)
    assert close(weighted[0, 0].bias, bias)
    assert close(weighted.carry(concept.vectors)[0, 0], weight @ concept.at(0).double())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert close(reformulate(concept, maps).vectors[0], weight @ concept.at(0).double())
        assert close(reformulate(concept, maps, weighting="uniform").vectors[0], maps[0, 0].weight @ concept.at(0))


def test_equal_weights_change_nothing() -> None:
    for shape in SHAPES.values():
        x, y = related(*shape)
        maps = LayerMaps.fit(x, y, ridge=1e-2)
        equal = replace(maps, weights=torch.ones(1, shape[0]), _memo={})
        assert close(equal[0, 0].weight, maps[0, 0].weight)
        assert close(equal.r2, maps.r2)


# --- what is derived from what ----------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("first", ["nothing", "everything"])
def test_derived_maps_do_not_depend_on_what_was_asked_before(shape: tuple[int, int], first: str) -> None:
    x, y = related(*shape, layers=(3, 3))
    y[:, 1] = torch.randn_like(y[:, 1])  # a layer that pulls the common ridge up
    maps = LayerMaps.fit(x, y)
    concept, other = random_concept(maps), random_concept(maps, seed=6)
    if first == "everything":
        _ = maps.r2, maps.cka, maps.carry(concept.vectors), maps.reweighted(other).r2, maps.coverage(other)
        _ = maps.only([1], [2]).r2, maps.shuffled(seed=4).r2, maps[2, 2]
    fresh = LayerMaps.fit(x, y)
    ridges = [fresh.ridge(s) for s in range(3)]

    def afresh(target: Tensor, weights: Tensor | None = None) -> LayerMaps:
        return replace(LayerMaps.fit(x, target), weights=weights, _memo={("ridge", s): ridge for s, ridge in enumerate(ridges)})

    part = maps.only([2, 0], [2])
    assert part.source.layers == (2, 0) and part.target.layers == (2,)
    assert [part.ridge(2), part.ridge(0)] == [ridges[2], ridges[0]]
    assert close(part[0, 2].weight, fresh[0, 2].weight)
    assert close(part.r2, fresh.r2[[2, 0]][:, [2]])
    assert close(part.carry(concept.vectors[[2, 0]]), fresh.carry(concept.vectors)[[2, 0]][:, [2]])

    null = maps.shuffled(seed=1)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    assert close(null.r2, afresh(y[order]).r2)
    assert close(null.carry(concept.vectors), afresh(y[order]).carry(concept.vectors))

    weighted = maps.reweighted(concept)
    again = afresh(y, weighted.weights)
    assert close(weighted.r2, again.r2, 1e-4)
    assert close(weighted.carry(concept.vectors), again.carry(concept.vectors))
    assert close(weighted.only([1], [0]).carry(concept.vectors[1:2]), again.carry(concept.vectors)[1:2, :1])
    assert close(weighted.only([1], [0]).r2, again.r2[1:2, :1], 1e-4)
    assert close(weighted.shuffled(seed=1).r2, afresh(y[order], weighted.weights).r2, 1e-4)
    # weights are always those of the rows as they are, never of rows weighted before
    rows_said = weighted.reweighted(other).weights
    expected = fresh.reweighted(other).weights
    assert rows_said is not None and expected is not None and close(rows_said, expected)
    assert close(weighted.coverage(other), fresh.coverage(other))


def test_layers_are_taken_by_their_names_not_their_places() -> None:
    x, y = related(40, 8, layers=(3, 3))
    maps = LayerMaps.fit(x, y)
    part = maps.only([1, 2], [2])
    moved = reformulate(random_concept(maps), part, layers={2: 2}, weighting="uniform")
    assert moved.layers == (2,)
    assert close(moved.vectors[0], maps[2, 2].direction(random_concept(maps).at(2)))


# --- concepts and artifacts -------------------------------------------------------------------------------------------


def rich_maps() -> LayerMaps:
    return LayerMaps.fit(*related(300, 6, layers=(2, 4)))


def test_reformulate_takes_for_every_target_layer_the_source_layer_that_predicts_it_best_or_as_told() -> None:
    x, y = related(300, 6, layers=(2, 4))
    x[:, 0] += 5 * torch.randn(300, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y[:, 2] = x[:, 0, :1] + 0.1 * y[:, 2]  # one target layer reads the noise
    maps = LayerMaps.fit(x, y)
    concept = random_concept(maps)
    assert reformulate(concept, maps).provenance["layers"] == [[1, 0], [1, 1], [0, 2], [1, 3]]
    told = reformulate(concept, maps, layers={1: 0})
    assert told.layers == (0,) and told.model == maps.target.model
    with pytest.raises(ValueError, match="expected layers of the maps"):
        reformulate(concept, maps, layers={1: 7})
    with unchecked(), pytest.raises(ValueError, match="expected weighting"):
        reformulate(concept, maps, weighting="some")  # type: ignore[arg-type]


def test_another_models_concept_is_refused() -> None:
    maps = rich_maps()
    elsewhere = replace(random_concept(maps), model=ModelId("other", None, "other", 2, 6, "raw"))
    centred = replace(random_concept(maps), model=replace(maps.source.model, basis="centred"))
    for concept in (elsewhere, centred):
        for use in (maps.coverage, maps.reweighted, lambda concept: reformulate(concept, maps)):
            with pytest.raises(ValueError, match="these maps start in source"):
                use(concept)
    with pytest.raises(ValueError, match="no row weights"):
        paper = LayerMaps.fit(*related(300, 6), method="paper")
        paper.reweighted(random_concept(paper))


@pytest.mark.parametrize("weighted", [False, True])
def test_maps_are_loaded_as_they_were_saved(tmp_path: Path, weighted: bool) -> None:
    maps = LayerMaps.fit(*(side.float() for side in related(50, 8, layers=(2, 3))), sentence=uneven(50))
    concept = random_concept(maps)
    if weighted:
        maps = maps.reweighted(concept)
    loaded = LayerMaps.load(maps.only([1], [0, 2]).save(tmp_path / "maps.safetensors"))
    part = maps.only([1], [0, 2])
    assert (loaded.source.layers, loaded.target.layers, loaded.method) == ((1,), (0, 2), "ridge")
    assert loaded.ridge(1) == maps.ridge(1)
    assert torch.equal(loaded.carry(concept.vectors[1:]), part.carry(concept.vectors[1:]))
    assert torch.equal(loaded.r2, part.r2)
    assert (loaded.weights is None) != weighted
    one = AffineMap.load(maps[1, 2].save(tmp_path / "map.safetensors"))
    assert torch.equal(one.weight, maps[1, 2].weight) and torch.equal(one.bias, maps[1, 2].bias)
    assert one.fit == maps[1, 2].fit
    with pytest.raises(ValueError, match="of kind 'affine map'"):
        AffineMap.load(tmp_path / "maps.safetensors")


# --- rows that go wrong -----------------------------------------------------------------------------------------------


@shapes
def test_duplicated_rows_count_twice(shape: tuple[int, int]) -> None:
    x, y = (side.float() for side in related(*shape))
    twice = torch.cat([x, x[: shape[0] // 2]])
    maps = LayerMaps.fit(twice, torch.cat([y, y[: shape[0] // 2]]), ridge=1e-2)
    weights = torch.ones(shape[0], dtype=torch.float64)
    weights[: shape[0] // 2] = 2
    weight, bias = textbook(x[:, 0].double(), y[:, 0].double(), absolute(maps), weights)
    assert close(maps[0, 0].weight, weight) and close(maps[0, 0].bias, bias)
    assert float(maps.r2) == pytest.approx(maps[0, 0].fit.r2, abs=1e-4)
    assert maps.ridge(0) == 1e-2


@shapes
def test_rank_deficient_rows_are_fitted_in_their_span(shape: tuple[int, int]) -> None:
    n, d = shape
    x = torch.randn(n, 3, dtype=torch.float64) @ torch.randn(3, d, dtype=torch.float64)
    y = x @ torch.randn(d, 7, dtype=torch.float64) + 1
    maps = LayerMaps.fit(x[:, None], y[:, None], sentence=uneven(n))
    found = maps[0, 0]
    assert found.fit.rank == 3
    assert close(found.point(x.float()), y, 1e-4)
    assert float(maps.r2) > 0.999 and found.fit.r2 > 0.999


def test_constant_columns_and_constant_layers_do_no_harm() -> None:
    for shape in SHAPES.values():
        x, y = related(*shape, layers=(2, 2))
        x[:, 0, 3], y[:, 0, 2] = 2.0, -1.0
        plain = LayerMaps.fit(x[:, :1], y[:, :1], ridge=1e-2)[0, 0]
        assert not plain.weight[:, 3].abs().max() > 1e-9 and not plain.weight[2].abs().max() > 1e-9
        assert float(plain.bias[2]) == pytest.approx(-1)
        y[:, 1] = 4.0  # a target layer that says nothing at all
        maps = LayerMaps.fit(x, y)
        assert bool(torch.isfinite(maps.r2).all()) and bool(torch.isfinite(maps.carry(random_concept(maps).vectors)).all())
        assert maps[0, 1].fit.r2 <= 1


@shapes
def test_one_huge_sink_row_leaves_the_arithmetic_right(shape: tuple[int, int]) -> None:
    x, y = related(*shape, layers=(1, 2))
    x[5] *= 3000
    y[5] *= 3000
    maps = LayerMaps.fit(x.float(), y.float(), sinks="keep")
    weight, _ = textbook(x[:, 0].float().double(), y[:, 0].float().double(), absolute(maps))
    assert close(maps[0, 0].weight, weight, 1e-4)
    assert close(maps.r2[0], torch.tensor([maps[0, t].fit.r2 for t in range(2)]), 1e-3)


def test_what_cannot_be_fitted_is_refused_by_a_sentence() -> None:
    x, y = (side[:, 0] for side in related(20, 5))
    broken = x.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(ValueError, match="activations of source hold NaN"):
        fit_affine(broken, y)
    with pytest.raises(ValueError, match="activations of target hold NaN or infinity"):
        fit_affine(x, torch.full_like(y, torch.inf))
    with pytest.raises(ValueError, match="at least two sentences; got 20 from one"):
        fit_affine(x, y, sentence=torch.zeros(20, dtype=torch.long))
    with unchecked():
        with pytest.raises(ValueError, match="expected paired rows; got 20 of the source and 19"):
            fit_affine(x, y[:19])
        with pytest.raises(ValueError, match="expected a method among"):
            fit_affine(x, y, method="magic")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="the sentence of each of 20 rows; got 7"):
            fit_affine(x, y, sentence=torch.arange(7))
    with pytest.raises(ValueError, match="has no ridge"):
        fit_affine(x, y, method="paper", ridge=0.1)
    with pytest.raises(ValueError, match="expected a ridge"):
        fit_affine(x, y, ridge=-1.0)
    with pytest.raises(ValueError, match="expected a collected layer"):
        LayerMaps.fit(x[:, None], y[:, None])[0, 3]
    with pytest.raises(ValueError, match="at least two sentences"):
        fit_affine(x[:0], y[:0])


# --- two models that have learned nothing -------------------------------------------------------------------------------


def test_untrained_models_line_up_where_their_texts_do_so_that_a_cosine_alone_proves_nothing(tmp_path: Path) -> None:
    # Nothing transfers between them in what they say (test_evaluation.py). But both see the same words, whatever the
    # tokenizer, and a difference of words is carried to much the same difference of words: hence the behavioural controls.
    models = []
    for name, architecture, save, seed in (("a", "llama", save_tokenizer, 1), ("b", "gpt2", save_word_tokenizer, 2)):
        random_model(architecture, seed).save_pretrained(tmp_path / name)
        save(tmp_path / name)
        models.append(load_model(tmp_path / name, device="cpu"))
    words, g = sorted(set(" ".join(TEXTS).replace(",", "").split())), torch.Generator().manual_seed(0)
    corpus = [" ".join(words[i] for i in torch.randint(len(words), (8,), generator=g).tolist()) for _ in range(100)]
    maps = fit_maps(*models, corpus[:60])
    assert len(maps.source) == len(maps.target) == 60 * 8
    carried, null = [], []
    for ends in zip(words[:6], words[6:12], strict=True):
        pairs = ContrastPairs("ending", *(tuple(f"{text} {end}" for text in corpus[60:]) for end in ends))
        concept, native = (refine(model, pairs) for model in models)
        for used, cosines in ((maps, carried), (maps.shuffled(seed=0), null)):
            moved = used.only([2], [2]).carry(concept.only(2).vectors)[0, 0]
            cosines.append(abs(float(torch.cosine_similarity(moved, native.at(2), dim=0))))
    assert sum(carried) / 6 > 0.4 > sum(null) / 6
