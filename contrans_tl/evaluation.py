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
    random_weighting   the concept through maps weighted for random directions: not a null, but what weighting does by itself

Intervals are 95% bootstrap intervals over questions (resampled by group where questions share one) and over vectors where an
arm has several. For a rate of exactly 0 or 1 such an interval has no width: it says what these questions gave, no more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.data import ContrastPairs, Metric, Question
from contrans_tl.models import HookedModel, check_ready, hook_name, identify, resumed_after, run_blocks
from contrans_tl.refinement import ConceptVector, refine
from contrans_tl.reformulation import UNWEIGHTED, LayerMaps, reformulate
from contrans_tl.tokens import by_length, encode, pad

STRENGTHS = (1.0, 2.0, 3.0, 5.0)
BUDGET = 0.5
"""Nats per token that the transplant may cost on neutral text."""
RESAMPLES = 2000
NULLS = ("shuffled_map", "random", "random_source", "other_concept", "sign_flipped", "neutral_corpus")
"""Arms that have to stay at the base if it is the concept that acts. (The last is there if such maps are given.)"""


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
    presence: float
    foreseen: str
    """What `LayerMaps.verdict` said at that layer, before anything was transplanted."""
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


# --- forward passes -------------------------------------------------------------------------------------------------

Forward = Callable[[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]], Float[Tensor, "prompt pos vocab"]]
"""Tokens and mask -> logits in float32."""


def plain(model: HookedModel) -> Forward:
    """The model as it is."""

    def forward(tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos vocab"]:
        with torch.no_grad():
            return model(tokens, return_type="logits", attention_mask=mask).float()

    return forward


@dataclass(frozen=True, eq=False)
class SteeredAt:
    """A model to be steered at one layer with one vector after another: what `transplant` does at all positions, but the
    blocks up to that layer run once for each batch of tokens, not once for each vector."""

    model: HookedModel
    layer: int
    _below: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    def by(self, concept: ConceptVector, strength: float) -> Forward:
        """Forward passes with strength * vector added after the block."""
        check_ready(self.model)
        vector, above = strength * concept.at(self.layer), plain(self.model)

        def forward(tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos vocab"]:
            resid = self._residual(tokens, mask)
            with resumed_after(self.model, self.layer, resid + vector.to(resid)):
                return above(tokens, mask)

        return forward

    def _residual(
        self, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]
    ) -> Float[Tensor, "prompt pos d_model"]:
        key = str(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes() + mask.cpu().numpy().tobytes()
        if key not in self._below:

            def keep(resid: Tensor, hook: Any) -> None:
                self._below[key] = resid.detach().clone()

            run_blocks(self.model, tokens, mask, [(hook_name(self.layer), keep)], self.layer)
        return self._below[key]


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


@dataclass(frozen=True, eq=False)
class Answers:
    """How a model answered."""

    hits: dict[str, Float[np.ndarray, " question"]]
    """Metric -> 1 where the question is answered as the concept would have it, else 0."""
    margin: Float[np.ndarray, " question"]
    """Log-probability of the answer less that of the best other option, in nats: how near a miss was."""


def answer_questions(
    model: HookedModel,
    questions: Sequence[ReadQuestion],
    metric: Metric,
    *,
    forward: Forward | None = None,
    batch_size: int = 64,
) -> Answers:
    """Ask the questions, of the model as it is or by a `forward` of `SteeredAt`.

    `token_accuracy`: the most likely next token of the whole vocabulary is the first token of the answer; beside it
    `logit_accuracy`, the same among the options' first tokens only (both as in the paper's emotion experiment).
    `mc1`: the answer is the most likely option, by the sum of its tokens' log-probabilities.

    Raises:
        ValueError: for `token_accuracy`, two options that begin with the same token.
    """
    hits = {}
    if metric == "mc1":
        scores = iter(_option_logprobs(model, questions, forward, batch_size))
        options = [[next(scores) for _ in question.options] for question in questions]
    else:
        firsts = [[option[0] for option in q.options] for q in questions]
        if clashes := [i for i, first in enumerate(firsts) if len(set(first)) < len(first)]:
            raise ValueError(
                f"two options of question {clashes[0]} begin with the same token in {model.cfg.model_name}, so the next token "
                'cannot tell them apart; set "metric": "mc1".'
            )
        logits = _next_token_logits(model, [q.prompt for q in questions], forward, batch_size)
        answers = torch.tensor([first[q.answer] for first, q in zip(firsts, questions, strict=True)])
        hits["token_accuracy"] = (logits.argmax(-1) == answers).double().numpy()
        options = [row[first].tolist() for row, first in zip(logits, firsts, strict=True)]
    margin = np.array(
        [
            scores[q.answer] - max(score for i, score in enumerate(scores) if i != q.answer)
            for scores, q in zip(options, questions, strict=True)
        ]
    )
    hits["mc1" if metric == "mc1" else "logit_accuracy"] = (margin > 0).astype(float)
    return Answers(hits, margin)


def text_losses(
    model: HookedModel, texts: Sequence[str], *, forward: Forward | None = None, batch_size: int = 64
) -> tuple[Float[np.ndarray, " text"], Float[np.ndarray, " text"]]:
    """Of every text, the sum of its tokens' negative log-likelihoods (nats) and their number, the first token left out."""
    sequences = [encoding.ids for encoding in encode(model, texts, truncate=True)]
    losses, counts = np.zeros(len(texts)), np.array([len(ids) - 1.0 for ids in sequences])
    for batch in by_length([len(ids) for ids in sequences], batch_size):
        tokens, mask = pad([sequences[i] for i in batch], _device(model))
        logprobs = (forward or plain(model))(tokens, mask)[:, :-1].log_softmax(-1)
        losses[batch] = -(logprobs.gather(-1, tokens[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1).double().cpu().numpy()
    return losses, counts


def _next_token_logits(
    model: HookedModel, prompts: Sequence[Sequence[int]], forward: Forward | None, batch_size: int
) -> Float[Tensor, "prompt vocab"]:
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in by_length([len(ids) for ids in prompts], batch_size):
        tokens, mask = pad([prompts[i] for i in batch], _device(model))
        last = (forward or plain(model))(tokens, mask)[torch.arange(len(batch)), mask.sum(1) - 1].cpu()
        for i, row in zip(batch, last, strict=True):
            rows[i] = row
    return torch.stack(rows)


def _option_logprobs(
    model: HookedModel, questions: Sequence[ReadQuestion], forward: Forward | None, batch_size: int
) -> list[float]:
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
        logprobs = (forward or plain(model))(tokens, mask).log_softmax(-1).cpu()
        for row, i in enumerate(batch):
            for number in wanted[sequences[i]]:
                start, option = options[number]
                places = torch.arange(start - 1, start - 1 + len(option))
                scores[number] = float(logprobs[row, places, torch.tensor(option)].sum())
    return scores


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
    keep: int = 2,
) -> Choice:
    """Layers and strength with the largest effect on the select split within the neutral-loss budget.

    All layer pairs are tried at the middle strength on every other question, the best `keep` of them (between equals those of
    the larger margin) at all strengths on all questions. Of equal effects the one is taken that costs less on neutral text; if
    nothing is within the budget, the one that costs least.

    Args:
        candidates: {(source layer, target layer): the carried concept}.
        neutral: texts that no map was fitted on.
    """
    questions = read_questions(target, pairs.select)
    losses, counts = text_losses(target, neutral)

    at = {layer: SteeredAt(target, layer) for _, layer in candidates}

    def steered(layers: tuple[int, int], strength: float) -> Forward:
        return at[layers[1]].by(candidates[layers], strength)

    def effect(layers: tuple[int, int], strength: float, step: int = 1) -> tuple[float, float]:
        answers = answer_questions(target, questions[::step], pairs.metric, forward=steered(layers, strength))
        return float(answers.hits[pairs.metric].mean()), float(answers.margin.mean())

    def cost(layers: tuple[int, int], strength: float) -> float:
        return float((text_losses(target, neutral, forward=steered(layers, strength))[0] - losses).sum() / counts.sum())

    middle = sorted(strengths)[(len(strengths) - 1) // 2]
    screened = {layers: effect(layers, middle, step=2) for layers in candidates}
    best = sorted(candidates, key=screened.__getitem__, reverse=True)[:keep]
    settings = [(layers, strength) for layers in best for strength in strengths]
    effects = {setting: effect(*setting) for setting in settings}
    costs = {setting: cost(*setting) for setting in settings}
    affordable = {setting for setting, loss in costs.items() if loss <= budget}
    if affordable:
        chosen = min(affordable, key=lambda setting: (-effects[setting][0], costs[setting]))
    else:
        chosen = min(costs, key=costs.__getitem__)
    (layer_source, layer_target), strength = chosen
    sweep = [
        {"layer_source": s, "layer_target": t, "strength": middle, "screened": hits} for (s, t), (hits, _) in screened.items()
    ] + [
        {
            "layer_source": s,
            "layer_target": t,
            "strength": x,
            "effect": effects[(s, t), x][0],
            "loss_increase": costs[(s, t), x],
        }
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
        other_maps: further maps, such as the paper's or those of another corpus; each is an arm of its name. What a `paper`
            or `identity` map carries is injected as it comes, all others' vectors with the norm of the transplanted one.
        n_random: vectors in the `random` arm; a quarter as many in `random_source`.

    Raises:
        ValueError: no select or test questions, fewer than two neutral texts, or a concept of another model than the maps'.
    """
    if not pairs.select or not pairs.test:
        raise ValueError(f"{pairs.name}: expected select and test questions to evaluate on; see ContrastPairs.")
    if not maps.target.model.same_space(here := identify(target)):
        raise ValueError(f"these maps lead into {maps.target.model}, the model is {here}: fit maps into this one.")
    if len(neutral) < 2:
        raise ValueError("expected at least two neutral texts: half to choose the strength on, half to report on.")
    neutral_select, neutral_test = neutral[: len(neutral) // 2], neutral[len(neutral) // 2 :]
    concept = concept.only(*maps.source.layers)
    weighted = maps.reweighted(concept)
    choice = choose(target, carried(weighted, concept), pairs, neutral_select, strengths=strengths, budget=budget)
    s, t = choice.layer_source, choice.layer_target
    chosen = maps.only([s], [t])
    concept = concept.only(s)
    native = refine(target, pairs, layers=[t])
    moved = reformulate(concept, chosen, layers={s: t})

    def through(maps: LayerMaps, concept: ConceptVector = concept) -> ConceptVector:
        return carried(maps.only([s], [t]), concept)[s, t]

    arms: dict[str, list[ConceptVector]] = {
        "base": [],
        "transplanted": [moved],
        "uniform": [through(chosen)],
        "native": [native],
        "shuffled_map": [through(chosen.shuffled(seed=seed).reweighted(concept)).matched_to(moved)],
        "random": random_like(moved, n_random, seed=seed),
        "random_source": [
            through(weighted, v).matched_to(moved) for v in random_like(concept, max(2, n_random // 4), seed=seed)
        ],
        "sign_flipped": [-moved],
        "random_weighting": [through(chosen.reweighted(v)) for v in random_like(concept, 2, seed=seed + 1)],
    }
    if other is not None:
        arms["other_concept"] = [through(chosen.reweighted(other.only(s)), other.only(s))]
    for name, more in (other_maps or {}).items():
        if more.method in UNWEIGHTED:
            arms[name] = [through(more)]
        else:
            arms[name] = [through(more.only([s], [t]).reweighted(concept)).matched_to(moved)]

    questions = read_questions(target, pairs.test)
    groups = [question.group for question in pairs.test]
    base_losses, counts = text_losses(target, neutral_test)

    at = SteeredAt(target, t)

    def measure(vectors: Sequence[ConceptVector]) -> dict[str, Estimate]:
        runs = [at.by(vector, choice.strength) for vector in vectors] or [plain(target)]
        answers = [answer_questions(target, questions, pairs.metric, forward=forward).hits for forward in runs]
        increases = np.stack([text_losses(target, neutral_test, forward=forward)[0] - base_losses for forward in runs])
        measured = {name: estimate(np.stack([hits[name] for hits in answers]), groups=groups, seed=seed) for name in answers[0]}
        return measured | {"loss_increase": estimate(increases, counts=counts, seed=seed)}

    foreseen = chosen.verdict(concept, s)
    return TransferReport(
        concept=pairs.name,
        target=maps.target.model.name,
        metric=pairs.metric,
        layer_source=s,
        layer_target=t,
        strength=choice.strength,
        coverage=foreseen.coverage,
        presence=foreseen.presence,
        foreseen=str(foreseen),
        r2=float(chosen.r2),
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
