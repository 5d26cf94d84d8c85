"""What is saved is what is loaded; anything else is refused in words. Nothing is pickled, and no file is ever half-written."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from contrans_tl import AffineMap, ConceptVector, LayerMaps, ModelId, fit_affine
from contrans_tl.artifacts import FORMAT, header_of, load, save, write_atomically

MODEL = ModelId("tiny", "abc123", "0123456789abcdef", 3, 4, "raw")
CONCEPT = ConceptVector(
    torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),
    (0, 2),
    "naïve “joy”",
    MODEL,
    {"method": "mean", "positive": 2, "nested": {"layers": [[0, 1]], "none": None}},
)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_concept_is_loaded_as_it_was_saved(tmp_path):
    path = CONCEPT.save(tmp_path / "new" / "folder" / "c.safetensors")
    loaded = ConceptVector.load(path)
    assert torch.equal(loaded.vectors, CONCEPT.vectors)
    for name in ("layers", "name", "model", "provenance"):
        assert getattr(loaded, name) == getattr(CONCEPT, name)
    assert isinstance(loaded.layers, tuple)


def test_an_affine_map_is_loaded_as_it_was_saved(tmp_path):
    fitted = fit_affine(rows(1, 30, 4), rows(2, 30, 5))
    loaded = AffineMap.load(fitted.save(tmp_path / "map.safetensors"))
    assert torch.equal(loaded.weight, fitted.weight) and torch.equal(loaded.bias, fitted.bias)
    assert loaded.fit == fitted.fit


def test_layer_maps_are_loaded_as_they_were_saved(tmp_path):
    maps = LayerMaps.fit(rows(1, 30, 2, 4), rows(2, 30, 3, 5))
    loaded = LayerMaps.load(maps.save(tmp_path / "maps.safetensors"))
    assert loaded.source.model == maps.source.model and loaded.target.layers == maps.target.layers
    for pair in ((0, 0), (1, 2)):
        assert torch.equal(loaded[pair].weight, maps[pair].weight)
        assert loaded[pair].fit == maps[pair].fit


def test_tensors_that_share_memory_are_saved(tmp_path):
    x = rows(3, 4, 4)
    tensors, _ = load(save(tmp_path / "a", "thing", {"a": x, "b": x[1:], "c": x.T}, {}), "thing")
    assert torch.equal(tensors["a"], x) and torch.equal(tensors["b"], x[1:]) and torch.equal(tensors["c"], x.T)


def test_the_header_tells_the_format_the_versions_and_where_it_belongs_without_this_library(tmp_path):
    with safe_open(CONCEPT.save(tmp_path / "c.safetensors"), framework="pt") as file:
        about = json.loads(file.metadata()["contrans_tl"])
    assert about["format"] == FORMAT and about["kind"] == "concept vector"
    assert about["model"] == MODEL.to_dict() and about["layers"] == [0, 2]
    assert {"contrans-tl", "transformer-lens", "transformers", "torch"} <= set(about["versions"])


def test_no_file_is_a_pickle(tmp_path):
    path = CONCEPT.save(tmp_path / "c.safetensors")
    with pytest.raises((pickle.UnpicklingError, EOFError, KeyError, ValueError)):
        pickle.loads(path.read_bytes())
    for source in Path(sys.modules["contrans_tl"].__file__).parent.rglob("*.py"):
        code = source.read_text()
        assert not re.search(r"import pickle|pickle\.(load|dump)|torch\.save\(|allow_pickle=True", code), source
        loads = re.findall(r"torch\.load\([^)]*\)", code)
        assert all("weights_only=True" in call for call in loads), source


def test_a_pickle_is_refused_and_not_run(tmp_path):
    path = tmp_path / "evil.safetensors"
    torch.save({"vectors": torch.zeros(1, 4)}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        ConceptVector.load(path)


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    whole = CONCEPT.save(tmp_path / "c.safetensors").read_bytes()
    for size in (0, 4, 8, 40, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"{size}.safetensors"
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="truncated or not a safetensors file") as caught:
            ConceptVector.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [None, {"contrans_tl": "[]"}, {"contrans_tl": "{}"}, {"other": "x"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path, header):
    save_file({"vectors": torch.zeros(1, 4)}, tmp_path / "f.safetensors", header)
    with pytest.raises(ValueError, match="not written by contrans_tl"):
        ConceptVector.load(tmp_path / "f.safetensors")


def test_a_newer_format_is_refused_with_the_remedy(tmp_path):
    path = save(tmp_path / "c.safetensors", "concept vector", {"vectors": torch.zeros(1, 4)}, {"format": FORMAT + 1})
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}; this version reads up to {FORMAT}. Update contrans_tl"):
        ConceptVector.load(path)


def test_another_kind_of_artifact_and_a_missing_file_are_refused(tmp_path):
    path = CONCEPT.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="of kind 'layer maps'; .* is of kind 'concept vector'"):
        LayerMaps.load(path)
    assert header_of(path)["kind"] == "concept vector" and header_of(path)["layers"] == [0, 2]
    for read in (AffineMap.load, header_of):
        with pytest.raises(ValueError, match="there is no file"):
            read(tmp_path / "missing")


def test_nan_is_refused_on_loading_too(tmp_path):
    about = {"name": "x", "layers": [0], "model": MODEL.to_dict(), "provenance": {}}
    path = save(tmp_path / "c", "concept vector", {"vectors": torch.full((1, 4), float("nan"))}, about)
    with pytest.raises(ValueError, match="NaN"):
        ConceptVector.load(path)


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = CONCEPT.save(tmp_path / "c.safetensors")
    before = path.read_bytes()

    def broken(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        replace(CONCEPT, vectors=CONCEPT.vectors + 1).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = write_atomically(tmp_path / "report.json", b"old")
    code = (
        "import os, signal, sys\n"
        "from contrans_tl import artifacts\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "artifacts.write_atomically(sys.argv[1], b'new' * 1000)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
