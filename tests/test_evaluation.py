"""Scores against plain Hugging Face, intervals against what is known of them, and nulls that stay null."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import CORPUS, D_MODEL, N_LAYERS, TEXTS

from contrans_tl import ContrastPairs, Question, refine, transplant
from contrans_tl.evaluation import (
    Interrupted,
    Rivals,
    Search,
    SteeredAt,
    answer_questions,
    choose,
    estimate,
    evaluate,
    plain,
    random_like,
    read_questions,
    side_effects,
    task_of,
)
from contrans_tl.passes import head_only_at, resumed_after
from contrans_tl.reformulation import fit_maps
from contrans_tl.tokens import encode, pad

QUESTIONS = [
    Question("the quick brown fox jumps over the", (" lazy", " quick", " dog"), 0),
    Question("a letter made", (" me feel happy", " over the dog", " the quick river"), 2),
    Question("brown letters feel", (" lazy over", " lazy dog"), 1),
]


def logprobs_alone(reference, tokenizer, text: str):
    """Log-probabilities of one text's next tokens by Hugging Face, and its ids."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        return reference(torch.tensor([ids])).logits[0].log_softmax(-1), ids


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_mc1_is_the_option_with_the_largest_sum_of_log_probabilities(architecture, bridges, references):
    model, reference = bridges[architecture], references[architecture]
    best = []
    for question in QUESTIONS:
        _, prompt = logprobs_alone(reference, model.tokenizer, question.prompt)
        sums = []
        for option in question.options:
            logprobs, ids = logprobs_alone(reference, model.tokenizer, question.prompt + option)
            sums.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        best.append(int(np.argmax(sums)))
    asked = [replace(question, answer=answer) for question, answer in zip(QUESTIONS, best, strict=True)]
    assert answer_questions(model, read_questions(model, asked), "mc1").hits["mc1"].tolist() == [1, 1, 1]
    wrong = [
        replace(question, answer=(answer + 1) % len(question.options)) for question, answer in zip(QUESTIONS, best, strict=True)
    ]
    assert answer_questions(model, read_questions(model, wrong), "mc1").hits["mc1"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_token_accuracy_asks_the_whole_vocabulary_and_logit_accuracy_the_options(architecture, bridges, references):
    model, reference = bridges[architecture], references[architecture]
    logprobs, _ = logprobs_alone(reference, model.tokenizer, "the quick brown fox")
    top = model.tokenizer.decode([int(logprobs[-1].argmax())])
    # The two options' first tokens, best first, with and without the token the model would say.
    said = Question("the quick brown fox", (top + "x", " zz"), 0)
    read = read_questions(model, [said])
    firsts = [option[0] for option in read[0].options]
    expected = float(int(logprobs[-1].argmax()) == firsts[0])
    scores = answer_questions(model, read, "token_accuracy").hits
    assert scores["token_accuracy"].tolist() == [expected]
    margin = answer_questions(model, read, "token_accuracy").margin
    assert margin == pytest.approx(float(logprobs[-1, firsts[0]] - logprobs[-1, firsts[1]]), abs=1e-4)  # float32 logits
    assert scores["logit_accuracy"].tolist() == [float(logprobs[-1, firsts[0]] > logprobs[-1, firsts[1]])]


def test_an_option_that_another_one_begins_with_is_refused_for_token_accuracy(bridges):
    read = read_questions(bridges["llama"], [Question("the", (" brown", " brown fox"), 0)])
    with pytest.raises(ValueError, match="no next token tells them apart"):
        answer_questions(bridges["llama"], read, "token_accuracy")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_text_losses_in_a_padded_batch_equal_one_text_at_a_time(architecture, bridges, references):
    model, reference = bridges[architecture], references[architecture]
    costs = side_effects(model, TEXTS, [])
    for text, loss, count in zip(TEXTS, costs.loss, costs.tokens, strict=True):
        logprobs, ids = logprobs_alone(reference, model.tokenizer, text)
        alone = -sum(float(logprobs[i - 1, ids[i]]) for i in range(1, len(ids)))
        assert count == len(ids) - 1
        assert loss == pytest.approx(alone, rel=1e-5)  # float32 sums of a dozen terms


def test_an_interval_of_independent_items_has_the_textbook_width():
    hits = (np.random.default_rng(0).random(400) < 0.3).astype(float)
    interval = estimate(hits[None])
    error = np.sqrt(interval.value * (1 - interval.value) / 400)
    # 2000 resamples know a 2.5% quantile to about 4% of the width.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval.low < interval.value < interval.high and interval.n == 400


def test_items_of_one_group_count_as_one_draw():
    hits = np.repeat((np.random.default_rng(0).random(50) < 0.5).astype(float), 8)
    alone = estimate(hits[None])
    grouped = estimate(hits[None], groups=[f"fact {i // 8}" for i in range(400)])
    assert grouped.value == alone.value
    # Eight identical items a group: the standard error is sqrt(8) times as large.
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(8**0.5, rel=0.15)


def test_vectors_that_disagree_widen_the_interval_of_their_arm():
    items = np.random.default_rng(0).random(100)
    alike, unlike = np.stack([items, items]), np.stack([items, items - 0.5])
    assert estimate(unlike).high - estimate(unlike).low > 2 * (estimate(alike).high - estimate(alike).low)


def test_a_loss_increase_is_a_mean_over_tokens_not_over_texts():
    assert estimate(np.array([[1.0, 0.0]]), counts=np.array([1.0, 9.0])).value == pytest.approx(0.1)


def test_choose_takes_the_largest_effect_within_the_budget(bridges):
    model, task = bridges["llama"], task_of(PAIRS)
    concept = refine(model, PAIRS)
    candidates = {(0, layer): concept.only(layer) for layer in concept.layers}
    for budget_on, spent in (("loss", "loss_increase"), ("kl", "kl")):
        free = choose(
            model, candidates, task, TEXTS, search=Search((1.0, 4.0), budget=np.inf, budget_on=budget_on, max_depth=1.0)
        )
        tried = [point for point in free.sweep if "effect" in point]
        assert free.within_budget and max(point["effect"] for point in tried) == next(
            point["effect"]
            for point in tried
            if (point["layer_target"], point["strength"]) == (free.layer_target, free.strength)
        )
        # Nothing is as cheap as minus infinity: the least costly setting is taken.
        least = choose(model, candidates, task, TEXTS, search=Search((1.0, 4.0), budget=-np.inf, budget_on=budget_on))
        cheapest = min((point for point in least.sweep if "effect" in point), key=lambda point: point[spent])
        assert (least.layer_target, least.strength) == (cheapest["layer_target"], cheapest["strength"])
        assert not least.within_budget


def test_only_layers_below_the_depth_are_tried_unless_maps_lead_to_no_other(bridges):
    model, concept = bridges["llama"], refine(bridges["llama"], PAIRS)
    last = N_LAYERS - 1
    assert last >= 0.8 * N_LAYERS or N_LAYERS < 5
    search = Search((1.0,), max_depth=last / N_LAYERS)
    found = choose(model, {(0, t): concept.only(t) for t in concept.layers}, task_of(PAIRS), TEXTS, search=search)
    assert {point["layer_target"] for point in found.sweep} == set(range(last))
    only_last = choose(model, {(0, last): concept.only(last)}, task_of(PAIRS), TEXTS, search=search)
    assert only_last.layer_target == last


def test_random_controls_have_the_norm_of_what_they_control_for(bridges):
    concept = refine(bridges["llama"], PAIRS)
    for control in random_like(concept, 3, seed=0):
        assert torch.allclose(control.vectors.norm(dim=-1), concept.vectors.norm(dim=-1), rtol=1e-5)
        assert control.cosine(concept).abs().max() < 0.9


WORDS = ("dog", "fox", "river", "letter", "quick", "lazy", "brown", "over")
PAIRS = ContrastPairs(
    "happiness",
    positive=tuple(f"the {a} made me feel happy over the {b}" for a in WORDS for b in WORDS[:3]),
    negative=tuple(f"a {a} sleeps and the {b} jumps" for a in WORDS for b in WORDS[:3]),
    select=tuple(Question(f"brown {a} {b}", (" happy", " dog"), 0) for a in WORDS for b in WORDS[3:5]),
    test=tuple(Question(f"lazy {a} {b}", (" happy", " dog"), 0) for a in WORDS for b in WORDS[5:]),
)


@pytest.fixture(scope="module")
def untrained(bridges):
    """What `evaluate` takes, from two untrained models."""
    source, target = bridges["llama"], bridges["gpt2"]
    sentences = [f"{text} {a} {b}" for text in CORPUS for a in WORDS for b in WORDS]
    return (target, PAIRS, refine(source, PAIRS), fit_maps(source, target, sentences)), source


QUICK = {"neutral": TEXTS, "search": Search((1.0, 2.0)), "rivals": Rivals(n_random=3)}


def test_two_untrained_models_show_no_transfer_and_the_report_says_so(untrained):
    inputs, source = untrained
    report = evaluate(*inputs, **QUICK)
    assert not report.transferred
    assert "no transfer beyond controls" in report.verdict
    assert set(report.arms) == {
        "base",
        "transplanted",
        "zero",
        "uniform",
        "native",
        "shuffled_map",
        "random",
        "random_source",
        "sign_flipped",
        "random_weighting",
    }
    for arm in ("shuffled_map", "random", "random_source"):
        assert report.geometry[arm]["norm"] == pytest.approx(report.geometry["transplanted"]["norm"], rel=1e-4)
    assert report.geometry["native"]["cosine_to_native"] == pytest.approx(1, abs=1e-5)
    for arm in ("base", "zero"):
        assert report.arms[arm]["loss_increase"].value == report.arms[arm]["kl"].value == 0
        assert report.arms[arm]["token_accuracy"] == report.arms["base"]["token_accuracy"]
    moved = report.arms["transplanted"]["kl"]
    assert moved.value > 0
    assert report.dose["native"] == pytest.approx(
        report.strength * report.geometry["transplanted"]["norm"] / report.geometry["native"]["norm"], rel=1e-5
    )


def test_any_arms_can_be_asked_for_and_those_that_cannot_be_made_are_named(untrained):
    inputs, source = untrained
    report = evaluate(*inputs, **QUICK, arms=["native", "random"])
    assert set(report.arms) == {"base", "transplanted", "native", "random"}
    with pytest.raises(ValueError, match="expected arms among .*; got instruction, banana"):
        evaluate(*inputs, **QUICK, arms=["instruction", "banana"])
    rivals = Rivals(source=source, instruction="Be happy. ", aligned=source, n_random=1)
    every = evaluate(*inputs, **(QUICK | {"rivals": rivals}), arms=["source_own", "instruction", "aligned"])
    assert set(every.arms) == {"base", "transplanted", "source_own", "instruction", "aligned"}
    # The source is measured against itself; the other model, which reads the target's tokens, against the target; an
    # instruction stands before no neutral text.
    costs = {arm: metrics["loss_increase"].value for arm, metrics in every.arms.items() if "loss_increase" in metrics}
    assert set(costs) == set(every.arms) - {"instruction"} and costs["source_own"] != 0
    lost = [side_effects(model, TEXTS[len(TEXTS) // 2 :], []).loss.sum() for model in (source, inputs[0])]
    tokens = side_effects(source, TEXTS[len(TEXTS) // 2 :], []).tokens.sum()
    assert costs["aligned"] == pytest.approx((lost[0] - lost[1]) / tokens, rel=1e-4)


def test_a_concept_or_a_source_of_another_model_is_refused_before_anything_runs(untrained, bridges):
    (target, pairs, concept, maps), _ = untrained
    elsewhere = refine(bridges["qwen2"], PAIRS)
    with pytest.raises(ValueError, match="expected a concept of llama"):
        evaluate(target, pairs, elsewhere, maps, **QUICK)
    with pytest.raises(ValueError, match="expected a source of llama"):
        evaluate(target, pairs, concept, maps, **(QUICK | {"rivals": Rivals(source=bridges["qwen2"])}))
    with pytest.raises(ValueError, match="these maps lead into gpt2"):
        evaluate(bridges["qwen2"], pairs, concept, maps, **QUICK)


def test_an_instruction_that_does_not_fit_the_context_costs_its_own_arm_only(untrained):
    inputs, _ = untrained
    rivals = replace(QUICK["rivals"], instruction="happy " * inputs[0].cfg.n_ctx)
    report = evaluate(*inputs, **(QUICK | {"rivals": rivals}), arms=["random", "instruction"])
    assert set(report.arms) == {"base", "transplanted", "random"}
    assert "does not fit the context" in report.failures["instruction"] and "Failed: instruction" in report.verdict


def test_a_verdict_without_null_controls_is_undecided(untrained):
    inputs, _ = untrained
    # The question is turned round, so that the base is beaten: the options trade places.
    swapped = replace(PAIRS, test=tuple(replace(q, answer=1 - q.answer) for q in PAIRS.test))
    reports = [evaluate(inputs[0], pairs, *inputs[2:], **QUICK, arms=[]) for pairs in (PAIRS, swapped)]
    assert not any(report.transferred for report in reports)
    assert all("no transfer beyond" in r.verdict or "no null control was run" in r.verdict for r in reports)


def test_an_evaluation_that_is_stopped_leaves_a_report_that_says_it_is_partial(untrained):
    inputs, _ = untrained
    asked = iter([False] * 4 + [True] * 100)
    with pytest.raises(Interrupted) as caught:
        evaluate(*inputs, **QUICK, stopped=lambda: next(asked))
    partial, whole = caught.value.report, evaluate(*inputs, **QUICK)
    assert partial.partial and "Partial: interrupted before" in partial.verdict and not partial.transferred
    assert len(partial.arms) == 4 and set(partial.missing) == set(whole.arms) - set(partial.arms)
    assert all(partial.arms[name] == whole.arms[name] for name in partial.arms)
    assert not whole.partial


def test_prompts_that_were_seen_are_refused_or_mark_the_report(untrained):
    inputs, _ = untrained
    seen = {"the fit corpus": ["They say: LAZY dog  brown.", PAIRS.test[0].prompt + " and more of it"]}
    with pytest.raises(ValueError, match=r"contained in the fit corpus.*allow_overlap=True"):
        evaluate(*inputs, **QUICK, known=seen)
    report = evaluate(*inputs, **QUICK, arms=["random"], known=seen, allow_overlap=True)
    assert report.in_sample and "In-sample" in report.verdict
    assert not evaluate(*inputs, **QUICK, arms=["random"]).in_sample
    with pytest.raises(ValueError, match="the refine pairs"):
        leaking = replace(PAIRS, test=(Question(PAIRS.positive[0], (" happy", " dog"), 0), *PAIRS.test))
        evaluate(inputs[0], leaking, *inputs[2:], **QUICK)


def test_an_evaluation_without_questions_is_refused(untrained):
    (target, _, *rest), _ = untrained
    with pytest.raises(ValueError, match="there are no test questions"):
        evaluate(target, replace(PAIRS, test=()), *rest, **QUICK)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "qwen2", "gemma2"])
def test_steering_that_resumes_at_the_layer_equals_a_transplant(architecture, bridges):
    model = bridges[architecture]
    concept = refine(model, PAIRS)
    tokens, mask = pad([encoding.ids for encoding in encode(model, TEXTS)])
    before = plain(model)(tokens, mask)
    for layer in concept.layers:
        at = SteeredAt(model, layer)
        for strength in (1.0, -3.0):
            with transplant(model, concept, strength=strength, layers=[layer]):
                hooked = plain(model)(tokens, mask)
            resumed = at.by(concept, strength)(tokens, mask)
            assert torch.equal(resumed[mask.bool()], hooked[mask.bool()])
            assert not torch.allclose(resumed[mask.bool()], before[mask.bool()], atol=1e-3)
    assert torch.equal(plain(model)(tokens, mask), before)


def test_a_model_is_whole_again_after_an_exception_while_resumed(bridges):
    model = bridges["llama"]
    tokens, mask = pad([encoding.ids for encoding in encode(model, TEXTS)])
    before = plain(model)(tokens, mask)
    with pytest.raises(KeyboardInterrupt), resumed_after(model, 1, torch.zeros(len(TEXTS), tokens.shape[1], D_MODEL)):
        assert not torch.equal(plain(model)(tokens, mask), before)
        raise KeyboardInterrupt
    assert torch.equal(plain(model)(tokens, mask), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "qwen2", "gemma2"])
def test_the_head_can_be_computed_where_it_is_read_only(architecture, bridges):
    model = bridges[architecture]
    tokens, mask = pad([encoding.ids for encoding in encode(model, TEXTS)])
    whole, where = plain(model)(tokens, mask), torch.zeros(tokens.shape, dtype=torch.bool)
    where[[0, 0, 1, 3], [0, 1, 5, 2]] = True
    with head_only_at(model, where):
        some = plain(model)(tokens, mask)
        assert torch.equal(plain(model)(tokens[:2], mask[:2]), whole[:2])  # a pass of another shape is left alone
    assert torch.allclose(some[where], whole[where], atol=1e-5) and not some[~where].any()  # float32, other batch shapes
    with pytest.raises(KeyboardInterrupt), head_only_at(model, where):
        raise KeyboardInterrupt
    assert torch.equal(plain(model)(tokens, mask), whole)


def test_options_that_begin_with_others_are_scored_as_if_alone(bridges, references):
    model, reference = bridges["llama"], references["llama"]
    question = Question("the quick", (" brown", " brown fox", " brown fox jumps", " dog"), 2)
    asked = [question, replace(question, prompt="the quick brown", options=(" fox", " fox jumps"), answer=1)]
    margins = answer_questions(model, read_questions(model, asked), "mc1").margin
    for one, margin in zip(asked, margins, strict=True):
        _, prompt = logprobs_alone(reference, model.tokenizer, one.prompt)
        sums = []
        for option in one.options:
            logprobs, ids = logprobs_alone(reference, model.tokenizer, one.prompt + option)
            sums.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        assert margin == pytest.approx(sums.pop(one.answer) - max(sums), abs=1e-4)  # float32 logits
