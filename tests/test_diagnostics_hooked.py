"""A HookedTransformer (TransformerLens 3.9) and a bridge of the same weights are attributed, swept and patched alike."""

import pytest
import torch
from conftest import TEXTS, hooks_on, save_tokenizer
from test_attribution import difference, ramp
from test_hooked_transformer import HookedTransformer, hooked_transformer

from contrans_tl.diagnostics import attribute, patch, sweep

if HookedTransformer is not None:

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_both_are_attributed_swept_and_patched_alike(bridges, references, folders, architecture):
        bridge = bridges[architecture]
        hooked = hooked_transformer(architecture, references[architecture], save_tokenizer(folders[architecture]))
        hooked.requires_grad_(False)
        found = []
        for model in (hooked, bridge):
            concept = ramp(model)
            for steps in (1, 3):
                a = attribute(model, concept, TEXTS, metric=difference, layer=0, steps=steps, check=4, batch_size=3)
                found.append([a.scores.values, a.heads_by_position.values, torch.tensor([one.true for one in a.checked])])
            vectors = torch.ones(3, 4, 8)
            heads = sweep(model, concept, TEXTS, metric=difference, heads=[(0, 1), (2, 3)], head_vectors=vectors)
            layers = sweep(model, concept, TEXTS, metric=difference, positions=("all", "last"), batch_size=11)
            found.append([heads.scores.values, layers.scores.values])
            for direction in ("denoise", "noise"):
                p = patch(model, concept, TEXTS[:2], metric=difference, layer=0, direction=direction, by_position=True)
                found.append([p.scores.values, p.by_layer.values, p.by_position.values])
            assert not hooks_on(model) and not any("forward" in vars(module) for module in (*model.blocks, model.unembed))
        half = len(found) // 2
        for mine, theirs in zip(found[:half], found[half:], strict=True):
            for one, other in zip(mine, theirs, strict=True):
                assert one.abs().max() > 1e-3 and torch.allclose(one, other, atol=2e-4)

    def test_a_model_whose_parameters_ask_for_gradients_is_left_without_any(bridges, references, folders):
        model = hooked_transformer("gpt2", references["gpt2"], save_tokenizer(folders["gpt2"]))
        model.requires_grad_(True)
        with_them = attribute(model, ramp(model), TEXTS, metric=difference, layer=0, check=0)
        assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
        model.requires_grad_(False)
        without = attribute(model, ramp(model), TEXTS, metric=difference, layer=0, check=0)
        assert torch.allclose(with_them.scores.values, without.scores.values, atol=1e-6)
