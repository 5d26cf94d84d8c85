"""A head is a place like a layer: its vectors are refined, carried and added as those of the residual stream are.

The references are made by hand in plain Hugging Face: a hook on the input of the attention's output projection, which is every
head's z side by side, one unpadded sequence at a time, without key-value cache.
"""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, TEXTS, decoder_layers, hooks_on, unchecked
from torch import Tensor

from contrans_tl import ContrastPairs, Injection, identify, injection_hooks, load_model, transplant
from contrans_tl.heads import HeadMaps, HeadVectors, collect_heads, fit_head_maps, refine_heads, reformulate_heads
from contrans_tl.reformulation import LayerMaps, fit_affine

TOLERANCE = 1e-5
"""as for the residual stream; a vector at one wrong token or head changes logits by more than 0.01."""
N_HEADS, D_HEAD = 4, D_MODEL // 4
TOKENS = torch.tensor([[0, 41, 77, 130, 9, 250]])
NEW = 3
PROMPTS = ["the quick brown fox", "a", "a letter made me feel"]
PAIRS = ContrastPairs("happiness", ("a letter made me feel happy", "happy dog"), ("the lazy dog", "a river feels lazy"))
OUT = {"llama": "self_attn.o_proj", "qwen2": "self_attn.o_proj", "gemma2": "self_attn.o_proj"}
OUT |= {"gpt2": "attn.c_proj", "neox": "attention.dense"}
SENTENCES = [f"{a} {b} {c}" for a in TEXTS for b in TEXTS[:3] for c in TEXTS[1:3]]


def vectors(model: Any, *heads: tuple[int, int], seed: int = 0, size: float = 3.0) -> HeadVectors:
    drawn = size * torch.randn(len(heads), D_HEAD, generator=torch.Generator().manual_seed(seed))
    return HeadVectors(drawn, heads, "happiness", identify(model))


@contextmanager
def at_z(hf: Any, architecture: str, layer: int, look: Any) -> Any:
    """While open, `look` reads, and may replace, the z of a layer, "pos head d_head", of one sequence."""

    def before(module: Any, inputs: Any) -> Any:
        z = inputs[0][0]
        changed = look(z.view(len(z), N_HEADS, D_HEAD))
        return None if changed is None else (changed.reshape(1, *z.shape),)

    handle = decoder_layers(hf)[layer].get_submodule(OUT[architecture]).register_forward_pre_hook(before)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()


def logits_by_hand(hf: Any, name: str, ids: list[int], head: tuple[int, int], v: Tensor, where: slice) -> Tensor:
    def write(z: Tensor) -> Tensor:
        z = z.clone()
        z[where, head[1]] += v
        return z

    with at_z(hf, name, head[0], write):
        return hf(torch.tensor([ids]), use_cache=False).logits[0]


# --- vectors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_vector_of_every_head_is_the_mean_difference_of_its_z_at_the_last_real_token(bridges, references, architecture):
    model, hf = bridges[architecture], references[architecture]
    found = refine_heads(model, PAIRS, batch_size=3)
    assert found.heads == tuple((layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS))
    for layer in range(N_LAYERS):
        means = []
        for side in (PAIRS.positive, PAIRS.negative):
            last: list[Tensor] = []
            for text in side:
                ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
                ids = ([model.tokenizer.bos_token_id] if found.provenance["prepend_bos"] else []) + ids
                with at_z(hf, architecture, layer, lambda z, last=last: last.append(z[-1].clone()) or None):
                    hf(torch.tensor([ids]), use_cache=False)
            means.append(torch.stack(last).mean(0))
        for head in range(N_HEADS):
            assert (found.at(layer, head) - (means[0] - means[1])[head]).abs().max() < TOLERANCE


def test_vectors_of_some_heads_are_those_of_all_and_are_saved_as_they_are(bridges, tmp_path):
    every, some = refine_heads(bridges["llama"], PAIRS), refine_heads(bridges["llama"], PAIRS, heads=[(2, 3), (0, 1)])
    assert torch.equal(some.vectors, every.only((2, 3), (0, 1)).vectors) and some.heads == ((2, 3), (0, 1))
    back = HeadVectors.load((2.0 * some).save(tmp_path / "v.safetensors"))
    assert torch.equal(back.vectors, 2 * some.vectors) and back.heads == some.heads and back.model == some.model
    assert "2 heads of layers 0..2" in repr(back) and back.provenance["of"]["positive"] == 2


def test_heads_that_are_not_there_are_named(bridges):
    model = bridges["llama"]
    for wrong in ([(9, 0)], [(0, 4)], [], [(0, 1), (0, 1)]):
        with pytest.raises(ValueError, match="layers 0 to 2 and heads 0 to 3"):
            refine_heads(model, PAIRS, heads=wrong)
    with pytest.raises(ValueError, match=r"there is none at \(1, 1\)"):
        vectors(model, (0, 1)).at(1, 1)
    with pytest.raises(ValueError, match="different heads"):
        vectors(model, (0, 1), (0, 1))
    with pytest.raises(ValueError, match="NaN"):
        HeadVectors(torch.full((1, D_HEAD), torch.nan), ((0, 0),), "x", identify(model))


# --- transplanted --------------------------------------------------------------------------------------------------------

WHERE = {
    "all": lambda prompt, length: slice(0, length),
    "prompt": lambda prompt, length: slice(0, prompt),
    "generated": lambda prompt, length: slice(prompt, length),
    "last": lambda prompt, length: slice(prompt - 1, prompt),
}


@pytest.mark.parametrize("head", [(0, 0), (1, 3), (2, 2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_steered_head_equals_a_hand_written_hugging_face_hook(bridges, references, architecture, head):
    model, ids = bridges[architecture], TOKENS[0].tolist()
    v, base = vectors(model, head), model(TOKENS)
    expected = logits_by_hand(references[architecture], architecture, ids, head, 1.5 * v.at(*head), slice(None))
    with transplant(model, v, strength=1.5):
        steered = model(TOKENS)[0]
    assert (steered - expected).abs().max() < TOLERANCE
    assert (steered - base[0]).abs().max() > 0.01
    with transplant(model, v, strength=0.0):
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), base)


@pytest.mark.parametrize("positions", WHERE)
def test_a_padded_batch_is_steered_as_each_prompt_alone(bridges, references, positions):
    model, head = bridges["gpt2"], (1, 2)
    v, tokens = vectors(model, head), model.to_tokens(PROMPTS, padding_side="right")
    with transplant(model, v, positions=positions):
        logits = model(tokens)
    for row, prompt in enumerate(PROMPTS):
        ids = model.to_tokens(prompt)[0].tolist()
        expected = logits_by_hand(references["gpt2"], "gpt2", ids, head, v.at(*head), WHERE[positions](len(ids), len(ids)))
        assert (logits[row, : len(ids)] - expected).abs().max() < TOLERANCE


@pytest.fixture(scope="module")
def by_hand(bridges: dict[str, Any], references: dict[str, Any]) -> dict[tuple[str, str], list[list[int]]]:
    """{(architecture, positions): greedy continuation of every prompt}, every step from the beginning."""
    table = {}
    for name, model in bridges.items():
        v = 4.0 * vectors(model, (0, 1))
        for positions in WHERE:
            table[name, positions] = []
            for prompt in PROMPTS:
                ids = model.to_tokens(prompt)[0].tolist()
                text = list(ids)
                for _ in range(NEW):
                    where = WHERE[positions](len(ids), len(text))
                    logits = logits_by_hand(references[name], name, text, (0, 1), v.at(0, 1), where)
                    text.append(int(logits[-1].argmax()))
                table[name, positions].append(text[len(ids) :])
        assert len({str(table[name, positions]) for positions in WHERE}) >= 3, name  # they tell the positions apart
    return table


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("positions", WHERE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_with_a_steered_head_is_that_of_hugging_face_by_hand(bridges, by_hand, architecture, positions, cache):
    model = bridges[architecture]
    options = dict(max_new_tokens=NEW, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    with transplant(model, 4.0 * vectors(model, (0, 1)), positions=positions):
        batched = model.generate(PROMPTS, use_past_kv_cache=cache, **options)[:, -NEW:].tolist()
        single = model.generate(PROMPTS[2], use_past_kv_cache=cache, **options)[0, -NEW:].tolist()
    assert batched == by_hand[architecture, positions] and single == batched[2]
    assert not hooks_on(model)


def test_several_heads_and_a_layer_add_up(bridges):
    from contrans_tl import ConceptVector

    model = bridges["llama"]
    v, resid = vectors(model, (1, 0), (1, 2), (2, 3)), ConceptVector(torch.ones(1, D_MODEL), (0,), "ones", identify(model))
    with transplant(model, [v, resid], strength=[2.0, 0.5], heads=[(1, 2), (2, 3)]):
        together = model(TOKENS)
    with transplant(model, v.only((1, 2)), strength=2.0), transplant(model, v.only((2, 3)), strength=2.0):
        with transplant(model, resid, strength=0.5):
            assert (model(TOKENS) - together).abs().max() < TOLERANCE
    with transplant(model, v, strength=2.0, heads=[(1, 2)]):
        assert (model(TOKENS) - together).abs().max() > 0.01


def test_a_bf16_model_is_steered_in_bf16_at_its_heads(folders):
    model = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16)
    for positions in ("all", "last"):
        with transplant(model, vectors(model, (1, 1)), positions=positions):
            assert model(TOKENS).dtype == torch.bfloat16


def test_the_model_is_as_it_was_after_an_exception(bridges):
    model = bridges["llama"]
    with pytest.raises(KeyboardInterrupt), transplant(model, vectors(model, (1, 1)), positions="last"):
        raise KeyboardInterrupt
    assert not hooks_on(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"vectors at 2 heads; choose, as in heads=\[\(2, 3\)\]"),
        ({"heads": [(1, 1)]}, r"there is none at \(1, 1\)"),
        ({"layers": [0]}, "layers= says where to add a ConceptVector"),
        ({"heads": [(0, 0)], "positions": "first"}, "expected positions"),
    ],
)
def test_what_cannot_be_added_to_heads_is_one_line_of_error(bridges, options, message):
    model = bridges["llama"]
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        with transplant(model, vectors(model, (0, 0), (2, 3)), **options):
            pass
    assert "\n" not in str(caught.value) and not hooks_on(model)


def test_heads_of_another_model_and_heads_that_do_not_exist_are_refused(bridges):
    model = bridges["llama"]
    with (
        pytest.raises(ValueError, match="lives in gpt2 .* reformulate it first"),
        transplant(model, vectors(bridges["gpt2"], (0, 0))),
    ):
        pass
    for wrong, message in ((Injection(0, torch.zeros(D_HEAD), head=4), "no head 4"), (Injection(9, torch.zeros(8)), "layer 9")):
        with pytest.raises(ValueError, match=message):
            injection_hooks(model, [wrong])
    with pytest.raises(ValueError, match="d_head = 8"):
        injection_hooks(model, [Injection(0, torch.zeros(D_MODEL), head=1)])
    with pytest.raises(ValueError, match="heads= says where to add a HeadVectors"):
        from contrans_tl import ConceptVector

        with transplant(model, ConceptVector(torch.ones(1, D_MODEL), (0,), "x", identify(model)), heads=[(0, 0)]):
            pass


# --- carried -------------------------------------------------------------------------------------------------------------


def test_a_head_map_is_the_affine_map_of_its_z_and_carries_the_vector_without_the_bias(bridges):
    source, target = bridges["llama"], bridges["gpt2"]
    maps = fit_head_maps(source, target, SENTENCES, source_heads=[(1, 2), (0, 3)], target_heads=[(2, 0), (0, 1)], pooled=False)
    assert maps.r2.shape == (2, 2)
    x, y = (collect_heads(m, SENTENCES, heads=h, rows="words") for m, h in ((source, [(1, 2)]), (target, [(0, 1)])))
    direct = fit_affine(x.at(1 * N_HEADS + 2), y.at(1), sentence=x.sentence, ridge=maps.maps.ridge(1 * N_HEADS + 2))
    v = refine_heads(source, PAIRS)
    moved = reformulate_heads(v, maps, heads={(0, 1): (1, 2)}, weighting="uniform")
    assert moved.heads == ((0, 1),) and moved.model == identify(target)
    assert torch.allclose(moved.at(0, 1), direct.direction(v.at(1, 2)), rtol=1e-3, atol=1e-4)
    with transplant(target, moved):
        target(TOKENS)


def test_a_model_mapped_onto_itself_finds_its_own_heads_and_keeps_their_vectors(bridges):
    model, chosen = bridges["gpt2"], [(2, 1), (0, 0), (1, 3)]
    maps = fit_head_maps(model, model, SENTENCES, source_heads=chosen, target_heads=chosen, ridge=1e-8, pooled=False)
    assert maps.best() == {head: head for head in chosen}
    v = refine_heads(model, PAIRS)
    for weighting in ("uniform", "concept"):
        moved = reformulate_heads(v, maps, weighting=weighting)
        for head in chosen:
            assert torch.nn.functional.cosine_similarity(moved.at(*head), v.at(*head), dim=0) > 0.99


def test_pooled_heads_are_mapped_side_by_side(bridges):
    source, target, chosen = bridges["llama"], bridges["gpt2"], [(2, 1), (0, 3)]
    maps = fit_head_maps(source, target, SENTENCES, source_heads=chosen, target_heads=[(2, 0), (0, 1)])
    assert maps.r2.shape == (1, 2)
    x, y = (collect_heads(m, SENTENCES, heads=h, rows="words") for m, h in ((source, chosen), (target, [(0, 1)])))
    direct = fit_affine(x.values.flatten(1), y.at(1), sentence=x.sentence, ridge=maps.maps.ridge(0))
    v = refine_heads(source, PAIRS)
    moved = reformulate_heads(v, maps, weighting="uniform")
    assert moved.heads == ((2, 0), (0, 1)) and moved.provenance["heads"][0]["from"] == tuple(chosen)
    expected = direct.direction(torch.cat([v.at(2, 1), v.at(0, 3)]))
    assert torch.allclose(moved.at(0, 1), expected, rtol=1e-3, atol=1e-4)
    itself = fit_head_maps(source, source, SENTENCES, target_heads=[(1, 3)], ridge=1e-8)
    for weighting in ("uniform", "concept"):
        [back] = reformulate_heads(v, itself, weighting=weighting).vectors
        assert torch.nn.functional.cosine_similarity(back, v.at(1, 3), dim=0) > 0.99
    with pytest.raises(ValueError, match="all source heads together: leave out heads="):
        reformulate_heads(v, maps, heads={(0, 1): (2, 1)})
    with pytest.raises(ValueError, match="pooled=False"):
        maps.best()


@pytest.mark.parametrize("pooled", [True, False])
def test_head_maps_are_loaded_as_they_were_saved(bridges, tmp_path, pooled):
    source, target = bridges["llama"], bridges["gpt2"]
    chosen = {"source_heads": [(1, 2), (0, 3)], "target_heads": [(2, 0), (0, 1)]}
    maps = fit_head_maps(source, target, SENTENCES, pooled=pooled, **chosen)
    loaded = HeadMaps.load(maps.save(tmp_path / "maps.safetensors"))
    for name in ("source", "target", "source_heads", "target_heads", "pooled"):
        assert getattr(loaded, name) == getattr(maps, name)
    v = refine_heads(source, PAIRS)
    moved, again = reformulate_heads(v, maps), reformulate_heads(v, loaded)
    assert moved.heads == again.heads and torch.equal(moved.vectors, again.vectors)
    with pytest.raises(ValueError, match="of kind 'layer maps'; .* is of kind 'head maps'"):
        LayerMaps.load(tmp_path / "maps.safetensors")
    with pytest.raises(ValueError, match="of kind 'head maps'; .* is of kind 'head vectors'"):
        HeadMaps.load(v.save(tmp_path / "vectors.safetensors"))


def test_what_no_head_map_has_is_refused(bridges):
    model = bridges["gpt2"]
    maps = fit_head_maps(model, model, SENTENCES, source_heads=[(0, 0)], target_heads=[(1, 1)], pooled=False)
    with pytest.raises(ValueError, match="lives in llama"):
        reformulate_heads(vectors(bridges["llama"], (0, 0)), maps)
    with pytest.raises(ValueError, match=r"got \(1, 2\): \(0, 0\)"):
        reformulate_heads(vectors(model, (0, 0)), maps, heads={(1, 2): (0, 0)})
    with unchecked(), pytest.raises(ValueError, match="weighting 'concept' or 'uniform'"):
        reformulate_heads(vectors(model, (0, 0)), maps, weighting="both")
    with pytest.raises(ValueError, match="expected a list of texts"):
        fit_head_maps(model, model, "one text")
