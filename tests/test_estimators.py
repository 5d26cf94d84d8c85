"""Estimators: each recovers what it assumes, none loses to what it contains, and all keep the promises of a map."""

from typing import Any

import pytest
import torch
from torch import Tensor

from contrans_tl import fit_affine
from contrans_tl.reformulation import EXACT, UNWEIGHTED, LayerMaps, Method
from contrans_tl.solvers import folds

METHODS: tuple[Method, ...] = ("ridge", "paper", "pcr", "reduced_rank", "procrustes", "identity")
every_method = pytest.mark.parametrize("method", METHODS)
D = 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def falling(n: int, d: int, seed: int = 0) -> Tensor:
    """Rows whose principal components fall off by a factor of thirty, about a mean that is not zero."""
    basis = torch.linalg.qr(draw(d, d, seed=50))[0]
    return draw(n, d, seed=seed) * torch.logspace(0, -1.5, d).double() @ basis + 3 * draw(d, seed=51)


def orthonormal(d_target: int, d_source: int) -> Tensor:
    return torch.linalg.qr(draw(max(d_target, d_source), min(d_target, d_source), seed=7))[0].reshape(d_target, d_source)


def r2(map: Any, x: Tensor, y: Tensor) -> float:
    """On fresh rows."""
    return float(1 - (y - map.point(x.float())).square().sum() / (y - y.mean(0)).square().sum())


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual.double() - expected).abs().max() <= tolerance * expected.abs().max())


def related(n: int, d_source: int = D, d_target: int = D, noise: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows "row layer d" of a source and a target that share a linear map, with noise."""
    x = falling(n, d_source, seed)
    y = x @ draw(d_source, d_target, seed=1) + noise * draw(n, d_target, seed=seed + 2) + 5
    return x[:, None], y[:, None]


# --- planted maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_target", [D, D + 5], ids=["equal widths", "wider target"])
def test_procrustes_recovers_a_scaled_rotation_exactly(d_target: int) -> None:
    x, rotation = falling(60, D), 1.7 * orthonormal(d_target, D)
    found = fit_affine(x, x @ rotation.T + 4, method="procrustes")
    assert close(found.weight, rotation)  # float32 of the result
    assert close(found.bias, torch.full((d_target,), 4.0).double())
    assert found.fit.r2 == pytest.approx(1, abs=1e-9)


def test_into_a_narrower_stream_procrustes_has_orthonormal_rows_and_the_best_scale() -> None:
    x, y = falling(60, D), draw(60, 5, seed=9)
    found = fit_affine(x, y, method="procrustes").weight.double()
    gram = found @ found.T
    assert close(gram / gram[0, 0], torch.eye(5).double())
    here, there = x - x.mean(0), y - y.mean(0)
    residual = [float((there - c * here @ found.T).square().sum()) for c in (0.99, 1.0, 1.01)]
    assert residual[1] < min(residual[0], residual[2])


def test_identity_recovers_a_moved_mean_and_nothing_else() -> None:
    x = falling(60, D)
    found = fit_affine(x, x + 4, method="identity")
    assert torch.equal(found.weight, torch.eye(D))
    assert close(found.bias, torch.full((D,), 4.0).double())
    assert found.fit.r2 == pytest.approx(1, abs=1e-9)
    v = draw(D, seed=3).float()
    assert torch.equal(found.direction(v), v)


def test_pcr_recovers_a_map_of_the_leading_components_and_its_rank() -> None:
    x = draw(300, D) * torch.tensor([1.0] * 4 + [0.02] * (D - 4)) + 3  # a gap, so that parts of the rows agree on the four
    weight = torch.cat([draw(9, 4, seed=3), torch.zeros(9, D - 4)], 1)
    y = x @ weight.T + 0.1 * draw(300, 9, seed=4) + 1
    found = fit_affine(x, y, method="pcr")
    assert found.fit.rank == 4
    assert close(found.weight, weight, 0.02)  # three standard errors, 0.1 / sqrt(300), of entries up to 2
    assert fit_affine(x, y, method="pcr", rank=3).fit.rank == 3


def test_reduced_rank_recovers_a_map_of_low_rank_and_its_rank() -> None:
    x = falling(300, D)
    weight = draw(9, 2, seed=3) @ draw(2, D, seed=5)
    y = x @ weight.T + 0.3 * draw(300, 9, seed=4) + 1
    found = fit_affine(x, y, method="reduced_rank")
    assert found.fit.rank == 2
    assert torch.linalg.matrix_rank(found.weight, rtol=1e-4) == 2
    fresh = falling(2000, D, seed=20)
    assert r2(found, fresh, fresh @ weight.T + 1) > r2(fit_affine(x, y), fresh, fresh @ weight.T + 1)


@pytest.mark.parametrize("n", [40, 9], ids=["more rows than dimensions", "fewer"])
def test_reduced_rank_is_least_squares_of_that_rank_on_rows_that_hold_the_ridge(n: int) -> None:
    x, y = (side[:, 0] for side in related(n, noise=2.0))
    found = LayerMaps.fit(x[:, None], y[:, None], method="reduced_rank", rank=3, ridge=0.3)
    ridge = 0.3 * found.decomposition(0).scale
    # Ridge is least squares on the rows sqrt(ridge) I with target 0 appended; of rank 3, its fitted values' best rank-3 part.
    rows = torch.cat([x - x.mean(0), ridge**0.5 * torch.eye(D).double()])
    wanted = torch.cat([y - y.mean(0), torch.zeros(D, D).double()])
    full = torch.linalg.lstsq(rows, wanted).solution
    leading = torch.linalg.svd(rows @ full, full_matrices=False).Vh[:3]
    assert close(found[0, 0].weight, (full @ leading.T @ leading).T, 1e-4)  # float32 of the result


def test_standardising_recovers_a_map_from_dimensions_of_very_different_size() -> None:
    sizes = torch.logspace(0, -4, D).double()
    x, fresh = (draw(40, D, seed=seed) * sizes for seed in (0, 1))
    weight = draw(9, D, seed=3) / sizes  # every dimension matters alike
    y = x @ weight.T + draw(40, 9, seed=4)
    plain, standardised = (fit_affine(x, y, standardise=flag) for flag in (False, True))
    assert r2(standardised, fresh, fresh @ weight.T) > r2(plain, fresh, fresh @ weight.T) + 0.01
    assert standardised.fit.ridge > plain.fit.ridge


# --- none loses to what it contains ---------------------------------------------------------------------------------

NESTED: list[tuple[Method, Method]] = [
    ("ridge", "pcr"),  # here at full rank: least squares, a ridge of zero
    ("pcr", "pcr"),  # likewise
    ("reduced_rank", "ridge"),
    ("procrustes", "identity"),
]


@pytest.mark.parametrize(("wide", "special"), NESTED)
@pytest.mark.parametrize("truth", METHODS[2:])
def test_on_fresh_rows_no_estimator_loses_to_its_special_case(wide: Method, special: Method, truth: Method) -> None:
    # Fresh rows decide. The noise is that of the smallest of the source's components: a rotation, which nothing shrinks, would
    # pay for noise far above them.
    x, fresh = falling(240, D), falling(4000, D, seed=30)
    weight = {
        "pcr": draw(D, 3, seed=3) @ torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:3],
        "reduced_rank": draw(D, 2, seed=3) @ draw(2, D, seed=5),
        "procrustes": orthonormal(D, D),
        "identity": torch.eye(D).double(),
    }[truth]
    y = x @ weight.T + 0.03 * draw(240, D, seed=4)
    options: Any = {"rank": D} if special == "pcr" else {}
    outcomes = [
        r2(fit_affine(x, y, method=wide), fresh, fresh @ weight.T),
        r2(fit_affine(x, y, method=special, **options), fresh, fresh @ weight.T),
    ]
    assert outcomes[0] >= outcomes[1] - 0.01


def test_where_rows_equal_dimensions_the_papers_solver_fails_and_the_default_does_not() -> None:
    d = 40
    latent, fresh_latent = draw(d, 6), draw(2000, 6, seed=11)
    into, out = 2 * draw(6, d, seed=1), draw(6, 30, seed=2)
    x, fresh = latent @ into + 0.5 * draw(d, d, seed=3), fresh_latent @ into + 0.5 * draw(2000, d, seed=4)
    y, wanted = latent @ out + 0.5 * draw(d, 30, seed=5), fresh_latent @ out
    with pytest.warns(UserWarning, match="minimum-norm"):
        paper = fit_affine(x, y, method="paper")
    default = fit_affine(x, y)
    assert r2(paper, fresh, wanted) < 0  # worse than the mean
    assert r2(default, fresh, wanted) > 0.8
    assert paper.weight.norm() > 5 * default.weight.norm()


@pytest.mark.parametrize("ridge", [0.0, None])
def test_only_what_has_no_ridge_warns_near_as_many_rows_as_dimensions(ridge: float | None, recwarn: Any) -> None:
    fit_affine(*(side[:, 0] for side in related(13)), ridge=ridge)
    assert any("minimum-norm" in str(warning.message) for warning in recwarn) == (ridge == 0.0)


# --- promises of every map ------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("n", [40, 9], ids=["more rows than dimensions", "fewer"])
@pytest.mark.parametrize("weighted", [False, True], ids=["uniform", "weighted"])
@pytest.mark.parametrize("standardise", [False, True], ids=["as given", "standardised"])
def test_a_vector_is_carried_as_the_matrix_carries_it(method: Method, n: int, weighted: bool, standardise: bool) -> None:
    if method in UNWEIGHTED and (weighted or standardise):
        return
    x, y = related(n)
    x, y = torch.cat([x, x.flip(2)], 1), torch.cat([y, y.flip(2), y], 1)
    weights = draw(2, n, seed=8).abs().float() if weighted else None
    maps = LayerMaps.fit(x, y, method=method, standardise=standardise)
    maps = LayerMaps(*(getattr(maps, name) for name in FIELDS), weights)
    vectors = draw(2, D, seed=9).float()
    grid = maps.carry(vectors)
    for s in range(2):
        for t in range(3):
            assert close(grid[s, t], maps[s, t].direction(vectors[s]).double(), 2e-4)  # float32 of the weight
            difference = maps[s, t].point(vectors[s]) - maps[s, t].point(torch.zeros(D))
            assert close(grid[s, t], difference.double(), 2e-3)  # the bias, 30 times larger, in float32


FIELDS = ("source", "target", "method", "fixed_ridge", "fixed_rank", "standardise")


@every_method
def test_held_out_predictions_and_r2_are_those_of_refitting(method: Method) -> None:
    n = 44
    x, y = (side[:, 0] for side in related(n, seed=4))
    sentence = torch.arange(n) // 4
    maps = LayerMaps.fit(x[:, None], y[:, None], method=method, sentence=sentence)
    ridge = {"ridge": maps.ridge(0)} if method in ("ridge", "reduced_rank") else {}
    rank = {"rank": maps.rank(0, 0)} if method in ("pcr", "reduced_rank") else {}
    parts = folds(sentence, 11 if method in EXACT else 5)
    predicted = torch.empty_like(y)
    for fitted, held_out in parts:
        # The ridge is a multiple of the mean eigenvalue: absolute, it is the whole fit's for leave-one-sentence-out.
        scale = {}
        if method == "ridge":
            part = LayerMaps.fit(x[fitted, None], y[fitted, None], sentence=sentence[fitted]).decomposition(0)
            scale = {"ridge": maps.ridge(0) * maps.decomposition(0).scale / part.scale}
        refitted = fit_affine(x[fitted], y[fitted], method=method, sentence=sentence[fitted], **(ridge | rank | scale))
        predicted[held_out] = refitted.point(x[held_out].float()).double()
    assert close(maps.held_out(0, 0), predicted, 1e-4)  # float32 of the refitted maps
    total = y.square().sum() if method == "paper" else (y - y.mean(0)).square().sum()
    assert float(maps.r2) == pytest.approx(float(1 - (y - predicted).square().sum() / total), abs=1e-4)
    assert maps[0, 0].fit.r2 == pytest.approx(float(maps.r2), abs=1e-6)


def test_with_a_weight_of_zero_held_out_rows_are_predicted_by_parts() -> None:
    x, y = related(40)
    weights = torch.ones(1, 40)
    weights[0, ::7] = 0
    fitted = LayerMaps.fit(x, y)
    maps = LayerMaps(*(getattr(fitted, name) for name in FIELDS), weights)
    assert bool(torch.isfinite(maps.held_out(0, 0)).all())
    assert close(maps.held_out(0, 0), fitted.held_out(0, 0).double(), 0.5)


@every_method
def test_the_reverse_is_the_map_fitted_with_sides_exchanged(method: Method) -> None:
    x, y = related(40)
    there = LayerMaps.fit(x, y, method=method)
    back = there.reverse()
    assert torch.equal(back[0, 0].weight, LayerMaps.fit(y, x, method=method)[0, 0].weight)
    assert (back.source, back.target) == (there.target, there.source)
    if method not in UNWEIGHTED:
        weighted = LayerMaps(*(getattr(there, name) for name in FIELDS), torch.ones(1, 40))
        with pytest.raises(ValueError, match="reverse the unweighted maps"):
            weighted.reverse()


def test_the_reverse_keeps_ridge_rank_and_standardisation() -> None:
    x, y = related(40)
    options: Any = {"method": "reduced_rank", "ridge": 0.3, "rank": 3, "standardise": True}
    back = LayerMaps.fit(x, y, **options).reverse()
    assert torch.equal(back[0, 0].weight, LayerMaps.fit(y, x, **options)[0, 0].weight)


@every_method
def test_uniform_weights_of_one_change_nothing(method: Method) -> None:
    x, y = related(40)
    fitted = LayerMaps.fit(x, y, method=method)
    weighted = LayerMaps(*(getattr(fitted, name) for name in FIELDS), torch.ones(1, 40))
    if method != "paper":
        assert close(weighted[0, 0].weight, fitted[0, 0].weight.double(), 1e-6)
        assert float(weighted.r2) == pytest.approx(float(fitted.r2), abs=1e-9)


@every_method
def test_maps_of_every_method_survive_saving(method: Method, tmp_path: Any) -> None:
    x, y = related(40)
    maps = LayerMaps.fit(torch.cat([x, -x], 1), y, method=method, standardise=method not in UNWEIGHTED)
    loaded = LayerMaps.load(maps.save(tmp_path / "maps.safetensors"))
    for s in range(2):
        assert torch.equal(loaded[s, 0].weight, maps[s, 0].weight)
        assert loaded[s, 0].fit == maps[s, 0].fit


def test_what_was_left_out_is_known_when_maps_are_loaded(tmp_path: Any) -> None:
    x, y = related(40)
    x[::8] *= 100
    maps = LayerMaps.fit(x, y)
    loaded = LayerMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert loaded[0, 0].fit == maps[0, 0].fit and loaded[0, 0].fit.sinks == 5
    assert maps.sinks is not None and loaded.sinks is not None
    for side, expected in zip(loaded.sinks, maps.sinks, strict=True):
        assert torch.equal(side.values, expected.values) and torch.equal(side.sentence, expected.sentence)


def test_a_layer_alone_keeps_the_rank_that_all_layers_chose() -> None:
    x, y = related(60)
    noise = draw(60, 2, D, seed=6)
    maps = LayerMaps.fit(x, torch.cat([y, noise], 1), method="pcr")
    assert maps.only([0], [1]).rank(0, 1) == maps.rank(0, 1) == maps.rank(0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pcr", "ridge": 0.1}, "'pcr' has no ridge"),
        ({"method": "ridge", "rank": 3}, "a rank of at least 1 for pcr or reduced_rank"),
        ({"method": "pcr", "rank": 0}, "a rank of at least 1"),
        ({"method": "paper", "standardise": True}, "defined on the rows as they are"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(options: Any, message: str) -> None:
    x, y = related(40)
    with pytest.raises(ValueError, match=message):
        LayerMaps.fit(x, y, **options)


def test_identity_between_streams_of_different_widths_is_refused() -> None:
    x, y = related(40, d_target=D + 1)
    with pytest.raises(ValueError, match="streams of one width; got 12 and 13"):
        LayerMaps.fit(x, y, method="identity")
