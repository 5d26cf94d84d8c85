"""Writers: the parts sum to the whole on every architecture, and the head that writes is named first."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, save_tokenizer
from planted import planted
from test_hooked_transformer import SHAPE, HookedTransformer, hooked_transformer

from contrans_tl import ConceptVector, ContrastPairs, collect, identify, refine
from contrans_tl.diagnostics import Writers, readers, writers, writing
from contrans_tl.diagnostics.writing import INCOMPLETE, chances
from contrans_tl.evaluation.intervals import clopper_pearson, difference, mean_differences

PAIRS = ContrastPairs(
    "happiness",
    ("a letter made me feel happy", "happy dog", "a happy fox jumps over the dog", "quick brown letters"),
    ("the lazy dog", "a river feels lazy", "the brown fox jumps over a dog", "the lazy letters"),
)
UNEVEN = replace(PAIRS, negative=PAIRS.negative[:3])


def some_concept(model, seed: int = 0) -> ConceptVector:
    vectors = torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return ConceptVector(vectors, tuple(range(N_LAYERS)), "some", identify(model))


def naive_parts(model, text: str, direction: torch.Tensor, layer: int) -> dict[str, float]:
    """From a full cache, one prompt, the attention's output as a whole."""
    _, cache = model.run_with_cache(model.to_tokens(text))
    names = {
        f"L{block} {name}": f"blocks.{block}.hook_{site}_out" for block in range(layer + 1) for name, site in PARTS.items()
    }
    return {label: float(cache[name][0, -1] @ direction) for label, name in names.items()}


PARTS = {"attention": "attn", "MLP": "mlp"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pairs", [PAIRS, UNEVEN], ids=["pairs", "uneven"])
def test_the_parts_sum_to_the_projection(bridges, architecture, pairs):
    model = bridges[architecture]
    concept = some_concept(model)
    for layer in range(N_LAYERS):
        found = writers(model, concept, pairs, layer=layer, batch_size=3)
        rows = collect(model, [*pairs.positive, *pairs.negative], layers=[layer]).values[:, 0]
        whole = rows @ concept.at(layer) / concept.at(layer).norm()
        parts = torch.cat([found.positive, found.negative])
        assert ((parts.sum(1) - whole).abs() < INCOMPLETE * whole.abs().max()).all()
        assert found.completeness < 1e-6
        difference = whole[: len(pairs.positive)].mean() - whole[len(pairs.positive) :].mean()
        assert float(found.scores.values.sum()) == pytest.approx(float(difference), rel=1e-4)
        assert found.whole.value == pytest.approx(float(difference), rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_and_mlps_are_what_they_add_to_the_stream(bridges, architecture):
    model = bridges[architecture]
    concept = some_concept(model)
    found = writers(model, concept, PAIRS, layer=1)
    unit = concept.at(1) / concept.at(1).norm()
    labels = found.scores.axes["part"]
    for row, text in enumerate(PAIRS.positive):
        for label, value in naive_parts(model, text, unit, 1).items():
            block, kind = label.split()
            of = [part for part in labels if part.startswith((f"{block}H", f"{block} b") if kind == "attention" else label)]
            assert float(found.positive[row, [labels.index(part) for part in of]].sum()) == pytest.approx(value, abs=1e-5)


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_a_heads_part_is_what_is_missing_without_it(bridges, architecture):
    """In the last block's attention, whose output nothing else reads before the MLP. Of Gemma 2 the norm's scale changes too,
    so that this holds with the scale held."""
    model = bridges[architecture]
    concept, (layer, head) = some_concept(model), (1, 2)
    found = writers(model, concept, PAIRS, layer=layer)
    unit = concept.at(layer) / concept.at(layer).norm()
    text, seen = PAIRS.positive[0], {}

    def silence(z, hook):
        z = z.clone()
        z[:, :, head] = 0
        return z

    def keep(x, hook, *, name):
        seen[name] = x.detach().clone()

    def hold(scale, hook):
        return seen["scale"]

    scale = f"blocks.{layer}.ln1_post.hook_scale"
    out = (f"blocks.{layer}.hook_attn_out", partial(keep, name="with"))
    looks = [out, (scale, partial(keep, name="scale"))] if architecture == "gemma2" else [out]
    model.run_with_hooks(model.to_tokens(text), fwd_hooks=looks)
    without = [(f"blocks.{layer}.attn.hook_z", silence), (out[0], partial(keep, name="without"))]
    model.run_with_hooks(model.to_tokens(text), fwd_hooks=without + [(scale, hold)] * (architecture == "gemma2"))
    missing = float((seen["with"] - seen["without"])[0, -1] @ unit)
    label = found.scores.axes["part"].index(f"L{layer}H{head}")
    assert float(found.positive[0, label]) == pytest.approx(missing, abs=1e-5)


if HookedTransformer is not None:
    RMS = dict(normalization_type="RMS", final_rms=True, gated_mlp=True, act_fn="silu", n_key_value_heads=2)
    ROTARY = dict(positional_embedding_type="rotary", rotary_dim=8, rotary_adjacent_pairs=False)
    SHAPES = {
        "llama": RMS | ROTARY,
        "gpt2": dict(normalization_type="LN", act_fn="gelu_new"),
        "neox": dict(normalization_type="LN", act_fn="gelu", parallel_attn_mlp=True) | ROTARY | dict(rotary_dim=2),
        "qwen2": RMS | ROTARY,
        "gemma2": RMS | ROTARY | dict(use_normalization_before_and_after=True, attn_scores_soft_cap=50.0),
    }

    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_the_parts_sum_to_the_projection_in_a_hooked_transformer(folders, architecture):
        """Of each shape, with weights, biases and norms at random, and prompts padded."""
        from transformer_lens import HookedTransformerConfig

        cfg = HookedTransformerConfig(**SHAPE, **SHAPES[architecture], device="cpu", model_name=architecture, seed=0)
        model = HookedTransformer(cfg, tokenizer=save_tokenizer(folders[architecture]), default_padding_side="right").eval()
        for weight in model.parameters():
            weight.data.add_(0.2 * torch.randn_like(weight))
        for layer in range(N_LAYERS):
            found = writers(model, some_concept(model), UNEVEN, layer=layer)
            assert found.completeness < 1e-6
            assert float(found.scores.values.sum()) == pytest.approx(found.whole.value, rel=1e-4)
        assert (
            readers(model, some_concept(model), PAIRS.positive, layer=0, draws=20).p.values.min() > 0
        )  # its formula is checked

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    @pytest.mark.parametrize("processed", [False, True])
    def test_both_classes_have_the_same_writers(bridges, references, folders, architecture, processed):
        tokenizer = save_tokenizer(folders[architecture])
        hooked = hooked_transformer(architecture, references[architecture], tokenizer, processed=processed)
        for layer in range(N_LAYERS):
            x = writers(hooked, some_concept(hooked), PAIRS, layer=layer)
            assert x.completeness < 1e-5
            if not processed:  # processing moves biases and means from one part to another
                y = writers(bridges[architecture], some_concept(bridges[architecture]), PAIRS, layer=layer)
                assert x.scores.axes == y.scores.axes
                assert (x.positive - y.positive).abs().max() < 1e-5


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_planted_writer_is_named_first(tmp_path, shape):
    case = planted(tmp_path, shape)
    layer, head = case.writer
    for concept in (case.concept(), refine(case.model, case.pairs)):
        for at in range(layer, case.model.cfg.n_layers):
            found = writers(case.model, concept, case.pairs, layer=at)
            (first, value), (_, second) = found.top(2)
            assert first == found.heads.top(1)[0][0] == f"L{layer}H{head}"
            assert value > 10 * abs(second) or concept.provenance  # a refined one has a share of what the words themselves are
            place = found.scores.axes["part"].index(first)
            assert found.intervals[place].low > 0.9 * value and found.chance[place] < 0.05
            assert first in str(found) and len(found.to_dataframe()) == len(found.scores.axes["part"])
        assert writers(case.model, concept, case.pairs, layer=0).heads.values.abs().max() < 0.1


def test_only_the_side_with_the_words_has_the_writer(tmp_path):
    case = planted(tmp_path)
    found = writers(case.model, case.concept(), case.pairs, layer=2)
    assert found.side("positive").at(part="L1H2") > 2.5 > 0.1 > abs(found.side("negative").at(part="L1H2"))


@pytest.mark.parametrize("paired", [True, False])
def test_where_sides_differ_by_chance_a_part_is_named_as_rarely_as_said(paired):
    """In 5% of lists; 300 lists of 30 parts, of which some are heavy-tailed and some depend on others."""
    generator, lists, named = torch.Generator().manual_seed(0), 300, 0
    for _ in range(lists):
        parts = torch.randn(12 if paired else 13, 2, 30, generator=generator).double() ** 3
        parts[..., 1:15] += parts[..., :1]
        positive, negative = parts[:, 0], parts[:, 1] if paired else parts[:9, 1]
        named += bool((chances(positive, negative, seed=named) <= 0.05).any())
    low, high = clopper_pearson(named, lists)
    assert low < 0.05 and high > 0.02, named


def test_on_a_random_model_with_sides_by_chance_parts_are_named_as_rarely_as_said(bridges):
    """Prompts of random words, on either side by chance, projected on random directions: the whole way."""
    words, generator, lists = "the quick brown fox a letter dog river lazy over".split(), torch.Generator().manual_seed(1), 40
    named = 0
    for seed in range(lists):
        length = torch.randint(2, 6, (20,), generator=generator).tolist()
        drawn = [" ".join(words[i] for i in torch.randint(len(words), (n,), generator=generator)) for n in length]
        sides = ContrastPairs("nothing", tuple(drawn[:10]), tuple(drawn[10:]))
        model = bridges[("llama", "gpt2")[seed % 2]]
        named += bool((writers(model, some_concept(model, seed), sides, layer=2).chance <= 0.05).any())
    assert clopper_pearson(named, lists)[0] < 0.05, named


def test_a_batch_is_as_one_by_one_and_the_same_again(bridges):
    model = bridges["gemma2"]
    one, many = (writers(model, some_concept(model), PAIRS, layer=2, batch_size=size) for size in (1, 8))
    assert (one.positive - many.positive).abs().max() < 1e-5
    assert one.chance.tolist() == writers(model, some_concept(model), PAIRS, layer=2, batch_size=1).chance.tolist()
    content = many.to_dict()
    assert content["kind"] == "Writers" and len(content["chance"]) == len(content["scores"]["values"])


def test_an_architecture_whose_parts_miss_the_whole_is_refused(bridges, monkeypatch):
    monkeypatch.setattr(writing, "post_norm_site", lambda model, layer: None)
    with pytest.raises(ValueError, match="miss the projection.*cannot be told apart"):
        writers(bridges["gemma2"], some_concept(bridges["gemma2"]), PAIRS, layer=1)


def test_what_cannot_be_is_refused_before_any_pass(bridges, monkeypatch):
    model, other = bridges["llama"], bridges["gpt2"]
    monkeypatch.setattr(type(model), "run_with_hooks", lambda *a, **k: pytest.fail("a pass was made"))
    concept = some_concept(model)
    for change, message in [
        (dict(concept=some_concept(other)), "lives in.*reformulate it"),
        (dict(layer=7), r"there is none at 7"),
        (dict(concept=replace(concept, vectors=torch.zeros(N_LAYERS, D_MODEL))), "nothing to project on"),
    ]:
        options = dict(concept=concept, pairs=PAIRS, layer=1) | change
        with pytest.raises(ValueError, match=message):
            writers(model, **options)
    model.train()
    with pytest.raises(ValueError, match="eval mode"):
        writers(model, concept, PAIRS, layer=1)
    model.eval()


def test_there_are_two_sides(tmp_path, bridges):
    found = writers(bridges["llama"], some_concept(bridges["llama"]), PAIRS, layer=0)
    assert isinstance(found, Writers)
    with pytest.raises(ValueError, match="'positive' or 'negative'"):
        found.side("both")


def test_intervals_of_parts_are_those_of_differences_where_prompts_are_pairs():
    values, rival = np.random.default_rng(0).normal(size=(2, 10, 3))
    for part, found in enumerate(mean_differences(values, rival)):
        alone = difference(values[:, part], rival[None, :, part])
        assert (found.value, found.low, found.high) == pytest.approx((alone.value, alone.low, alone.high))


def test_intervals_of_parts_hold_the_difference_of_sides_of_unequal_size():
    """In 93% of lists or more (bootstrap percentiles of 40 and 25 prompts), of sides of unequal spread."""
    rng, lists, parts = np.random.default_rng(0), 30, 30
    held = 0
    for _ in range(lists):
        values, rival = 3.0 + rng.normal(size=(40, parts)), 2.0 + 3.0 * rng.normal(size=(25, parts))
        held += sum(one.low <= 1.0 <= one.high for one in mean_differences(values, rival))
    assert 0.92 < held / (lists * parts) < 0.98, held
