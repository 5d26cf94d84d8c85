"""What leaves in a format of another tool comes back bit by bit, with all that the format holds, or is refused."""

import io
import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, unchecked
from safetensors.torch import load_file, save_file
from torch import Tensor

from contrans_tl import ConceptVector, ModelId, identify, read_exchange, write_exchange
from contrans_tl.__main__ import main
from contrans_tl.exchange import read_arrays, to_repeng, to_steering_vector, write_npy

WRITTEN = ("gguf", "npy", "npz", "safetensors", "spec")
TELLING = ("gguf", "safetensors", "spec")
MODEL = ModelId("someone/tiny", "abc123", "0123456789abcdef", 5, 8, "raw")


def vectors(*shape: int) -> Tensor:
    """Numbers of which no decimal is round, and the corners of float32."""
    found = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) / 3
    found.view(-1)[:5] = torch.tensor([-0.0, 1e-45, 1.17549435e-38, -1.0e38, 1 / 3])
    return found


CONCEPT = ConceptVector(vectors(2, 8), (2, 4), "happiness", MODEL, {"method": "mean", "positive": 4})


def file_of(format: str, folder: Path) -> Path:
    return folder / {"spec": "concept.json"}.get(format, f"concept.{format}")


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(torch.int32).flatten().tolist()


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("strength", [1.0, -0.3])
def test_a_concept_comes_back_bit_by_bit(tmp_path, format, strength):
    concept = CONCEPT.only(4) if format == "spec" else CONCEPT
    path = write_exchange(concept, file_of(format, tmp_path), format, strength=strength)
    found = read_exchange(path, format, model=MODEL)
    assert bits(found.vectors) == bits(strength * concept.vectors)
    assert found.layers == concept.layers and found.model == MODEL
    assert found.vectors.dtype == torch.float32
    assert read_exchange(path, model=MODEL).layers == found.layers, "the suffix tells the format"
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing is left beside the file"


@pytest.mark.parametrize("format", TELLING)
def test_formats_that_can_hold_it_tell_name_model_strength_and_provenance(tmp_path, format):
    concept = CONCEPT.only(2)
    found = read_exchange(write_exchange(concept, file_of(format, tmp_path), strength=2.5))
    assert (found.name, found.model) == ("happiness", MODEL)
    assert found.provenance["factor"] == 2.5 and found.provenance["of"] == concept.provenance
    assert found.provenance["read_from"] == format


@pytest.mark.parametrize("format", ["npy", "npz"])
def test_formats_that_cannot_hold_it_ask_for_the_model(tmp_path, format):
    path = write_exchange(CONCEPT, file_of(format, tmp_path))
    with pytest.raises(ValueError, match="does not say whose vectors.*model="):
        read_exchange(path)
    found = read_exchange(path, model=MODEL, name="joy", layers=[4])
    assert (found.name, found.layers) == ("joy", (4,)) and bits(found.vectors) == bits(CONCEPT.vectors[1:])


@pytest.mark.parametrize("format", TELLING)
def test_a_file_of_another_model_is_refused(tmp_path, format):
    path = write_exchange(CONCEPT.only(2), file_of(format, tmp_path))
    with pytest.raises(ValueError, match="same name but other weights"):
        read_exchange(path, model=replace(MODEL, fingerprint="f" * 16))
    with pytest.raises(ValueError, match="reformulate it first"):
        read_exchange(path, model=replace(MODEL, name="other", fingerprint="f" * 16))


@pytest.mark.parametrize("format", WRITTEN)
def test_no_path_of_this_machine_leaves_it(tmp_path, format):
    home = "/home/somebody/models"
    provenance = {
        "data": f"{home}/pairs.json",
        "nested": [{"from": "~/x/y.npz"}, "C:\\Users\\somebody\\z.pt"],
        "method": "mean",
    }
    concept = replace(CONCEPT.only(4), model=replace(MODEL, name=f"{home}/tiny"), provenance=provenance)
    path = write_exchange(concept, file_of(format, tmp_path))
    content = path.read_bytes()
    assert b"somebody" not in content and str(tmp_path).encode() not in content
    if format in TELLING:
        found = read_exchange(path)
        assert found.model.name == "tiny"
        assert found.provenance["of"] == {"data": "pairs.json", "nested": [{"from": "y.npz"}, "z.pt"], "method": "mean"}


@pytest.mark.parametrize("format", ["gguf", "npy", "safetensors"])
def test_a_loaded_model_stands_for_its_id(bridges, tmp_path, format):
    here = identify(bridges["llama"])
    concept = ConceptVector(vectors(1, D_MODEL), (1,), "joy", here)
    found = read_exchange(write_exchange(concept, file_of(format, tmp_path)), model=bridges["llama"])
    assert found.model == here and bits(found.vectors) == bits(concept.vectors)
    if format != "npy":
        with pytest.raises(ValueError, match="reformulate it first"):
            read_exchange(file_of(format, tmp_path), model=bridges["neox"])


def test_half_precision_leaves_as_the_same_numbers_in_float32(tmp_path):
    with unchecked():
        concept = replace(CONCEPT, vectors=torch.randn(2, 8).to(torch.bfloat16))
        found = read_exchange(write_exchange(concept, tmp_path / "x.npz"), model=MODEL)
    assert torch.equal(found.vectors, concept.vectors.float())


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e30])
def test_a_strength_that_leaves_float32_is_refused_before_anything_is_written(tmp_path, format, strength):
    with pytest.raises(ValueError, match="finite strength|more than float32 holds"):
        write_exchange(CONCEPT.only(2), file_of(format, tmp_path), strength=strength)
    assert not list(tmp_path.iterdir())


def test_a_spec_alone_says_positions(tmp_path):
    path = write_exchange(CONCEPT.only(2), tmp_path / "x.json", positions="generated")
    assert read_exchange(path).provenance["positions"] == ["generated"]
    with pytest.raises(ValueError, match="npz file does not say which tokens.*write a spec"):
        write_exchange(CONCEPT, tmp_path / "x.npz", positions="last")


def test_a_format_is_one_of_those_there_are(tmp_path):
    with unchecked():
        with pytest.raises(ValueError, match="a format among gguf, npy.*got format 'onnx'"):
            write_exchange(CONCEPT, tmp_path / "x.onnx", "onnx")
        with pytest.raises(ValueError, match="whose suffix tells none"):
            read_exchange(tmp_path / "x.bin", model=MODEL)
    with pytest.raises(ValueError, match="pickles, and are read only"):
        write_exchange(CONCEPT, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="there is no file"):
        read_exchange(tmp_path / "none.npy", model=MODEL)
    write_npy(CONCEPT, tmp_path / "x.bin")
    assert read_exchange(tmp_path / "x.bin", "npy", model=MODEL).layers == (2, 4)


@pytest.mark.parametrize("format", WRITTEN)
def test_a_truncated_or_foreign_file_is_refused(tmp_path, format):
    path = write_exchange(CONCEPT.only(2), file_of(format, tmp_path))
    whole = path.read_bytes()
    for content in (whole[: len(whole) - 9], whole[:20], b"", b"not a file of vectors at all, but longer than a header"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated"):
            read_exchange(path, model=MODEL)


# Arrays


def saved(array: Any, path: Path) -> Path:
    """As somebody else saves it."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, **array)
    elif path.suffix == ".safetensors":
        save_file(array, path)
    else:
        torch.save(array, path)
    return path


def test_an_array_has_a_row_for_every_layer_or_for_those_named(tmp_path):
    rows = vectors(5, 8)
    rows[3] = 0
    path = saved(rows.numpy(), tmp_path / "all.npy")
    assert read_arrays(path, MODEL).layers == (0, 1, 2, 4), "rows of zeros are no vectors"
    assert read_arrays(path, MODEL, layers=[3]).vectors.abs().max() == 0, "unless they are asked for"
    assert bits(read_arrays(path, MODEL, layers=[1, 4]).vectors) == bits(rows[[1, 4]])
    two = read_arrays(saved(rows[:2].numpy(), tmp_path / "two.npy"), MODEL, layers=[1, 4])
    assert two.layers == (1, 4) and bits(two.vectors) == bits(rows[:2])
    one = read_arrays(saved(rows[0].numpy(), tmp_path / "one.npy"), MODEL, layers=[3])
    assert one.layers == (3,) and bits(one.vectors) == bits(rows[:1])


def test_rows_that_are_not_as_many_as_layers_are_refused(tmp_path):
    path = saved(np.ones((6, 8), np.float32), tmp_path / "x.npy")
    with pytest.raises(ValueError, match="expected rows: 5, one for each layer.*has 6.*hidden_states.*final norm"):
        read_arrays(path, MODEL)
    path = saved(np.ones((3, 8), np.float32), path)
    with pytest.raises(ValueError, match="or 2; 'x.npy' has 3"):
        read_arrays(path, MODEL, layers=[1, 2])
    with pytest.raises(ValueError, match="say layers="):
        read_arrays(path, MODEL)
    with pytest.raises(ValueError, match="increasing order"):
        read_arrays(path, MODEL, layers=[3, 2, 1])
    with pytest.raises(ValueError, match="between 0 and 4"):
        read_arrays(path, MODEL, layers=[3, 4, 5])
    with pytest.raises(ValueError, match="has none"):
        read_arrays(saved(np.zeros((5, 8), np.float32), path), MODEL)
    with pytest.raises(ValueError, match=r"d_model = 8.*got shape \(7,\)"):
        read_arrays(saved(np.ones((5, 7), np.float32), path), MODEL)
    with pytest.raises(ValueError, match=r'array "layer d_model".*shape \(5, 8, 1\)'):
        read_arrays(saved(np.ones((5, 8, 1), np.float32), path), MODEL)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("key", ["layer.{}", "layers.{}", "{}", "blocks.{}.hook_resid_post", "blocks.{}.hook_out"])
def test_named_vectors_tell_their_layer(tmp_path, suffix, key):
    rows = vectors(2, 8)
    tensors = {key.format(4): rows[1], key.format(0): rows[0]}
    arrays = {name: row.numpy() for name, row in tensors.items()}
    path = saved(arrays if suffix == ".npz" else tensors, tmp_path / f"x{suffix}")
    found = read_arrays(path, MODEL)
    assert found.layers == (0, 4) and bits(found.vectors) == bits(rows) and found.name == "x"
    assert read_arrays(path, MODEL, layers=[4]).layers == (4,)
    with pytest.raises(ValueError, match=r"vectors at layers \[0, 4\]; there is none at \[1\]"):
        read_arrays(path, MODEL, layers=[0, 1])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
def test_a_single_array_among_names_is_an_array(tmp_path, suffix):
    rows = vectors(5, 8)
    path = saved({"arr_0": rows.numpy() if suffix == ".npz" else rows}, tmp_path / f"x{suffix}")
    assert read_arrays(path, MODEL).layers == (0, 1, 2, 3, 4)


def test_torch_files_hold_a_tensor_a_list_or_integers_as_keys(tmp_path):
    rows = vectors(5, 8)
    for content in (rows, torch.nn.Parameter(rows), list(rows), dict(enumerate(rows))):
        assert bits(read_arrays(saved(content, tmp_path / "x.pt"), MODEL).vectors) == bits(rows)


def test_keys_and_contents_that_are_no_vectors_are_refused(tmp_path):
    row = torch.ones(8)
    for content, message in (
        ({"layer.1": row, "mean": row}, "keys such as 'layer.3'; 'x.pt' has 'mean'"),
        ({"layer.1": row, "1": row}, "names layer 1 twice"),
        ({"layer.9": row}, "between 0 and 4"),
        ({"layer.1": "text"}, "has str 'layer.1'"),
        ({"layer.1": row.long()}, "floating-point"),
        (3.0, "holds a float"),
        ([row, torch.ones(7)], "one width"),
        ({"layer.1": torch.ones(7)}, r"d_model = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            read_arrays(saved(content, tmp_path / "x.pt"), MODEL)
    with pytest.raises(ValueError, match="arrays of floating-point numbers; 'x.npy' holds int64"):
        read_arrays(saved(np.ones((5, 8), np.int64), tmp_path / "x.npy"), MODEL)
    with pytest.raises(ValueError, match="NaN"):
        read_arrays(saved(np.full((5, 8), np.nan, np.float32), tmp_path / "x.npy"), MODEL)
    with pytest.raises(ValueError, match="expected a file .npy, .npz.*got 'x.txt'"):
        read_arrays(tmp_path / "x.txt", MODEL)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    sprung = tmp_path / "sprung"
    trap = Trap(sprung)
    saved(np.array([trap], dtype=object), tmp_path / "x.npy")
    saved({"layer.1": np.array([trap], dtype=object)}, tmp_path / "x.npz")
    saved({"layer.1": trap}, tmp_path / "x.pt")
    (tmp_path / "x.pth").write_bytes(pickle.dumps(trap, protocol=2))
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(trap))
    for name in ("x.npy", "x.npz", "x.pt", "x.pth", "bare.npy"):
        with pytest.raises(ValueError, match="Python objects|not unpickled"):
            read_arrays(tmp_path / name, MODEL)
        assert not sprung.exists(), name
    pickle.loads((tmp_path / "x.pth").read_bytes())
    assert sprung.exists(), "the trap works"


def test_safetensors_of_ours_are_plain_ones_to_others_and_a_saved_concept_is_told_apart(tmp_path):
    path = write_exchange(CONCEPT, tmp_path / "x.safetensors")
    plain = load_file(path)
    assert sorted(plain) == ["layer.2", "layer.4"] and bits(plain["layer.4"]) == bits(CONCEPT.at(4))
    with pytest.raises(ValueError, match="is a concept vector as contrans_tl saves it"):
        read_exchange(CONCEPT.save(path))


def test_numpy_files_of_ours_are_plain_ones_to_others(tmp_path):
    array = np.load(write_exchange(CONCEPT, tmp_path / "x.npy"), allow_pickle=False)
    assert array.shape == (5, 8) and array.dtype == np.float32 and not array[[0, 1, 3]].any()
    with np.load(write_exchange(CONCEPT, tmp_path / "x.npz"), allow_pickle=False) as named:
        assert sorted(named.files) == ["layer.2", "layer.4"] and named["layer.2"].shape == (8,)


def test_arrays_of_other_byte_orders_and_precisions_are_read(tmp_path):
    array = vectors(5, 8).numpy().astype(">f8")
    assert bits(read_arrays(saved(array, tmp_path / "x.npy"), MODEL).vectors) == bits(vectors(5, 8))
    half = np.asfortranarray(np.full((5, 8), 0.5, np.float16))
    assert read_arrays(saved(half, tmp_path / "x.npy"), MODEL).vectors.unique().tolist() == [0.5]


def test_a_zip_that_is_no_numpy_file_is_refused(tmp_path):
    content = io.BytesIO()
    torch.save({}, content)
    (tmp_path / "x.npz").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="arrays of floating-point numbers; 'x.npz' holds bytes"):
        read_arrays(tmp_path / "x.npz", MODEL)


def test_a_missing_package_is_named_with_how_to_get_it(tmp_path, monkeypatch):
    for name in ("gguf", "repeng", "steering_vectors"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "x.gguf"
    path.touch()
    for call, remedy in (
        (lambda: write_exchange(CONCEPT, path), r"control vectors need gguf: pip install 'contrans-tl\[gguf\]'"),
        (lambda: read_exchange(path, model=MODEL), r"control vectors need gguf: pip install 'contrans-tl\[gguf\]'"),
        (lambda: to_repeng(CONCEPT), "needs repeng.*pip install repeng"),
        (lambda: to_steering_vector(CONCEPT), "needs steering-vectors.*pip install steering-vectors"),
    ):
        with pytest.raises(ImportError, match=remedy):
            call()


def test_a_spec_is_json_that_others_read(tmp_path):
    spec = json.loads(write_exchange(CONCEPT.only(4), tmp_path / "x.json", "spec", strength=2.0).read_text())
    assert spec["injections"][0]["site"] == "blocks.4.hook_resid_post" and spec["injections"][0]["op"] == "add"
    assert spec["concept"]["strength"] == 2.0


def test_the_command_line_imports_a_file_of_another_tool(bridges, folders, tmp_path, capsys, monkeypatch):
    rows = vectors(2, D_MODEL)
    call = ["import", str(saved(rows.numpy(), tmp_path / "joy.npy")), "--out", str(tmp_path / "joy.safetensors")]
    assert main([*call, "--layers", "0,2", "--model", str(folders["llama"])]) == 0
    assert "ConceptVector('joy', layers 0..2" in capsys.readouterr().out
    read = ConceptVector.load(tmp_path / "joy.safetensors")
    assert (read.layers, bits(read.vectors)) == ((0, 2), bits(rows)) and read.model.same_space(identify(bridges["llama"]))
    monkeypatch.setattr("contrans_tl.load_model", lambda *a, **k: pytest.fail("a model is loaded for what cannot work"))
    for wrong, message in (
        (["import", str(tmp_path / "no.npy"), "--model", "anything"], "there is no file"),
        ([*call, "--layers", "0-2", "--model", "anything"], "expected --layers as in 3,4"),
        (call, "model="),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
