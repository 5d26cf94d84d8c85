"""Evaluation: did the concept arrive, and was it the concept that did it?

    report = evaluate(target, pairs, concept, maps, neutral=sentences)
    print(report.verdict)

Layers and strength are chosen on the select split under a budget of neutral-text loss; everything reported is measured on the
test split. Beside the transplanted vector run its controls, at the same layer and strength:

    base            nothing added
    transplanted    the concept through the concept-weighted maps
    uniform         the same through uniformly weighted maps
    native          the target's own vector, refined from the same pairs: the ceiling
    shuffled_map    through maps fitted on shuffled pairs of rows            norm of the transplanted
    random          random vectors of the target's space                     norm of the transplanted
    random_source   random source vectors through the concept-weighted maps  norm of the transplanted
    other_concept   another concept, carried like the transplanted one
    sign_flipped    the transplanted vector, subtracted

Intervals are 95% bootstrap intervals over questions (resampled by group where questions share one) and over vectors where an
arm has several. For a rate of exactly 0 or 1 such an interval has no width: it says what these questions gave, no more.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.data import ContrastPairs, Metric, Question
from contrans_tl.models import HookedModel
from contrans_tl.refinement import ConceptVector, refine
from contrans_tl.reformulation import LayerMaps, reformulate
from contrans_tl.tokens import by_length, encode, pad
from contrans_tl.transplantation import transplant

STRENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0)
BUDGET = 0.5
"""Nats per token that the transplant may cost on neutral text."""
RESAMPLES = 2000
NULLS = ("shuffled_map", "random", "random_source", "other_concept")
"""Arms that have to stay at the base if it is the concept that acts."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% bootstrap interval."""

    value: float
    low: float
    high: float
    n: int
    """Questions or texts."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Choice:
    """Where and how strongly to transplant, and the sweep it was chosen from."""

    layer_source: int
    layer_target: int
    strength: float
    sweep: tuple[dict[str, int | float], ...]
    """Every setting tried: layers, strength, and either `screened`, the effect on half of the select split, or `effect` on all
    of it and `loss_increase`."""


@dataclass(frozen=True)
class TransferReport:
    """One concept carried into one target, beside its controls."""

    concept: str
    target: str
    metric: Metric
    layer_source: int
    layer_target: int
    strength: float
    coverage: float
    """Of the concept by the fit corpus, at the source layer."""
    r2: float
    """Held-out R2 of the uniform map between the two layers."""
    arms: dict[str, dict[str, Estimate]]
    """Arm -> metric -> estimate, on the test split."""
    geometry: dict[str, dict[str, float]]
    """Arm -> cosine to the target's native vector, and norm; means over vectors."""
    sweep: tuple[dict[str, int | float], ...]

    @property
    def transferred(self) -> bool:
        """Whether the transplanted arm lies above the base and every null, intervals apart."""
        return not self._rivals()

    @property
    def verdict(self) -> str:
        """One sentence on what the controls allow to say."""
        effect, base = (self.arms[arm][self.metric] for arm in ("transplanted", "base"))
        said = f"{self.concept} into {self.target}: {self.metric} {base} -> {effect}"
        if self.transferred:
            return f"{said}; above the base and every null control, intervals apart."
        return f"{said}; no transfer shown: not apart from {', '.join(self._rivals())}."

    def _rivals(self) -> list[str]:
        low = self.arms["transplanted"][self.metric].low
        return [arm for arm in ("base", *NULLS) if arm in self.arms and self.arms[arm][self.metric].high >= low]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to report.json."""
        return asdict(self) | {"verdict": self.verdict}


# --- questions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadQuestion:
    """A question as a model reads it."""

    prompt: tuple[int, ...]
    """Tokens that the prompt has in common with all its continuations."""
    options: tuple[tuple[int, ...], ...]
    """The tokens that follow, for each option."""
    answer: int


def read_questions(model: HookedModel, questions: Sequence[Question]) -> list[ReadQuestion]:
    """Questions in the model's tokens. An option is tokenised behind its prompt, never alone: whether the space before it
    belongs to its first token is the tokenizer's affair."""
    texts = [[q.prompt, *(q.prompt + option for option in q.options)] for q in questions]
    encodings = iter(encode(model, [text for group in texts for text in group]))
    read = []
    for question in questions:
        prompt, *full = [next(encodings).ids for _ in range(1 + len(question.options))]
        shared = next((k for k, ids in enumerate(zip(prompt, *full, strict=False)) if len(set(ids)) > 1), None)
        shared = min(map(len, [prompt, *full])) if shared is None else shared
        options = tuple(ids[shared:] for ids in full)
        if not all(options):
            raise ValueError(f"an option adds no token to its prompt: {question.prompt!r}, {question.options}.")
        read.append(ReadQuestion(prompt[:shared], options, question.answer))
    return read


def answer_questions(
    model: HookedModel, questions: Sequence[ReadQuestion], metric: Metric, *, batch_size: int = 64
) -> dict[str, Float[np.ndarray, " question"]]:
    """Whether each question is answered as the concept would have it, 1 or 0.

    `token_accuracy`: the most likely next token of the whole vocabulary is the first token of the answer; beside it
    `logit_accuracy`, the same among the options' first tokens only (both as in the paper's emotion experiment).
    `mc1`: the answer is the most likely option, by the sum of its tokens' log-probabilities.

    Raises:
        ValueError: for `token_accuracy`, two options that begin with the same token.
    """
    if metric == "mc1":
        scores = iter(_option_logprobs(model, questions, batch_size))
        return {"mc1": np.array([float(int(np.argmax([next(scores) for _ in q.options])) == q.answer) for q in questions])}
    firsts = [[option[0] for option in q.options] for q in questions]
    if clashes := [i for i, first in enumerate(firsts) if len(set(first)) < len(first)]:
        raise ValueError(
            f"two options of question {clashes[0]} begin with the same token in {model.cfg.model_name}, so the next token "
            'cannot tell them apart; set "metric": "mc1".'
        )
    logits = _next_token_logits(model, [q.prompt for q in questions], batch_size)
    answers = torch.tensor([first[q.answer] for first, q in zip(firsts, questions, strict=True)])
    among = [int(row[first].argmax()) == q.answer for row, first, q in zip(logits, firsts, questions, strict=True)]
    return {
        "token_accuracy": (logits.argmax(-1) == answers).double().numpy(),
        "logit_accuracy": np.array(among, dtype=float),
    }


def text_losses(
    model: HookedModel, texts: Sequence[str], *, batch_size: int = 64
) -> tuple[Float[np.ndarray, " text"], Float[np.ndarray, " text"]]:
    """Of every text, the sum of its tokens' negative log-likelihoods (nats) and their number, the first token left out."""
    sequences = [encoding.ids for encoding in encode(model, texts, truncate=True)]
    losses, counts = np.zeros(len(texts)), np.array([len(ids) - 1.0 for ids in sequences])
    for batch in by_length([len(ids) for ids in sequences], batch_size):
        tokens, mask = pad([sequences[i] for i in batch], _device(model))
        logprobs = _logits(model, tokens, mask)[:, :-1].log_softmax(-1)
        losses[batch] = -(logprobs.gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1).double().cpu().numpy()
    return losses, counts


def _next_token_logits(model: HookedModel, prompts: Sequence[Sequence[int]], batch_size: int) -> Float[Tensor, "prompt vocab"]:
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in by_length([len(ids) for ids in prompts], batch_size):
        tokens, mask = pad([prompts[i] for i in batch], _device(model))
        last = _logits(model, tokens, mask)[torch.arange(len(batch)), mask.sum(1) - 1].cpu()
        for i, row in zip(batch, last, strict=True):
            rows[i] = row
    return torch.stack(rows)


def _option_logprobs(model: HookedModel, questions: Sequence[ReadQuestion], batch_size: int) -> list[float]:
    # The last token of an option is predicted, never read: options that differ only there share one sequence.
    inputs = [q.prompt + option[:-1] for q in questions for option in q.options]
    slots = {ids: slot for slot, ids in enumerate(dict.fromkeys(inputs))}
    wanted: dict[tuple[int, ...], list[int]] = {}
    for number, ids in enumerate(inputs):
        wanted.setdefault(ids, []).append(number)
    options = [(len(q.prompt), option) for q in questions for option in q.options]
    sequences, scores = list(slots), [0.0] * len(inputs)
    for batch in by_length([len(ids) for ids in sequences], batch_size):
        tokens, mask = pad([sequences[i] for i in batch], _device(model))
        logprobs = _logits(model, tokens, mask).log_softmax(-1).cpu()
        for row, i in enumerate(batch):
            for number in wanted[sequences[i]]:
                start, option = options[number]
                places = torch.arange(start - 1, start - 1 + len(option))
                scores[number] = float(logprobs[row, places, torch.tensor(option)].sum())
    return scores


def _logits(
    model: HookedModel, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt pos vocab"]:
    with torch.no_grad():
        return model(tokens, return_type="logits", attention_mask=mask).float()


def _device(model: HookedModel) -> torch.device:
    return next(iter(model.parameters())).device


def carried(maps: LayerMaps, concept: ConceptVector) -> dict[tuple[int, int], ConceptVector]:
    """The concept through these maps as they are weighted, at every (source layer, target layer)."""
    grid = maps.carry(concept.only(*maps.source.layers).vectors)
    return {
        (s, t): ConceptVector(grid[i, j][None], (t,), concept.name, maps.target.model)
        for i, s in enumerate(maps.source.layers)
        for j, t in enumerate(maps.target.layers)
    }


# --- intervals ------------------------------------------------------------------------------------------------------


def estimate(
    values: Float[np.ndarray, "vector item"],
    *,
    counts: Float[np.ndarray, " item"] | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean over vectors of sum(values) / sum(counts) over items, with a percentile bootstrap over groups of items and over
    vectors. Without groups each item is its own."""
    n = values.shape[1]
    counts = np.ones(n) if counts is None else counts
    labels = [group or f"item {i}" for i, group in enumerate(groups or [""] * n)]
    names, member = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(values), len(names)))
    for row, value in zip(sums, values, strict=True):
        np.add.at(row, member, value)
    sizes = np.bincount(member, weights=counts, minlength=len(names))
    rng = np.random.default_rng(seed)
    picked = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    vectors = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES) / len(values)
    means = ((vectors @ sums) * picked).sum(1) / (picked @ sizes)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(sums.mean(0).sum() / sizes.sum()), float(low), float(high), n)


# --- arms -----------------------------------------------------------------------------------------------------------


def choose(
    target: HookedModel,
    candidates: Mapping[tuple[int, int], ConceptVector],
    pairs: ContrastPairs,
    neutral: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    budget: float = BUDGET,
    keep: int = 3,
) -> Choice:
    """Layers and strength with the largest effect on the select split within the neutral-loss budget.

    All layer pairs are tried at the middle strength on every other question, the best `keep` of them at all strengths on all
    questions. Equal effects: the one that costs less on neutral text. Nothing within the budget: the one that costs least.

    Args:
        candidates: {(source layer, target layer): the carried concept}.
        neutral: texts that no map was fitted on.
    """
    questions = read_questions(target, pairs.select)
    losses, counts = text_losses(target, neutral)

    def effect(layers: tuple[int, int], strength: float, step: int = 1) -> float:
        with transplant(target, candidates[layers], strength=strength):
            return float(answer_questions(target, questions[::step], pairs.metric)[pairs.metric].mean())

    def cost(layers: tuple[int, int], strength: float) -> float:
        with transplant(target, candidates[layers], strength=strength):
            return float((text_losses(target, neutral)[0] - losses).sum() / counts.sum())

    middle = sorted(strengths)[len(strengths) // 2]
    screened = {layers: effect(layers, middle, step=2) for layers in candidates}
    best = sorted(candidates, key=lambda layers: -screened[layers])[:keep]
    settings = [(layers, strength) for layers in best for strength in strengths]
    effects = {setting: effect(*setting) for setting in settings}
    costs = {setting: cost(*setting) for setting in settings}
    affordable = {setting for setting, loss in costs.items() if loss <= budget}
    if affordable:
        chosen = min(affordable, key=lambda setting: (-effects[setting], costs[setting]))
    else:
        chosen = min(costs, key=costs.__getitem__)
    (layer_source, layer_target), strength = chosen
    sweep = [
        {"layer_source": s, "layer_target": t, "strength": middle, "screened": value} for (s, t), value in screened.items()
    ] + [
        {"layer_source": s, "layer_target": t, "strength": x, "effect": effects[(s, t), x], "loss_increase": costs[(s, t), x]}
        for (s, t), x in settings
    ]
    return Choice(layer_source, layer_target, strength, tuple(sweep))


def random_like(concept: ConceptVector, n: int, *, seed: int) -> list[ConceptVector]:
    """Random directions with the concept's norm at every layer."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(n, *concept.vectors.shape, generator=generator)
    return [replace(concept, vectors=draw, name=f"random {i}").matched_to(concept) for i, draw in enumerate(draws)]


def evaluate(
    target: HookedModel,
    pairs: ContrastPairs,
    concept: ConceptVector,
    maps: LayerMaps,
    *,
    neutral: Sequence[str],
    other: ConceptVector | None = None,
    other_maps: Mapping[str, LayerMaps] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    budget: float = BUDGET,
    n_random: int = 10,
    seed: int = 0,
) -> TransferReport:
    """Carry a concept into the target and measure it against every control.

    Args:
        pairs: with select and test questions; their prompts occur in neither the refine pairs nor the fit corpus.
        concept: refined in the source, at the maps' source layers.
        neutral: texts that no map was fitted on; the first half serves the choice of strength, the second the report.
        other: another concept of the source, for the `other_concept` arm.
        other_maps: further maps, such as the paper's or those of another corpus; each is an arm of its name. A `paper` map's
            vector is injected as it comes, all others with the norm of the transplanted one.
        n_random: vectors in the `random` arm; a third as many in `random_source`.

    Raises:
        ValueError: no select or test questions, fewer than two neutral texts, or a concept of another model than the maps'.
    """
    if not pairs.select or not pairs.test:
        raise ValueError(f"{pairs.name}: expected select and test questions to evaluate on; see ContrastPairs.")
    if len(neutral) < 2:
        raise ValueError("expected at least two neutral texts: half to choose the strength on, half to report on.")
    neutral_select, neutral_test = neutral[: len(neutral) // 2], neutral[len(neutral) // 2 :]
    concept = concept.only(*maps.source.layers)
    weighted = maps.reweighted(concept)
    choice = choose(target, carried(weighted, concept), pairs, neutral_select, strengths=strengths, budget=budget)
    s, t = choice.layer_source, choice.layer_target
    here = maps.only([s], [t])
    concept = concept.only(s)
    native = refine(target, pairs, layers=[t])
    moved = reformulate(concept, here, layers={s: t})

    def through(maps: LayerMaps, concept: ConceptVector = concept) -> ConceptVector:
        return carried(maps.only([s], [t]), concept)[s, t]

    arms: dict[str, list[ConceptVector]] = {
        "base": [],
        "transplanted": [moved],
        "uniform": [through(here)],
        "native": [native],
        "shuffled_map": [through(here.shuffled(seed=seed).reweighted(concept)).matched_to(moved)],
        "random": random_like(moved, n_random, seed=seed),
        "random_source": [
            through(weighted, v).matched_to(moved) for v in random_like(concept, max(2, n_random // 3), seed=seed)
        ],
        "sign_flipped": [-moved],
    }
    if other is not None:
        arms["other_concept"] = [through(here.reweighted(other.only(s)), other.only(s))]
    for name, more in (other_maps or {}).items():
        if more.method == "paper":
            arms[name] = [through(more)]
        else:
            arms[name] = [through(more.only([s], [t]).reweighted(concept)).matched_to(moved)]

    questions = read_questions(target, pairs.test)
    groups = [question.group for question in pairs.test]
    base_losses, counts = text_losses(target, neutral_test)

    def measure(vectors: Sequence[ConceptVector]) -> dict[str, Estimate]:
        hits: dict[str, list[np.ndarray]] = {}
        increases = []
        runs: Sequence[ConceptVector | None] = vectors or [None]
        for vector in runs:
            with nullcontext() if vector is None else transplant(target, vector, strength=choice.strength):
                for name, values in answer_questions(target, questions, pairs.metric).items():
                    hits.setdefault(name, []).append(values)
                increases.append(text_losses(target, neutral_test)[0] - base_losses)
        measured = {name: estimate(np.stack(values), groups=groups, seed=seed) for name, values in hits.items()}
        return measured | {"loss_increase": estimate(np.stack(increases), counts=counts, seed=seed)}

    return TransferReport(
        concept=pairs.name,
        target=maps.target.model.name,
        metric=pairs.metric,
        layer_source=s,
        layer_target=t,
        strength=choice.strength,
        coverage=float(here.coverage(concept)[0]),
        r2=float(here.r2),
        arms={name: measure(vectors) for name, vectors in arms.items()},
        geometry={
            name: {
                "cosine_to_native": float(torch.stack([vector.cosine(native) for vector in vectors]).mean()),
                "norm": float(torch.stack([vector.vectors.norm() for vector in vectors]).mean()),
            }
            for name, vectors in arms.items()
            if vectors
        },
        sweep=choice.sweep,
    )
