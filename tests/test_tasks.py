"""What tasks, subjects and costs say, against plain loops over Hugging Face models that nothing ever wrapped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    D_MODEL,
    N_CTX,
    TEXTS,
    VOCAB,
    hf_steered_logits,
    random_model,
    save_tokenizer,
    save_word_tokenizer,
    unchecked,
)
from torch import Tensor

from contrans_tl import ConceptVector, ContrastPairs, Question, fit_maps, identify, load_model, refine, transplant
from contrans_tl.evaluation import (
    Continuations,
    Marks,
    MultipleChoice,
    ProxyTuned,
    RestrictedChoice,
    Rivals,
    Sampling,
    Search,
    SteeredAt,
    Subject,
    Task,
    WordList,
    choose,
    classifier,
    evaluate,
    plain,
    read_questions,
    side_effects,
    strength_for_kl,
    tasks,
    write,
)
from contrans_tl.tokens import encode, pad

LAYER, STRENGTH = 1, 1.0
TOLERANCE = 1e-4
"""Sums of a dozen float32 log-probabilities of the size 10, added in another order: at most 1e-5 was seen."""
BATCHES = (1, 2, 7, 64)
PROMPTS = [*TEXTS, "a river", "the lazy", "happy letters and", "over the quick", "fox"]
CHOICES = (
    Question("the quick brown fox jumps over the", (" lazy dog", " lazy fox", " quick river"), 1, correct=(0, 1)),
    Question("a letter made", (" me feel happy", " over the dog", " the quick river", " me"), 2),
    Question("brown letters feel", (" lazy over", " lazy dog", " a", " happy and lazy"), 3, correct=(1, 3), prefix="the dog\n"),
    Question("the dog sleeps and", (" jumps", " a fox jumps", " the river"), 0, correct=(0, 2)),
    Question("quick", (" brown", " river, and then a letter made me feel lazy"), 1),
)


@dataclass(frozen=True, eq=False)
class Held:
    """A model as the library holds it, and the same in plain Hugging Face."""

    model: Any
    reference: Any
    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def logits(self, ids: list[int], push: Tensor | None = None) -> Tensor:
        push = torch.zeros(D_MODEL) if push is None else push
        return hf_steered_logits(self.reference, ids, LAYER, lambda resid: resid + push)

    def logprob(self, ids: list[int], start: int, push: Tensor | None = None) -> float:
        """Of the tokens from `start` on."""
        logprobs = self.logits(ids, push).log_softmax(-1).double()
        return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))

    def greedy(self, ids: list[int], n: int, push: Tensor | None = None) -> list[int]:
        """The likeliest tokens that follow, one whole pass each."""
        written: list[int] = []
        for _ in range(n):
            written.append(int(self.logits(ids + written, push)[-1].argmax()))
        return written

    def text(self, written: list[int]) -> str:
        """What these tokens say before the end of sequence."""
        end = self.tokenizer.eos_token_id
        return self.tokenizer.decode(written[: written.index(end)] if end in written else written)


@pytest.fixture(scope="module")
def held(bridges: Any, references: Any, folders: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Held]:
    """Two architectures with a byte-level tokenizer, and one with tokens that run across words and one with whole words."""
    from transformers import AutoTokenizer

    models = {
        name: Held(bridges[name], references[name], AutoTokenizer.from_pretrained(folders[name])) for name in ("llama", "gpt2")
    }
    for name, save in (("across", lambda folder: save_tokenizer(folder, across_words=True)), ("words", save_word_tokenizer)):
        folder = tmp_path_factory.mktemp(name)
        references["llama"].save_pretrained(folder)
        tokenizer = save(folder)
        models[name] = Held(load_model(folder, device="cpu"), references["llama"], tokenizer)
    return models


@pytest.fixture(params=["base", "steered"])
def arm(request: Any) -> bool:
    return request.param == "steered"


def pushed(model: Any, seed: int = 7) -> ConceptVector:
    """A vector that moves every answer: as long as the residual stream."""
    vector = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return ConceptVector(vector, (LAYER,), "a push", identify(model))


def subject_of(model: Any, steered: bool, opening: str = "") -> tuple[Subject, Tensor]:
    """A subject, and what it adds to the residual stream."""
    if not steered:
        return Subject(model, opening), torch.zeros(D_MODEL)
    concept = pushed(model)
    return replace(SteeredAt(model, LAYER).subject(concept, STRENGTH), opening=opening), STRENGTH * concept.at(LAYER)


def ask(kind: Any, questions: Sequence[Question], subject: Subject, **options: Any) -> Marks:
    return kind("asked", tuple(questions), tuple(questions), **options).measure(subject, "test")


@pytest.mark.parametrize("name", ["llama", "gpt2", "words"])
def test_mc1_mc2_and_mc1_by_length_equal_a_loop_over_the_answers(name: str, arm: bool, held: dict[str, Held]) -> None:
    it = held[name]
    subject, push = subject_of(it.model, arm)
    marks = ask(MultipleChoice, CHOICES, subject)
    for k, question in enumerate(CHOICES):
        start = len(it.ids(question.text))
        sums = np.array([it.logprob(it.ids(question.text + option), start, push) for option in question.options])
        wrong = [i for i in range(len(sums)) if i not in (question.correct or (question.answer,))]
        lengths = [len(option.strip()) for option in question.options]
        right = np.exp(sums)[list(question.correct or (question.answer,))].sum()
        assert marks.propensity is not None
        assert marks.propensity[k] == pytest.approx(sums[question.answer] - sums[wrong].max(), abs=TOLERANCE)
        assert marks.metrics["mc1"][k] == (sums[question.answer] > sums[wrong].max())
        assert marks.metrics["mc1_normalised"][k] == ((sums / lengths)[question.answer] > (sums / lengths)[wrong].max())
        assert marks.metrics["mc2"][k] == pytest.approx(right / np.exp(sums).sum(), abs=TOLERANCE)


def test_options_that_begin_within_a_token_of_their_prompt_are_scored_as_whole_texts(held: dict[str, Held]) -> None:
    it = held["across"]
    merged = [q for q in CHOICES if any(it.ids(q.text + o)[: len(it.ids(q.text))] != it.ids(q.text) for o in q.options)]
    assert merged, "this tokenizer reads no option together with its prompt: it tests nothing"
    marks = ask(MultipleChoice, merged, Subject(it.model))
    assert marks.propensity is not None
    for k, question in enumerate(merged):
        # What the texts of a question have in common falls out of every difference.
        sums = np.array([it.logprob(it.ids(question.text + option), 1) for option in question.options])
        wrong = [i for i in range(len(sums)) if i not in (question.correct or (question.answer,))]
        assert marks.propensity[k] == pytest.approx(sums[question.answer] - sums[wrong].max(), abs=TOLERANCE)
        right = np.exp(sums - sums.max())[list(question.correct or (question.answer,))].sum()
        assert marks.metrics["mc2"][k] == pytest.approx(right / np.exp(sums - sums.max()).sum(), abs=TOLERANCE)


def runs(options: Sequence[Sequence[int]]) -> list[list[int]]:
    """Of each the shortest beginning that no other option has."""
    cut = []
    for option in options:
        others = [list(other) for other in options if other is not option]
        cut.append(next(list(option[:n]) for n in range(1, len(option) + 1) if all(o[:n] != list(option[:n]) for o in others)))
    return cut


@pytest.mark.parametrize("name", ["llama", "gpt2", "across", "words"])
def test_token_accuracy_is_whether_greedy_text_begins_with_the_answer(name: str, arm: bool, held: dict[str, Held]) -> None:
    it = held[name]
    subject, push = subject_of(it.model, arm)
    questions, expected, margins, longest = [], [], [], 0
    for prompt in PROMPTS:
        ids = it.ids(prompt)
        said = it.greedy(ids, 3, push)
        # What it says, and a text that begins with the same token; others that share tokens with each other. (Of the words that
        # this model can say the tokenizer of whole words knows few: there the answers are words that it does not say.)
        own = [it.tokenizer.decode(said), f"{it.tokenizer.decode(said[:1])} dog"] if name != "words" else [" happy"]
        options = tuple(dict.fromkeys([*own, " lazy dog", " lazy fox"]))
        read = [it.ids(prompt + option) for option in options]
        if any(full[: len(ids)] != ids or len(full) == len(ids) for full in read):
            continue  # the loop below would need another split; the test above has such options
        tails = [full[len(ids) :] for full in read]
        if any(a is not b and b[: len(a)] == a for a in tails for b in tails):
            continue
        cut = runs(tails)
        longest = max(longest, *map(len, cut))
        alone = [it.logprob(ids + run, len(ids), push) for run in cut]
        for answer, run in enumerate(cut):
            questions.append(Question(prompt, options, answer))
            expected.append((float(said[: len(run)] == run), float(alone[answer] > max(np.delete(alone, answer)))))
            margins.append(alone[answer] - max(np.delete(alone, answer)))
    assert len(questions) >= 8 and longest > 1
    marks = ask(RestrictedChoice, questions, subject)
    assert marks.metrics["token_accuracy"].tolist() == [token for token, _ in expected]
    assert marks.metrics["logit_accuracy"].tolist() == [logit for _, logit in expected]
    assert marks.propensity == pytest.approx(np.array(margins), abs=TOLERANCE)
    assert (name != "words") <= marks.metrics["token_accuracy"].sum() < len(questions)
    assert 0 < marks.metrics["logit_accuracy"].sum() < len(questions)
    # And against generate() of the same model, with its key-value cache.
    for question, hit in zip(questions, marks.metrics["token_accuracy"], strict=True):
        tokens = torch.tensor([it.ids(question.prompt)])
        with subject.running() as model:
            out = model.generate(
                tokens, max_new_tokens=3, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
            )
        tails = [it.ids(question.prompt + option)[tokens.shape[1] :] for option in question.options]
        run = runs(tails)[question.answer]
        assert hit == (out[0, tokens.shape[1] :][: len(run)].tolist() == run)


@pytest.mark.parametrize("name", ["llama", "words"])
def test_an_option_that_another_begins_with_is_refused_with_what_to_do(name: str, held: dict[str, Held]) -> None:
    model = held[name].model
    for options in ((" lazy", " lazy dog"), (" dog", " lazy dog", " lazy")):
        with pytest.raises(ValueError, match='no next token tells them apart.*" ?lazy"|lazy.*"metric": "mc1"'):
            ask(RestrictedChoice, [Question("the", options, 0)], Subject(model))
        assert ask(MultipleChoice, [Question("the", options, 0)], Subject(model)).metrics["mc1"].shape == (1,)


def test_without_a_bos_token_something_has_to_stand_before_an_option(held: dict[str, Held], monkeypatch: Any) -> None:
    it = held["llama"]
    monkeypatch.setattr(it.model.cfg, "default_prepend_bos", False)
    whole = it.tokenizer("the", add_special_tokens=False)["input_ids"]
    assert len(whole) == 1 and it.tokenizer("t", add_special_tokens=False)["input_ids"] != whole
    with pytest.raises(ValueError, match="nothing stands before"):
        read_questions(it.model, [Question("t", ("he", "o"), 0)])


@pytest.mark.parametrize("opening", ["", "Pretend you are lazy. "])
@pytest.mark.parametrize("kind", [MultipleChoice, RestrictedChoice])
def test_few_shot_examples_and_an_opening_are_read_as_part_of_the_text(
    kind: Any, opening: str, arm: bool, held: dict[str, Held]
) -> None:
    it = held["llama"]
    subject, _ = subject_of(it.model, arm, opening)
    bare, _ = subject_of(it.model, arm)
    options = (" lazy dog", " quick fox")
    prefixed = [Question(prompt, options, 0, prefix="fox: quick\n") for prompt in PROMPTS]
    written = [Question(opening + "fox: quick\n" + prompt, options, 0) for prompt in PROMPTS]
    without = [Question(prompt, options, 0) for prompt in PROMPTS]
    marks, same, other = ask(kind, prefixed, subject), ask(kind, written, bare), ask(kind, without, bare)
    assert np.array_equal(marks.propensity, same.propensity)  # type: ignore[arg-type]
    assert not np.allclose(marks.propensity, other.propensity, atol=1e-2)  # type: ignore[arg-type]
    task = kind("asked", tuple(prefixed), tuple(prefixed))
    assert task.prompts("test") == PROMPTS and task.demonstrations() == ["fox: quick\n"]


def test_another_model_at_the_same_address_is_read_anew(held: dict[str, Held]) -> None:
    """A task outlives the models it is put to, and Python gives their addresses to the next."""
    task = MultipleChoice("asked", CHOICES, CHOICES)
    alone = {name: ask(MultipleChoice, CHOICES, Subject(held[name].model)).propensity for name in ("llama", "words")}
    addresses = set()
    for _ in range(4):
        for name, expected in alone.items():
            model = _Stand(held[name].model)
            addresses.add(id(model))
            assert np.array_equal(task.measure(Subject(model), "test").propensity, expected)  # type: ignore[arg-type]
            del model
    assert len(addresses) < 8, "no address came twice: this tested nothing"


class _Stand:
    """Stands for a model that is loaded and dropped."""

    def __init__(self, model: Any):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_questions_costs_and_texts_are_the_same_in_batches_of_any_size(name: str, arm: bool, held: dict[str, Held]) -> None:
    model = held[name].model
    scored, costs, greedy, drawn, read = [], [], [], [], read_questions(model, CHOICES)
    for size in BATCHES:
        subject, _ = subject_of(model, arm)
        scored.append(ask(MultipleChoice, CHOICES, subject, batch_size=size))
        costs.append(side_effects(model, TEXTS, [subject.forward], batch_size=size))
        greedy.append(write(subject, PROMPTS, 6, batch_size=size))
        drawn.append(write(subject, PROMPTS, 6, sampling=Sampling(0.7, seed=3), batch_size=size))
    assert len(read) == len(CHOICES)
    for marks, cost in zip(scored, costs, strict=True):
        assert marks.propensity == pytest.approx(scored[0].propensity, abs=TOLERANCE)
        assert all(marks.metrics[metric] == pytest.approx(scored[0].metrics[metric], abs=TOLERANCE) for metric in marks.metrics)
        for kind in ("loss", "loss_increase", "kl", "tokens"):
            assert getattr(cost, kind) == pytest.approx(getattr(costs[0], kind), rel=1e-5, abs=1e-5)
    assert all(texts == greedy[0] for texts in greedy) and all(texts == drawn[0] for texts in drawn)
    assert greedy[0] != drawn[0]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_continuations_equal_a_loop_and_generate_under_a_transplant(name: str, arm: bool, held: dict[str, Held]) -> None:
    it = held[name]
    subject, push = subject_of(it.model, arm)
    seen: list[list[str]] = []
    task = Continuations("look", tuple(PROMPTS), tuple(PROMPTS), lambda texts: seen.append(texts) or [0.0] * len(texts), 6)
    task.measure(subject, "test")
    expected = [it.text(it.greedy(it.ids(prompt), 6, push)) for prompt in PROMPTS]
    assert seen == [expected]
    assert arm == (expected != [it.text(it.greedy(it.ids(prompt), 6)) for prompt in PROMPTS])
    with transplant(it.model, pushed(it.model), strength=STRENGTH if arm else 0.0):
        for prompt, text in zip(PROMPTS, expected, strict=True):
            ids = torch.tensor([it.ids(prompt)])
            out = it.model.generate(ids, max_new_tokens=6, do_sample=False, return_type="tokens", verbose=False)
            assert it.text(out[0, ids.shape[1] :].tolist()) == text


@contextmanager
def ending_with(tokenizer: Any, token: int) -> Iterator[None]:
    """While open, this token is the end of sequence."""
    before = tokenizer.eos_token
    try:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
        yield
    finally:
        tokenizer.eos_token = before


@pytest.mark.parametrize("sampling", [None, Sampling(1.0)])
def test_a_continuation_ends_at_the_end_of_sequence(sampling: Sampling | None, held: dict[str, Held]) -> None:
    it = held["llama"]
    prompts, tokenizer = [it.ids(prompt) for prompt in PROMPTS], it.model.tokenizer
    with ending_with(tokenizer, tokenizer.pad_token_id + 1):
        free = Subject(it.model).generate(prompts, 6, sampling=sampling)
    assert [len(tokens) for tokens in free] == [6] * len(free), "this token it does not write here"
    end = free[0][2]
    with ending_with(tokenizer, end):
        assert tokenizer.eos_token_id == end
        stopped = Subject(it.model).generate(prompts, 6, sampling=sampling)
    assert stopped == [tokens[: tokens.index(end)] if end in tokens else tokens for tokens in free]
    assert len(stopped[0]) < 3 and tokenizer.eos_token_id == it.tokenizer.eos_token_id


def test_a_continuation_that_the_context_cannot_hold_is_refused(held: dict[str, Held]) -> None:
    for name in ("llama", "gpt2"):
        model = held[name].model
        room = N_CTX - len(held[name].ids("the dog"))
        for sampling in (None, Sampling()):
            assert write(Subject(model), ["the dog"], room, sampling=sampling)
            with pytest.raises(ValueError, match=f"{room + 1} new tokens.*do not fit the context"):
                write(Subject(model), ["the dog"], room + 1, sampling=sampling)


def chi_square(tokens: Sequence[int], chances: Tensor) -> tuple[float, int]:
    """The statistic and its degrees of freedom, tokens of which fewer than five are expected taken together."""
    expected = chances.double().numpy() * len(tokens)
    found = np.bincount(tokens, minlength=len(expected)).astype(float)
    common = expected >= 5
    expected = np.append(expected[common], expected[~common].sum())
    found = np.append(found[common], found[~common].sum())
    return float(((found - expected) ** 2 / expected).sum()), len(expected) - 1


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_tokens_have_the_models_distribution(temperature: float, arm: bool, held: dict[str, Held]) -> None:
    it = held["llama"]
    subject, push = subject_of(it.model, arm)
    ids, n = it.ids("the dog"), 2000
    rows = subject.generate([ids] * n, 2, sampling=Sampling(temperature, seed=1), batch_size=1000)
    ends = it.tokenizer.eos_token_id
    firsts = [row[0] if row else ends for row in rows]
    first = (it.logits(ids, push)[-1] / temperature).softmax(-1)
    second = torch.zeros(VOCAB)
    for token in set(firsts) - {ends}:
        share = firsts.count(token) / n
        second += share * (it.logits([*ids, token], push)[-1] / temperature).softmax(-1)
    second[ends] += firsts.count(ends) / n
    for tokens, chances in ((firsts, first), ([row[1] if len(row) > 1 else ends for row in rows], second)):
        statistic, freedom = chi_square(tokens, chances)
        # Four standard deviations of a chi-square above its mean; the seeds are fixed, so that this is no lottery.
        assert freedom > 10 and statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_one_seed_gives_one_text_whatever_else_is_asked_and_another_seed_another(held: dict[str, Held]) -> None:
    model = held["llama"].model
    drawn = write(Subject(model), PROMPTS, 6, sampling=Sampling(seed=4))
    torch.manual_seed(99)
    assert write(Subject(model), PROMPTS, 6, sampling=Sampling(seed=4)) == drawn
    assert write(Subject(model), PROMPTS[:3], 6, sampling=Sampling(seed=4)) == drawn[:3]
    assert write(Subject(model), PROMPTS, 6, sampling=Sampling(seed=5)) != drawn
    still = SteeredAt(model, LAYER).subject(pushed(model), 0.0)
    assert write(still, PROMPTS, 6, sampling=Sampling(seed=4)) == drawn, "arms are paired: only the model differs"
    assert write(Subject(model), PROMPTS, 6, sampling=Sampling(1e-4)) == write(Subject(model), PROMPTS, 6)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature above 0"):
            Sampling(temperature)


def test_sampled_texts_leave_no_residuals_behind(held: dict[str, Held]) -> None:
    """What is kept of the lower blocks serves the next vector on the same tokens; text that grows has no such use for it."""
    at = SteeredAt(held["llama"].model, LAYER)
    write(at.subject(pushed(at.model), 1.0), PROMPTS, 6, sampling=Sampling())
    assert not at._below


def test_proxy_tuned_logits_are_base_plus_expert_less_novice(
    held: dict[str, Held], tmp_path_factory: pytest.TempPathFactory
) -> None:
    it = held["gpt2"]
    small = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("small")
        hf = random_model("llama", seed)
        hf.save_pretrained(folder)
        small.append(Held(load_model(folder, tokenizer=save_tokenizer(folder), device="cpu"), hf, it.tokenizer))
    expert, novice = small
    tuned = ProxyTuned(it.model, expert=expert.model, novice=novice.model)
    tokens, mask = pad([encoding.ids for encoding in encode(it.model, TEXTS)])
    logits = tuned.forward(tokens, mask)
    for row, text in enumerate(TEXTS):
        ids = it.ids(text)
        alone = it.logits(ids) + expert.logits(ids) - novice.logits(ids)
        assert torch.allclose(logits[row, : len(ids)], alone, atol=TOLERANCE)
    written, ids = tuned.generate([it.ids("the dog")], 4), it.ids("the dog")
    for token in written[0]:
        assert token == int((it.logits(ids) + expert.logits(ids) - novice.logits(ids))[-1].argmax())
        ids = [*ids, token]
    same = ProxyTuned(it.model, expert=expert.model, novice=expert.model)
    assert torch.allclose(same.forward(tokens, mask)[mask.bool()], plain(it.model)(tokens, mask)[mask.bool()], atol=TOLERANCE)
    other = held["words"].model
    for role, models in (("expert", (other, novice.model)), ("novice", (expert.model, other))):
        with pytest.raises(ValueError, match=f"expected for {role} a model that reads the same tokens"):
            ProxyTuned(it.model, expert=models[0], novice=models[1])


def test_a_word_list_counts_whole_words_in_any_case() -> None:
    assert WordList(("dog", "lazy fox"))(["A Dog, a dog's DOG", "dogs hotdog", "the lazy fox", "", "lazy  fox"]) == [
        3,
        0,
        1,
        0,
        0,
    ]
    assert WordList(("f***", "c++", "naïve"))(["oh f*** it", "f***ing c++ and C++.", "NAÏVE naïveté"]) == [1, 2, 1]
    for words in ((), ("dog", "")):
        with pytest.raises(ValueError, match="expected words"):
            WordList(words)


def test_a_transformers_classifier_scores_by_the_probability_of_a_label(tmp_path: Path, held: dict[str, Held]) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    torch.manual_seed(0)
    labels = {0: "kind", 1: "toxic", 2: "neither"}
    size = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB)
    config = LlamaConfig(**size, id2label=labels, label2id={v: k for k, v in labels.items()}, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    tokenizer = save_tokenizer(tmp_path, pad_is_eos=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(tmp_path)
    expected = []
    for text in PROMPTS:
        with torch.no_grad():
            expected.append(float(model(torch.tensor([tokenizer(text)["input_ids"]])).logits.softmax(-1)[0, 1]))
    scorer = classifier(str(tmp_path), "toxic", batch_size=3, device="cpu")
    assert scorer(PROMPTS) == pytest.approx(expected, abs=TOLERANCE)
    task = Continuations("toxicity", tuple(PROMPTS), tuple(PROMPTS), scorer, 4, threshold=0.5)
    marks = task.measure(Subject(held["llama"].model), "test")
    assert marks.metrics["score"] == pytest.approx(np.array(scorer(list(marks.texts))), abs=1e-6)
    assert marks.metrics["rate"].tolist() == (marks.metrics["score"] >= 0.5).astype(float).tolist()
    assert np.array_equal(marks.propensity, -marks.metrics["score"])  # type: ignore[arg-type]
    with pytest.raises(tasks.ScoringFailed, match="there is no 'rude'"):
        tasks.score(classifier(str(tmp_path), "rude"), PROMPTS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "words"])
def test_costs_on_neutral_text_equal_a_loop_over_texts(name: str, held: dict[str, Held]) -> None:
    it = held[name]
    subject, push = subject_of(it.model, True)
    small, small_push = SteeredAt(it.model, LAYER).by(pushed(it.model), 0.05), 0.05 * pushed(it.model).at(LAYER)
    costs = side_effects(it.model, TEXTS, [subject.forward, small, Subject(it.model).forward], batch_size=3)
    for k, text in enumerate(TEXTS):
        ids = it.ids(text)
        clean = it.logits(ids)[:-1].double().log_softmax(-1)
        following = torch.tensor(ids[1:])[:, None]
        assert costs.tokens[k] == len(ids) - 1
        assert costs.loss[k] == pytest.approx(-float(clean.gather(1, following).sum()), rel=1e-5)
        for row, added in enumerate((push, small_push)):
            steered = it.logits(ids, added)[:-1].double().log_softmax(-1)
            kl = float((clean.exp() * (clean - steered)).sum())
            increase = float((clean - steered).gather(1, following).sum())
            # float32 logits of the size 10 are known to 1e-6, and so is each token's share of a sum.
            assert costs.kl[row, k] == pytest.approx(kl, rel=1e-5, abs=1e-5) and costs.kl[row, k] > 0
            assert costs.loss_increase[row, k] == pytest.approx(increase, rel=1e-5, abs=2e-5)
    assert not costs.kl[2].any() and not costs.loss_increase[2].any()
    assert costs.per_token(costs.kl)[0] == pytest.approx(costs.kl[0].sum() / costs.tokens.sum())


@pytest.mark.parametrize("strength", [0.0, 1e-4, 1e-2, 1.0, 30.0])
def test_kl_is_never_below_zero_and_zero_without_a_vector(strength: float, held: dict[str, Held]) -> None:
    model = held["llama"].model
    kl = side_effects(model, TEXTS, [SteeredAt(model, LAYER).by(pushed(model), strength)]).kl
    # A text's sum over ten tokens of terms that are rounded to 1e-7 each.
    assert kl.min() >= -1e-6 and (strength < 1e-2 or kl.min() > 0)
    assert strength or not kl.any()


@pytest.mark.parametrize("budget", [0.003, 0.1, 0.3])
def test_a_strength_by_kl_spends_its_budget(budget: float, held: dict[str, Held]) -> None:
    for name in ("llama", "gpt2"):
        at = SteeredAt(held[name].model, LAYER)
        strength = strength_for_kl(at, pushed(at.model), TEXTS, budget)
        costs = side_effects(at.model, TEXTS, [at.by(pushed(at.model), strength)])
        # Found to within 1% in strength, of which KL is about the square.
        assert budget * 0.98 <= float(costs.per_token(costs.kl)[0]) <= budget * 1.001
    nothing = replace(pushed(at.model), vectors=torch.zeros(1, D_MODEL))
    with pytest.raises(ValueError, match=r"less than .* nats of KL at any strength \(0 at the last one tried\)"):
        strength_for_kl(at, nothing, TEXTS, budget)


WORDS = ("dog", "fox", "river", "letter", "quick", "lazy", "brown", "over")
PAIRS = ContrastPairs(
    "happiness",
    positive=tuple(f"the {a} made me feel happy over the {b}" for a in WORDS for b in WORDS[:3]),
    negative=tuple(f"a {a} sleeps and the {b} jumps" for a in WORDS for b in WORDS[:3]),
    select=tuple(Question(f"brown {a} {b}", (" happy", " dog"), 0) for a in WORDS for b in WORDS[3:5]),
    test=tuple(Question(f"lazy {a} {b}", (" happy", " dog"), 0) for a in WORDS for b in WORDS[5:]),
)


@pytest.mark.parametrize("unit", ["raw", "native", "resid", "kl"])
def test_strengths_are_counted_in_the_unit_that_was_asked_for(unit: Any, held: dict[str, Held]) -> None:
    model = held["llama"].model
    concepts = {(0, layer): refine(model, PAIRS).only(layer) for layer in (0, 1)}
    norms = {0: 3.0, 1: 0.5}
    settings = (0.01, 0.03) if unit == "kl" else (0.1, 0.3)  # untrained models say so little that no vector costs 0.3 nats
    search = Search(settings, unit=unit, budget=np.inf)
    found = choose(model, concepts, tasks.task_of(PAIRS), TEXTS, search=search, norms=norms.__getitem__)
    tried = [point for point in found.sweep if "effect" in point]
    assert {point["setting"] for point in tried} == set(settings) and len(tried) == 4
    for point in tried:
        length = float(concepts[0, int(point["layer_target"])].vectors.norm())
        if unit == "raw":
            assert point["strength"] == point["setting"]
        elif unit == "kl":
            assert point["kl"] == pytest.approx(point["setting"], rel=0.02)
        else:
            assert point["strength"] * length == pytest.approx(point["setting"] * norms[int(point["layer_target"])], rel=1e-6)
    assert (found.strength, found.setting) in [(point["strength"], point["setting"]) for point in tried]
    if unit in ("native", "resid"):
        with pytest.raises(ValueError, match=f"units of '{unit}' need the norms"):
            choose(model, concepts, tasks.task_of(PAIRS), TEXTS, search=search)


@pytest.fixture(scope="module")
def carrying(bridges: Any) -> tuple[Any, ...]:
    """What `evaluate` takes, from two untrained models."""
    source, target = bridges["llama"], bridges["gpt2"]
    sentences = [f"the {a} {b} jumps over a {c}" for a in WORDS for b in WORDS for c in WORDS[:2]]
    return target, PAIRS, refine(source, PAIRS), fit_maps(source, target, sentences).only([0, 2], [1])


def test_the_report_tells_the_dose_in_units_of_native_vector_and_residual_stream(carrying: tuple[Any, ...]) -> None:
    for unit in ("native", "resid"):
        search = Search((0.7,), unit=unit, budget=np.inf)
        report = evaluate(*carrying, neutral=TEXTS, search=search, arms=["native"])
        assert report.dose[unit] == pytest.approx(0.7, rel=1e-5) and report.search["setting"] == 0.7
        moved = report.strength * report.geometry["transplanted"]["norm"]
        norm = report.geometry["native"]["norm"]
        if unit == "resid":
            rows = carrying[3].target.at(report.layer_target)
            norm = float(rows.norm(dim=-1).mean())
        assert moved == pytest.approx(0.7 * norm, rel=1e-4)


OPENINGS = tuple(f"brown {a} {b}" for a in WORDS for b in WORDS[3:5])
ENDINGS = tuple(f"lazy {a} {b}" for a in WORDS for b in WORDS[5:])
QUICK: dict[str, Any] = {
    "neutral": TEXTS,
    "search": Search((1.0, 2.0), budget=np.inf),
    "rivals": Rivals(n_random=2),
    "arms": ["native", "random", "zero"],
}


def letters(texts: list[str]) -> list[float]:
    return [float(text.count("e")) for text in texts]


LETTERS = Continuations("letters", OPENINGS, ENDINGS, letters, 5, wanted="higher")


@pytest.fixture(scope="module")
def healthy(carrying: tuple[Any, ...]) -> Any:
    """The report of a scorer that does not fail."""
    return evaluate(*carrying, task=LETTERS, **QUICK)


@pytest.mark.parametrize(
    "fault, said",
    [
        ("raise", "the scorer raised RuntimeError: no connection"),
        ("nan", "the scorer returned 1 numbers that are NaN or infinite."),
        ("count", "the scorer returned 23 numbers for 24 continuations."),
    ],
)
def test_a_scorer_that_fails_is_told_beside_its_arm_and_costs_no_other(
    fault: str, said: str, carrying: tuple[Any, ...], healthy: Any
) -> None:
    asked = 0

    def scorer(texts: list[str]) -> list[float]:
        nonlocal asked
        asked += len(texts) == len(ENDINGS)
        if asked != 4 or len(texts) != len(ENDINGS):  # base, transplanted, zero, native
            return letters(texts)
        if fault == "raise":
            raise RuntimeError("no connection")
        return [*letters(texts)[:-1], float("nan")] if fault == "nan" else letters(texts)[:-1]

    report = evaluate(*carrying, task=replace(LETTERS, scorer=scorer), **QUICK)
    assert report.failures == {"native": said} and f"Failed: native ({said})." in report.verdict
    assert set(report.arms) == set(healthy.arms) - {"native"} and not healthy.failures
    for name in report.arms:
        assert report.arms[name] == healthy.arms[name] and report.items[name] == healthy.items[name]
        assert name == "transplanted" or report.differences[name] == healthy.differences[name]
    assert report.transfer_rate is None and report.steerability["transplanted"] == healthy.steerability["transplanted"]


def test_marks_of_a_task_of_ones_own_have_to_be_finite_and_one_for_each_prompt(carrying: tuple[Any, ...]) -> None:
    class Counting(Task):
        name, metric = "counting", "count"

        def __init__(self, spoil: Any):
            self.spoil, self.asked = spoil, 0

        def prompts(self, split: str) -> Any:
            return {"select": OPENINGS, "test": ENDINGS}.get(split, ())

        def measure(self, subject: Subject, split: Any) -> Marks:
            self.asked += split == "test"
            values = np.array(letters(write(subject, self.prompts(split), 4)))
            return Marks({"count": self.spoil(values) if self.asked == 3 and split == "test" else values})

    for spoil, said in ((lambda x: x * np.nan, "NaN or infinite"), (lambda x: x[1:], "for 24 prompts")):
        task = Counting(spoil)
        report = evaluate(*carrying, task=task, **QUICK)
        [(arm, why)] = report.failures.items()
        assert said in why and arm == "zero" and f"Failed: zero ({why})" in report.verdict
        assert set(report.arms) == {"base", "transplanted", *QUICK["arms"]} - {arm}


def test_the_task_in_the_modules_docstring_runs_through_evaluate(carrying: tuple[Any, ...]) -> None:
    assert tasks.__doc__ is not None
    example = tasks.__doc__[tasks.__doc__.index("    class Shouting") :]
    names: dict[str, Any] = {"Task": Task, "Marks": Marks, "write": write, "np": np, "SELECT": OPENINGS, "TEST": ENDINGS}
    exec("\n".join(line[4:] for line in example.splitlines()), names)
    report = evaluate(*carrying, task=names["Shouting"](), **QUICK)
    assert report.metric == "capitals" and set(report.arms) == {"base", "transplanted", *QUICK["arms"]}
    assert report.arms["zero"]["capitals"] == report.arms["base"]["capitals"] and not report.failures
    assert report.arms["base"]["capitals"].n == len(ENDINGS) and "own_capitals" not in report.arms["base"]
    with unchecked(), pytest.raises(TypeError, match="measure"):
        type("Half", (Task,), {"prompts": lambda self, split: ()})()
