"""A spec is the transplant it describes, here and in the words of TransformerLens's remote drivers."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, RemoteBridge, decoder_layers, hf_steered_logits, unchecked
from test_control_vectors import IDS, MODEL, TOLERANCE, concept_of
from torch import Tensor

from contrans_tl import identify, injection_hooks, transplant
from contrans_tl.exchange import from_spec, read_spec, to_interventions, to_spec, write_spec


@pytest.mark.parametrize("positions", ["all", "prompt", "last", "generated"])
def test_a_spec_through_json_is_the_transplant(bridges, positions):
    model = bridges["llama"]
    concept = concept_of(identify(model), 1)
    spec = json.loads(json.dumps(to_spec(concept, strength=1.7, positions=positions), allow_nan=False))
    with torch.no_grad():
        with transplant(model, concept, strength=1.7, positions=positions):
            expected = model(torch.tensor([IDS]))
        with model.hooks(fwd_hooks=injection_hooks(model, from_spec(spec))):
            assert torch.equal(model(torch.tensor([IDS])), expected)
        assert torch.equal(model(torch.tensor([IDS])), expected) == (positions == "generated")


def test_a_spec_says_site_op_value_positions_and_where_it_comes_from():
    concept = concept_of(MODEL, 1, 3)
    spec = to_spec(concept, strength=2.0, positions="last", layers=[3, 1])
    assert (spec["format"], spec["kind"]) == (1, "transplant")
    assert spec["concept"] == {
        "name": "joy",
        "model": MODEL.to_dict(),
        "strength": 2.0,
        "provenance": {"method": "mean"},
    }
    assert [{key: step[key] for key in ("site", "op", "positions")} for step in spec["injections"]] == [
        {"site": f"blocks.{layer}.hook_resid_post", "op": "add", "positions": "last"} for layer in (3, 1)
    ]
    assert spec["injections"][0]["value"] == (2.0 * concept.at(3)).tolist()
    with pytest.raises(ValueError, match="has vectors at 2 layers; choose"):
        to_spec(concept)


def test_a_spec_file_is_read_as_the_concept_it_adds(tmp_path):
    concept = concept_of(MODEL, 3)
    path = write_spec(concept, tmp_path / "x.json", strength=0.1, positions="generated")
    found = read_spec(path)
    assert found.layers == (3,) and torch.equal(found.vectors, 0.1 * concept.vectors) and found.name == "joy"
    spec = json.loads(path.read_text())
    del spec["concept"]
    path.write_text(json.dumps(spec))
    assert read_spec(path, MODEL).name == "x"
    with pytest.raises(ValueError, match="does not say whose vectors"):
        read_spec(path)
    path.write_text(json.dumps(spec | {"injections": 2 * spec["injections"]}))
    with pytest.raises(ValueError, match="at one layer more than once"):
        read_spec(path, MODEL)


def test_what_is_no_spec_is_refused():
    good = to_spec(concept_of(MODEL, 1))
    step = good["injections"][0]
    for spec, message in (
        ({}, "expected a transplant with kind, format and injections"),
        ([], "expected a transplant with kind"),
        (good | {"format": 2}, "format 1 at most; got 'transplant' of format 2"),
        (good | {"kind": "sweep"}, "got 'sweep'"),
        (good | {"injections": [step | {"op": "set"}]}, "got 'set' at 'all'"),
        (good | {"injections": [step | {"positions": "first"}]}, "got 'add' at 'first'"),
        (good | {"injections": [step | {"site": "blocks.1.hook_resid_mid"}]}, "got 'blocks.1.hook_resid_mid'"),
        (good | {"injections": [step | {"site": "blocks.x.hook_resid_post"}]}, "got 'blocks.x.hook_resid_post'"),
        (good | {"injections": [step | {"value": 1.0}]}, "list of finite numbers"),
        (good | {"injections": [step | {"value": [1.0, float("nan")]}]}, "list of finite numbers"),
        (good | {"injections": [step | {"value": ["a"]}]}, "list of numbers"),
        (good | {"injections": [{"site": step["site"]}]}, "KeyError: 'op'"),
        (good | {"injections": 3}, "expected a transplant with"),
    ):
        with unchecked(), pytest.raises(ValueError, match=message):
            from_spec(spec)


def test_a_spec_of_another_width_or_model_is_refused(tmp_path):
    path = write_spec(concept_of(MODEL, 1), tmp_path / "x.json")
    with pytest.raises(ValueError, match="other weights"):
        read_spec(path, replace(MODEL, fingerprint="f" * 16))
    spec = json.loads(path.read_text())
    spec["concept"]["model"] = "tiny"
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="says too little about its model"):
        read_spec(path)


# What a RemoteBridge takes


def accepts(edits: dict[str, Any], n_layers: int, d_model: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The edits through all that TransformerLens checks and does with them on the way into vLLM and Inspect: scale and bias by
    hook point, "pos d_model", as its worker fills them. 3.9 has no remote bridge: there the same rules stand here."""
    if RemoteBridge is None:
        apply = _fill
    else:
        from transformer_lens.model_bridge.sources.inspect.hooks import supported_hook_points
        from transformer_lens.model_bridge.sources.inspect.intervention import build_interventions
        from transformer_lens.model_bridge.sources.vllm.driver import VLLMDriver
        from transformer_lens.model_bridge.sources.vllm.overlays.decoder_only import DecoderOnlyOverlay
        from transformer_lens.model_bridge.sources.vllm.worker_extension import _apply_intervention

        config = type("Config", (), {"hidden_size": d_model, "num_hidden_layers": n_layers})()
        driver: Any = VLLMDriver.__new__(VLLMDriver)
        driver._llm = None
        driver._hook_widths = {name: width for name, (_, width) in DecoderOnlyOverlay().capture_specs(config).items()}
        driver.supported_hook_points = frozenset(driver._hook_widths)
        driver._enable_batching, driver._enable_position_interventions = False, True
        assert driver._validate_interventions(edits) == edits
        served = build_interventions(edits, supported_hook_points(n_layers))
        assert served == {f"{name.split('.')[1]}:resid_post": edit for name, edit in edits.items()}
        apply = _apply_intervention
    buffers = {}
    for name, edit in edits.items():
        scale, bias = torch.ones(len(IDS), d_model), torch.zeros(len(IDS), d_model)
        apply(scale, bias, edit)
        buffers[name] = (scale, bias)
    return buffers


def _fill(scale: Tensor, bias: Tensor, edit: dict[str, Any]) -> None:
    assert edit["op"] == "add" and set(edit) <= {"op", "value", "pos"}
    rows = slice(None) if "pos" not in edit else edit["pos"]
    bias[rows] = torch.tensor(edit["value"])


def affine(scale: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda resid: resid * scale + bias


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "prompt", "last"])
def test_a_remote_bridge_steers_what_transplant_steers(bridges, references, architecture, positions):
    model, hf = bridges[architecture], references[architecture]
    for layer in range(N_LAYERS):
        concept = concept_of(identify(model), layer)
        edits = to_interventions(concept, strength=1.5, positions=positions, prompt_length=len(IDS))
        assert list(edits) == [f"blocks.{layer}.hook_out"]
        ((scale, bias),) = accepts(json.loads(json.dumps(edits)), N_LAYERS, D_MODEL).values()
        with torch.no_grad(), transplant(model, concept, strength=1.5, positions=positions):
            here = model(torch.tensor([IDS]))[0]
        assert (hf_steered_logits(hf, IDS, layer, affine(scale, bias)) - here).abs().max() < TOLERANCE


class Engine:
    """An engine as a RemoteBridge drives one: a plain model somewhere else, that takes names and edits."""

    def __init__(self, hf: Any, bridge: Any) -> None:
        self.hf, self.bridge_config, self.tokenizer, self.architecture = hf, bridge.cfg, bridge.tokenizer, "llama"
        self.supported_hook_points = frozenset(f"blocks.{layer}.hook_out" for layer in range(N_LAYERS))
        self.non_fireable_hook_points: frozenset[str] = frozenset()
        self.provides_sequence_logits = True

    def close(self) -> None: ...

    def supports(self, feature: str) -> bool:
        return False

    def forward(self, input_ids: Any, *, capture: Any, intervene: Any, **options: Any) -> Any:
        from transformer_lens.model_bridge.driver_protocol import ForwardResult

        captured: dict[str, Tensor] = {}

        def hook(name: str, module: Any, inputs: Any, output: Any) -> Any:
            resid = output[0] if isinstance(output, tuple) else output
            if name in intervene:
                resid = affine(*accepts({name: intervene[name]}, N_LAYERS, D_MODEL)[name])(resid)
            if name in capture:
                captured[name] = resid
            return (resid, *output[1:]) if isinstance(output, tuple) else resid

        layers = enumerate(decoder_layers(self.hf))
        handles = [block.register_forward_hook(partial(hook, f"blocks.{layer}.hook_out")) for layer, block in layers]
        try:
            with torch.no_grad():
                logits = self.hf(input_ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return ForwardResult(logits=logits, captured=captured)


if RemoteBridge is not None:

    @pytest.mark.parametrize("positions", ["all", "last"])
    def test_a_captured_run_of_a_remote_bridge_is_that_of_the_transplant(bridges, references, positions):
        model = bridges["llama"]
        concept = concept_of(identify(model), 1)
        remote = RemoteBridge(model.adapter, model.tokenizer, Engine(references["llama"], model))
        edits = to_interventions(concept, strength=1.5, positions=positions, prompt_length=len(IDS))
        logits, there = remote.run_with_cache(torch.tensor([IDS]), intervene=edits)
        with torch.no_grad(), transplant(model, concept, strength=1.5, positions=positions):
            expected, here = model.run_with_cache(torch.tensor([IDS]))
        assert (logits - expected).abs().max() < TOLERANCE
        for layer in range(N_LAYERS):
            assert (there[f"blocks.{layer}.hook_out"] - here[f"blocks.{layer}.hook_resid_post"]).abs().max() < TOLERANCE


def test_several_concepts_add_up_where_they_meet():
    one, two = concept_of(MODEL, 1, 2), replace(concept_of(MODEL, 2), name="fear")
    edits = to_interventions([one, two.only(2)], strength=[1.0, -2.0], layers=[2])
    assert list(edits) == ["blocks.2.hook_out"]
    assert torch.allclose(torch.tensor(edits["blocks.2.hook_out"]["value"]), one.at(2) - 2.0 * two.at(2))
    accepts(edits, 4, 8)


def test_what_a_remote_bridge_cannot_do_is_refused():
    concept = concept_of(MODEL, 1)
    with pytest.raises(ValueError, match="generates nothing"):
        to_interventions(concept, positions="generated")
    with pytest.raises(ValueError, match="expected prompt_length="):
        to_interventions(concept, positions="last")
    with pytest.raises(ValueError, match="a RemoteBridge runs weights as they are published"):
        to_interventions(replace(concept, model=replace(MODEL, basis="centred")))
    with pytest.raises(ValueError, match="choose"):
        to_interventions(concept_of(MODEL, 1, 2))
