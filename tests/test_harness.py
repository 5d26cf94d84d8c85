"""EleutherAI's harness on our models gives what their own Hugging Face model gives, and what our tasks give, steered or not."""

import json
import sys
from contextlib import nullcontext
from typing import Any

import lm_eval
import pytest
import torch
from conftest import D_MODEL, N_CTX, TEXTS, hf_steered_logits, save_tokenizer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from test_hooked_transformer import HookedTransformer, hooked_transformer
from transformers import AutoTokenizer

from contrans_tl import ConceptVector, Question, identify, transplant
from contrans_tl.evaluation import MultipleChoice, SteeredAt, Subject, continuation_logprobs, read_questions
from contrans_tl.harness import harness_model

LAYER, STRENGTH = 1, 2.0
TOLERANCE = 1e-4
"""Sums of a dozen log-probabilities in float32, of the size 10 each, that were computed in other batches: 1e-5 at most."""
QUESTIONS = [
    {"prompt": "the quick brown fox jumps over the", "choices": ["lazy", "quick brown river", "dog"], "answer": 0},
    {"prompt": "a letter made", "choices": ["me feel happy", "over the dog", "river"], "answer": 2},
    {"prompt": "brown letters feel", "choices": ["lazy over", "lazy dog"], "answer": 1},
    {"prompt": "a lazy fox", "choices": ["jumps", "jumps over", "jumps over a river"], "answer": 1},
    {"prompt": "quick", "choices": ["dog", "letter", "fox", "sleeps over a quick, quick river"], "answer": 3},
    {"prompt": "the dog sleeps and the letter", "choices": ["happy", "feel happy"], "answer": 0},
]
LONG = " ".join(TEXTS * 3)
"""More tokens than the models' context holds."""
STEERED = [False, True]


def pushed(model: Any) -> ConceptVector:
    """A vector that moves every answer: as long as the residual stream."""
    vector = torch.randn(1, D_MODEL, generator=torch.Generator().manual_seed(5))
    return ConceptVector(vector, (LAYER,), "a push", identify(model))


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Three local task files over two local data sets."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "texts.csv").write_text("\n".join(["text", *(f'"{text}"' for text in [*TEXTS, LONG])]))
    (folder / "choice.yaml").write_text(f"""
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    (folder / "last_word.yaml").write_text(f"""
task: local_last_word
dataset_path: csv
dataset_kwargs: {{data_files: {{test: {folder}/texts.csv}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}} and the"
doc_to_target: " lazy dog"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
""")
    (folder / "loss.yaml").write_text(f"""
task: local_loss
dataset_path: csv
dataset_kwargs: {{data_files: {{test: {folder}/texts.csv}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: byte_perplexity}}]
""")
    return TaskManager(include_path=str(folder), include_defaults=False)


def run(model: Any, tasks: TaskManager, *names: str, **options: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model=harness_model(model, **options), tasks=list(names), task_manager=tasks, bootstrap_iters=0, log_samples=True
    )


def samples(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return sorted(results["samples"][name], key=lambda sample: sample["doc_id"])


def option_logprobs(sample: dict[str, Any]) -> list[float]:
    return [float(response[0]) for response in sample["filtered_resps"]]


@pytest.mark.parametrize("steered", STEERED)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_their_multiple_choice_equals_ours_and_a_loop_over_hugging_face(
    architecture: str, steered: bool, bridges: Any, references: Any, tasks: TaskManager
) -> None:
    model, reference = bridges[architecture], references[architecture]
    concept = pushed(model)
    with transplant(model, concept, strength=STRENGTH) if steered else nullcontext():
        theirs = samples(run(model, tasks, "local_choice", batch_size=7), "local_choice")
    questions = tuple(Question(q["prompt"], tuple(f" {c}" for c in q["choices"]), q["answer"]) for q in QUESTIONS)
    subject = SteeredAt(model, LAYER).subject(concept, STRENGTH) if steered else Subject(model)
    read = read_questions(model, questions)
    ours = iter(
        continuation_logprobs(model, [(q.prompt, option) for q in read for option in q.options], forward=subject.forward)
    )
    push = STRENGTH * concept.at(LAYER) if steered else torch.zeros(D_MODEL)
    for sample, question in zip(theirs, read, strict=True):
        for logprob, option in zip(option_logprobs(sample), question.options, strict=True):
            ids = [*question.prompt, *option]
            logprobs = hf_steered_logits(reference, ids, LAYER, lambda resid: resid + push).log_softmax(-1)
            alone = sum(float(logprobs[i - 1, ids[i]]) for i in range(len(question.prompt), len(ids)))
            assert logprob == pytest.approx(alone, abs=TOLERANCE)
            assert logprob == pytest.approx(next(ours)[0], abs=TOLERANCE)
    marks = MultipleChoice("local", questions, questions).measure(subject, "test")
    assert marks.metrics["mc1"].tolist() == [sample["acc"] for sample in theirs]
    assert marks.metrics["mc1_normalised"].tolist() == [sample["acc_norm"] for sample in theirs]
    # A test in which all is right or all is wrong would tell little.
    assert 0 < sum(sample["acc"] + sample["acc_norm"] for sample in theirs) < 2 * len(QUESTIONS)


@pytest.fixture(scope="module", params=[(name, bos) for name in ("llama", "gpt2") for bos in (True, False)], ids=str)
def ours_and_theirs(request: Any, bridges: Any, references: Any, folders: Any) -> tuple[Any, Any]:
    """Our adapter and their own, on the same weights, with and without a bos token."""
    name, bos = request.param
    # The tokenizer of a bridge writes the bos token by itself, the one in the folder does not.
    tokenizer = bridges[name].tokenizer if bos else AutoTokenizer.from_pretrained(folders[name])
    hf = HFLM(pretrained=references[name], tokenizer=tokenizer, batch_size=3, max_length=N_CTX)
    ours = harness_model(bridges[name], batch_size=3, prepend_bos=None if bos else False)
    assert ours.tok_encode("the dog") == hf.tok_encode("the dog")
    return ours, hf


def test_log_likelihoods_equal_those_of_their_own_model_also_beyond_the_context(ours_and_theirs: Any) -> None:
    ours, theirs = ours_and_theirs
    asked = requests(
        "loglikelihood",
        *[(text, " the lazy dog") for text in [*TEXTS, LONG]],
        *[(text, " the lazy cat") for text in TEXTS],
        ("the dog ", "sleeps"),  # their rule: a space at the end of a context is the continuation's
        ("", "the dog"),  # no context: behind the bos token
        ("<|endoftext|>a letter", " made"),
    )
    for (total, greedy), (expected, likeliest) in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert total == pytest.approx(expected, abs=TOLERANCE) and greedy == likeliest
    first = [text[:12] for text in TEXTS]
    continued = ours.generate_until(requests("generate_until", *[(text, {"max_gen_toks": 3}) for text in first]))
    said = ours.loglikelihood(requests("loglikelihood", *zip(first, continued, strict=True)))
    assert any(greedy for _, greedy in said), "what is written greedily is the likeliest, where its text is read the same way"


def test_rolling_log_likelihoods_equal_theirs_in_several_windows(ours_and_theirs: Any) -> None:
    ours, theirs = ours_and_theirs
    asked = requests("loglikelihood_rolling", *[(text,) for text in [*TEXTS, LONG, LONG + LONG]])
    expected = theirs.loglikelihood_rolling(asked)
    assert len(ours.tok_encode(LONG)) > N_CTX
    if ours.bos:  # theirs then predicts the bos token as well, from a bos token before it; the windows lie elsewhere
        bos = ours.tokenizer.bos_token
        asked = requests("loglikelihood_rolling", *[(bos + text,) for text in [*TEXTS, LONG, LONG + LONG]])
    # Sums over up to 200 tokens: relative to their size.
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)


def test_generated_text_equals_theirs_up_to_the_first_stop_and_within_the_context(ours_and_theirs: Any) -> None:
    ours, theirs = ours_and_theirs
    plain_text = {"max_gen_toks": 12, "do_sample": False, "temperature": 1.0}
    free = ours.generate_until(requests("generate_until", *[(text, plain_text) for text in [*TEXTS, LONG]]))
    stop = free[0][2:4]  # something that it does write
    asked = requests(
        "generate_until",
        *[(text, plain_text | {"until": []}) for text in [*TEXTS, LONG]],
        *[(text, {"max_gen_toks": 12, "until": [stop, "dog"]}) for text in TEXTS],
        *[(text, {"max_new_tokens": 5, "until": stop}) for text in TEXTS],
    )
    written = ours.generate_until(asked)
    assert written == theirs.generate_until(asked)
    assert all(stop not in text for text in written[len(TEXTS) + 1 :]) and written[len(TEXTS) + 1] == free[0].split(stop)[0]


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generated_text_is_what_generate_writes_under_a_transplant(architecture: str, positions: Any, bridges: Any) -> None:
    model = bridges[architecture]
    asked = requests("generate_until", *[(text, {"max_gen_toks": 8}) for text in TEXTS])
    base = harness_model(model).generate_until(asked)
    with transplant(model, pushed(model), strength=STRENGTH, positions=positions):
        written = {size: harness_model(model, batch_size=size).generate_until(asked) for size in (1, 2, 64)}
        one_by_one = []
        for text in TEXTS:
            tokens = torch.tensor([harness_model(model).tok_encode(text)])
            assert tokens[0, 0] == model.tokenizer.bos_token_id
            out = model.generate(tokens, max_new_tokens=8, do_sample=False, return_type="tokens", verbose=False)
            out = out[0, tokens.shape[1] :].tolist()
            end = model.tokenizer.eos_token_id
            one_by_one.append(model.tokenizer.decode(out[: out.index(end)] if end in out else out))
    assert all(texts == one_by_one for texts in written.values())
    assert one_by_one != base


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """All that is reported of all tasks."""
    table = results["results"].items()
    return {f"{task} {name}": x for task, row in table for name, x in row.items() if isinstance(x, float)}


def test_no_number_depends_on_the_batch_size_and_strength_0_is_the_model_as_it_is(bridges: Any, tasks: TaskManager) -> None:
    model = bridges["gpt2"]
    names = ("local_choice", "local_last_word", "local_loss")
    base = run(model, tasks, *names)
    assert {key.split()[0] for key in numbers(base)} == set(names)
    assert numbers(run(model, tasks, *names, batch_size=1)) == pytest.approx(numbers(base), rel=TOLERANCE)
    with transplant(model, pushed(model), strength=0.0):
        assert numbers(run(model, tasks, *names)) == numbers(base)
    with transplant(model, pushed(model), strength=STRENGTH):
        moved = run(model, tasks, *names)
    assert moved["config"]["hooked_model"]["fingerprint"] == identify(model).fingerprint
    assert all(x != numbers(base)[key] for key, x in numbers(moved).items() if "perplexity" in key)
    assert numbers(run(model, tasks, *names)) == numbers(base), "and afterwards it is as it was"


if HookedTransformer is not None:  # TransformerLens 4 has none

    @pytest.mark.parametrize("steered", STEERED)
    @pytest.mark.parametrize("architecture", ["llama", "gpt2"])
    def test_a_hooked_transformer_gives_the_numbers_of_the_bridge(
        architecture: str, steered: bool, bridges: Any, references: Any, folders: Any, tasks: TaskManager
    ) -> None:
        bridge = bridges[architecture]
        hooked = hooked_transformer(architecture, references[architecture], save_tokenizer(folders[architecture]))
        results, texts = [], []
        for model in (bridge, hooked):
            with transplant(model, pushed(model), strength=STRENGTH) if steered else nullcontext():
                results.append(run(model, tasks, "local_choice", "local_last_word", "local_loss"))
                asked = requests("generate_until", *[(text, {"max_gen_toks": 8}) for text in TEXTS])
                texts.append(harness_model(model).generate_until(asked))
        for one, other in zip(*(samples(result, "local_choice") for result in results), strict=True):
            assert option_logprobs(one) == pytest.approx(option_logprobs(other), abs=TOLERANCE)
        assert numbers(results[0]) == pytest.approx(numbers(results[1]), rel=TOLERANCE)
        assert texts[0] == texts[1]


def test_sampled_text_follows_the_seed_and_the_temperature(bridges: Any) -> None:
    model = harness_model(bridges["llama"])
    ask = {"max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_k": 40}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model.generate_until(requests("generate_until", *[(text, ask) for text in TEXTS])))
    assert drawn[0] == drawn[1] != drawn[2]
    cold = model.generate_until(requests("generate_until", *[(text, ask | {"temperature": 1e-4}) for text in TEXTS]))
    greedy = model.generate_until(requests("generate_until", *[(text, {"max_gen_toks": 8}) for text in TEXTS]))
    assert cold == greedy


def test_a_chat_template_that_writes_the_bos_token_gets_no_second_one(bridges: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridges["llama"]
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}say{% endif %}"
    )
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    lm = harness_model(model)
    text = lm.apply_chat_template([{"role": "user", "content": "the dog"}])
    assert text == "<|endoftext|>the dog say"
    bos = model.tokenizer.bos_token_id
    assert lm.tok_encode(text) == lm.tok_encode("the dog say") == [bos, *lm.tok_encode("the dog say", add_special_tokens=False)]
    assert lm.chat_template(True) == template


def test_what_cannot_be_done_is_refused_with_the_rule(bridges: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = harness_model(bridges["llama"])
    with pytest.raises(ValueError, match="continuation of 1 to 48 tokens"):
        lm.loglikelihood(requests("loglikelihood", ("the", LONG)))
    with pytest.raises(ValueError, match="leave no room for a prompt"):
        lm.generate_until(requests("generate_until", ("the", {})))
    with pytest.raises(ValueError, match="greedy decoding or sampling"):
        lm.generate_until(requests("generate_until", ("the", {"max_gen_toks": 4, "num_beams": 3})))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"contrans-tl\[lm-eval\]"):
        harness_model(bridges["llama"])
