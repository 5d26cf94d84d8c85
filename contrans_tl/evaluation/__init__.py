"""Evaluation: did the concept arrive, and was it the concept that did it?

    report = evaluate(target, pairs, concept, maps, neutral=sentences, known={"the fit corpus": corpus})
    print(report.verdict)

| module | holds |
|---|---|
| `tasks` | what is asked, and how it is scored |
| `questions` | answers read from logits |
| `subjects` | a model as one arm runs it |
| `arms` | what the transplanted concept is measured beside |
| `selection` | layers and strength, on the select split, under a budget |
| `costs` | what it does to neutral text |
| `intervals`, `steerability` | the numbers |
| `measuring` | every arm on the test split |
| `protocol` | `evaluate`, step by step |
| `transfer` | its report, and the verdict |
"""

from contrans_tl.evaluation.arms import ARMS, NULLS, Rivals, carried, random_like
from contrans_tl.evaluation.costs import side_effects, strength_for_kl
from contrans_tl.evaluation.intervals import Estimate, Lead, clopper_pearson, difference, estimate, lead, transfer_rate
from contrans_tl.evaluation.protocol import evaluate, leaks_of
from contrans_tl.evaluation.questions import (
    Answers,
    ReadQuestion,
    answer_questions,
    continuation_logprobs,
    read_questions,
)
from contrans_tl.evaluation.selection import Choice, Search, choose, frontier
from contrans_tl.evaluation.steerability import Steerability, steerability
from contrans_tl.evaluation.subjects import Forward, ProxyTuned, Sampling, Steered, SteeredAt, Subject, plain
from contrans_tl.evaluation.tasks import (
    Continuations,
    Marks,
    MultipleChoice,
    RestrictedChoice,
    ScoringFailed,
    Task,
    WordList,
    classifier,
    task_of,
    write,
)
from contrans_tl.evaluation.transfer import Interrupted, TransferReport

__all__ = [
    "ARMS",
    "NULLS",
    "Answers",
    "Choice",
    "Continuations",
    "Estimate",
    "Forward",
    "Interrupted",
    "Lead",
    "Marks",
    "MultipleChoice",
    "ProxyTuned",
    "ReadQuestion",
    "RestrictedChoice",
    "Rivals",
    "Sampling",
    "ScoringFailed",
    "Search",
    "Steerability",
    "Steered",
    "SteeredAt",
    "Subject",
    "Task",
    "TransferReport",
    "WordList",
    "answer_questions",
    "carried",
    "choose",
    "classifier",
    "clopper_pearson",
    "continuation_logprobs",
    "difference",
    "estimate",
    "evaluate",
    "frontier",
    "lead",
    "leaks_of",
    "plain",
    "random_like",
    "read_questions",
    "side_effects",
    "steerability",
    "strength_for_kl",
    "task_of",
    "transfer_rate",
    "write",
]
