"""A control vector steers the same layer in llama.cpp and repeng, a steering vector in steering-vectors, as it does here."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, decoder_layers, hf_residuals, hf_steered_logits
from torch import Tensor

from contrans_tl import ConceptVector, identify, transplant
from contrans_tl.exchange import from_repeng, from_steering_vector, read_gguf, to_repeng, to_steering_vector, write_gguf
from contrans_tl.models import ModelId

MODEL = ModelId("tiny", None, "0123456789abcdef", 4, 8, "raw")
IDS = [0, 50, 97, 200, 133, 7]
TOLERANCE = 1e-5
"""Logits of size 2 of two float32 forwards, of Hugging Face and through TransformerLens: 6e-7 apart at most."""


def concept_of(model: ModelId, *layers: int) -> ConceptVector:
    vectors = 5 * torch.randn(len(layers), model.d_model, generator=torch.Generator().manual_seed(1))
    return ConceptVector(vectors, layers, "joy", model, {"method": "mean"})


def steered_here(bridge: Any, concept: ConceptVector, strength: float) -> Tensor:
    with torch.no_grad(), transplant(bridge, concept, strength=strength, layers=concept.layers):
        return bridge(torch.tensor([IDS]))[0]


@dataclass
class LlamaCpp:
    """llama.cpp's loader and adapter after its source (common.cpp, llama-adapter.cpp), in numpy: one buffer that starts at
    layer 1, to which every `direction.N` is added; block il takes the il-1st piece of it."""

    n_layers: int
    n_embd: int = -1
    data: Any = None

    def load(self, path: Path) -> "LlamaCpp":
        for tensor in gguf.GGUFReader(path).tensors:
            prefix, number = tensor.name.split(".")
            assert prefix == "direction" and int(number) > 0, "invalid direction tensor layer index"
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32, "invalid direction tensor type"
            assert tensor.data.ndim == 1 and self.n_embd in (-1, tensor.data.size), "does not match previous dimensions"
            self.n_embd = tensor.data.size
            longer = np.zeros(max(0 if self.data is None else self.data.size, self.n_embd * int(number)), np.float32)
            longer[: 0 if self.data is None else self.data.size] = 0 if self.data is None else self.data
            longer[self.n_embd * (int(number) - 1) : self.n_embd * int(number)] += tensor.data
            self.data = longer
        return self

    def logits(self, hf: Any, ids: list[int]) -> Tensor:
        """With every direction added to the output of its block."""

        def adds(il: int) -> Any:
            piece = torch.from_numpy(self.data[self.n_embd * (il - 1) : self.n_embd * il])

            def hook(module: Any, inputs: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (output[0] + piece, *output[1:])
                return output + piece

            return hook

        covered = range(1, min(self.n_layers, self.data.size // self.n_embd + 1))
        handles = [decoder_layers(hf)[il].register_forward_hook(adds(il)) for il in covered]
        try:
            with torch.no_grad():
                return hf(torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_steers_the_layer_that_transplant_steers(bridges, references, tmp_path, architecture):
    bridge, hf = bridges[architecture], references[architecture]
    for layer in range(1, N_LAYERS):
        concept = concept_of(identify(bridge), layer)
        path = write_gguf(concept, tmp_path / "joy.gguf", strength=1.5)
        theirs = LlamaCpp(N_LAYERS).load(path).logits(hf, IDS)
        assert (theirs - steered_here(bridge, concept, 1.5)).abs().max() < TOLERANCE
        elsewhere = replace(concept, layers=(layer - 1,))
        assert (theirs - steered_here(bridge, elsewhere, 1.5)).abs().max() > 0.05, "which a layer beside it does not"


def test_all_directions_of_a_file_add_up_as_a_transplant_at_all_its_layers(bridges, references, tmp_path):
    concept = concept_of(identify(bridges["llama"]), 2, 1)
    theirs = LlamaCpp(N_LAYERS).load(write_gguf(concept, tmp_path / "joy.gguf")).logits(references["llama"], IDS)
    assert (theirs - steered_here(bridges["llama"], concept, 1.0)).abs().max() < TOLERANCE


def test_a_file_holds_what_llama_cpp_and_repeng_look_for(tmp_path):
    concept = concept_of(MODEL, 3, 1)
    reader = gguf.GGUFReader(write_gguf(concept, tmp_path / "joy.gguf", strength=-2.0, model_hint="llama"))
    text = {key: reader.fields[key].contents() for key in ("general.architecture", "controlvector.model_hint", "general.name")}
    assert text == {"general.architecture": "controlvector", "controlvector.model_hint": "llama", "general.name": "joy"}
    # As repeng reads it: the last part of the field.
    assert bytes(reader.fields["controlvector.model_hint"].parts[-1]).decode() == "llama"
    assert reader.fields["controlvector.layer_count"].types == [gguf.GGUFValueType.UINT32]
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.3"]
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and list(tensor.shape) == [8]
        layer = int(tensor.name.split(".")[1])
        assert np.array_equal(tensor.data, (-2.0 * concept.at(layer)).numpy())


def test_a_vector_at_layer_0_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no place for layer 0.*leave it out: concept.only\(1, 3\)"):
        write_gguf(concept_of(MODEL, 0, 3, 1), tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="no place for layer 0.*at a later layer"):
        write_gguf(concept_of(MODEL, 0), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_vectors_of_the_centred_basis_are_refused_both_ways(tmp_path):
    centred = replace(MODEL, basis="centred")
    concept = concept_of(centred, 1)
    for engine, call in (
        ("llama.cpp", lambda: write_gguf(concept, tmp_path / "x.gguf")),
        ("repeng", lambda: to_repeng(concept)),
        ("steering-vectors", lambda: to_steering_vector(concept)),
        ("repeng", lambda: from_repeng(Repeng("llama", {1: np.ones(8, np.float32)}), centred)),
        ("steering-vectors", lambda: from_steering_vector(Steering({1: torch.ones(8)}), centred)),
    ):
        with pytest.raises(ValueError, match=f"{engine} runs weights as they are published.*centred basis.*load_model"):
            call()
    foreign(tmp_path / "y.gguf", {"direction.1": np.ones(8, np.float32)})
    with pytest.raises(ValueError, match="centred basis"):
        read_gguf(tmp_path / "y.gguf", centred)


def foreign(path: Path, tensors: dict[str, Any], architecture: str = "controlvector", hint: bool = True) -> Path:
    """A file as another tool writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    if hint:
        writer.add_string("controlvector.model_hint", "mistral")
        writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_repeng_or_llama_cpp_is_read_at_the_layers_it_steers(tmp_path):
    rows = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    path = foreign(tmp_path / "honest.gguf", {"direction.2": rows[2], "direction.0": rows[0], "direction.1": rows[1]})
    with pytest.raises(ValueError, match="does not say whose vectors"):
        read_gguf(path)
    found = read_gguf(path, MODEL)
    assert found.layers == (0, 1, 2) and found.name == "honest" and found.model == MODEL
    assert np.array_equal(found.vectors.numpy(), rows)
    assert read_gguf(path, MODEL, name="honesty").name == "honesty"


def test_the_last_layer_of_a_file_that_is_not_ours_is_warned_of(tmp_path, recwarn):
    read_gguf(write_gguf(concept_of(MODEL, 3), tmp_path / "ours.gguf"), MODEL)
    assert not recwarn.list
    path = foreign(tmp_path / "theirs.gguf", {"direction.3": np.ones(8, np.float32)})
    with pytest.warns(UserWarning, match="last layer, 3.*behind the final norm.*concept.only"):
        assert read_gguf(path, MODEL).layers == (3,)
    with pytest.warns(UserWarning, match="last layer, 3"):
        from_repeng(Repeng("llama", {3: np.ones(8, np.float32)}), MODEL)


def test_repengs_last_hidden_state_is_not_the_stream_it_steers(references):
    """Why it is warned of: hidden_states[l + 1] is the output of block l for every layer but the last."""
    hf = references["llama"]
    with torch.no_grad():
        states = hf(torch.tensor([IDS]), output_hidden_states=True, use_cache=False).hidden_states
    outputs = hf_residuals(hf, IDS)
    gaps = [float((states[layer + 1][0] - outputs[layer]).abs().max()) for layer in range(N_LAYERS)]
    assert max(gaps[:-1]) == 0 and gaps[-1] > 0.1


def test_files_that_llama_cpp_refuses_are_refused(tmp_path):
    row = np.ones(8, np.float32)
    path = tmp_path / "x.gguf"
    for tensors, message in (
        ({"direction.1": row.astype(np.float16)}, "expected float32 vectors; direction.1 of 'x.gguf' is F16"),
        ({"direction.1": np.ones((2, 8), np.float32)}, "is F32, 2-d"),
        ({"direction.one": row}, "expected tensors direction.N; 'x.gguf' has 'direction.one'"),
        ({"direction.1": row, "blk.0.weight": row}, "has 'blk.0.weight'"),
        ({"direction.1": row, "direction.2": np.ones(7, np.float32)}, r"d_model = 8.*got shape \(7,\) at layer 2"),
        ({"direction.4": row}, "between 0 and 3"),
        ({}, "has none"),
    ):
        with pytest.raises(ValueError, match=message):
            read_gguf(foreign(path, tensors), MODEL)
    with pytest.raises(ValueError, match="expected a control vector; 'x.gguf' is a GGUF file of architecture 'llama'"):
        read_gguf(foreign(path, {"direction.1": row}, architecture="llama"), MODEL)
    assert read_gguf(foreign(path, {"direction.1": row}, hint=False), MODEL).layers == (1,), "the hint is not needed"


# repeng and steering-vectors in memory, by the shapes of their classes


@dataclass
class Repeng:
    """repeng.ControlVector, as far as others see it."""

    model_type: str
    directions: dict[int, Any]


@dataclass
class Steering:
    """steering_vectors.SteeringVector, as far as others see it."""

    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the two packages; tests/benchmarks/peers.py has the real ones."""
    monkeypatch.setitem(sys.modules, "repeng", SimpleNamespace(ControlVector=Repeng))
    monkeypatch.setitem(sys.modules, "steering_vectors", SimpleNamespace(SteeringVector=Steering))


def test_repeng_gets_and_gives_our_layers_and_numbers(packages):
    concept = concept_of(MODEL, 2, 0)
    vector = to_repeng(concept, strength=0.3, model_type="llama")
    assert vector.model_type == "llama" and to_repeng(concept).model_type == "tiny"
    assert set(vector.directions) == {0, 2} and all(row.dtype == np.float32 for row in vector.directions.values())
    found = from_repeng(vector, MODEL, name="joy")
    assert found.layers == (0, 2) and found.name == "joy"
    assert torch.equal(found.vectors, 0.3 * concept.only(0, 2).vectors)
    assert found.provenance == {"read_from": "repeng", "model_type": "llama"}
    with pytest.raises(ValueError, match="d_model = 8"):
        from_repeng(Repeng("llama", {1: np.ones(64, np.float32)}), MODEL)


def test_steering_vectors_get_and_give_our_layers_and_numbers(packages):
    concept = concept_of(MODEL, 3, 0)
    vector = to_steering_vector(concept, strength=0.3)
    assert vector.layer_type == "decoder_block" and set(vector.layer_activations) == {0, 3}
    found = from_steering_vector(vector, MODEL)
    assert found.layers == (0, 3) and torch.equal(found.vectors, 0.3 * concept.only(0, 3).vectors)
    counted = from_steering_vector(Steering({-1: torch.ones(8), 1: torch.zeros(8)}), MODEL)
    assert counted.layers == (1, 3) and counted.at(3).sum() == 8
    with pytest.raises(ValueError, match="twice"):
        from_steering_vector(Steering({-1: torch.ones(8), 3: torch.zeros(8)}), MODEL)


def test_other_layer_types_are_refused():
    for kind in ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm"):
        with pytest.raises(ValueError, match=f"expected layer_type 'decoder_block'.*read from '{kind}'"):
            from_steering_vector(Steering({1: torch.ones(8)}, kind), MODEL)


def test_what_leaves_shares_no_memory_with_the_concept(packages):
    concept = concept_of(MODEL, 1)
    before = concept.vectors.clone()
    to_repeng(concept).directions[1][:] = 0
    to_steering_vector(concept).layer_activations[1].zero_()
    assert torch.equal(concept.vectors, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_adding_to_the_output_of_block_l_is_what_all_three_do(bridges, references, packages, architecture, layer):
    """repeng (`ControlModule.forward`) and steering-vectors (`_create_additive_hook`) add to the output of decoder layer l."""
    bridge, hf = bridges[architecture], references[architecture]
    concept = concept_of(identify(bridge), layer)
    here = steered_here(bridge, concept, 0.7)
    for row in (
        torch.from_numpy(to_repeng(concept, strength=0.7).directions[layer]),
        to_steering_vector(concept, strength=0.7).layer_activations[layer],
    ):
        assert (hf_steered_logits(hf, IDS, layer, lambda resid, row=row: resid + row) - here).abs().max() < TOLERANCE
    assert row.shape == (D_MODEL,)
