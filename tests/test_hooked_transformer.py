"""A HookedTransformer (TransformerLens 3.9) and a TransformerBridge of the same weights are one model to the library.

TransformerLens 4 has no HookedTransformer. There the other half of the promise is tested: it is absent, the library never
asks for it, and a bridge made the way a HookedTransformer was - from a bare configuration, no Hugging Face model beside it -
takes its place through the same protocol.
"""

from typing import Any

import pytest
import torch
from conftest import D_MODEL, N_CTX, N_LAYERS, TEXTS, VOCAB, hooks_on, save_tokenizer

from contrans_tl import ConceptVector, ContrastPairs, collect, identify, refine, transplant
from contrans_tl.checks import self_check
from contrans_tl.evaluation import SteeredAt, plain
from contrans_tl.models import HookedModel, hook_name
from contrans_tl.passes import head_only_at

try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

TOLERANCE = 1e-5
"""the two classes sum in other orders, which is 1e-6 in float32 at a stream of scale 1 to 10."""
PAIRS = ContrastPairs("happiness", ("a letter made me feel happy", "happy dog"), ("the lazy dog", "a river feels lazy"))
TOKENS = torch.tensor([[0, 41, 77, 130, 9, 250]])

SHAPE = dict(d_model=D_MODEL, n_layers=N_LAYERS, n_heads=4, d_head=D_MODEL // 4, n_ctx=N_CTX, d_vocab=VOCAB, d_mlp=48)


LAYOUT = {
    "gpt2": dict(act_fn="gelu_new", normalization_type="LN", positional_embedding_type="standard"),
    "llama": dict(
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=D_MODEL // 4,
        rotary_adjacent_pairs=False,
        gated_mlp=True,
        final_rms=True,
        n_key_value_heads=2,
        eps=1e-6,
    ),
}


def hooked_transformer(architecture: str, hf: Any, tokenizer: Any, *, processed: bool = False) -> Any:
    """A HookedTransformer with the weights of a Hugging Face model, copied by TransformerLens's own converters."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights

    convert = {"gpt2": convert_gpt2_weights, "llama": convert_llama_weights}[architecture]
    cfg = HookedTransformerConfig(**SHAPE, **LAYOUT[architecture], device="cpu", model_name=architecture)
    model = HookedTransformer(cfg, tokenizer=tokenizer, default_padding_side="right")
    model.load_and_process_state_dict(
        convert(hf, cfg),
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed,
        fold_value_biases=processed,
    )
    return model.eval()


if HookedTransformer is not None:

    @pytest.fixture(scope="module", params=["gpt2", "llama"])
    def both(request: Any, bridges: Any, references: Any, folders: Any) -> tuple[Any, Any]:
        """(HookedTransformer, bridge) of the same weights."""
        name = request.param
        return hooked_transformer(name, references[name], save_tokenizer(folders[name])), bridges[name]

    def test_both_give_the_same_rows(both):
        hooked, bridge = both
        for rows in ("last", "words"):
            for layers in (None, [0, 1]):
                x, y = (collect(m, TEXTS, rows=rows, layers=layers, batch_size=2) for m in (hooked, bridge))
                assert (x.values - y.values).abs().max() < TOLERANCE
                assert torch.equal(x.end, y.end) and x.prepend_bos == y.prepend_bos

    @pytest.mark.parametrize("method", ["mean", "pca", "logistic"])
    def test_both_give_the_same_concept(both, method):
        x, y = (refine(model, PAIRS, method=method) for model in both)
        assert (x.vectors - y.vectors).abs().max() < TOLERANCE

    @pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
    def test_both_give_the_same_steered_logits(both, positions):
        logits = []
        for model in both:
            concept = ConceptVector(2 * torch.ones(1, D_MODEL).cumsum(1) / D_MODEL, (1,), "ramp", identify(model))
            base = model(TOKENS)
            with transplant(model, concept, strength=1.5, positions=positions):
                logits.append(model(TOKENS))
            changed = bool((logits[-1] - base).abs().max() > 0.01)
            assert changed == (positions != "generated")
            assert not hooks_on(model)
        assert (logits[0] - logits[1]).abs().max() < TOLERANCE

    def test_both_compute_the_head_where_it_is_read_only(both):
        where = torch.zeros(TOKENS.shape, dtype=torch.bool)
        where[0, [1, 4]] = True
        for model in both:
            whole = model(TOKENS)
            with head_only_at(model, where):
                some = model(TOKENS)
            assert (some[where] - whole[where]).abs().max() < TOLERANCE and not some[~where].any()
            assert torch.equal(model(TOKENS), whole)

    @pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
    @pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
    def test_both_generate_the_same_under_a_transplant(both, positions, cache):
        options = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=cache)
        prompts = ["the quick brown fox", "a", "a letter made me feel"]
        out = []
        for model in both:
            concept = ConceptVector(torch.linspace(-3, 3, D_MODEL)[None], (1,), "ramp", identify(model))
            with transplant(model, concept, positions=positions):
                single = [model.generate(model.to_tokens(prompt), **options)[0, -5:].tolist() for prompt in prompts]
                batch = model.generate(prompts, padding_side="left", return_type="tokens", **options)[:, -5:].tolist()
            assert batch == single
            out.append(batch)
        assert out[0] == out[1]

    def test_last_is_the_last_real_token_of_a_padded_batch(both):
        hooked, bridge = both
        tokens = bridge.to_tokens(TEXTS, padding_side="right")
        seen = []
        for model in both:
            concept = ConceptVector(torch.ones(1, D_MODEL), (1,), "ones", identify(model))
            with transplant(model, concept, positions="last"):
                _, steered = model.run_with_cache(tokens, names_filter=hook_name(1))
            _, base = model.run_with_cache(tokens, names_filter=hook_name(1))
            seen.append((steered[hook_name(1)] - base[hook_name(1)])[..., 0].round())
        assert torch.equal(seen[0], seen[1])
        assert bool((seen[0].sum(1) == 1).all())

    def test_steering_that_resumes_at_the_layer_equals_a_transplant_in_both(both):
        tokens, mask = TOKENS, torch.ones_like(TOKENS)
        for model in both:
            concept = refine(model, PAIRS)
            for layer in concept.layers:
                with transplant(model, concept, strength=2.0, layers=[layer]):
                    hooked = plain(model)(tokens, mask)
                assert torch.equal(SteeredAt(model, layer).by(concept, 2.0)(tokens, mask), hooked)

    def test_the_self_check_passes_and_it_is_a_hooked_model(both):
        hooked, _ = both
        assert isinstance(hooked, HookedModel)
        self_check(hooked)

    def test_a_processed_hooked_transformer_with_layer_norm_is_in_the_centred_basis(references, folders, bridges):
        tokenizer = save_tokenizer(folders["gpt2"])
        processed = hooked_transformer("gpt2", references["gpt2"], tokenizer, processed=True)
        raw = bridges["gpt2"]
        assert identify(processed).basis == "centred" and identify(raw).basis == "raw"
        x, y = collect(processed, TEXTS), collect(raw, TEXTS)
        centred = y.values - y.values.mean(-1, keepdim=True)
        assert (x.values - centred).abs().max() < TOLERANCE  # the exact law for models with LayerNorm
        assert (x.values - y.values).abs().max() > 0.01
        with pytest.raises(ValueError, match="raw basis.*centred basis"):
            with transplant(processed, refine(raw, PAIRS), layers=[1]):
                pass

    def test_a_processed_hooked_transformer_with_root_mean_square_norms_stays_raw(references, folders, bridges):
        tokenizer = save_tokenizer(folders["llama"])
        processed = hooked_transformer("llama", references["llama"], tokenizer, processed=True)
        assert identify(processed).basis == "raw"
        assert (collect(processed, TEXTS).values - collect(bridges["llama"], TEXTS).values).abs().max() < TOLERANCE

else:

    @pytest.fixture(scope="module", params=["LN", "RMS"])
    def native(request: Any, tmp_path_factory: Any) -> Any:
        """A bridge from a bare configuration, as HookedTransformer(HookedTransformerConfig(...)) was."""
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        tokenizer = save_tokenizer(tmp_path_factory.mktemp("native"))
        cfg = TransformerBridgeConfig(**SHAPE, act_fn="gelu", normalization_type=request.param, seed=0)
        bridge = TransformerBridge.boot_native(cfg, tokenizer=tokenizer)
        return bridge.eval()

    def test_there_is_no_hooked_transformer_and_nothing_needs_one(bridges):
        import transformer_lens

        with pytest.raises((ImportError, AttributeError)):
            _ = transformer_lens.HookedTransformer
        assert all(isinstance(model, HookedModel) for model in bridges.values())

    def test_a_native_bridge_is_a_hooked_model_that_passes_the_self_check(native):
        assert isinstance(native, HookedModel)
        self_check(native)
        assert (identify(native).n_layers, identify(native).d_model, identify(native).basis) == (N_LAYERS, D_MODEL, "raw")

    def test_a_native_bridge_gives_the_rows_of_each_text_alone(native):
        x = collect(native, TEXTS, batch_size=3)
        for row, text in enumerate(TEXTS):
            tokens = native.to_tokens(text, prepend_bos=x.prepend_bos)
            _, cache = native.run_with_cache(tokens)
            alone = torch.stack([cache[hook_name(layer)][0, -1] for layer in range(N_LAYERS)])
            assert (x.values[row] - alone).abs().max() < TOLERANCE

    @pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
    def test_a_native_bridge_is_steered_like_any_other(native, positions):
        v = 2.0 * refine(native, PAIRS).only(1)
        where = {"all": slice(None), "prompt": slice(None), "generated": slice(0, 0), "last": slice(-1, None)}[positions]

        def by_hand(x: torch.Tensor, hook: Any) -> torch.Tensor:
            x = x.clone()
            x[:, where] += v.at(1)
            return x

        expected = native.run_with_hooks(TOKENS, fwd_hooks=[(hook_name(1), by_hand)])
        with transplant(native, v, positions=positions):
            steered = native(TOKENS)
        assert (steered - expected).abs().max() < TOLERANCE
        assert not hooks_on(native)

    @pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
    def test_a_native_bridge_generates_the_same_with_and_without_cache_batched_or_single(native, positions):
        v = ConceptVector(torch.linspace(-3, 3, D_MODEL)[None], (1,), "ramp", identify(native))
        options = dict(max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens")
        prompts = ["the quick brown fox", "a", "a letter made me feel"]
        out = []
        with transplant(native, v, positions=positions):
            for cache in (True, False):
                batch = native.generate(prompts, use_past_kv_cache=cache, **options)[:, -5:]
                single = [native.generate(prompt, use_past_kv_cache=cache, **options)[0, -5:] for prompt in prompts]
                out += [batch.tolist(), torch.stack(single).tolist()]
        assert all(tokens == out[0] for tokens in out)
