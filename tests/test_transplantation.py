"""A transplant adds what it says, where it says, and leaves the model as it was.

The references are made by hand in plain Hugging Face: a forward hook on the decoder layer, one unpadded sequence at a time,
without key-value cache.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, hf_steered_logits, hooks_on, unchecked
from torch import Tensor

from contrans_tl import ConceptVector, Injection, identify, injection_hooks, load_model, transplant
from contrans_tl.transplantation import injections

TOLERANCE = 1e-5
"""The brief's bound; logits here are of order 1 to 10, and float32 sums in another order differ by 1e-6. A vector added at one
wrong token changes them by more than 0.01."""
TOKENS = torch.tensor([[0, 41, 77, 130, 9, 250]])
PROMPTS = ["the quick brown fox", "a", "a letter made me feel"]
NEW = 5


def concept(model: Any, *layers: int, seed: int = 0, name: str = "happiness") -> ConceptVector:
    vectors = torch.randn(len(layers), D_MODEL, generator=torch.Generator().manual_seed(seed))
    return ConceptVector(vectors, layers, name, identify(model))


@pytest.fixture(scope="module")
def llama(bridges: dict[str, Any]) -> Any:
    return bridges["llama"]


# --- what is added -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(N_LAYERS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steered_logits_equal_those_of_a_hand_written_hugging_face_hook(bridges, references, architecture, layer):
    model = bridges[architecture]
    v = concept(model, layer)
    ids = TOKENS[0].tolist()
    expected = hf_steered_logits(references[architecture], ids, layer, lambda x: x + 1.5 * v.at(layer))
    with transplant(model, v, strength=1.5):
        steered = model(TOKENS)[0]
    assert (steered - expected).abs().max() < TOLERANCE
    assert (steered - model(TOKENS)[0]).abs().max() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_strength_0_changes_nothing(bridges, architecture):
    model = bridges[architecture]
    base = model(TOKENS)
    for positions in ("all", "prompt", "generated", "last"):
        with transplant(model, concept(model, 0, 1, 2), strength=0.0, layers=[0, 1, 2], positions=positions):
            assert torch.equal(model(TOKENS), base)


def test_plus_and_minus_the_same_strength_change_nothing(llama):
    base, v = llama(TOKENS), concept(llama, 1)
    with transplant(llama, [v, v], strength=[3.0, -3.0]):
        assert (llama(TOKENS) - base).abs().max() < TOLERANCE
    with transplant(llama, v, strength=3.0), transplant(llama, -v, strength=3.0):
        assert (llama(TOKENS) - base).abs().max() < TOLERANCE


def test_several_concepts_and_nested_transplants_add_up(llama, references):
    v, w = concept(llama, 1), concept(llama, 1, seed=1, name="anger")
    expected = hf_steered_logits(references["llama"], TOKENS[0].tolist(), 1, lambda x: x + 2 * v.at(1) - 0.5 * w.at(1))
    with transplant(llama, [v, w], strength=[2.0, -0.5]):
        together = llama(TOKENS)[0]
    with transplant(llama, v, strength=2.0), transplant(llama, w, strength=-0.5):
        nested = llama(TOKENS)[0]
    with transplant(llama, 2.0 * v - 0.5 * w):
        summed = llama(TOKENS)[0]
    for logits in (together, nested, summed):
        assert (logits - expected).abs().max() < TOLERANCE


def test_leaving_the_inner_transplant_leaves_the_outer_one(llama):
    v, w = concept(llama, 1), concept(llama, 2, seed=1)
    with transplant(llama, v):
        outer = llama(TOKENS)
        with transplant(llama, w):
            assert (llama(TOKENS) - outer).abs().max() > 0.01
        assert torch.equal(llama(TOKENS), outer)


def test_several_layers_are_injected_when_asked_for(llama, references):
    v = concept(llama, 0, 2)
    with transplant(llama, v, layers=[0, 2], strength=0.7):
        both = llama(TOKENS)[0]
    with transplant(llama, v, layers=[0], strength=0.7), transplant(llama, v, layers=[2], strength=0.7):
        assert torch.equal(llama(TOKENS)[0], both)
    with transplant(llama, v, layers=[0], strength=0.7):
        first = llama(TOKENS)[0]
    expected = hf_steered_logits(references["llama"], TOKENS[0].tolist(), 0, lambda x: x + 0.7 * v.at(0))
    assert (first - expected).abs().max() < TOLERANCE
    assert (first - both).abs().max() > 0.01


def test_run_with_cache_sees_the_write(llama):
    v = concept(llama, 1)
    _, before = llama.run_with_cache(TOKENS)
    with transplant(llama, v, strength=2.0):
        _, after = llama.run_with_cache(TOKENS)
    for site in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
        assert (after[site] - before[site] - 2 * v.at(1)).abs().max() < TOLERANCE
    assert torch.equal(after["blocks.1.hook_resid_pre"], before["blocks.1.hook_resid_pre"])


def test_the_hooks_are_plain_data_for_run_with_hooks(llama):
    v = concept(llama, 1)
    with transplant(llama, v, strength=2.0, positions="last"):
        expected = llama(TOKENS)
    seen: list[Tensor] = []
    own = ("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.clone()))
    hooks = injection_hooks(llama, injections(v, strength=2.0, positions="last"))
    assert torch.equal(llama.run_with_hooks(TOKENS, fwd_hooks=[*hooks, own]), expected)
    assert len(seen) == 1


def test_the_writing_hook_returns_a_new_tensor_in_the_dtype_of_the_stream(llama):
    from contrans_tl.transplantation import add_everywhere

    resid = torch.zeros(1, 2, D_MODEL, dtype=torch.bfloat16)
    out = add_everywhere(resid, None, vector=torch.ones(D_MODEL, dtype=torch.float64))
    assert out.dtype == torch.bfloat16 and bool((out == 1).all()) and not resid.any()


def test_a_bf16_model_is_steered_in_bf16(folders, references):
    model = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16)
    v = concept(model, 1)
    for positions, where in (("all", slice(None)), ("last", slice(-1, None))):
        with transplant(model, v, strength=2.0, positions=positions):
            steered = model(TOKENS)[0]
        assert steered.dtype == torch.bfloat16

        def write(x: Tensor, where: slice = where) -> Tensor:
            x = x.clone()
            x[where] += 2 * v.at(1)
            return x

        expected = hf_steered_logits(references["llama"], TOKENS[0].tolist(), 1, write)
        # bfloat16 keeps 8 bits: relative steps of 2^-8, a few of them over three layers
        assert (steered.float() - expected).norm() / expected.norm() < 0.05


# --- where it is added -------------------------------------------------------------------------------------------------

WHERE: dict[str, Callable[[int, int], slice]] = {
    "all": lambda prompt, length: slice(0, length),
    "prompt": lambda prompt, length: slice(0, prompt),
    "generated": lambda prompt, length: slice(prompt, length),
    "last": lambda prompt, length: slice(prompt - 1, prompt),
}


def ids_of(model: Any, prompt: str) -> list[int]:
    return model.to_tokens(prompt)[0].tolist()


def generated_by_hand(hf: Any, ids: list[int], v: Tensor, layer: int, positions: str, new: int = NEW) -> list[int]:
    """Greedy continuation of one sequence in plain Hugging Face, every step from the beginning."""
    sequence = list(ids)
    for _ in range(new):

        def write(x: Tensor) -> Tensor:
            x = x.clone()
            x[WHERE[positions](len(ids), len(sequence))] += v
            return x

        sequence.append(int(hf_steered_logits(hf, sequence, layer, write)[-1].argmax()))
    return sequence[len(ids) :]


def generated(model: Any, prompts: str | list[str] | Tensor, new: int = NEW, **options: Any) -> list[list[int]]:
    out = model.generate(
        prompts,
        max_new_tokens=new,
        do_sample=False,
        stop_at_eos=False,
        return_type="tokens",
        verbose=False,
        **options,
    )
    return out[:, -new:].tolist()


@pytest.fixture(scope="module")
def by_hand(bridges: dict[str, Any], references: dict[str, Any]) -> dict[tuple[str, str], list[list[int]]]:
    """{(architecture, positions): continuation of every prompt}, and proof that they tell the positions apart."""
    table = {
        (name, positions): [
            generated_by_hand(references[name], ids_of(model, prompt), 2.0 * concept(model, 1).at(1), 1, positions)
            for prompt in PROMPTS
        ]
        for name, model in bridges.items()
        for positions in WHERE
    }
    for name in bridges:
        assert len({str(table[name, positions]) for positions in WHERE}) == len(WHERE), name
    return table


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "single"])
@pytest.mark.parametrize("positions", WHERE)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_that_of_hugging_face_by_hand(bridges, by_hand, architecture, positions, batched, cache):
    model = bridges[architecture]
    with transplant(model, concept(model, 1), strength=2.0, positions=positions):
        if batched:
            out = generated(model, PROMPTS, use_past_kv_cache=cache)
        else:  # one after the other within one transplant: each begins anew
            out = [generated(model, prompt, use_past_kv_cache=cache)[0] for prompt in PROMPTS]
    assert out == by_hand[architecture, positions]
    assert not hooks_on(model)


@pytest.mark.parametrize("positions", WHERE)
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_a_prompt_of_one_token_is_a_prompt_also_after_another_generation(bridges, references, positions, cache):
    """No bos, one token: only the attention tells it from a token generated with a cache."""
    model = bridges["neox"]
    v = concept(model, 1)
    with transplant(model, v, strength=2.0, positions=positions):
        for first in (77, 41, 41):
            out = generated(model, torch.tensor([[first]]), use_past_kv_cache=cache)[0]
            assert out == generated_by_hand(references["neox"], [first], 2.0 * v.at(1), 1, positions)


def test_a_prompt_that_begins_with_the_last_token_of_a_cached_generation_is_a_prompt(bridges, references):
    model = bridges["neox"]
    v = concept(model, 1)
    with transplant(model, v, strength=2.0, positions="prompt"):
        last_entered = generated(model, TOKENS, new=3)[0][-2]
        prompt = [last_entered, 41]
        out = generated(model, torch.tensor([prompt]))[0]
    assert out == generated_by_hand(references["neox"], prompt, 2.0 * v.at(1), 1, "prompt")


@pytest.mark.parametrize("positions", WHERE)
def test_a_plain_pass_is_all_prompt_and_its_padding_on_the_right_is_not(bridges, references, positions):
    model, hf = bridges["gpt2"], references["gpt2"]
    v = concept(model, 1)
    tokens = model.to_tokens(PROMPTS, padding_side="right")
    assert tokens[1, -1] == model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
    with transplant(model, v, positions=positions):
        logits = model(tokens)
    for row, prompt in enumerate(PROMPTS):
        ids = ids_of(model, prompt)

        def write(x: Tensor) -> Tensor:
            x = x.clone()
            x[WHERE[positions](len(x), len(x))] += v.at(1)
            return x

        assert (logits[row, : len(ids)] - hf_steered_logits(hf, ids, 1, write)).abs().max() < TOLERANCE


def test_independent_passes_within_one_transplant_each_begin_anew(llama):
    v = concept(llama, 1)

    def alone(tokens: Tensor) -> Tensor:
        with transplant(llama, v, positions="last"):
            return llama(tokens)

    other = TOKENS.flip(1)  # after three tokens, four others
    batches = [TOKENS, TOKENS[:, :3], other[:, :4], TOKENS[:, :1], TOKENS[:, 3:4], other, TOKENS.repeat(2, 1)]
    expected = [alone(tokens) for tokens in batches]
    with transplant(llama, v, positions="last"):
        for tokens, logits in zip(batches, expected, strict=True):
            assert torch.equal(llama(tokens), logits)


def test_positions_are_told_apart_when_the_model_is_in_compatibility_mode(folders):
    model = load_model(folders["gpt2"], device="cpu")
    model.enable_compatibility_mode(no_processing=True)
    v = concept(model, 1)
    outs = {}
    for positions in WHERE:
        with transplant(model, v, strength=2.0, positions=positions):
            cached, uncached = (generated(model, PROMPTS, use_past_kv_cache=cache) for cache in (True, False))
        assert cached == uncached
        outs[positions] = str(cached)
    assert len(set(outs.values())) == len(WHERE)


# --- the model afterwards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", WHERE)
def test_the_model_is_as_it_was_also_after_an_exception(llama, positions):
    base = llama(TOKENS)
    with pytest.raises(KeyboardInterrupt):
        with transplant(llama, concept(llama, 1), positions=positions):
            llama(TOKENS)
            raise KeyboardInterrupt
    assert not hooks_on(llama)
    with pytest.raises(RuntimeError, match="in the middle of a pass"):
        with transplant(llama, concept(llama, 1), positions=positions):
            llama.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.hook_resid_post", fail)])
    assert not hooks_on(llama)
    assert torch.equal(llama(TOKENS), base)


def fail(x: Tensor, hook: Any) -> None:
    raise RuntimeError("in the middle of a pass")


def test_the_users_own_hooks_survive(llama):
    calls: list[str] = []
    llama.add_hook("blocks.1.hook_resid_post", lambda x, hook: calls.append("mine"))
    try:
        with transplant(llama, concept(llama, 1)):
            llama(TOKENS)
            llama.run_with_cache(TOKENS)
            llama.run_with_hooks(TOKENS, fwd_hooks=[])
        llama(TOKENS)
    finally:
        llama.reset_hooks()
    assert len(calls) == 4


def test_the_transplant_survives_the_users_own_run_with_hooks_and_run_with_cache(llama):
    with transplant(llama, concept(llama, 1)):
        steered = llama(TOKENS)
        llama.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x + 1)])
        llama.run_with_cache(TOKENS)
        assert torch.equal(llama(TOKENS), steered)


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_a_concept_of_another_model_is_refused_with_the_remedy(bridges):
    lives_in_gpt2 = concept(bridges["gpt2"], 1)
    with pytest.raises(ValueError, match="'happiness' lives in gpt2 .* the model is llama .*: reformulate it first"):
        with transplant(bridges["llama"], lives_in_gpt2):
            pass
    with pytest.raises(ValueError, match="reformulate it first"):
        with transplant(bridges["llama"], [concept(bridges["llama"], 1), lives_in_gpt2]):
            pass


def test_a_concept_of_other_weights_of_the_same_name_is_refused(llama):
    from dataclasses import replace

    other = replace(concept(llama, 1), model=replace(identify(llama), fingerprint="0" * 16))
    with pytest.raises(ValueError, match="same name but other weights"):
        with transplant(llama, other):
            pass


def test_a_model_in_training_mode_is_refused(folders):
    model = load_model(folders["llama"], device="cpu")
    v = concept(model, 1)
    model.train()
    with pytest.raises(ValueError, match="model.eval()"):
        with transplant(model, v):
            pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"vectors at 2 layers; choose, as in layers=\[2\]"),
        ({"layers": [1]}, r"vectors at layers \(0, 2\); there is none at 1"),
        ({"layers": [0], "strength": [1.0, 2.0]}, "got 2 for 1 concepts"),
        ({"layers": [0], "strength": float("nan")}, "finite strength"),
        ({"layers": [0], "positions": "first"}, "expected positions all, prompt, generated, last"),
    ],
)
def test_what_cannot_be_injected_is_one_line_of_error(llama, options, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        with transplant(llama, concept(llama, 0, 2), **options):
            pass
    assert "\n" not in str(caught.value)
    assert not hooks_on(llama)


def test_no_concept_at_all_is_refused(llama):
    with pytest.raises(ValueError, match="concepts"):
        with transplant(llama, []):
            pass


def test_a_layer_the_model_does_not_have_and_another_width_are_refused(llama):
    with pytest.raises(ValueError, match=f"has {N_LAYERS} layers; there is no layer 9"):
        injection_hooks(llama, [Injection(9, torch.zeros(D_MODEL))])
    with pytest.raises(ValueError, match=f"d_model = {D_MODEL}; got shape \\(5,\\)"):
        injection_hooks(llama, [Injection(0, torch.zeros(5))])


def test_a_pass_that_starts_at_a_later_layer_cannot_tell_positions(llama):
    hooks = injection_hooks(llama, [Injection(1, torch.zeros(D_MODEL), "last")])
    _, write = hooks[-1]
    with pytest.raises(ValueError, match="starts at a later layer"):
        write(torch.zeros(1, 2, D_MODEL), hook=None)
