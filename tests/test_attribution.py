"""Attribution and patching name what was planted; gradients are slopes, and integrated ones sum to the effect."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL, N_LAYERS, TEXTS, hooks_on, unchecked
from planted import PAIRS, READER, WRITER, planted

from contrans_tl import ConceptVector, Question, identify, transplant
from contrans_tl.diagnostics import Metric, attribute, patch
from contrans_tl.diagnostics.attribution import rank_correlation
from contrans_tl.diagnostics.metrics import ask
from contrans_tl.diagnostics.runs import batches, read_logits
from contrans_tl.models import hook_name
from contrans_tl.tokens import encode

PROMPTS = list(PAIRS.negative)
QUESTIONS = [Question(text, (" the dog", " a river", " letter"), i % 3) for i, text in enumerate(TEXTS)]
ARCHITECTURES = ("llama", "gpt2", "neox", "qwen2", "gemma2")


def label(head: tuple[int, int]) -> str:
    return f"L{head[0]}H{head[1]}"


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 41] - logits[:, 77]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def case(request: Any, tmp_path_factory: Any) -> Any:
    return planted(tmp_path_factory.mktemp("planted"), request.param)


@pytest.fixture(scope="module")
def word(case: Any) -> ConceptVector:
    """What tells the concept's words from others where they enter: what the writer looks for."""
    quick, brown = (case.model.tokenizer.encode(text, add_special_tokens=False) for text in (" quick", " brown"))
    v = case.model.W_E[quick[0]] - case.model.W_E[brown[0]]
    return ConceptVector(v.detach()[None], (0,), "word", identify(case.model))


def ramp(model: Any) -> ConceptVector:
    g = torch.Generator().manual_seed(3)
    return ConceptVector(torch.randn(N_LAYERS, D_MODEL, generator=g), tuple(range(N_LAYERS)), "random", identify(model))


def metric_of(model: Any, texts: list[str], concept: ConceptVector | None = None, **injection: Any) -> torch.Tensor:
    """The metric of each text alone, run as a user runs it."""
    values = []
    for encoding in encode(model, texts):
        tokens = torch.tensor([encoding.ids])
        with torch.no_grad():
            if concept is None:
                logits = model(tokens)
            else:
                with transplant(model, concept, **injection):
                    logits = model(tokens)
        values.append(difference(logits[:, -1])[0])
    return torch.stack(values)


@pytest.mark.parametrize("steps", [1, 4])
def test_attribution_names_the_planted_reader_first_and_writer_and_reader_where_the_word_comes_in(case, word, steps):
    read = attribute(case.model, case.concept((2,)), PROMPTS, metric=case.metric, steps=steps)
    assert read.heads.top(1)[0][0] == label(READER)
    both = attribute(case.model, word, PROMPTS, metric=case.metric, steps=steps)
    assert {name for name, _ in both.heads.top(2)} == {label(WRITER), label(READER)}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_names_the_planted_reader_first_and_writer_and_reader_where_the_word_comes_in(case, word, direction):
    read = patch(case.model, case.concept((2,)), PROMPTS, metric=case.metric, direction=direction)
    assert read.top(1)[0][0] == label(READER)
    assert read.scores.at(layer=READER[0], head=READER[1]) > 0.8 and read.by_layer.at(layer="L3", site="resid_pre") > 0.999
    both = patch(case.model, word, PROMPTS, metric=case.metric, direction=direction)
    assert {name for name, _ in both.top(2)} == {label(WRITER), label(READER)}
    assert abs(both.by_layer.at(layer="L3", site="mlp_out")) < 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gradient_is_the_slope_of_the_metric_along_the_vector(bridges, architecture):
    model, h = bridges[architecture], 1e-2
    concept = ramp(model)
    found = attribute(model, concept, TEXTS, metric=difference, layer=0, check=0)
    assert found.base == pytest.approx(float(metric_of(model, TEXTS).mean()), abs=1e-5)
    for layer in (0, 2):
        up, down = (metric_of(model, TEXTS, concept, layers=[layer], strength=s) for s in (h, -h))
        slope = float((up - down).mean() / (2 * h))
        # A central difference is off by h^2 times the third derivative, and by rounding over h: 1e-6 / 1e-2.
        assert float(found.layers.at(layer=layer)) == pytest.approx(slope, rel=0.02, abs=2e-3)
        last, before = (metric_of(model, TEXTS, concept, layers=[layer], strength=s, positions="last") for s in (h, -h))
        assert found.scores.at(layer=layer, position="-1") == pytest.approx(
            float((last - before).mean() / (2 * h)), rel=0.02, abs=2e-3
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_integrated_gradients_sum_to_the_effect_as_steps_grow(bridges, architecture):
    model, concept = bridges[architecture], 2.0 * ramp(bridges[architecture])
    errors = []
    for steps in (1, 2, 12):
        found = attribute(model, concept, TEXTS, metric=difference, layer=1, steps=steps, check=0, batch_size=7)
        errors.append(abs(float(found.layers.at(layer=1)) - found.effect))
    with_vector = metric_of(model, TEXTS, concept, layers=[1]) - metric_of(model, TEXTS)
    assert found.effect == pytest.approx(float(with_vector.mean()), abs=1e-5)
    assert errors[2] < 2e-3 * abs(found.effect) + 1e-4 and errors[2] < errors[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_true_effects_are_those_of_runs_with_that_one_change(bridges, architecture):
    model, concept = bridges[architecture], ramp(bridges[architecture])
    found = attribute(model, concept, TEXTS, metric=difference, layer=0, strength=1.5, check=99, batch_size=40)
    base, checked = metric_of(model, TEXTS), {one.place: one.true for one in found.checked}
    for layer in concept.layers:
        alone = metric_of(model, TEXTS, concept, layers=[layer], strength=1.5) - base
        assert checked[f"L{layer}"] == pytest.approx(float(alone.mean()), abs=2e-5)
    last = metric_of(model, TEXTS, concept, layers=[2], strength=1.5, positions="last") - base
    assert checked["L2 -1"] == pytest.approx(float(last.mean()), abs=2e-5)
    head = next(one for one in found.checked if one.kind == "head")
    layer, h = map(int, head.place[1:].split("H"))
    effects = []
    for encoding, was in zip(encode(model, TEXTS), base, strict=True):
        tokens, name = torch.tensor([encoding.ids]), hook_name(layer, "z")
        with transplant(model, concept, layers=[0], strength=1.5):
            z = model.run_with_cache(tokens, names_filter=lambda n, name=name: n == name)[1][name].detach()

        def put(x: torch.Tensor, hook: Any, z: torch.Tensor = z) -> torch.Tensor:
            x = x.clone()
            x[:, :, h] = z[:, :, h]
            return x

        with torch.no_grad():
            effects.append(difference(model.run_with_hooks(tokens, fwd_hooks=[(name, put)])[:, -1])[0] - was)
    assert head.true == pytest.approx(float(torch.stack(effects).mean()), abs=2e-5)


def test_small_vectors_are_attributed_what_they_do(bridges):
    """At a strength where nothing bends, and however prompts are padded and batched."""
    for model in (bridges["llama"], bridges["neox"]):
        concept = ramp(model)
        found = attribute(model, concept, TEXTS, metric=difference, layer=0, strength=2e-3, check=9, batch_size=2)
        for one in found.checked:
            assert one.attributed == pytest.approx(one.true, rel=0.05, abs=2e-5), one
        again = attribute(model, concept, TEXTS, metric=difference, layer=0, strength=2e-3, check=0, batch_size=32)
        assert torch.allclose(found.scores.values, again.scores.values, atol=1e-6)
        assert torch.allclose(found.heads_by_position.values, again.heads_by_position.values, atol=1e-6)


def test_a_vector_of_one_layer_can_be_looked_at_in_all(bridges):
    model, v = bridges["gpt2"], ramp(bridges["gpt2"])
    one = attribute(model, v.only(1), TEXTS, metric=difference, vectors="one", check=0)
    assert one.scores.axes["layer"] == ("L0", "L1", "L2")
    at = ConceptVector(v.vectors[[1, 1, 1]], (0, 1, 2), "same", v.model)
    same = attribute(model, at, TEXTS, metric=difference, layer=1, check=0)
    assert torch.allclose(one.scores.values, same.scores.values)
    assert one.heads.values[:2].count_nonzero() == 0 and one.heads.values[2].count_nonzero() == 4


def test_questions_bring_their_answers(bridges):
    model = bridges["llama"]
    for metric in ("logit_difference", "log_probability", "kl"):
        asked = ask(model, QUESTIONS, metric)
        logits = torch.cat([read_logits(model, b) for b in batches(model, asked.sequences, 1)])
        order = torch.cat([b.prompts for b in batches(model, asked.sequences, 1)])
        values = asked.metric(logits, 0.5 * logits, order)
        for row, prompt in enumerate(order.tolist()):
            question, base = QUESTIONS[prompt], (0.5 * logits[row]).log_softmax(-1)
            first = [
                encode(model, [question.prompt + option])[0].ids[len(asked.sequences[prompt])] for option in question.options
            ]
            answer = first.pop(question.answer)
            expected = {
                "logit_difference": logits[row, answer] - logits[row, first].mean(),
                "log_probability": logits[row].log_softmax(-1)[answer],
                "kl": (base.exp() * (base - logits[row].log_softmax(-1))).sum(),
            }[metric]
            assert float(values[row]) == pytest.approx(float(expected), abs=1e-5)
    found = attribute(model, ramp(model), QUESTIONS, layer=0, check=3)
    assert found.scores.unit == "logits" and "rank correlation" in str(found) and found.to_dict()["checked"]


def test_one_gradient_says_nothing_of_kl_and_integrated_ones_do(bridges):
    model, concept = bridges["llama"], 3.0 * ramp(bridges["llama"])
    one = attribute(model, concept, TEXTS, metric="kl", layer=1, check=0)
    many = attribute(model, concept, TEXTS, metric="kl", layer=1, steps=16, check=0)
    assert abs(float(one.layers.at(layer=1))) < 1e-4 < 0.01 < one.effect
    assert float(many.layers.at(layer=1)) == pytest.approx(many.effect, rel=0.02)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_patching_everything_that_enters_a_layer_brings_the_whole_effect(bridges, architecture):
    model, concept = bridges[architecture], ramp(bridges[architecture])
    for direction in ("denoise", "noise"):
        found = patch(model, concept, TEXTS, metric=difference, layer=0, direction=direction, batch_size=3)
        assert found.by_layer.values[1:, 0].tolist() == pytest.approx([1.0, 1.0], abs=1e-4)
        assert not found.by_layer.values[0].any() and not found.scores.values[0].any()
        base = metric_of(model, TEXTS)
        moved = metric_of(model, TEXTS, concept, layers=[0])
        assert found.effect == pytest.approx(float((moved - base).mean()), abs=1e-5)


def test_patching_one_position_is_transformerlenss_on_prompts_of_one_length(bridges):
    """TransformerLens's functions as they are, on prompts that need no alignment, and by hand where they do."""
    from transformer_lens import patching

    model, concept = bridges["gpt2"], ramp(bridges["gpt2"])
    texts = ["the quick brown fox", "the brown quick fox"]
    tokens = torch.tensor([encoding.ids for encoding in encode(model, texts)])
    found = patch(model, concept, texts, metric=difference, layer=0, strength=2.0, by_position=True)
    keep = {hook_name(at, site) for at in range(3) for site in ("resid_pre", "z")}
    with torch.no_grad():
        with transplant(model, concept, layers=[0], strength=2.0):
            logits, cache = model.run_with_cache(tokens, names_filter=lambda name: name in keep)
        plain = difference(model(tokens)[:, -1]).mean()
        whole = difference(logits[:, -1]).mean() - plain

        def metric(logits: torch.Tensor) -> torch.Tensor:
            return (difference(logits[:, -1]).mean() - plain) / whole

        resid = patching.get_act_patch_resid_pre(model, tokens, cache, metric)
        heads = patching.get_act_patch_attn_head_out_all_pos(model, tokens, cache, metric)
    assert torch.allclose(found.by_position.at(site="resid_pre").values[1:], resid[1:], atol=1e-4)
    assert torch.allclose(found.scores.values[1:], heads[1:], atol=1e-4)
    several, *alone = (
        patch(model, concept, some, metric=difference, layer=0, strength=2.0, by_position=True)
        for some in ([texts[0], "the dog"], [texts[0]], ["the dog"])
    )
    weights = [one.effect / 2 / several.effect for one in alone]
    last = sum(w * one.by_position.values[..., -2:] for w, one in zip(weights, alone, strict=True))
    assert torch.allclose(several.by_position.values[..., -2:], last, atol=1e-4)


def test_the_model_is_left_as_it_was_also_after_an_error(bridges):
    model = bridges["llama"]
    before = model(torch.tensor([[0, 5, 9]])).detach()

    def breaks(logits: torch.Tensor) -> torch.Tensor:
        if len(logits) == len(TEXTS):
            raise RuntimeError("in the metric")
        return difference(logits)

    for work in (attribute, patch):
        with pytest.raises(RuntimeError, match="in the metric"):
            work(model, ramp(model), TEXTS, metric=breaks, layer=0)
        assert not hooks_on(model)
        work(model, ramp(model), TEXTS, metric=difference, layer=0)
    assert torch.equal(model(torch.tensor([[0, 5, 9]])), before)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters()) and not model.training
    assert not any("forward" in vars(module) for module in (*model.blocks, model.unembed))


def test_what_cannot_be_attributed_or_patched_is_refused_in_a_sentence(bridges):
    model, other = bridges["llama"], bridges["gpt2"]
    concept = ramp(model)
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(layer=7), "there is none at 7"),
        (dict(), "choose one"),
        (dict(layer=0, strength=0.0), "finite strength other than 0"),
        (dict(layer=0, metric="accuracy"), "metric among"),
        (dict(layer=0, metric="logit_difference"), "needs prompts that are Questions"),
        (dict(layer=0, metric=lambda logits: difference(logits).mean()), "one floating-point number a prompt"),
        (dict(layer=0, metric=lambda logits: logits), "one floating-point number a prompt"),
        (dict(layer=0, metric=lambda logits: 3.0), "one floating-point number a prompt"),
    ]
    with unchecked():
        for work in (attribute, patch):
            for options, message in wrong:
                with pytest.raises(ValueError, match=message):
                    work(model, concept, TEXTS, **{"metric": difference, **options})
            with pytest.raises(ValueError, match="reformulate it first"):
                work(other, concept, TEXTS, metric=difference, layer=0)
            with pytest.raises(ValueError, match="expected prompts"):
                work(model, concept, [], metric=difference, layer=0)
            twice = [Question("the dog", (" a river", " a letter"), 0)]
            with pytest.raises(ValueError, match="does not tell them apart"):
                work(model, concept, twice, layer=0)
        with pytest.raises(ValueError, match="no gradient"):
            attribute(model, concept, TEXTS, metric=lambda logits: (logits[:, 3] > 0).float(), layer=0)
        with pytest.raises(ValueError, match="steps of 1 or more"):
            attribute(model, concept, TEXTS, metric=difference, layer=0, steps=0)
        with pytest.raises(ValueError, match="vectors='own'"):
            attribute(model, concept, TEXTS, metric=difference, layer=0, vectors="both")
        with pytest.raises(ValueError, match="direction='denoise'"):
            patch(model, concept, TEXTS, metric=difference, layer=0, direction="both")
        with pytest.raises(ValueError, match="no effect to share out"):
            patch(model, concept, TEXTS, metric=lambda logits: 0 * logits[:, 0] + 1.0, layer=0)
    model.train()
    try:
        with pytest.raises(ValueError, match="eval mode"):
            attribute(model, concept, TEXTS, metric=difference, layer=0)
    finally:
        model.eval()


def test_ranks_correlate_as_spearman_says():
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 25.0, 1e9]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert rank_correlation([1.0, 1.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(np.sqrt(3) / 2)
    assert np.isnan(rank_correlation([1.0, 2.0], [1.0, 2.0])) and np.isnan(rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


def test_a_metric_of_ones_own_may_know_the_prompts_and_the_model_as_it_is(bridges):
    model = bridges["llama"]
    tokens = torch.arange(len(TEXTS)) + 40
    mine = Metric(lambda logits, base, prompts: (logits - base).gather(1, tokens[prompts, None])[:, 0], "gain", "logits")
    found = attribute(model, ramp(model), TEXTS, metric=mine, layer=1, check=2)
    assert found.base == 0 and found.metric == "gain"
