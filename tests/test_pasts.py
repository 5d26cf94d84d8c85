"""A pass that begins behind a past gives what the whole pass gives."""

import pytest
import torch
from conftest import CONFIGS, random_model, save_tokenizer
from test_hooked_transformer import HookedTransformer, hooked_transformer

from contrans_tl import load_model
from contrans_tl.models import HookedModel
from contrans_tl.pasts import Past

TOKENS = torch.arange(3, 3 + 24).reshape(2, 12) * 7 % 300


def check(model: HookedModel) -> None:
    past = Past.empty(model, len(TOKENS))
    with torch.no_grad():
        whole = model(TOKENS, return_type="logits")
        filling = model(TOKENS, return_type="logits", **past.options(TOKENS))
        assert torch.allclose(filling, whole, atol=2e-5)
        assert past.holds(12) and not past.holds(11)
        for positions in (11, 7, 1):
            rest = TOKENS[:, positions:].repeat(3, 1)
            behind = model(rest, return_type="logits", **past.first(positions, times=3).options(rest))
            assert torch.allclose(behind, whole[:, positions:].repeat(3, 1, 1), atol=2e-5)
    assert past.holds(12)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_follows_a_past_is_what_the_whole_pass_gives(bridges, architecture):
    check(bridges[architecture])


def test_also_where_a_layer_sees_the_last_few_tokens_only(bridges, tmp_path):
    hf = random_model("gemma2")
    hf.config.sliding_window = 4
    hf.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model = load_model(tmp_path, device="cpu")
    with torch.no_grad():
        near, all_ = (m(TOKENS, return_type="logits")[:, -1] for m in (model, bridges["gemma2"]))
    assert (near - all_).abs().max() > 0.01
    check(model)


def test_a_cache_that_nothing_was_put_into_holds_nothing(bridges):
    assert not Past.empty(bridges["llama"], 2).holds(0)


if HookedTransformer is not None:

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_of_a_hooked_transformer_as_well(references, folders, architecture):
        check(hooked_transformer(architecture, references[architecture], save_tokenizer(folders[architecture])))
