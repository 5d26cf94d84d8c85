"""Separability: how well, at every layer, projections on a concept tell its pairs apart, and how well two halves of them agree.

    d' = (mean p+ - mean p-) / sd within a side            p = <h, v> at the last token
    AUROC = P(p+ > p-)

With pairs alone, every fold is scored on the vector that the other folds make, v = mean h+ - mean h-: no pair scores the
vector it made. Both numbers, and the cosine of the vectors of two halves, predict how well a vector steers (Braun et al.,
2505.22637). All need no more than the Gram matrix of the rows: <h_i, v> = sum_j K_ij c_j, with c_j = +-1/n.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl.activations import collect, hash_texts
from contrans_tl.data import ContrastPairs
from contrans_tl.diagnostics.folds import Sides
from contrans_tl.diagnostics.scores import Diagnosis, Scores
from contrans_tl.diagnostics.scores import layers as layer_labels
from contrans_tl.models import HookedModel, check_ready, identify
from contrans_tl.refinement import ConceptVector, mean_difference
from contrans_tl.transplantation import check_home

MEASURES = ("d'", "AUROC", "split-half cosine", "norm / stream")
RESAMPLES = 500
Gram = Float[Tensor, "layer prompt prompt"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Separability(Diagnosis):
    """Axes: measure, layer. `norm / stream` is |v| over the mean norm of the rows at the last token."""

    low: Scores
    """Lower end of the 95% bootstrap interval over pairs; of the split-half cosine, of 95% of the splits; NaN for the norm."""
    high: Scores
    null: Scores
    """What 95% of permutations of the labels stay below; NaN for the norm."""

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The layers with the largest d'."""
        return self.scores.at(measure="d'").top(k)

    def __str__(self) -> str:
        rows = [f"  {'':<5}" + "".join(f"{measure:>28}" for measure in MEASURES)]
        for k, label in enumerate(self.scores.axes["layer"]):
            cells = [self._cell(m, k) for m in range(len(MEASURES))]
            rows.append(f"  {label:<5}" + "".join(f"{cell:>28}" for cell in cells))
        head = f"Separability: {self.about}; in brackets 95%, in parentheses 95% of permutations"
        return "\n".join([head, *rows, *(f"  {note}" for note in self.notes)])

    def _cell(self, measure: int, layer: int) -> str:
        value, low, high, null = (float(x.values[measure, layer]) for x in (self.scores, self.low, self.high, self.null))
        return f"{value:.3f}" if null != null else f"{value:.2f} [{low:.2f}, {high:.2f}] ({null:.2f})"


def separability(
    model: HookedModel,
    pairs: ContrastPairs,
    *,
    concept: ConceptVector | None = None,
    layers: Sequence[int] | None = None,
    folds: int = 5,
    splits: int = 100,
    permutations: int = 100,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Separability:
    """d', AUROC, split-half cosine and relative norm of a concept at every layer, on the last token of its pairs.

    Args:
        concept: a vector to score the pairs on that was not refined from them, such as a carried one. None: the pairs' own,
            cross-fitted. The split-half cosine is always the pairs'.
        folds: of the cross-fitting; pairs, and prompts of the same text, stay together.
        splits: random halves of the prompts, and as many with permuted labels.

    Raises:
        ValueError: a concept of another model, or one refined from these very prompts in this model; too few pairs; a layer
            that the model or the concept does not have.
    """
    check_ready(model)
    here, sides = identify(model), Sides.of(pairs)
    fold = sides.folds(folds, seed=seed, of=pairs.name)
    prompts, notes = [*pairs.positive, *pairs.negative], []
    if concept is not None:
        check_home(concept, here)
        if layers is None:
            layers = concept.layers
        concept = concept.only(*layers)
        notes = _notes(concept, prompts)
    rows = collect(model, prompts, layers=layers, prepend_bos=prepend_bos, batch_size=batch_size)
    values = rows.values.double()
    vectors = mean_difference(*values.tensor_split([len(pairs.positive)])) if concept is None else concept.vectors.double()
    given = None if concept is None else vectors
    found, halves = [], []
    for k in range(len(rows.layers)):  # one by one: Gram matrices of many prompts at all layers would be large
        one = values[:, [k]]
        found.append(separated(one, sides, fold, None if given is None else given[[k]], permutations, seed))
        halves.append(agreement(one, sides, splits, seed))
    share = vectors.norm(dim=-1) / values.norm(dim=-1).mean(0)
    blank = torch.full_like(share, torch.nan)
    scored = [torch.cat(each, dim=1) for each in zip(*found, strict=True)]
    agreed = [torch.cat(each) for each in zip(*halves, strict=True)]
    axes = {"measure": MEASURES, "layer": layer_labels(rows.layers)}
    made = [
        Scores(torch.stack([*separate, half, last]).float(), axes, "ratio, share or cosine")
        for separate, half, last in zip(scored, agreed, (share, blank, blank, blank), strict=True)
    ]
    what = "cross-fitted" if concept is None else f"on the vector {concept.name!r} as it is"
    return Separability(
        about=f"{pairs.name} in {here.name}, {len(pairs.positive)} + {len(pairs.negative)} prompts, {what}",
        scores=made[0],
        low=made[1],
        high=made[2],
        null=made[3],
        notes=tuple(notes),
    )


def _notes(concept: ConceptVector, prompts: Sequence[str]) -> list[str]:
    """What the concept shares with the prompts; ValueError if it was refined from them in this model."""
    here = hash_texts(prompts)
    if concept.provenance.get("prompts_hash") == here:
        raise ValueError(
            f"{concept.name!r} was refined from these very pairs and would separate them in any case: leave out concept= for "
            "cross-fitted numbers, or pass other pairs."
        )
    if concept.provenance.get("refined", {}).get("prompts_hash") == here:
        return ["carried from a vector that these very pairs made in the source: their noise may be shared."]
    return []


def separated(
    rows: Float[Tensor, "prompt layer d_model"],
    sides: Sides,
    fold: Int[Tensor, " prompt"],
    vectors: Float[Tensor, "layer d_model"] | None,
    permutations: int,
    seed: int,
) -> tuple[Float[Tensor, "measure layer"], ...]:
    """d' and AUROC of every layer: value, both ends of the bootstrap interval, and what 95% of permutations stay below.

    Without vectors, every fold is projected on what the others make."""
    gram = _gram(rows)

    def projected(side: Float[Tensor, " prompt"]) -> Float[Tensor, "layer prompt"]:
        if vectors is not None:
            return einsum(rows, vectors / vectors.norm(dim=-1, keepdim=True), "prompt layer d, layer d -> layer prompt")
        return _cross_fitted(gram, side, fold)

    along = projected(sides.side)
    once = torch.ones(1, len(sides.side)).double()
    value = _separation(along, sides.side > 0, fold, once)[:, 0]
    spread = _separation(along, sides.side > 0, fold, _resampled(sides, seed))
    null = torch.stack(
        [_separation(projected(side), side > 0, fold, once)[:, 0] for side in sides.permuted(permutations, seed=seed + 1)]
    )
    return value, spread.quantile(0.025, dim=1), spread.quantile(0.975, dim=1), null.quantile(0.95, dim=0)


def _gram(rows: Float[Tensor, "prompt layer d_model"]) -> Gram:
    centred = rows - rows.mean(0)
    return einsum(centred, centred, "i layer d, j layer d -> layer i j")


def _weights(side: Float[Tensor, " *draw prompt"]) -> Float[Tensor, " *draw prompt"]:
    """c with v = sum_j c_j h_j the mean difference; prompts of side 0 are left out."""
    positive, negative = (side > 0).double(), (side < 0).double()
    return positive / positive.sum(-1, keepdim=True) - negative / negative.sum(-1, keepdim=True)


def _cross_fitted(gram: Gram, side: Float[Tensor, " prompt"], fold: Int[Tensor, " prompt"]) -> Float[Tensor, "layer prompt"]:
    """Projection of every prompt on the unit vector that the other folds make."""
    c = torch.stack([_weights(torch.where(fold == k, 0.0, side)) for k in range(int(fold.max()) + 1)])
    along = einsum(gram, c, "layer i j, fold j -> layer fold i")
    length = einsum(along, c, "layer fold i, fold i -> layer fold").clamp_min(0).sqrt()
    unit = along / length.clamp_min(1e-300)[..., None]
    return unit.gather(1, fold.expand(len(gram), 1, -1))[:, 0]


def _resampled(sides: Sides, seed: int) -> Float[Tensor, "resample prompt"]:
    """How often each prompt is drawn, with all that belongs to it."""
    clusters = int(sides.cluster.max()) + 1
    drawn = torch.randint(clusters, (RESAMPLES, clusters), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, clusters).double()
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))[:, sides.cluster]


def _separation(
    along: Float[Tensor, "layer prompt"],
    positive: Bool[Tensor, " prompt"],
    fold: Int[Tensor, " prompt"],
    weights: Float[Tensor, "draw prompt"],
) -> Float[Tensor, "measure draw layer"]:
    """d' and AUROC; prompts are compared within their fold, as folds have vectors of their own."""
    draws, layers = len(weights), len(along)
    size, compared, freedom = (torch.zeros(draws, 1).double() for _ in range(3))
    gap, wins, squares = (torch.zeros(draws, layers).double() for _ in range(3))
    for k in range(int(fold.max()) + 1):
        p, n = (along[:, side & (fold == k)] for side in (positive, ~positive))
        u, w = (weights[:, side & (fold == k)] for side in (positive, ~positive))
        filled = ((u.sum(1) > 0) & (w.sum(1) > 0)).double()[:, None]  # a resample may leave out a side of a small fold
        u, w = u * filled, w * filled
        a, b = u.sum(1, keepdim=True), w.sum(1, keepdim=True)
        ahead = (p[:, :, None] > n[:, None]).double() + 0.5 * (p[:, :, None] == n[:, None]).double()
        wins += einsum(u, ahead, w, "draw i, layer i j, draw j -> draw layer")
        means = [x @ p.T / m.clamp_min(1) for x, p, m in ((u, p, a), (w, n, b))]
        gap += (a + b) * (means[0] - means[1])
        squares += u @ p.T**2 - a * means[0] ** 2 + w @ n.T**2 - b * means[1] ** 2
        size, compared, freedom = size + a + b, compared + a * b, freedom + a + b - 2 * filled
    deviation = (squares / freedom.clamp_min(1)).clamp_min(1e-300).sqrt()
    return torch.stack([gap / size / deviation, wins / compared])


def agreement(
    rows: Float[Tensor, "prompt layer d_model"], sides: Sides, splits: int, seed: int
) -> tuple[Float[Tensor, " layer"], ...]:
    """Mean cosine of the vectors of two random halves of the prompts, the range of 95% of the splits, and what 95% of as many
    splits with permuted labels stay below."""
    gram, generator = _gram(rows), torch.Generator().manual_seed(seed)
    order = torch.rand(splits, int(sides.cluster.max()) + 1, generator=generator).argsort(1).argsort(1)
    half = (order % 2)[:, sides.cluster]

    def cosines(side: Float[Tensor, "split prompt"]) -> Float[Tensor, "split layer"]:
        a, b = (_weights(torch.where(half == part, side, 0.0)) for part in (0, 1))
        shared, *own = (einsum(gram, x, y, "layer i j, split i, split j -> split layer") for x, y in ((a, b), (a, a), (b, b)))
        return shared / (own[0] * own[1]).clamp_min(1e-300).sqrt()

    found = cosines(sides.side.expand(splits, -1))
    null = cosines(sides.permuted(splits, seed=seed + 1))
    return found.mean(0), found.quantile(0.025, dim=0), found.quantile(0.975, dim=0), null.quantile(0.95, dim=0)
