"""What a vector does in a target, measured on a concept's held-out questions; and the models and concepts of the studies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from contrans_tl import ConceptVector, ContrastPairs, load_model, refine
from contrans_tl.data import Metric, Question
from contrans_tl.demo import CONCEPTS, TARGETS, demo_data
from contrans_tl.evaluation import Answers, Forward, ReadQuestion, SteeredAt, answer_questions, plain, read_questions
from contrans_tl.models import HookedModel
from contrans_tl.passes import resumed_after

ASKED: dict[Metric, dict[str, int]] = {"token_accuracy": {"select": 5, "test": 10}, "mc1": {"select": 12, "test": 24}}
"""Questions of each split: for an emotion one and two of every other emotion; answers to facts vary more."""


def concept_pairs() -> list[ContrastPairs]:
    """Six emotions and honesty."""
    return [ContrastPairs.load(demo_data() / "concepts" / f"{concept}.json") for concept in CONCEPTS]


@dataclass(frozen=True, eq=False)
class Pair:
    """The models of one training seed, and the concepts as the source and as the targets have them."""

    seed: str
    source: HookedModel
    targets: dict[str, HookedModel]
    concepts: dict[str, ConceptVector]
    native: dict[tuple[str, str], ConceptVector]
    """(target, concept) -> the target's own vector: what is compared with, never what predicts."""
    exams: dict[tuple[str, str], "Exam"]


def load_pair(folder: Path, concepts: Sequence[ContrastPairs]) -> Pair:
    """What `data/train_pair.py` left in a folder."""
    source = load_model(folder / "source", device="cpu")
    targets = {name: load_model(folder / name, device="cpu") for name in TARGETS}
    each = [(name, pairs) for name in TARGETS for pairs in concepts]
    return Pair(
        seed=folder.name,
        source=source,
        targets=targets,
        concepts={pairs.name: refine(source, pairs) for pairs in concepts},
        native={(name, pairs.name): refine(targets[name], pairs) for name, pairs in each},
        exams={(name, pairs.name): Exam.of(targets[name], pairs) for name, pairs in each},
    )


@dataclass(frozen=True, eq=False)
class Exam:
    """Some questions of both splits, asked of a target together."""

    target: HookedModel
    metric: Metric
    split: tuple[str, ...]
    """Of every question."""
    questions: tuple[ReadQuestion, ...]
    base: Answers
    _at: dict[int, SteeredAt] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, target: HookedModel, pairs: ContrastPairs) -> "Exam":
        chosen = [(split, q) for split, n in ASKED[pairs.metric].items() for q in thinned(getattr(pairs, split), n)]
        questions = tuple(read_questions(target, [question for _, question in chosen]))
        base = answer_questions(target, questions, pairs.metric)
        return cls(target, pairs.metric, tuple(split for split, _ in chosen), questions, base)

    def effects(self, vectors: Float[Tensor, "vector d_target"], layer: int, strength: float) -> list[dict[str, float]]:
        """Of every vector, `hits_select`, `gain_select`, `hits_test`, `gain_test`: the share answered as the concept would
        have it, and by how many nats the margin of that answer over the best other option grew."""
        at = self._at.setdefault(layer, SteeredAt(self.target, layer))
        return [self._effect(forward) for forward in side_by_side(at, strength * vectors.float())]

    def _effect(self, forward: Forward) -> dict[str, float]:
        answers = answer_questions(self.target, self.questions, self.metric, forward=forward)
        split, values = np.array(self.split), {}
        for name in ASKED[self.metric]:
            here = split == name
            values[f"hits_{name}"] = float(answers.hits[self.metric][here].mean())
            values[f"gain_{name}"] = float((answers.margin - self.base.margin)[here].mean())
        return values


def side_by_side(at: SteeredAt, vectors: Float[Tensor, "vector d_target"]) -> list[Forward]:
    """Forward passes with each of the vectors added, all computed when the first is asked for: one pass through the blocks
    above for all of them, where a pass costs more than its arithmetic."""
    done: dict[tuple, Float[Tensor, "vector prompt pos vocab"]] = {}

    def steered(tokens: Tensor, mask: Tensor) -> Float[Tensor, "vector prompt pos vocab"]:
        key = (tokens.shape, tokens.numpy().tobytes())
        if key not in done:
            resid = at.residual(tokens, mask)
            every = rearrange(resid + vectors[:, None, None].to(resid), "vector prompt pos d -> (vector prompt) pos d")
            with resumed_after(at.model, at.layer, every):
                logits = plain(at.model)(tokens.repeat(len(vectors), 1), mask.repeat(len(vectors), 1))
            done[key] = rearrange(logits, "(vector prompt) pos vocab -> vector prompt pos vocab", vector=len(vectors))
        return done[key]

    def one(i: int) -> Forward:
        return lambda tokens, mask: steered(tokens, mask)[i]

    return [one(i) for i in range(len(vectors))]


def thinned(questions: Sequence[Question], n: int) -> Iterator[Question]:
    """n of them, evenly spread."""
    return (questions[i * len(questions) // n] for i in range(min(n, len(questions))))
