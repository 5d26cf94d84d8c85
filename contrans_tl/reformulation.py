"""Reformulation: affine maps between the residual streams of two models, and concepts carried through them (ConTrans 3.2).

    maps = fit_maps(source, target, sentences)        every source layer x every target layer
    maps[9, 18].point(x)                              W x + b, for activations
    maps[9, 18].direction(v)                          W v, for differences: the bias cancels
    moved = reformulate(concept, maps, layers={9: 18})

Rows are paired activations x_i, y_i with weights w_i; X and Y hold the rows sqrt(w_i) (x_i - mean_w x). Centred ridge is

    W = Y^T X (X^T X + lambda I)^-1 ,    b = mean_w y - W mean_w x

All pairs of layers share their work. With the thin decomposition X = U S V^T of one source layer - from X^T X when rows
outnumber dimensions, from X X^T otherwise, whichever is smaller - a vector is carried to every target layer without W:

    W v = Y^T a ,    a = U (S^2 + lambda)^-1 U^T X v

and the residuals of leave-one-sentence-out are exact without refitting: with H = q q^T + U S^2 (S^2 + lambda)^-1 U^T, q the
unit vector along sqrt(w) (the bias), the rows g of a sentence have held-out residuals (I - H_gg)^-1 (Y - H Y)_g. The ridge
is the one with the least of them, over all target layers; as they are linear in Y, a few random mixtures of its columns tell.
Summed over all columns, for R2, they need Y Y^T only.

`method="paper"` is the paper's solver instead: minimum-norm least squares, no bias, no centring, no ridge.

Two findings set the defaults (see the README for the measurements). *Coverage* of a concept v,
v^T X^T X (X^T X + lambda I)^-1 v / |v|^2 with lambda = 1e-3 of the mean diagonal, is the share of v that the corpus lets the
map see; it needs the source alone and predicts the effect of a transplant, which held-out R2 does not. *Concept weighting*
gives every row the weight s_i^2, s_i = |(x_i - mean)^T (X^T X + lambda I)^-1 v|, so that the map is fitted where the corpus
speaks of the concept.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl import artifacts
from contrans_tl.activations import Activations, Rows, collect, pair
from contrans_tl.models import HookedModel, ModelId, check_layers
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector

Method = Literal["ridge", "paper"]
Weighting = Literal["concept", "uniform"]
Groups = Sequence[Int[Tensor, "_ _"]]
"""The rows of each sentence, "sentence size", one tensor for each sentence length."""

RIDGES = tuple(10.0**k for k in torch.linspace(-7, 1, 17).tolist())
"""Ridge strengths tried, as multiples of the mean eigenvalue. Wide, because a few rows of huge norm (attention sinks) move
the best value a thousandfold."""
COLUMNS = 64
"""Random mixtures of the target's dimensions, over all its layers, that ridge strengths are judged by."""
DECIDED = 1e-9
"""Without ridge, a sentence whose rows keep less than this of their residuals decides its own fit; far above float64's
rounding, far below what two rows in general position keep."""
COVERAGE_RIDGE = 1e-3
"""Ridge of coverage and of the concept weights, as a multiple of the mean diagonal of X^T X."""
TINY = torch.finfo(torch.float64).tiny
"""Keeps a layer whose rows are all alike from dividing zero by zero: it counts as not predicted at all."""
LOW_COVERAGE = 0.984
"""Below this a warning is given: between what was measured where emotions arrived and where not, see `LayerMaps.coverage`."""


@dataclass(frozen=True)
class FitReport:
    """What an affine map was fitted on and how well it does."""

    method: Method
    rows: int
    sentences: int
    rank: int
    """Rank of the centred source rows; at most the smaller of rows - 1 and d_source."""
    ridge: float
    """As a multiple of the mean eigenvalue."""
    r2: float
    """Share of the target's variance predicted, leave-one-sentence-out; 1 - residual / total over all dimensions. NaN if,
    without ridge, some sentence alone decides its own fit."""


@dataclass(frozen=True, eq=False)
class AffineMap:
    """y = W x + b from one residual stream to another."""

    weight: Float[Tensor, "d_target d_source"]
    bias: Float[Tensor, " d_target"]
    fit: FitReport

    def point(self, x: Float[Tensor, "*row d_source"]) -> Float[Tensor, "*row d_target"]:
        """Carry activations: W x + b."""
        return x @ self.weight.T + self.bias

    def direction(self, v: Float[Tensor, "*row d_source"]) -> Float[Tensor, "*row d_target"]:
        """Carry differences of activations, such as concept vectors: W v."""
        return v @ self.weight.T

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as safetensors."""
        return artifacts.save(path, "affine map", {"weight": self.weight, "bias": self.bias}, {"fit": vars(self.fit)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "AffineMap":
        """Read what `save` wrote. ValueError for a truncated, foreign or newer file."""
        tensors, about = artifacts.load(path, "affine map")
        return cls(tensors["weight"], tensors["bias"], FitReport(**about["fit"]))


@dataclass(frozen=True, eq=False)
class Decomposition:
    """X = U S V^T of the weighted, centred rows of one source layer; V is never formed."""

    u: Float[Tensor, "row rank"]
    eigenvalues: Float[Tensor, " rank"]
    """S^2, the non-zero eigenvalues of X^T X."""
    x: Float[Tensor, "row d_source"]
    """The rows as given."""
    weights: Float[Tensor, " row"] | None
    centre: bool

    @property
    def rows(self) -> Float[Tensor, "row d_source"]:
        """X itself, made when asked for: kept for every layer it would take twice the memory of the activations."""
        return _weighted_centred(self.x, self.weights) if self.centre else self.x.double()

    @property
    def scale(self) -> float:
        """The mean eigenvalue, the unit in which ridge strengths are given."""
        return float(self.eigenvalues.sum()) / _most_rank(self.x)

    @property
    def interpolates(self) -> bool:
        """Whether the rows determine every residual: with nothing left outside U, only the ridge keeps a map from
        reproducing its rows exactly."""
        return len(self.eigenvalues) == len(self.u) - self.centre

    def dual(self, seen: Float[Tensor, "row ..."], ridge: float) -> Float[Tensor, "row ..."]:
        """a = U (S^2 + lambda)^-1 U^T X v for `seen` = X v, lambda absolute, so that W v = Y^T a; for X itself, W = Y^T a."""
        return (self.u / (self.eigenvalues + ridge)) @ (self.u.T @ seen)

    def outside(self, members: Int[Tensor, "sentence size"], kept: Float[Tensor, " rank"]) -> Float[Tensor, "sentence i j"]:
        """The diagonal blocks (I - H)_gg of every sentence g, H = q q^T + U (1 - kept) U^T. If the rows interpolate this is
        U kept U^T, which is right for any multiple of `kept` too and takes no difference of near equals."""
        between = self._within(members, kept if self.interpolates else 1 - kept)
        if self.interpolates:
            return between
        if self.centre:
            q = _unit_weights(self.x, self.weights)[members]
            between = between + einsum(q, q, "sentence i, sentence j -> sentence i j")
        return torch.eye(members.shape[1], dtype=self.u.dtype) - between

    def _within(self, members: Int[Tensor, "sentence size"], kept: Float[Tensor, " rank"]) -> Float[Tensor, "sentence i j"]:
        """The diagonal blocks of U kept U^T."""
        if members.shape[1] == 1:
            return (self.u.square() @ kept)[members][:, :, None]
        u = self.u[members]
        return einsum(u * kept, u, "sentence i rank, sentence j rank -> sentence i j")


def decompose(
    x: Float[Tensor, "row d_source"], weights: Float[Tensor, " row"] | None = None, *, centre: bool = True
) -> Decomposition:
    """Thin decomposition of the rows by the smaller of their two Gram matrices, in float64.

    Without centring (the paper's solver) it is a singular value decomposition of X itself: squaring would cost half of the
    digits that a solve without ridge needs. Directions below the precision of the input are dropped.
    """
    if not centre:
        u, singular, _ = torch.linalg.svd(x.double(), full_matrices=False)
        kept = singular > singular.max() * max(x.shape) * torch.finfo(torch.float64).eps
        return Decomposition(u[:, kept], singular[kept] ** 2, x, None, centre)
    rows = _weighted_centred(x, weights)
    n, d_source = x.shape
    # numpy's: three quarters of the time of torch's at n = 800 and 1600 on one core (OpenBLAS, MKL)
    eigenvalues, vectors = map(torch.from_numpy, np.linalg.eigh(products(rows if n <= d_source else rows.T).numpy()))
    kept = eigenvalues > eigenvalues.max() * max(x.shape) * torch.finfo(torch.float64).eps
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    u = vectors if n <= d_source else rows @ (vectors / eigenvalues.sqrt())
    return Decomposition(u, eigenvalues, x, weights, centre)


def dual_coefficients(
    rows: Float[Tensor, "row d_source"], v: Float[Tensor, " d_source"], ridge: float
) -> Float[Tensor, " row"]:
    """a = X (X^T X + lambda I)^-1 v = (X X^T + lambda I)^-1 X v, for one lambda > 0: a Cholesky factorisation of the smaller
    Gram matrix, some twenty times cheaper than the decomposition that serves every lambda."""
    n, d_source = rows.shape
    gram = products(rows if n <= d_source else rows.T)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    if n <= d_source:
        return torch.cholesky_solve((rows @ v)[:, None], factor)[:, 0]
    return rows @ torch.cholesky_solve(v[:, None], factor)[:, 0]


def products(x: Float[Tensor, "row column"]) -> Float[Tensor, "row row"]:
    """X X^T. By numpy, which sees that both factors are the same and computes half."""
    rows = x.cpu().numpy()
    return torch.from_numpy(rows @ rows.T)


def _weighted_centred(x: Float[Tensor, "row d_model"], weights: Float[Tensor, " row"] | None) -> Float[Tensor, "row d_model"]:
    """sqrt(w_i) (x_i - mean_w x), in float64."""
    x = x.double()
    if weights is None:
        return x - x.mean(0)
    return weights.sqrt()[:, None] * (x - (weights @ x) / weights.sum())


def _unit_weights(x: Float[Tensor, "row d_model"], weights: Float[Tensor, " row"] | None) -> Float[Tensor, " row"]:
    """q, the unit vector along sqrt(w)."""
    return torch.full((len(x),), len(x) ** -0.5).double() if weights is None else (weights / weights.sum()).sqrt()


def _weighted_variance(gram: Float[Tensor, "row row"], weights: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    """sum_i w_i |y_i - mean_w y|^2 from the rows' Gram matrix."""
    return weights @ gram.diagonal() - weights @ gram @ weights / weights.sum()


def _most_rank(x: Float[Tensor, "row d_model"]) -> int:
    """The most directions that centred rows can have."""
    return min(len(x) - 1, x.shape[1])


def leave_one_sentence_out(source: Decomposition, ridge: float, sentences: Groups) -> "LeftOut":
    """What turns target rows into the residuals of every sentence's rows under the map fitted without that sentence. Exact,
    without refitting. The ridge is absolute; sentences as `group_rows` gives them."""
    g = 1 / (source.eigenvalues + ridge)
    # I - H = U g U^T with g = lambda / (S^2 + lambda) if the rows interpolate. Residuals and hat matrix both vanish with
    # lambda then, their quotient does not: any multiple of g will do, and one of order 1 loses no digits.
    g = g / g.max() if source.interpolates else ridge * g
    outside = [source.outside(members, g) for members in sentences]
    if ridge == 0 and not source.interpolates:  # a sentence that alone decides a direction: without it, there is no such map
        outside = [torch.where(torch.linalg.eigvalsh(a)[:, :1, None] > DECIDED, a, torch.nan) for a in outside]
    return LeftOut(source, g, sentences, [torch.linalg.inv(a) for a in outside])


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Leave-one-sentence-out residuals at one ridge; see `leave_one_sentence_out`."""

    source: Decomposition
    kept: Float[Tensor, " rank"]
    """g: the part of each direction that the fit leaves in the residuals."""
    sentences: Groups
    inverses: Sequence[Float[Tensor, "_ _ _"]]
    """(I - H)_gg^-1 of every sentence, one tensor for each sentence length."""

    def residuals(
        self, y: Float[Tensor, "row d_target"], seen: Float[Tensor, "rank d_target"] | None = None
    ) -> Float[Tensor, "row d_target"]:
        """Of weighted, centred target rows (raw ones for the paper's solver). Linear in them, in their dtype; `seen` is U^T y
        where it is known."""
        u, g = self.source.u.to(y), self.kept.to(y)[:, None]
        seen = u.T @ y if seen is None else seen
        residuals = u @ (g * seen) if self.source.interpolates else y - u @ ((1 - g) * seen)
        for members, inverse in zip(self.sentences, self.inverses, strict=True):
            if members.shape[1] == 1:
                residuals[members[:, 0]] *= inverse[:, 0].to(y)
            else:
                residuals[members] = inverse.to(y) @ residuals[members]
        return residuals


def group_rows(sentence: Int[Tensor, " row"]) -> Groups:
    """The rows of each sentence, sentences of one size together."""
    order = sentence.argsort(stable=True)
    sizes = sentence[order].unique_consecutive(return_counts=True)[1].tolist()
    by_size: dict[int, list[Tensor]] = {}
    for members in order.split(sizes):
        by_size.setdefault(len(members), []).append(members)
    return [torch.stack(group) for group in by_size.values()]


@dataclass(frozen=True, eq=False)
class LayerMaps:
    """The affine maps from every collected source layer to every collected target layer.

    It holds the paired rows; each source layer is decomposed once, when first needed, and that serves every target layer and
    every concept. A map's matrix is made when somebody asks for `maps[s, t]`.
    """

    source: Activations
    target: Activations
    method: Method = "ridge"
    fixed_ridge: float | None = None
    """Ridge strength as a multiple of the mean eigenvalue; None: by leave-one-sentence-out, one for each source layer."""
    weights: Float[Tensor, "source_layer row"] | None = None
    """Row weights, a set for each source layer; None for uniform ones."""
    _memo: dict[tuple[str, int | None], Any] = field(default_factory=dict, repr=False)
    """What has been computed, by kind and layer. Never shared: what derives maps from these hands over what still holds."""

    @classmethod
    def fit(
        cls,
        source: Activations | Float[Tensor, "row source_layer d_source"],
        target: Activations | Float[Tensor, "row target_layer d_target"],
        *,
        method: Method = "ridge",
        ridge: float | None = None,
        sentence: Int[Tensor, " row"] | None = None,
    ) -> "LayerMaps":
        """Maps from activations, or from paired tensors of your own.

        Args:
            method: `ridge`, centred with bias, or `paper`, the paper's minimum-norm solver without either.
            ridge: strength as a multiple of the mean eigenvalue; None chooses it by leave-one-sentence-out.
            sentence: with tensors, which sentence each row belongs to; by default each to its own.

        Raises:
            ValueError: different numbers of rows, fewer than two sentences, NaN or infinity, an unknown method, a negative
                ridge.
        """
        if not isinstance(source, Activations) and len(source) != len(target):
            raise ValueError(f"expected paired rows; got {len(source)} of the source and {len(target)} of the target.")
        source = _as_activations(source, "source", sentence)
        target = _as_activations(target, "target", sentence)
        source, target = pair(source, target)
        if method not in ("ridge", "paper"):
            raise ValueError(f"expected method 'ridge' or 'paper'; got {method!r}.")
        if ridge is not None and not 0 <= ridge < torch.inf:
            raise ValueError(f"expected a ridge of at least 0, as a multiple of the mean eigenvalue; got {ridge}.")
        if method == "paper" and ridge:
            raise ValueError("method='paper' has no ridge; use method='ridge'.")
        if len(source.sentence.unique()) < 2:
            raise ValueError(f"expected rows from at least two sentences; got {len(source)} from one.")
        for activations in (source, target):
            if not bool(torch.isfinite(activations.values).all()):
                raise ValueError(f"activations of {activations.model.name} hold NaN or infinity; try another dtype.")
        rows, d_source = len(source), source.values.shape[-1]
        if method == "paper" and 0.5 < rows / d_source < 2:
            warnings.warn(
                f"the paper's solver on {rows} rows of dimension {d_source}: minimum-norm least squares is at its worst when "
                "the two are near each other (vectors several times too long, in the wrong direction). Use method='ridge'.",
                stacklevel=2,
            )
        return cls(source, target, method, 0.0 if method == "paper" else ridge)

    def __repr__(self) -> str:
        return (
            f"LayerMaps({self.source.model.name!r} {len(self.source.layers)} layers -> {self.target.model.name!r} "
            f"{len(self.target.layers)} layers, {self.method}, {len(self.source)} rows"
            f"{'' if self.weights is None else ', weighted'})"
        )

    # --- what is computed once --------------------------------------------------------------------------------------

    def decomposition(self, layer: int) -> Decomposition:
        """Of one source layer's rows; computed when first asked for."""
        return self._once(
            ("decomposition", layer),
            lambda: decompose(self.source.at(layer), self._weights(layer), centre=self.method != "paper"),
        )

    def ridge(self, layer: int) -> float:
        """Ridge strength of one source layer, as a multiple of its mean eigenvalue."""
        if self.fixed_ridge is not None:
            return self.fixed_ridge
        return self._once(("ridge", layer), lambda: self._choose_ridge(layer))

    def _choose_ridge(self, layer: int) -> float:
        # One strength serves all target layers, each counted relative to its variance. Coarse first, then around the best.
        source, error = self.decomposition(layer), self._held_out_error(layer)
        step = 4
        errors = {k: error(RIDGES[k] * source.scale) for k in range(0, len(RIDGES), step)}
        while step > 1:
            step //= 2
            best = min(errors, key=errors.__getitem__)
            near = [k for k in (best - step, best + step) if 0 <= k < len(RIDGES)]
            errors |= {k: error(RIDGES[k] * source.scale) for k in near}
        return RIDGES[min(errors, key=errors.__getitem__)]

    def _held_out_error(self, layer: int) -> Callable[[float], float]:
        """Of all target layers together, as a function of the absolute ridge."""
        source, dtype = self.decomposition(layer), self._dtype(layer)
        y = self._prepared(self._columns, layer).to(dtype)
        seen = source.u.to(y).T @ y
        return lambda ridge: float(leave_one_sentence_out(source, ridge, self._sentences).residuals(y, seen).square().sum())

    @cached_property
    def _columns(self) -> Float[Tensor, "row column"]:
        # Residuals are linear in the target, so their mean square over its dimensions is that of random mixtures of them: a
        # few mixtures of every layer stand for all it has, the same ones for every source layer and ridge.
        g, each = torch.Generator().manual_seed(0), max(4, COLUMNS // len(self.target.layers))
        columns = []
        for t in self.target.layers:
            y = self.target.at(t).double()
            if y.shape[1] > each:
                y = y @ torch.randint(0, 2, (y.shape[1], each), generator=g).double().mul_(2).sub_(1)
            columns.append(y / (y - y.mean(0)).norm().clamp_min(TINY))
        return torch.cat(columns, dim=1)

    @cached_property
    def r2(self) -> Float[Tensor, "source_layer target_layer"]:
        """Held-out R2 of every pair, leave-one-sentence-out: 1 - residual / total, over all dimensions together."""
        rows = [self._r2_row(s) for s in track(self.source.layers, "held-out R2", len(self.source.layers))]
        return torch.tensor(rows)

    def _r2_row(self, layer: int) -> list[float]:
        source, dtype, weights = self.decomposition(layer), self._dtype(layer), self._weights(layer)
        left_out = leave_one_sentence_out(source, self.ridge(layer) * source.scale, self._sentences)
        errors, totals = [], []
        if self._narrow:
            # Residuals are linear in the target's rows as given, R = A Y: |R|^2 = <A^T A, Y Y^T>.
            whole = self._prepared(torch.eye(len(self.source)), layer).to(dtype)
            seen = source.u.to(dtype).T if weights is None else (weights.sqrt()[:, None] * source.u).to(dtype).T
            residuals = left_out.residuals(whole, seen)
            quadratic = products(residuals.T).flatten()
            for t in self.target.layers:
                gram = self._target_gram(t, dtype)
                errors.append(float(quadratic @ gram.flatten()))
                totals.append(float(gram.trace() if weights is None else _weighted_variance(gram.double(), weights)))
        else:
            for t in self.target.layers:
                y = self._prepared(self.target.at(t), layer).to(dtype)
                errors.append(float(left_out.residuals(y).square().sum()))
                totals.append(float(y.square().sum()))
        return [1 - error / max(total, TINY) for error, total in zip(errors, totals, strict=True)]

    @cached_property
    def cka(self) -> Float[Tensor, "source_layer target_layer"]:
        """Linear centred kernel alignment of every pair: |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms."""
        xs = [_weighted_centred(self.source.at(s), None).float() for s in self.source.layers]
        ys = [_weighted_centred(self.target.at(t), None).float() for t in self.target.layers]
        if self._narrow:
            k, m = (torch.stack([products(a) for a in side]) for side in (xs, ys))
            shared = einsum(k, m, "s i j, t i j -> s t")
            norms = [gram.flatten(1).norm(dim=1) for gram in (k, m)]
        else:
            shared = torch.stack([torch.stack([(x.T @ y).square().sum() for y in ys]) for x in xs])
            norms = [torch.stack([products(a.T).norm() for a in side]) for side in (xs, ys)]
        return shared / (norms[0][:, None] * norms[1])

    @property
    def _narrow(self) -> bool:
        """Whether n x n Gram matrices are the smaller ones."""
        return len(self.source) <= self.source.values.shape[-1]

    def _dtype(self, layer: int) -> torch.dtype:
        """In which the ridge is scanned and R2 measured; what enters a map is float64. Float32 would not do for a row that
        all but decides its own fit, as a held-out residual is then a small difference divided by a small one: with about as
        many rows as dimensions, or a row far larger than the others (an attention sink), given or made by weights."""
        ratio = len(self.source) / self.source.values.shape[-1]
        source = self.decomposition(layer)
        sizes = source.u.square() @ source.eigenvalues
        return torch.float64 if 0.9 < ratio < 4 or sizes.max() > 30 * sizes.median() else torch.float32

    @cached_property
    def _sentences(self) -> Groups:
        return group_rows(self.source.sentence)

    def _weights(self, layer: int) -> Float[Tensor, " row"] | None:
        return None if self.weights is None else self.weights[self.source.layers.index(layer)].double()

    def _prepared(self, y: Float[Tensor, "row column"], source_layer: int) -> Float[Tensor, "row column"]:
        """Target rows as this source layer's fit sees them: weighted and centred, but for the paper's solver."""
        return y.double() if self.method == "paper" else _weighted_centred(y, self._weights(source_layer))

    def _target_gram(self, layer: int, dtype: torch.dtype) -> Float[Tensor, "row row"]:
        # Without weights, whatever the source layer: weights act from outside (see `_r2_row`).
        def gram() -> Float[Tensor, "row row"]:
            y = self.target.at(layer).to(dtype)
            return products(y if self.method == "paper" else y - y.mean(0))

        return self._once((f"gram {dtype}", layer), gram)

    def _once(self, key: tuple[str, int | None], compute: Callable[[], Any]) -> Any:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def _known(self, kind: str, layers: Sequence[int]) -> dict[tuple[str, int | None], Any]:
        """What has been computed already of one kind for these layers."""
        return {key: value for key, value in self._memo.items() if key[0].startswith(kind) and key[1] in layers}

    def _ridges(self, layers: Sequence[int]) -> dict[tuple[str, int | None], Any]:
        # Chosen here and now, so that maps derived from these have the same ridge whenever they are derived.
        return {("ridge", s): self.ridge(s) for s in layers}

    # --- what it is for ---------------------------------------------------------------------------------------------

    def __getitem__(self, layers: tuple[int, int]) -> AffineMap:
        """The affine map of one pair of layers, (source layer, target layer)."""
        s, t = layers
        source, y = self.decomposition(s), self._prepared(self.target.at(t), s)
        ridge = self.ridge(s)
        weight = y.T @ source.dual(source.rows, ridge * source.scale)
        if self.method == "paper":
            bias = torch.zeros(len(weight), dtype=torch.float64)
        else:
            x_mean, y_mean = self._mean(self.source.at(s), s), self._mean(self.target.at(t), s)
            bias = y_mean - weight @ x_mean
        residuals = leave_one_sentence_out(source, ridge * source.scale, self._sentences).residuals(y)
        report = FitReport(
            method=self.method,
            rows=len(self.source),
            sentences=len(self.source.sentence.unique()),
            rank=len(source.eigenvalues),
            ridge=ridge,
            r2=float(1 - residuals.square().sum() / y.square().sum().clamp_min(TINY)),
        )
        return AffineMap(weight.float(), bias.float(), report)

    def _mean(self, rows: Float[Tensor, "row d_model"], source_layer: int) -> Float[Tensor, " d_model"]:
        weights = self._weights(source_layer)
        return rows.double().mean(0) if weights is None else (weights @ rows.double()) / weights.sum()

    def carry(
        self, vectors: Float[Tensor, "source_layer d_source"], targets: Sequence[int] | None = None
    ) -> Float[Tensor, "source_layer target_layer d_target"]:
        """W v for a vector at every source layer, to every target layer (or those of `targets`), without forming any W."""
        layers = list(zip(self.source.layers, vectors.double(), strict=True))
        duals = torch.stack([self._dual(s, v) for s, v in track(layers, "carrying the concept", len(layers))])
        # The dual coefficients of a centred fit sum to zero over rows: the target's mean need not be taken out.
        carried = [duals @ self.target.at(t).double() for t in (self.target.layers if targets is None else targets)]
        return torch.stack(carried, dim=1).float()

    def _dual(self, layer: int, v: Float[Tensor, " d_source"]) -> Float[Tensor, " row"]:
        """The row coefficients a with W v = Y^T a, Y as given."""
        ridge, weights = self.ridge(layer), self._weights(layer)
        if weights is None or ridge == 0:
            source = self.decomposition(layer)
            dual = source.dual(source.rows @ v, ridge * source.scale)
        else:  # the ridge is known: one factorisation will do
            rows = _weighted_centred(self.source.at(layer), weights)
            dual = dual_coefficients(rows, v, ridge * float(rows.square().sum()) / _most_rank(rows))
        return dual if weights is None else weights.sqrt() * dual

    def coverage(self, concept: ConceptVector) -> Float[Tensor, " source_layer"]:
        """For every source layer, the share of the concept that the corpus lets a map see, from the source alone.

        v^T X^T X (X^T X + lambda I)^-1 v / |v|^2, lambda = 1e-3 of the mean diagonal of X^T X, X centred. Look at
        1 - coverage on a logarithmic scale. On the embedded pair, at the two upper source layers: 0.986 to 0.995 with the
        corpus that carries the emotions, 0.953 to 0.982 with the one that does not.
        """
        self._check_source(concept)
        return torch.tensor([self._shown(s, concept.at(s).double())[1] for s in self.source.layers])

    def reweighted(self, concept: ConceptVector) -> "LayerMaps":
        """The same maps fitted with each row counted by what it says about the concept: weights s_i^2,
        s_i = |(x_i - mean)^T (X^T X + lambda I)^-1 v|, of mean one, lambda that of coverage. Source only, no labels. The
        ridge strengths stay.

        Raises:
            ValueError: the concept lives elsewhere, no row says anything about it, or the paper's solver.
        """
        self._check_source(concept)
        if self.method == "paper":
            raise ValueError("the paper's solver has no row weights: pass weighting='uniform'.")
        weights = torch.stack([self._shown(s, concept.at(s).double())[0] ** 2 for s in self.source.layers])
        if not bool((weights.sum(1) > 0).all()):
            raise ValueError(f"no row says anything about {concept.name!r}: its coverage is 0, no map carries it.")
        weights = (weights / weights.mean(1, keepdim=True)).float()
        memo = self._ridges(self.source.layers) | self._known("gram", self.target.layers)
        return replace(self, weights=weights, fixed_ridge=None, _memo=memo)

    def _shown(self, layer: int, v: Float[Tensor, " d_source"]) -> tuple[Float[Tensor, " row"], float]:
        """How far each row shows the concept, X (X^T X + lambda I)^-1 v without weights, and the concept's coverage."""
        if self.method == "ridge" and self.weights is None:
            source = self.decomposition(layer)
            rows = source.rows
            floor = COVERAGE_RIDGE * float(source.eigenvalues.sum()) / rows.shape[1]
            shown = source.dual(rows @ v, floor)
        else:
            rows = _weighted_centred(self.source.at(layer), None)
            shown = dual_coefficients(rows, v, COVERAGE_RIDGE * float(rows.square().sum()) / rows.shape[1])
        return shown, float((rows @ v) @ shown / v.square().sum().clamp_min(TINY))

    def shuffled(self, *, seed: int) -> "LayerMaps":
        """The null control: the same rows, weights and ridge strengths with the target's rows permuted, so that nothing pairs
        them, and fitted again."""
        order = torch.randperm(len(self.target), generator=torch.Generator().manual_seed(seed))
        memo = self._ridges(self.source.layers) | self._known("decomposition", self.source.layers)
        return replace(self, target=replace(self.target, values=self.target.values[order]), _memo=memo)

    def only(self, sources: Sequence[int], targets: Sequence[int]) -> "LayerMaps":
        """The maps between these layers only, and no others: the ridge strengths are those of all layers."""
        sources, targets = tuple(sources), tuple(targets)
        source, target = self.source.only(sources), self.target.only(targets)
        if (source, target) == (self.source, self.target):
            return self
        weights = None if self.weights is None else self.weights[[self.source.layers.index(s) for s in sources]]
        memo = self._ridges(sources) | self._known("decomposition", sources) | self._known("gram", targets)
        return replace(self, source=source, target=target, weights=weights, _memo=memo)

    def _check_source(self, concept: ConceptVector) -> None:
        if not concept.model.same_space(self.source.model):
            raise ValueError(
                f"the concept {concept.name!r} lives in {concept.model}; these maps start in {self.source.model}. "
                "Refine it there, with the same revision and basis."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write rows, weights and chosen ridges as safetensors; to keep the file small, save `maps.only(...)`."""
        tensors = {"source": self.source.values, "target": self.target.values}
        tensors |= {"sentence": self.source.sentence, "end": self.source.end}
        if self.weights is not None:
            tensors["weights"] = self.weights
        about: dict[str, Any] = {
            "method": self.method,
            "ridges": None if self.method == "paper" else [self.ridge(s) for s in self.source.layers],
            "fixed_ridge": self.fixed_ridge,
            "rows": self.source.rows,
            "texts_hash": self.source.texts_hash,
        }
        for side, activations in (("source", self.source), ("target", self.target)):
            about[side] = {
                "model": activations.model.to_dict(),
                "layers": activations.layers,
                "prepend_bos": activations.prepend_bos,
            }
        return artifacts.save(path, "layer maps", tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerMaps":
        """Read what `save` wrote. ValueError for a truncated, foreign or newer file."""
        tensors, about = artifacts.load(path, "layer maps")
        source, target = (
            Activations(
                values=tensors[side],
                layers=tuple(about[side]["layers"]),
                sentence=tensors["sentence"],
                end=tensors["end"],
                model=ModelId(**about[side]["model"]),
                rows=about["rows"],
                prepend_bos=about[side]["prepend_bos"],
                texts_hash=about["texts_hash"],
            )
            for side in ("source", "target")
        )
        memo: dict[tuple[str, int | None], Any] = dict(
            zip((("ridge", s) for s in source.layers), about["ridges"] or (), strict=False)
        )
        return cls(source, target, about["method"], about["fixed_ridge"], tensors.get("weights"), memo)


def fit_affine(
    x: Float[Tensor, "row d_source"],
    y: Float[Tensor, "row d_target"],
    *,
    method: Method = "ridge",
    ridge: float | None = None,
    sentence: Int[Tensor, " row"] | None = None,
) -> AffineMap:
    """The affine map between paired rows of your own; see `LayerMaps.fit` for the arguments and errors."""
    return LayerMaps.fit(x[:, None], y[:, None], method=method, ridge=ridge, sentence=sentence)[0, 0]


def fit_maps(
    source: HookedModel,
    target: HookedModel,
    sentences: Sequence[str],
    *,
    rows: Rows = "words",
    method: Method = "ridge",
    ridge: float | None = None,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> LayerMaps:
    """Affine maps from every source layer to every target layer, fitted on the same sentences in both models (eq. 2).

    Args:
        sentences: neither labels nor the prompts of any concept, but text in which the concept occurs in passing: a corpus
            that never shows it cannot carry it (`LayerMaps.coverage`).
        rows: the end of every word, aligned by character between tokenizers, or the `last` token (the paper's).
        method, ridge: see `LayerMaps.fit`.

    Raises:
        ValueError: as `collect` and `LayerMaps.fit`.
    """
    check_layers(target_layers, target.cfg.n_layers, str(target.cfg.model_name))  # before the source has run
    options: dict[str, Any] = {"rows": rows, "prepend_bos": prepend_bos, "batch_size": batch_size}
    x = collect(source, sentences, layers=source_layers, **options)
    y = collect(target, sentences, layers=target_layers, **options)
    return LayerMaps.fit(x, y, method=method, ridge=ridge)


def reformulate(
    concept: ConceptVector,
    maps: LayerMaps,
    *,
    layers: Mapping[int, int] | None = None,
    weighting: Weighting = "concept",
) -> ConceptVector:
    """The concept in the target's residual stream: W v, never the bias (eq. 2; a concept is a difference).

    Args:
        layers: {source layer: target layer}; None pairs every target layer with the source layer of the same relative depth.
        weighting: `concept` refits the maps with rows weighted by what they say about this concept; `uniform` is the paper's.

    Raises:
        ValueError: the concept lives in another model or basis than the maps' source, or a layer the maps do not have.

    Warns when the corpus hardly shows the concept.
    """
    maps._check_source(concept)
    pairs = _by_depth(maps) if layers is None else [(s, t) for s, t in layers.items()]
    for s, t in pairs:
        if s not in maps.source.layers or t not in maps.target.layers:
            raise ValueError(f"expected layers of the maps, {maps.source.layers} -> {maps.target.layers}; got {s} -> {t}.")
    pairs.sort(key=lambda pair: pair[1])
    used = maps.only(sorted({s for s, _ in pairs}), sorted({t for _, t in pairs}))
    concept = concept.only(*used.source.layers)
    coverage = dict(zip(used.source.layers, used.coverage(concept).tolist(), strict=True))
    if (lowest := min(coverage.values())) < LOW_COVERAGE:
        warnings.warn(
            f"the corpus hardly shows {concept.name!r}: coverage {lowest:.3f}. A map fitted on it cannot carry the concept; "
            "add sentences that mention it in passing.",
            stacklevel=2,
        )
    if weighting == "concept":
        used = used.reweighted(concept)
    elif weighting != "uniform":
        raise ValueError(f"expected weighting 'concept' or 'uniform'; got {weighting!r}.")
    grid = used.carry(concept.vectors)
    picked = [grid[used.source.layers.index(s), used.target.layers.index(t)] for s, t in pairs]
    return ConceptVector(
        vectors=torch.stack(picked),
        layers=tuple(t for _, t in pairs),
        name=concept.name,
        model=maps.target.model,
        provenance={
            "carried_from": concept.model.to_dict(),
            "layers": [[s, t] for s, t in pairs],
            "method": maps.method,
            "weighting": weighting,
            "ridge": [used.ridge(s) for s, _ in pairs],
            "coverage": [coverage[s] for s, _ in pairs],
            "rows": maps.source.rows,
            "n_rows": len(maps.source),
            "texts_hash": maps.source.texts_hash,
            "refined": concept.provenance,
        },
    )


def _by_depth(maps: LayerMaps) -> list[tuple[int, int]]:
    def depth(activations: Activations, layer: int) -> float:
        return (layer + 1) / activations.model.n_layers

    return [
        (min(maps.source.layers, key=lambda s: abs(depth(maps.source, s) - depth(maps.target, t))), t)
        for t in maps.target.layers
    ]


def _as_activations(
    rows: Activations | Float[Tensor, "row layer d_model"], name: str, sentence: Int[Tensor, " row"] | None
) -> Activations:
    if isinstance(rows, Activations):
        return rows
    n, layers, d_model = rows.shape
    if sentence is not None and len(sentence) != n:
        raise ValueError(f"expected the sentence of each of {n} rows; got {len(sentence)}.")
    return Activations(
        values=rows.detach(),
        layers=tuple(range(layers)),
        sentence=torch.arange(n) if sentence is None else sentence,
        end=torch.arange(n),
        model=ModelId(name, None, name, layers, d_model, "raw"),
        rows="words",
        prepend_bos=False,
        texts_hash=f"{n} rows",
    )
