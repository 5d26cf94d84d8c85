"""Tasks: what is asked of every arm, and how it is scored. Same prompts for all arms, so that comparisons are paired.

    RestrictedChoice.of(pairs)       the paper's emotions: token and logit accuracy
    MultipleChoice.of(pairs)         TruthfulQA: mc1, mc2, mc1 by length
    Continuations("toxicity", prompts, scorer)      ToxiGen's form: a scorer reads what is written

One of your own has prompts and a way to measure:

    class Shouting(Task):
        name, metric = "shouting", "capitals"

        def prompts(self, split):
            return {"select": SELECT, "test": TEST}.get(split, ())

        def measure(self, subject, split):
            texts = write(subject, self.prompts(split), max_new_tokens=20)
            return Marks({"capitals": np.array([float(text.isupper()) for text in texts])})
"""

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import Float

from contrans_tl.data import ContrastPairs, Metric, Question, read_text
from contrans_tl.evaluation.questions import ReadQuestion, answer_questions, read_questions
from contrans_tl.evaluation.subjects import Sampling, Subject
from contrans_tl.tokens import encode

Split = Literal["select", "test", "own"]
"""Questions to choose by, to report on, and those of the concept itself."""
Scorer = Callable[[list[str]], Sequence[float]]
"""Continuations -> a number for each."""


class ScoringFailed(ValueError):
    """A scorer raised, or returned something other than one finite number for each continuation. What a task's `measure`
    raises of this kind is told in the report beside the arm, and costs that arm only."""


@dataclass(frozen=True, eq=False)
class Marks:
    """What one arm did on one split, prompt by prompt."""

    metrics: Mapping[str, Float[np.ndarray, " item"]]
    propensity: Float[np.ndarray, " item"] | None = None
    """How far each prompt leans the concept's way, in nats or the scorer's units, where that is finer than the metric."""
    texts: tuple[str, ...] = ()
    """What was written, where something was."""

    def __post_init__(self) -> None:
        """ScoringFailed for a metric that is no finite number."""
        for name, values in self.metrics.items():
            if not np.isfinite(values).all():
                raise ScoringFailed(f"{name}: {(~np.isfinite(values)).sum()} of {len(values)} are NaN or infinite.")


class Task(ABC):
    """Prompts of two splits and a way to measure a subject on them."""

    name: str
    metric: str
    """The one that layers and strength are chosen by and the verdict is about."""
    wanted: Literal["higher", "lower"] = "higher"
    """Which way the concept should move it."""

    @abstractmethod
    def prompts(self, split: Split) -> Sequence[str]:
        """Of one split; none if the task has no such split."""

    @abstractmethod
    def measure(self, subject: Subject, split: Split) -> Marks:
        """Put the prompts of a split to a subject."""

    def groups(self, split: Split) -> Sequence[str]:
        """Prompts with one group belong together and are resampled together; empty for one that stands alone."""
        return [""] * len(self.prompts(split))

    def demonstrations(self) -> Sequence[str]:
        """What stands before prompts and is no part of them (`prompts` are without it)."""
        return ()

    def screening(self) -> "Task":
        """The task with every other prompt of the select split, on which many layers are looked at first; by default itself."""
        return self

    def describe(self) -> dict[str, Any]:
        """What the report says of it."""
        sizes = {split: len(self.prompts(split)) for split in get_args(Split)}
        return {"task": type(self).__name__, "name": self.name, "metric": self.metric, "wanted": self.wanted, "prompts": sizes}


@dataclass(frozen=True, eq=False)
class _Asked(Task):
    name: str
    select: tuple[Question, ...]
    test: tuple[Question, ...]
    own: tuple[Question, ...] = ()
    """Prompts of the concept itself, which are answered its way without any help."""
    batch_size: int = 64
    _read: WeakKeyDictionary[Any, dict[Any, list[ReadQuestion]]] = field(
        init=False, repr=False, default_factory=WeakKeyDictionary
    )
    """By model, for as long as it lives; an address says nothing, the next model may get it."""

    @classmethod
    def of(cls, pairs: ContrastPairs) -> Any:
        """The held-out questions that come with contrast pairs."""
        return cls(pairs.name, pairs.select, pairs.test, pairs.own)

    def prompts(self, split: Split) -> list[str]:
        return [question.prompt for question in getattr(self, split)]

    def groups(self, split: Split) -> list[str]:
        return [question.group for question in getattr(self, split)]

    def demonstrations(self) -> list[str]:
        questions = (*self.select, *self.test, *self.own)
        return list(dict.fromkeys(question.prefix for question in questions if question.prefix))

    def screening(self) -> Task:
        return replace(self, select=self.select[::2])

    def measure(self, subject: Subject, split: Split) -> Marks:
        read, key = self._read.setdefault(subject.model, {}), (subject.opening, split)
        if key not in read:
            read[key] = read_questions(subject.model, getattr(self, split), opening=subject.opening)
        answers = answer_questions(
            subject.model,
            read[key],
            self.metric,  # type: ignore[arg-type]  # a subclass says which
            forward=subject.forward,
            batch_size=self.batch_size,
        )
        return Marks(answers.hits, answers.margin)


class RestrictedChoice(_Asked):
    """One of a few words has to follow: token and logit accuracy (`questions`)."""

    metric: Metric = "token_accuracy"


class MultipleChoice(_Asked):
    """One of several answers, of any length, has to be the likeliest: `mc1`, `mc1_normalised`, `mc2` (`questions`)."""

    metric: Metric = "mc1"


def measured(task: Task, subject: Subject, split: Split) -> Marks:
    """What a task measures of a subject. ScoringFailed unless that is one number for each prompt."""
    marks, n = task.measure(subject, split), len(task.prompts(split))
    for name, values in marks.metrics.items():
        if len(values) != n:
            raise ScoringFailed(f"{name}: {len(values)} numbers for {n} prompts.")
    return marks


def task_of(pairs: ContrastPairs) -> Task:
    """The task that contrast pairs with questions bring along, by their metric."""
    return (MultipleChoice if pairs.metric == "mc1" else RestrictedChoice).of(pairs)


@dataclass(frozen=True, eq=False)
class Continuations(Task):
    """What a model writes behind a prompt, scored by any function from texts to numbers; the mean is `metric` "score" and, with
    a threshold, the share at or above it "rate"."""

    name: str
    select: tuple[str, ...]
    test: tuple[str, ...]
    scorer: Scorer
    max_new_tokens: int = 20
    sampling: Sampling | None = None
    """None: greedy."""
    threshold: float | None = None
    wanted: Literal["higher", "lower"] = "lower"
    batch_size: int = 64

    @property
    def metric(self) -> str:  # type: ignore[override]
        return "score" if self.threshold is None else "rate"

    def prompts(self, split: Split) -> tuple[str, ...]:
        return () if split == "own" else getattr(self, split)

    def screening(self) -> Task:
        return replace(self, select=self.select[::2])

    def measure(self, subject: Subject, split: Split) -> Marks:
        texts = write(subject, self.prompts(split), self.max_new_tokens, sampling=self.sampling, batch_size=self.batch_size)
        scores = score(self.scorer, texts)
        metrics = {"score": scores}
        if self.threshold is not None:
            metrics["rate"] = (scores >= self.threshold).astype(float)
        leaning = scores if self.wanted == "higher" else -scores
        return Marks(metrics, leaning, tuple(texts))

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> "Continuations":
        """Prompts and a word list from JSON: {"name", "select": [texts], "test": [texts], "words": [texts]}.

        Raises:
            ValueError: no such file, or none of this form.
        """
        try:
            content = json.loads(read_text(path))
            lists = [content[key] for key in ("select", "test", "words")]
            if not all(isinstance(item, str) for texts in lists for item in texts) or not all(lists):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            form = '{"name": text, "select": [texts], "test": [texts], "words": [texts]}'
            raise ValueError(f"{path}: expected {form}; got something else ({error!r}).") from error
        select, test, words = lists
        name = str(content.get("name", Path(path).stem))
        scorer = options.pop("scorer", WordList(tuple(words)))
        return cls(name, tuple(select), tuple(test), scorer, **({"threshold": 1.0} | options))


def write(
    subject: Subject,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 64,
) -> list[str]:
    """The text that a subject writes behind each prompt. ValueError for more than the model's context holds."""
    ids = [encoding.ids for encoding in encode(subject.model, [subject.opening + prompt for prompt in prompts])]
    model, longest = subject.model, max(map(len, ids), default=0)
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise ValueError(
            f"{max_new_tokens} new tokens behind a prompt of {longest} do not fit the context of {model.cfg.model_name} "
            f"({model.cfg.n_ctx}). Shorten the prompts, or write fewer."
        )
    written = subject.generate(ids, max_new_tokens, sampling=sampling, batch_size=batch_size)
    return [model.tokenizer.decode(row, skip_special_tokens=True) for row in written]


def score(scorer: Scorer, texts: list[str]) -> Float[np.ndarray, " text"]:
    """One finite number for each text. ScoringFailed where the scorer does not give that."""
    try:
        scores = np.asarray(list(scorer(list(texts))), dtype=float)
    except Exception as error:  # a scorer is anybody's code; what it raised is told in the report, beside its arm
        raise ScoringFailed(f"the scorer raised {type(error).__name__}: {error}") from error
    if scores.shape != (len(texts),):
        raise ScoringFailed(f"the scorer returned {scores.size} numbers for {len(texts)} continuations.")
    if not np.isfinite(scores).all():
        raise ScoringFailed(f"the scorer returned {(~np.isfinite(scores)).sum()} numbers that are NaN or infinite.")
    return scores


@dataclass(frozen=True)
class WordList:
    """A scorer: how many of these words a text holds, in any case, as whole words."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.words or not all(word.strip() for word in self.words):
            raise ValueError(f"expected words to count, none of them empty; got {self.words}.")

    def __call__(self, texts: list[str]) -> list[float]:
        # Not \b, which a word that ends in a sign never ends at. Longest first, so that no word hides one that it begins.
        words = sorted(map(re.escape, self.words), key=len, reverse=True)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", re.IGNORECASE)
        return [float(len(pattern.findall(text))) for text in texts]


def classifier(model: str, label: str, *, device: str | int | None = None, batch_size: int = 32) -> Scorer:
    """A scorer: the probability that a transformers text classifier gives a label, as in ("s-nlp/roberta_toxicity_classifier",
    "toxic"). Loaded when first used. ValueError for a label that it does not know."""
    loaded: list[Any] = []

    def scorer(texts: list[str]) -> list[float]:
        from transformers import pipeline

        if not loaded:
            loaded.append(pipeline("text-classification", model=model, device=device, top_k=None))
        rows = loaded[0](list(texts), batch_size=batch_size, truncation=True)
        scores = [{entry["label"]: entry["score"] for entry in row} for row in rows]
        if scores and label not in scores[0]:
            raise ValueError(f"{model} has the labels {sorted(scores[0])}; there is no {label!r}.")
        return [row[label] for row in scores]

    return scorer
