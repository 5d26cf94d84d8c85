"""Maps of a corpus on disk: the same maps as in memory, and only one model in memory at a time."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CORPUS

from contrans_tl import ContrastPairs, LayerMaps, fit_maps, load_model, refine, reformulate, reformulation
from contrans_tl.models import identify

WORDS = " ".join(CORPUS).split()
SENTENCES = [" ".join(WORDS[i % 23 : i % 23 + 4 + i % 5] + [f"{i}"]) for i in range(60)]
PAIRS = ContrastPairs("calm", ("the lazy dog sleeps", "a quick fox"), ("brown letters", "the river feels happy"))


@pytest.fixture
def concept(bridges: dict[str, Any]) -> Any:
    return refine(bridges["llama"], PAIRS)


def test_maps_between_the_layers_asked_for_are_fitted_on_all_rows_and_grids_on_the_sample(bridges, concept, tmp_path):
    models = bridges["llama"], bridges["gpt2"]
    whole = fit_maps(*models, SENTENCES, ridge=0.01)
    maps = fit_maps(*models, SENTENCES, ridge=0.01, folder=tmp_path, sample=150)
    assert len(maps.source) <= 150 < len(whole.source)
    assert torch.equal(maps.r2, LayerMaps.fit(maps.source, maps.target, ridge=0.01).r2)
    found, expected = maps[1, 2], whole[1, 2]
    assert (found.fit.rows, found.fit.sentences) == (len(whole.source), len(SENTENCES))
    assert torch.allclose(found.weight, expected.weight, atol=1e-5 * float(expected.weight.abs().max()))  # float32 of both
    for weighting in ("uniform", "concept"):
        moved, wanted = (reformulate(concept, each, layers={1: 2}, weighting=weighting) for each in (maps, whole))
        # LayerMaps keeps its row weights in float32
        assert torch.allclose(moved.vectors, wanted.vectors, atol=1e-4 * float(wanted.vectors.abs().max()))
        assert moved.provenance["n_rows"] == len(whole.source)


def test_a_sample_of_everything_gives_the_grids_of_memory(bridges, concept, tmp_path):
    models = bridges["llama"], bridges["gpt2"]
    whole, maps = fit_maps(*models, SENTENCES), fit_maps(*models, SENTENCES, folder=tmp_path)
    assert torch.equal(maps.r2, whole.r2)
    assert torch.equal(maps.coverage(concept), whole.coverage(concept))
    assert torch.equal(maps.shuffled(seed=0)[1, 2].weight, whole.shuffled(seed=0)[1, 2].weight)


def test_maps_that_are_saved_or_turned_round_are_still_fitted_on_all_rows(bridges, concept, tmp_path):
    models = bridges["llama"], bridges["gpt2"]
    maps = fit_maps(*models, SENTENCES, ridge=0.01, folder=tmp_path / "rows", sample=150)
    loaded = LayerMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert loaded[1, 2].fit == maps[1, 2].fit and loaded[1, 2].fit.rows > len(maps.source)
    assert torch.equal(loaded[1, 2].weight, maps[1, 2].weight)
    back, whole = maps.reverse(), fit_maps(*models[::-1], SENTENCES, ridge=0.01)
    assert back[2, 1].fit.rows == len(whole.source)
    assert torch.allclose(back[2, 1].weight, whole[2, 1].weight, atol=1e-5 * float(whole[2, 1].weight.abs().max()))
    with pytest.raises(ValueError, match="save the unweighted maps"):
        maps.reweighted(concept).save(tmp_path / "weighted.safetensors")
    (tmp_path / "rows").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="there is no file"):
        LayerMaps.load(tmp_path / "maps.safetensors")


def test_row_weights_of_ones_own_are_refused_for_rows_on_disk(bridges, tmp_path):
    maps = fit_maps(bridges["llama"], bridges["gpt2"], SENTENCES, folder=tmp_path, sample=150)
    weighted = replace(maps, weights=torch.ones(3, len(maps.source)))
    with pytest.raises(ValueError, match="a weight for every row of the sample only"):
        _ = weighted[1, 2]


@pytest.mark.parametrize("on_disk", [True, False], ids=["on disk", "in memory"])
def test_by_name_one_model_is_gone_before_the_other_is_loaded(folders, bridges, tmp_path, monkeypatch, on_disk):
    loaded: list[weakref.ref[Any]] = []

    def load(name: Any) -> Any:
        gc.collect()
        assert not any(earlier() for earlier in loaded), "the model before is still in memory"
        model = load_model(name, device="cpu")
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(reformulation, "load_model", load)
    options: dict[str, Any] = {"folder": tmp_path} if on_disk else {}
    maps = fit_maps(folders["llama"], str(folders["gpt2"]), SENTENCES, **options)
    assert len(loaded) == 2
    assert maps.source.model.same_space(identify(bridges["llama"]))
    assert torch.equal(maps.r2, fit_maps(bridges["llama"], bridges["gpt2"], SENTENCES).r2)


def test_what_cannot_work_is_refused_before_a_model_runs(bridges, tmp_path, monkeypatch):
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr("contrans_tl.activations.run_blocks", run)
    models = bridges["llama"], bridges["gpt2"]
    with pytest.raises(ValueError, match="fitted by plain ridge; got 'pcr'"):
        fit_maps(*models, SENTENCES, method="pcr", folder=tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        fit_maps(models[0], "./nowhere", SENTENCES)
    with pytest.raises(ValueError, match="between 0 and 2"):
        fit_maps(*models, SENTENCES, target_layers=[7])
    with pytest.raises(ValueError, match="a list of texts"):
        fit_maps(*models, "one text")
    monkeypatch.setattr("contrans_tl.tokens.ALIGNED", 1.01)
    with pytest.raises(ValueError, match="part these texts differently"):
        fit_maps(*models, SENTENCES)


def test_of_rows_that_hardly_pair_no_map_is_fitted(bridges):
    from contrans_tl import collect

    x = collect(bridges["llama"], SENTENCES, rows="words")
    few = x.take(torch.arange(0, len(x), 5))
    assert len(x) / len(few) > 4
    with pytest.raises(ValueError, match="at 25% of the words at least; they do at"):
        LayerMaps.fit(x, few)
