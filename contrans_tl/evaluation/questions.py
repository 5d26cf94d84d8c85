"""Questions: what a model answers, read from its logits.

    read = read_questions(model, questions)
    answer_questions(model, read, "mc1", forward=subject.forward).hits

    token_accuracy   greedy decoding over the whole vocabulary writes the answer, as far as it differs from the other options
    logit_accuracy   among the options, as far as each differs from the others, the answer is the likeliest
    mc1              the answer is likelier than every option that is wrong, by the sum of log-probabilities of its tokens
    mc1_normalised   the same by log-probability a character
    mc2              the share of the probability of all options that falls on the right ones

The first two are the paper's emotion experiment, where an option is its first token; here it is the shortest run of tokens
that no other option begins with, so that " dismay" and " disgust" can be told apart in any tokenizer. The last three are
TruthfulQA's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float

from contrans_tl.data import Metric, Question
from contrans_tl.evaluation.subjects import Forward, plain
from contrans_tl.models import HookedModel
from contrans_tl.passes import head_only_at
from contrans_tl.progress import track
from contrans_tl.tokens import by_length, encode, pad
from contrans_tl.weights import device_of


@dataclass(frozen=True)
class ReadQuestion:
    """A question as a model reads it."""

    prompt: tuple[int, ...]
    """Tokens that the prompt has in common with all its continuations."""
    options: tuple[tuple[int, ...], ...]
    """The tokens that follow, for each option."""
    answer: int
    correct: tuple[int, ...]
    """All options that are right."""
    lengths: tuple[int, ...]
    """Characters of each option, outer spaces left out."""


def read_questions(model: HookedModel, questions: Sequence[Question], *, opening: str = "") -> list[ReadQuestion]:
    """Questions in the model's tokens. An option is tokenised behind its prompt, never alone: whether the space before it
    belongs to its first token is the tokenizer's affair.

    Args:
        opening: put before every prompt.

    Raises:
        ValueError: an option that adds no token to its prompt, a prompt that has no token in common with all its options, or
            what `encode` raises.
    """
    texts = [[opening + q.text, *(opening + q.text + option for option in q.options)] for q in questions]
    encodings = iter(encode(model, [text for group in texts for text in group]))
    read = []
    for question in questions:
        prompt, *full = [next(encodings).ids for _ in range(1 + len(question.options))]
        shared = next((k for k, ids in enumerate(zip(prompt, *full, strict=False)) if len(set(ids)) > 1), None)
        shared = min(map(len, [prompt, *full])) if shared is None else shared
        options = tuple(ids[shared:] for ids in full)
        if not all(options):
            raise ValueError(f"an option adds no token to its prompt: {question.prompt!r}, {question.options}.")
        if not shared:
            raise ValueError(
                f"nothing stands before the options {question.options} of {question.prompt!r} in the tokens of "
                f"{model.cfg.model_name}, so that nothing predicts their first tokens. Lengthen the prompt."
            )
        lengths = tuple(max(1, len(option.strip())) for option in question.options)
        read.append(ReadQuestion(prompt[:shared], options, question.answer, question.correct or (question.answer,), lengths))
    return read


@dataclass(frozen=True, eq=False)
class Answers:
    """How a model answered."""

    hits: dict[str, Float[np.ndarray, " question"]]
    """Metric -> between 0 and 1; 1 where the question is answered as the concept would have it."""
    margin: Float[np.ndarray, " question"]
    """Log-probability of the answer less that of the best wrong option, in nats: how near a miss was."""


def answer_questions(
    model: HookedModel,
    questions: Sequence[ReadQuestion],
    metric: Metric,
    *,
    forward: Forward | None = None,
    batch_size: int = 64,
) -> Answers:
    """Ask the questions, of the model as it is or by a subject's `forward`. The metrics are the module's.

    Raises:
        ValueError: for `token_accuracy`, an option that another one begins with.
    """
    if metric == "token_accuracy":
        questions = [_distinguishing(model, question) for question in questions]
    scores = _score_options(model, questions, forward or plain(model), batch_size)
    answers, margins, hits = [q.answer for q in questions], [], []
    for question, (sums, _) in zip(questions, scores, strict=True):
        wrong = [i for i in range(len(sums)) if i not in question.correct]
        margins.append(sums[question.answer] - max((sums[i] for i in wrong), default=-np.inf))
    margin = np.array(margins)
    if metric == "token_accuracy":
        hits = [greedy[answer] for (_, greedy), answer in zip(scores, answers, strict=True)]
        return Answers({"token_accuracy": np.array(hits, float), "logit_accuracy": (margin > 0).astype(float)}, margin)
    normalised, mass = [], []
    for question, (sums, _) in zip(questions, scores, strict=True):
        a_character = np.array(sums) / question.lengths
        wrong = [i for i in range(len(sums)) if i not in question.correct]
        normalised.append(a_character[question.answer] > a_character[wrong].max(initial=-np.inf))
        chances = np.exp(np.array(sums) - max(sums))
        mass.append(chances[list(question.correct)].sum() / chances.sum())
    return Answers(
        {"mc1": (margin > 0).astype(float), "mc1_normalised": np.array(normalised, float), "mc2": np.array(mass)}, margin
    )


def _distinguishing(model: HookedModel, question: ReadQuestion) -> ReadQuestion:
    """The question with each option cut to the shortest run of tokens that no other option begins with."""
    cut = []
    for i, option in enumerate(question.options):
        others = [other for k, other in enumerate(question.options) if k != i]
        own = (n for n in range(1, len(option) + 1) if not any(other[:n] == option[:n] for other in others))
        if (n := next(own, None)) is None:
            raise ValueError(
                f"option {i} of a question is where another one begins, in the tokens of {model.cfg.model_name}, so that no "
                f'next token tells them apart: {model.tokenizer.decode(option)!r}. Rename it, or set "metric": "mc1".'
            )
        cut.append(option[:n])
    return replace(question, options=tuple(cut))


def _score_options(
    model: HookedModel, questions: Sequence[ReadQuestion], forward: Forward, batch_size: int
) -> list[tuple[list[float], list[bool]]]:
    """Of every option of every question, the sum of its tokens' log-probabilities, and whether each of them is the likeliest of
    the vocabulary."""
    options = [(question.prompt, option) for question in questions for option in question.options]
    scores = iter(continuation_logprobs(model, options, forward=forward, batch_size=batch_size))
    by_question = [[next(scores) for _ in question.options] for question in questions]
    return [([total for total, _ in group], [best for _, best in group]) for group in by_question]


def continuation_logprobs(
    model: HookedModel,
    continuations: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    forward: Forward | None = None,
    batch_size: int = 64,
) -> list[tuple[float, bool]]:
    """Of every (prompt, continuation), in tokens: the sum of the continuation's log-probabilities, and whether each of its
    tokens is the likeliest of the vocabulary."""
    forward = forward or plain(model)
    # The last token of a continuation is predicted, never read, and what stands behind a token does not change it: those that
    # differ only there, or that others begin with, share one sequence.
    read = [prompt + continuation[:-1] for prompt, continuation in continuations]
    sequences: list[tuple[int, ...]] = []
    members: list[list[int]] = []
    for number in sorted(range(len(read)), key=lambda number: read[number], reverse=True):
        if not (sequences and sequences[-1][: len(read[number])] == read[number]):
            sequences.append(read[number])
            members.append([])
        members[-1].append(number)
    scores = [(0.0, False)] * len(continuations)
    batches = by_length([len(ids) for ids in sequences], batch_size)
    for batch in track(batches, "log-probabilities", len(batches)):
        tokens, mask = pad([sequences[i] for i in batch], device_of(model))
        asked = [(row, number) for row, i in enumerate(batch) for number in members[i]]
        lengths = [len(continuations[number][1]) for _, number in asked]
        rows = [row for (row, _), length in zip(asked, lengths, strict=True) for _ in range(length)]
        places = [
            len(continuations[number][0]) - 1 + k for (_, number), n in zip(asked, lengths, strict=True) for k in range(n)
        ]
        where = torch.zeros(tokens.shape, dtype=torch.bool)
        where[rows, places] = True
        with head_only_at(model, where):
            logprobs = forward(tokens, mask)[rows, places].log_softmax(-1).cpu()
        ids = torch.tensor([token for _, number in asked for token in continuations[number][1]])
        likeliest = iter((logprobs.argmax(-1) == ids).tolist())
        each = iter(logprobs.gather(-1, ids[:, None])[:, 0].tolist())
        for (_, number), length in zip(asked, lengths, strict=True):
            scores[number] = sum(islice(each, length)), all(list(islice(likeliest, length)))
    return scores
