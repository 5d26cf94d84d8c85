"""Moments: the map of one pair of layers from any number of rows, in bounded memory.

    x, y = store(source, texts, "activations", rows="words"), store(target, texts, "activations", rows="words")
    fit_streamed(x, y, (9, 18))                                 # AffineMap, on every row
    Moments(d_source, d_target).update(x1, y1).update(x2, y2).solve(1e-3)       # batches of your own

Centred ridge needs the rows only through their weighted means and second moments,

    W = S_yx (S_xx + lambda I)^-1 ,    b = mean y - W mean x ,    S_yx = sum_i w_i (y_i - mean y) (x_i - mean x)^T

so these are what is kept, in float64. Two sets of rows become one by moving both to their common mean m,
S + w (mean - m)(mean - m)^T, and adding: batches, shards of the corpus and processes all add up so. As nothing large is
subtracted from anything large, a mean a million times the spread costs no digits. The map is that of `LayerMaps` on the same
rows and ridge.

Held-out error needs no rows either: the moments of a fifth of the texts tell the residual of any map on them. The ridge is
chosen by it, and then all rows are fitted. (`LayerMaps` leaves out each sentence in turn, for which it needs the rows.)
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl.activations import check_shared, sink_rows
from contrans_tl.affine import AffineMap, FitReport
from contrans_tl.processes import share, summed
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector
from contrans_tl.shards import StoredActivations, paired_shards
from contrans_tl.solvers import CONCEPT_SHARE, COVERAGE_RIDGE, FOLDS, RIDGES, TINY


class Moments:
    """Weighted means and second moments of paired rows, in float64 on one device."""

    rows: int
    """How many rows there are, those of weight zero included."""
    sentences: int
    sinks: int
    """Rows of massive norm that were left out."""
    weight: float
    """Sum of the weights."""
    x_mean: Float[Tensor, " d_source"]
    y_mean: Float[Tensor, " d_target"]
    xx: Float[Tensor, "d_source d_source"]
    """S_xx."""
    yx: Float[Tensor, "d_target d_source"]
    """S_yx."""
    yy: Float[Tensor, " d_target"]
    """The diagonal of S_yy."""

    def __init__(self, d_source: int, d_target: int, *, device: torch.device | str | None = None) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.rows, self.sentences, self.sinks, self.weight = 0, 0, 0, 0.0
        self.x_mean, self.y_mean = zeros(d_source), zeros(d_target)
        self.xx, self.yx, self.yy = zeros(d_source, d_source), zeros(d_target, d_source), zeros(d_target)

    def update(
        self,
        x: Float[Tensor, "row d_source"],
        y: Float[Tensor, "row d_target"],
        weights: Float[Tensor, " row"] | None = None,
        *,
        sentence: Int[Tensor, " row"] | None = None,
    ) -> "Moments":
        """Take in paired rows, from any device.

        Args:
            weights: one by default; of any scale.
            sentence: which sentence each row belongs to, by default each to its own. A sentence's rows come in one batch.
        """
        self.rows += len(x)
        self.sentences += len(x) if sentence is None else len(sentence.unique())
        x, y = x.to(self.xx), y.to(self.xx)
        w = torch.ones(len(x)).to(self.xx) if weights is None else weights.to(self.xx)
        if not (added := float(w.sum())):
            return self
        part = added / (self.weight + added)
        self._move(torch.lerp(self.x_mean, (w @ x) / added, part), torch.lerp(self.y_mean, (w @ y) / added, part))
        self.weight += added
        x, y = (x - self.x_mean).mul_(w.sqrt()[:, None]), (y - self.y_mean).mul_(w.sqrt()[:, None])
        self.xx.addmm_(x.T, x)
        self.yx.addmm_(y.T, x)
        self.yy += y.square().sum(0)
        return self

    def __add__(self, other: "Moments") -> "Moments":
        """Of the rows of both, on the device of the first."""
        both, other = deepcopy(self), deepcopy(other)
        part = other.weight / max(self.weight + other.weight, TINY)
        common = [torch.lerp(a, b.to(a), part) for a, b in ((self.x_mean, other.x_mean), (self.y_mean, other.y_mean))]
        both._move(*common)
        other._move(*(mean.to(other.xx) for mean in common))
        both.rows += other.rows
        both.sentences += other.sentences
        both.sinks += other.sinks
        both.weight += other.weight
        both.xx += other.xx.to(both.xx)
        both.yx += other.yx.to(both.yx)
        both.yy += other.yy.to(both.yy)
        return both

    def all_reduce(self) -> "Moments":
        """Of the rows of all processes, in each of them. Alone, nothing changes."""
        rows, sentences, sinks = summed(torch.tensor([self.rows, self.sentences, self.sinks])).tolist()
        weight = float(summed(torch.tensor(self.weight, dtype=torch.float64)))
        self._move(*(summed(mean * (self.weight / max(weight, TINY))) for mean in (self.x_mean, self.y_mean)))
        self.rows, self.sentences, self.sinks, self.weight = rows, sentences, sinks, weight
        self.xx, self.yx, self.yy = summed(self.xx), summed(self.yx), summed(self.yy)
        return self

    def _move(self, x_mean: Float[Tensor, " d_source"], y_mean: Float[Tensor, " d_target"]) -> None:
        """Make the second moments those about other points than the means."""
        dx, dy = self.x_mean - x_mean, self.y_mean - y_mean
        self.xx.addr_(dx, dx, alpha=self.weight)
        self.yx.addr_(dy, dx, alpha=self.weight)
        self.yy += self.weight * dy.square()
        self.x_mean, self.y_mean = x_mean, y_mean

    def directions(self) -> tuple[Float[Tensor, " rank"], Float[Tensor, "d_source rank"]]:
        """Eigenvalues and eigenvectors of S_xx, without those below the precision of float64."""
        eigenvalues, vectors = torch.linalg.eigh(self.xx)
        kept = eigenvalues > eigenvalues.max() * max(self.rows, len(self.xx)) * torch.finfo(torch.float64).eps
        return eigenvalues[kept], vectors[:, kept]

    @property
    def scale(self) -> float:
        """The mean eigenvalue, the unit in which ridge strengths are given."""
        return float(self.xx.trace()) / max(1, min(self.rows - 1, len(self.xx)))

    def solve(self, ridge: float) -> tuple[Float[Tensor, "d_target d_source"], Float[Tensor, " d_target"], int]:
        """W, b, and the rank of the source's rows, for a multiple of the mean eigenvalue as ridge; at 0, the least-norm map."""
        eigenvalues, vectors = self.directions()
        weight = ((self.yx @ vectors) / (eigenvalues + ridge * self.scale)) @ vectors.T
        return weight, self.y_mean - weight @ self.x_mean, len(eigenvalues)


def fit_streamed(
    source: StoredActivations,
    target: StoredActivations,
    layers: tuple[int, int],
    *,
    ridge: float | None = None,
    concept: ConceptVector | None = None,
    device: torch.device | str | None = None,
) -> AffineMap:
    """The map of one pair of layers, (source layer, target layer), fitted on every row that both stores have but sinks.

    Under torchrun (`processes.joined`) each process reads its share of the shards, and all get the same map.

    Args:
        ridge: strength as a multiple of the mean eigenvalue; None chooses it by the error on a fifth of the texts.
        concept: count rows by what they say about it, as `LayerMaps.reweighted`; the ridge stays that of uniform weights. The
            shards are read twice.
        device: where the moments are: 8 bytes for each of (d_source + d_target) d_source numbers, a few times over. None is
            the CPU.

    Raises:
        ValueError: stores that do not pair, a layer that is not stored, a damaged shard, NaN or infinity, too few sentences, a
            negative ridge, a concept of another model or one that no row says anything about.
    """
    if ridge is not None and not 0 <= ridge < torch.inf:
        raise ValueError(f"expected a ridge of at least 0, as a multiple of the mean eigenvalue; got {ridge}.")
    if concept is not None and not concept.model.same_space(source.model):
        raise ValueError(f"the concept {concept.name!r} lives in {concept.model}; these rows are of {source.model}.")
    vector = None if concept is None else concept.at(layers[0])

    fitted, held_out = accumulate(source, target, layers, device=device)
    ridges = RIDGES if ridge is None else (ridge,)
    r2 = held_out_r2(fitted, held_out, ridges)
    ridge = ridges[int(r2.argmax())]
    if vector is not None:
        said = said_about(fitted + held_out, vector)

        def weigh(x: Float[Tensor, "row d_source"]) -> Float[Tensor, " row"]:
            return 1 - CONCEPT_SHARE + CONCEPT_SHARE * said(x)

        fitted, held_out = accumulate(source, target, layers, weigh=weigh, device=device)
        r2 = held_out_r2(fitted, held_out, (ridge,))
    whole = fitted + held_out
    weight, bias, rank = whole.solve(ridge)
    report = FitReport("ridge", whole.rows, whole.sentences, rank, ridge, float(r2.max()), whole.sinks)
    return AffineMap(weight.float().cpu(), bias.float().cpu(), report)


def accumulate(
    source: StoredActivations,
    target: StoredActivations,
    layers: tuple[int, int],
    *,
    weigh: Callable[[Float[Tensor, "row d_source"]], Float[Tensor, " row"]] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Moments, Moments]:
    """The moments of four fifths of the texts and of the other fifth, weighted by what `weigh` makes of source rows (float64,
    on the device).

    Raises:
        ValueError: as `fit_streamed`.
    """
    fitted, held_out = (Moments(source.model.d_model, target.model.d_model, device=device) for _ in range(2))
    set_aside, mine = held_out_texts(source.n_texts), share(source.n_shards)
    for x, y in track(paired_shards(source, target, layers, mine), "fitting", len(mine)):
        # Shard by shard, as no median of all rows is known; any thousand rows have nearly the same.
        massive = sink_rows(x.values[:, 0]) | sink_rows(y.values[:, 0])
        for moments, mine_of in ((fitted, ~set_aside[x.sentence]), (held_out, set_aside[x.sentence])):
            rows = mine_of & ~massive
            moments.sinks += int((mine_of & massive).sum())
            of_source = x.values[rows, 0].to(moments.xx)
            weights = None if weigh is None else weigh(of_source)
            moments.update(of_source, y.values[rows, 0], weights, sentence=x.sentence[rows])
    for moments in (fitted, held_out):
        moments.all_reduce()
    check_shared(fitted.rows + held_out.rows + fitted.sinks + held_out.sinks, len(source), len(target))
    if min(fitted.rows, held_out.rows) < 2:
        raise ValueError(
            f"expected rows of more texts, to hold a fifth of them out; got {fitted.rows} and {held_out.rows} rows."
        )
    for side, mean in ((source, fitted.x_mean + held_out.x_mean), (target, fitted.y_mean + held_out.y_mean)):
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(f"activations of {side.model.name} hold NaN or infinity; try another dtype.")
    return fitted, held_out


def held_out_texts(n_texts: int) -> Bool[Tensor, " text"]:
    """Which texts are held out: a fifth of them, always the same; drawn, as every fifth might be the same kind of text."""
    order = torch.randperm(n_texts, generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(n_texts, dtype=torch.bool)
    drawn[order[: max(1, n_texts // FOLDS)]] = True
    return drawn


def held_out_r2(fitted: Moments, held_out: Moments, ridges: Sequence[float]) -> Float[Tensor, " ridge"]:
    """R2 on held-out rows of the maps fitted on the others, one for each ridge: 1 - residual / total over all dimensions.

    In the eigenvectors V of S_xx the map is A diag(g) V^T, A = S_yx V, g = 1 / (eigenvalues + lambda). The residual, from
    held-out moments H about the fitted means, is a quadratic form in g:
    tr H_yy - 2 g . diag(A^T H_yx V) + g^T (A^T A * V^T H_xx V) g.
    """
    eigenvalues, vectors = fitted.directions()
    total = held_out.yy.sum().clamp_min(TINY)
    held_out = deepcopy(held_out)
    held_out._move(fitted.x_mean, fitted.y_mean)
    a = fitted.yx @ vectors
    quadratic = (a.T @ a) * (vectors.T @ held_out.xx @ vectors)
    linear = (a * (held_out.yx @ vectors)).sum(0)
    kept = [1 / (eigenvalues + ridge * fitted.scale) for ridge in ridges]
    errors = torch.stack([held_out.yy.sum() - 2 * g @ linear + g @ quadratic @ g for g in kept])
    return (1 - errors / total).cpu()


def said_about(
    moments: Moments, v: Float[Tensor, " d_source"]
) -> Callable[[Float[Tensor, "row d_source"]], Float[Tensor, " row"]]:
    """How much a row x_i says about a concept: s_i^2, s_i = (x_i - mean) . (S_xx + lambda I)^-1 v, lambda as in
    `LayerMaps.coverage`, over its mean over the rows of these moments, uniform ones.

    Raises:
        ValueError: no row says anything about it.
    """
    d_source, mean = len(moments.xx), moments.x_mean
    floor = COVERAGE_RIDGE * moments.xx.trace() / d_source
    if floor > 0:
        shown_by = torch.linalg.solve(moments.xx + floor * torch.eye(d_source).to(mean), v.to(mean))
        mean_square = shown_by @ moments.xx @ shown_by / moments.rows
    if not (floor > 0 and mean_square > 0):
        raise ValueError("no row says anything about the concept: its coverage is 0, no map carries it.")

    def said(x: Float[Tensor, "row d_source"]) -> Float[Tensor, " row"]:
        return ((x - mean) @ shown_by).square() / mean_square

    return said
