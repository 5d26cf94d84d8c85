"""The files that the paper's code writes - vectors of all layers, maps of one pair of layers - are read as what they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from contrans_tl import ConceptVector, ModelId
from contrans_tl.exchange import carry, read_arrays, read_map, read_maps, write_npy
from contrans_tl.reformulation import LayerMaps

SOURCE = ModelId("llama-7b", None, "0123456789abcdef", 4, 6, "raw")
TARGET = ModelId("llama-13b", None, "fedcba9876543210", 5, 9, "raw")


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AffineModel(torch.nn.Module):
    """Of their shape: a linear layer named `linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 9)


def saved(content: Any, path: Path) -> Path:
    """As their code saves it: arrays (also from tensors) with numpy, tensors and states with torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, content) if path.suffix == ".npy" else torch.save(content, path)
    return path


def test_a_refined_vector_has_a_row_for_every_block_output(tmp_path):
    rows = seeded(4, 6)
    concept = read_arrays(saved(rows.to(torch.bfloat16).to(torch.float), tmp_path / "llama-7b_anger_mean.npy"), SOURCE)
    assert concept.layers == (0, 1, 2, 3) and concept.name == "llama-7b_anger_mean"
    assert torch.equal(concept.vectors, rows.to(torch.bfloat16).float())


def test_their_conversion_is_carry_and_its_file_our_npy(tmp_path):
    """`convert_vector.py`: torch.mm(vectors, W.T), all rows but the target layer's zero."""
    rows, weight = seeded(4, 6), seeded(9, 6, seed=1)
    source = read_arrays(saved(rows, tmp_path / "llama-7b_anger_mean.npy"), SOURCE, name="anger")
    saved(weight, tmp_path / "svd_wiki_split" / "affine_2_to_3.pth")
    saved([], tmp_path / "svd_wiki_split" / "loss_record.npy")
    moved = carry(source, read_maps(tmp_path / "svd_wiki_split"), TARGET)
    theirs = torch.zeros(5, 9)
    theirs[3] = torch.mm(rows, weight.T)[2]
    path = saved(theirs.numpy(), tmp_path / "llama-7to13-anger.npy")
    read = read_arrays(path, TARGET)
    assert moved.layers == read.layers == (3,) and moved.model == TARGET and moved.name == "anger"
    assert torch.allclose(moved.vectors, read.vectors, atol=1e-6)  # one product of 6 numbers of size 1 in float32
    ours = write_npy(moved, tmp_path / "ours.npy")
    assert np.load(ours).shape == (5, 9) and np.allclose(np.load(ours), theirs, atol=1e-6)
    assert moved.provenance["layers"] == [[2, 3]] and moved.provenance["carried_from"] == SOURCE.to_dict()


def test_their_solver_and_ours_give_one_map(tmp_path):
    """`solve_via_svd`, W = Y^T U S^-1 V^T, saved as they save it, beside our `method="paper"`."""
    x, y = seeded(40, 6).double(), seeded(40, 9, seed=1).double()
    u, s, vh = np.linalg.svd(x.numpy(), full_matrices=False)
    theirs = read_map(saved(torch.from_numpy(y.numpy().T @ u @ np.diag(1 / s) @ vh).float(), tmp_path / "affine_1_to_2.pth"))
    ours = LayerMaps.fit(x[:, None].float(), y[:, None].float(), method="paper")[0, 0]
    assert torch.allclose(theirs.weight, ours.weight, atol=1e-5)  # float32 rows against float64 ones
    assert theirs.bias.abs().max() == 0 and ours.bias.abs().max() == 0
    assert theirs.fit.method == "paper" and theirs.fit.rank == 6
    assert theirs.fit.rows == 0 and np.isnan(theirs.fit.r2), "the file does not say"


def test_a_trained_map_has_a_bias_which_carries_points_and_no_directions(tmp_path):
    model = AffineModel()
    found = read_map(saved(model.state_dict(), tmp_path / "affine_1_to_2.pth"))
    x = seeded(3, 6)
    assert torch.allclose(found.point(x), model.linear(x), atol=1e-6)
    assert torch.allclose(found.direction(x), x @ model.linear.weight.T, atol=1e-6)
    concept = ConceptVector(x[:1], (1,), "anger", SOURCE)
    assert torch.equal(carry(concept, {(1, 2): found}, TARGET).vectors, found.direction(x[:1]))


def test_a_map_saved_as_an_array_is_the_same(tmp_path):
    weight = seeded(9, 6)
    assert torch.equal(read_map(saved(weight.numpy(), tmp_path / "affine_1_to_2.npy")).weight, weight)


def test_all_maps_of_a_folder_are_read_by_their_layers(tmp_path):
    for s, t in ((2, 3), (11, 4), (0, 1)):
        saved(torch.full((9, 6), float(10 * s + t)), tmp_path / f"affine_{s}_to_{t}.pth")
    saved(np.zeros(0), tmp_path / "loss_record.npy")
    assert {pair: float(found.weight[0, 0]) for pair, found in read_maps(tmp_path).items()} == {
        (0, 1): 1.0,
        (2, 3): 23.0,
        (11, 4): 114.0,
    }
    with pytest.raises(ValueError, match="expected files affine_SOURCE_to_TARGET.pth.*has none"):
        read_maps(tmp_path / "nowhere")


def test_maps_with_an_activation_are_refused(tmp_path):
    path = saved(AffineModel().state_dict(), tmp_path / "llama-7b_llama-13b_wiki_split_activation" / "affine_1_to_2.pth")
    with pytest.raises(ValueError, match="end in a ReLU; they are not affine"):
        read_map(path)


def test_files_that_are_no_maps_are_refused(tmp_path):
    path = tmp_path / "affine_1_to_2.pth"
    for content, message in (
        (torch.ones(6), r'expected a matrix "d_target d_source".*shape \(6,\)'),
        (torch.ones(9, 6, dtype=torch.long), "holds torch.int64"),
        ({"linear.weight": torch.ones(9, 6), "layer.bias": torch.ones(9)}, "expected linear.weight and linear.bias"),
        ({"linear.weight": torch.ones(9, 6), "linear.bias": torch.ones(6)}, "expected a matrix"),
        (AffineModel(), "not unpickled"),
    ):
        with pytest.raises(ValueError, match=message):
            read_map(saved(content, path))
    with pytest.raises(ValueError, match="there is no file"):
        read_map(tmp_path / "affine_9_to_9.pth")


def test_a_concept_is_carried_by_maps_that_fit_it(tmp_path):
    concept = ConceptVector(seeded(2, 6), (1, 2), "anger", SOURCE)
    one, other = (read_map(saved(seeded(9, 6, seed=n), tmp_path / f"affine_{n}_to_0.pth")) for n in (1, 2))
    moved = carry(concept, {(2, 0): other, (1, 4): one}, TARGET)
    assert moved.layers == (0, 4) and torch.equal(moved.at(4), one.direction(concept.at(1)))
    with pytest.raises(ValueError, match="one map into a target layer"):
        carry(concept, {(2, 0): other, (1, 0): one}, TARGET)
    with pytest.raises(ValueError, match=r"maps of shape \(6, 6\).*is \(9, 6\)"):
        carry(concept, {(2, 0): other}, SOURCE)
    with pytest.raises(ValueError, match="there is none at 3"):
        carry(concept, {(3, 0): other}, TARGET)
    with pytest.raises(ValueError, match="layers of llama-13b between 0 and 4"):
        carry(concept, {(1, 7): other}, TARGET)
    with pytest.raises(ValueError, match="expected vectors of llama-13b; 'anger' has none"):
        carry(concept, {}, TARGET)
