"""Moments of streamed rows give the map of all rows at once: in batches, in shards, with weights, in several processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, TEXTS, random_model, save_word_tokenizer
from torch import Tensor

from contrans_tl import LayerMaps, fit_affine, load_model, pair
from contrans_tl.models import ModelId
from contrans_tl.moments import Moments, accumulate, fit_streamed, held_out_r2, held_out_texts, said_about
from contrans_tl.processes import joined, share, summed
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import RIDGES
from contrans_tl.shards import StoredActivations, store
from contrans_tl.solvers import CONCEPT_SHARE

WORDS = "the quick brown fox jumps over a lazy dog letter made me feel happy river".split()
CORPUS = [f"{' '.join(WORDS[(7 * i + 3 * k) % len(WORDS)] for k in range(3 + i % 6))}" for i in range(40)] + TEXTS
OPTIONS: dict[str, Any] = {"rows": "words", "texts_per_shard": 8}
ROUNDING = 1e-10
"""Float64 keeps 16 digits; solves whose eigenvalues spread over 1e4 leave 12 of them."""
FLOAT32 = 1e-6
"""An AffineMap is float32: steps of 6e-8."""


def rows_of(n: int, d_source: int = 12, d_target: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A noisy affine map of rows whose dimensions differ in size."""
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    x = draw(n, d_source) * torch.logspace(0, -2, d_source).double() @ draw(d_source, d_source) + draw(d_source)
    return x, x @ draw(d_source, d_target) + 0.3 * draw(n, d_target) + draw(d_target)


def closed_form(x: Tensor, y: Tensor, ridge: float, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted, centred ridge as the textbook has it, from all rows."""
    w = torch.ones(len(x)).double() if weights is None else weights
    x_mean, y_mean = w @ x / w.sum(), w @ y / w.sum()
    a, b = w.sqrt()[:, None] * (x - x_mean), w.sqrt()[:, None] * (y - y_mean)
    penalty = ridge * a.square().sum() / min(len(x) - 1, x.shape[1])
    weight = b.T @ a @ torch.linalg.inv(a.T @ a + penalty * torch.eye(x.shape[1]).double())
    return weight, y_mean - weight @ x_mean


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def streamed(x: Tensor, y: Tensor, size: int, weights: Tensor | None = None) -> Moments:
    moments = Moments(x.shape[1], y.shape[1])
    for rows in torch.arange(len(x)).split(size):
        moments.update(x[rows], y[rows], None if weights is None else weights[rows])
    return moments


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("n", "ridge"), [(100, 1e-7), (100, 1.0), (8, 1e-3)])
def test_streamed_rows_give_the_map_of_the_whole(n, ridge, size, weighted):
    x, y = rows_of(n)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(1)).double() if weighted else None
    moments = streamed(x, y, size, weights)
    weight, bias, rank = moments.solve(ridge)
    expected = closed_form(x, y, ridge, weights)
    assert off(weight, expected[0]) < ROUNDING and off(bias, expected[1]) < ROUNDING
    assert rank == min(n - 1, 12) and moments.rows == moments.sentences == n


@pytest.mark.parametrize("ridge", [0.0, 1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("n", [6, 100])
def test_the_map_is_that_of_layer_maps_whatever_the_shape(n, ridge):
    x, y = rows_of(n)
    whole = fit_affine(x.float(), y.float(), ridge=ridge)
    weight, bias, rank = streamed(x.float(), y.float(), 7).solve(ridge)
    assert off(weight, whole.weight) < FLOAT32 and off(bias, whole.bias) < FLOAT32 and rank == whole.fit.rank


def test_moments_add_up_in_any_order_and_an_empty_part_adds_nothing():
    x, y = rows_of(60)
    parts = [streamed(x[rows], y[rows], 5) for rows in torch.arange(60).split(17)]
    whole, empty = streamed(x, y, 60), Moments(12, 9)
    backwards = ((parts[3] + parts[2]) + (empty + parts[1])) + (parts[0] + empty)
    for sums in (parts[0] + parts[1] + parts[2] + parts[3], backwards):
        assert (sums.rows, sums.sentences, sums.weight) == (60, 60, 60.0)
        for name in ("x_mean", "y_mean", "xx", "yx", "yy"):
            assert off(getattr(sums, name), getattr(whole, name)) < ROUNDING
    assert parts[0].rows == 17 and off(parts[0].xx, streamed(x[:17], y[:17], 17).xx) < ROUNDING  # the parts are left alone


def test_a_mean_a_million_times_the_spread_costs_no_digits():
    x, y = rows_of(200)
    far = 1e6 * torch.ones(12).double(), -1e6 * torch.ones(9).double()
    weight, bias, _ = (streamed(x[:100] + far[0], y[:100] + far[1], 9) + streamed(x[100:] + far[0], y[100:] + far[1], 9)).solve(
        1e-3
    )
    expected, _ = closed_form(x, y, 1e-3)
    # Numbers of size 1e6 have steps of 1e-10, and the smallest directions are 1e-2. Sums of squares about zero, of size 1e12
    # with steps of 1e-4, would leave nothing of them.
    assert off(weight, expected) < 1e-7
    assert off((x + far[0]) @ weight.T + bias, y + far[1]) < 1e-6


def test_a_weight_of_three_is_a_row_three_times():
    x, y = rows_of(30)
    times = torch.arange(30) % 4
    weighted, repeated = (
        streamed(x, y, 8, times.double()),
        streamed(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), 8),
    )
    assert weighted.weight == repeated.weight == float(times.sum())
    for name in ("x_mean", "y_mean", "xx", "yx", "yy"):
        assert off(getattr(weighted, name), getattr(repeated, name)) < ROUNDING


def test_held_out_r2_is_that_of_the_rows_themselves():
    x, y = rows_of(80)
    fitted, held_out = streamed(x[:60], y[:60], 60), streamed(x[60:], y[60:], 60)
    expected = []
    for ridge in RIDGES:
        weight, bias = closed_form(x[:60], y[:60], ridge)
        residual = y[60:] - x[60:] @ weight.T - bias
        expected.append(1 - residual.square().sum() / (y[60:] - y[60:].mean(0)).square().sum())
    assert (held_out_r2(fitted, held_out, RIDGES) - torch.stack(expected)).abs().max() < ROUNDING
    assert max(expected) - min(expected) > 0.1  # the ridges differ


# --- stored activations -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another tokenizer and fewer rows: it knows no letters, and the other's contexts are longer."""
    folder = tmp_path_factory.mktemp("other")
    random_model("gpt2").save_pretrained(folder)
    save_word_tokenizer(folder)
    return folder


Stores = tuple[StoredActivations, StoredActivations]


@pytest.fixture(scope="module")
def stores(bridges: dict[str, Any], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """Of a byte-level source and a word-level target; some texts are longer than the source's context."""
    folder, texts = tmp_path_factory.mktemp("stores"), [*CORPUS, "letters feel lazy " * 16]
    other = load_model(other_folder, device="cpu")
    x, y = store(bridges["llama"], texts, folder, **OPTIONS), store(other, texts, folder, **OPTIONS)
    assert len(x) < len(y)
    return x, y


def concept_of(model: ModelId, seed: int = 0) -> ConceptVector:
    vectors = torch.randn(model.n_layers, model.d_model, generator=torch.Generator().manual_seed(seed))
    return ConceptVector(vectors, tuple(range(model.n_layers)), "random", model)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_streamed_fit_is_that_of_layer_maps_on_all_paired_rows(stores, weighted):
    x, y = stores
    concept = concept_of(x.model) if weighted else None
    streamed = fit_streamed(x, y, (1, 2), concept=concept)
    maps = LayerMaps.fit(x.read(), y.read(), ridge=streamed.fit.ridge)
    whole = (maps if concept is None else maps.reweighted(concept))[1, 2]
    # with weights, those of LayerMaps are float32 as well
    assert off(streamed.weight, whole.weight) < FLOAT32 and off(streamed.bias, whole.bias) < FLOAT32
    same = ("method", "rows", "sentences", "rank", "ridge")
    assert [getattr(streamed.fit, name) for name in same] == [getattr(whole.fit, name) for name in same]
    assert len(x) == streamed.fit.rows and len(CORPUS) < streamed.fit.sentences
    if weighted:
        assert off(whole.weight, maps[1, 2].weight) > 0.01


def test_the_ridge_is_the_best_on_a_fifth_of_the_texts_and_stays_with_a_concept(stores):
    x, y = pair(stores[0].read(), stores[1].read())
    aside = held_out_texts(stores[0].n_texts)[x.sentence]
    assert 0.1 < aside.float().mean() < 0.3
    r2 = []
    for ridge in RIDGES:
        weight, bias = closed_form(x.at(0)[~aside].double(), y.at(2)[~aside].double(), ridge)
        residual = y.at(2)[aside].double() - x.at(0)[aside].double() @ weight.T - bias
        r2.append(float(1 - residual.square().sum() / (y.at(2)[aside] - y.at(2)[aside].mean(0)).square().sum()))
    fit = fit_streamed(*stores, (0, 2)).fit
    assert fit.ridge == RIDGES[r2.index(max(r2))] and abs(fit.r2 - max(r2)) < FLOAT32
    assert RIDGES[0] < fit.ridge < RIDGES[-1]
    assert fit_streamed(*stores, (0, 2), concept=concept_of(stores[0].model)).fit.ridge == fit.ridge


def test_concept_weights_have_mean_one_and_those_of_layer_maps(stores):
    x, y = pair(stores[0].read(), stores[1].read())
    concept = concept_of(x.model)
    fitted, held_out = accumulate(*stores, (1, 1))
    said = said_about(fitted + held_out, concept.at(1))(x.at(1).double())
    assert abs(float(said.mean()) - 1) < ROUNDING
    weights = 1 - CONCEPT_SHARE + CONCEPT_SHARE * said
    assert off(weights, LayerMaps.fit(x.only([1]), y.only([1])).reweighted(concept.only(1)).weights[0].double()) < FLOAT32


def test_fewer_rows_than_dimensions_are_fitted_too(bridges, tmp_path):
    x, y = (store(bridges[name], TEXTS, tmp_path, **OPTIONS) for name in ("llama", "gpt2"))
    assert len(x) < D_MODEL
    streamed = fit_streamed(x, y, (0, 0))
    whole = LayerMaps.fit(x.read([0]), y.read([0]), ridge=streamed.fit.ridge)[0, 0]
    assert off(streamed.weight, whole.weight) < FLOAT32 and streamed.fit.rank == whole.fit.rank < len(x)


def test_a_bf16_model_is_fitted_on_the_rows_it_gives(folders, bridges, tmp_path):
    x = store(load_model(folders["llama"], device="cpu", dtype=torch.bfloat16), CORPUS, tmp_path, **OPTIONS)
    y = store(bridges["gpt2"], CORPUS, tmp_path, **OPTIONS)
    streamed = fit_streamed(x, y, (1, 1), device="cpu")
    assert streamed.weight.dtype == torch.float32
    assert off(streamed.weight, LayerMaps.fit(x.read(), y.read(), ridge=streamed.fit.ridge)[1, 1].weight) < FLOAT32


def nan_in(stored: StoredActivations, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = StoredActivations.shard

    def spoiled(self: StoredActivations, number: int, layers: Any = None) -> Any:
        rows = shard(self, number, layers)
        if self is stored and number == 2:
            rows.values[1, 0, 3] = torch.inf
        return rows

    monkeypatch.setattr(StoredActivations, "shard", spoiled)


@pytest.mark.parametrize("side", [0, 1])
def test_infinity_in_one_row_is_refused_with_the_model_named(stores, monkeypatch, side):
    nan_in(stores[side], monkeypatch)
    with pytest.raises(ValueError, match=f"{stores[side].model.name} hold NaN or infinity"):
        fit_streamed(*stores, (0, 0))


def test_rows_of_massive_norm_are_left_out_as_in_memory(stores, monkeypatch):
    shard = StoredActivations.shard

    def with_a_sink(self: StoredActivations, number: int, layers: Any = None) -> Any:
        rows = shard(self, number, layers)
        if self is stores[0] and number in (1, 2):
            rows.values[1] *= 100
        return rows

    monkeypatch.setattr(StoredActivations, "shard", with_a_sink)
    found = fit_streamed(*stores, (0, 0), ridge=0.01)
    x, y = pair(stores[0].read(), stores[1].read())
    maps = LayerMaps.fit(x.only([0]), y.only([0]), ridge=0.01)
    assert found.fit.sinks == maps[0, 0].fit.sinks == 2
    assert found.fit.rows == len(x) - 2
    assert off(found.weight, maps[0, 0].weight) < FLOAT32


def test_what_cannot_be_fitted_is_one_line_of_error(stores, bridges, tmp_path):
    x, y = stores
    lonely = [store(bridges[name], TEXTS[:1], tmp_path, **OPTIONS) for name in ("llama", "gpt2")]
    for arguments, options, message in (
        ((x, y, (0, 0)), {"ridge": -1.0}, "ridge of at least 0"),
        ((x, y, (0, 9)), {}, "stored layers"),
        ((x, y, (9, 0)), {"concept": concept_of(x.model)}, "none at 9"),
        ((x, y, (0, 0)), {"concept": concept_of(y.model)}, "lives in"),
        ((x, y, (0, 0)), {"concept": 0.0 * concept_of(x.model)}, "no row says anything"),
        ((*lonely, (0, 0)), {}, "rows of more texts"),
        ((x, lonely[1], (0, 0)), {}, "store both alike"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            fit_streamed(*arguments, **options)
        assert "\n" not in str(caught.value)


# --- processes ----------------------------------------------------------------------------------------------------------


def test_alone_a_process_does_everything_and_waits_for_nobody():
    x = torch.arange(3.0)
    with joined():
        assert list(share(5)) == [0, 1, 2, 3, 4] and torch.equal(summed(x), x)


def work(source: Path, target: Path, folder: Path) -> None:
    """What each process does: store both models' activations, fit, and fail in one of them while the other waits."""
    from contrans_tl import activations, shards

    ran: list[int] = []
    run_blocks, rank = activations.run_blocks, os.environ.get("RANK", "0")

    def counted(model: Any, tokens: Any, *rest: Any) -> None:
        ran.append(len(tokens))
        run_blocks(model, tokens, *rest)

    def failed(*arguments: Any) -> Any:
        raise RuntimeError("this process fails")

    with pytest.MonkeyPatch.context() as patch, joined():
        patch.setattr(activations, "run_blocks", counted)
        x, y = (store(load_model(model, device="cpu"), CORPUS, folder / "shards", **OPTIONS) for model in (source, target))
        tensors = {"ran": torch.tensor(ran), "rows": x.read().values}
        for name, concept in (("uniform", None), ("weighted", concept_of(x.model))):
            fitted, held_out = accumulate(x, y, (1, 2))
            if concept is not None:
                fitted, held_out = accumulate(x, y, (1, 2), weigh=said_about(fitted + held_out, concept.at(1)))
            for ridge in RIDGES:
                tensors[f"{name} {ridge}"] = (fitted + held_out).solve(ridge)[0]
            tensors[f"{name} float32"] = fit_streamed(x, y, (1, 2), concept=concept).weight
        torch.save(tensors, folder / f"rank{rank}.pt")
        if len(share(2)) == 1:  # two processes
            if rank == "1":
                patch.setattr(shards, "read_rows", failed)
            store(load_model(source, device="cpu"), CORPUS, folder / "failed", **OPTIONS)
            (folder / f"rank{rank} went on").touch()


@pytest.fixture(scope="module")
def processes(folders: dict[str, Path], other_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder in which two processes have worked, and how they ended. torchrun finds a free port by itself."""
    folder = tmp_path_factory.mktemp("processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, __file__, *map(str, (folders["llama"], other_folder, folder))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # Minutes, so that a hang is a failure.
    return folder, subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_two_processes_share_the_work_and_give_the_map_of_one(processes, folders, other_folder, tmp_path):
    work(folders["llama"], other_folder, tmp_path)
    alone = torch.load(tmp_path / "rank0.pt")
    both = [torch.load(processes[0] / f"rank{rank}.pt") for rank in range(2)]
    assert sum(int(part["ran"].sum()) for part in both) == 2 * len(CORPUS) == int(alone["ran"].sum())
    for part in both:
        assert 0 < int(part["ran"].sum()) < 2 * len(CORPUS)
        assert torch.equal(part["rows"], alone["rows"])
        for ridge in RIDGES:
            for name in (f"uniform {ridge}", f"weighted {ridge}"):
                assert off(part[name], alone[name]) < ROUNDING
                assert torch.equal(part[name], both[0][name])
        for name in ("uniform float32", "weighted float32"):
            assert off(part[name], alone[name]) < FLOAT32
    written = [{path.name: path.read_bytes() for path in folder.glob("shards/*/*")} for folder in (processes[0], tmp_path)]
    assert written[0] == written[1]


def test_an_error_in_one_process_ends_them_all(processes):
    folder, done = processes
    assert done.returncode != 0 and "this process fails" in done.stderr, done.stderr[-2000:]
    assert list(folder.glob("failed/*/shard-*"))  # what the other one stored is kept
    assert not list(folder.glob("failed/*/index*")) and not list(folder.glob("* went on"))


if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
