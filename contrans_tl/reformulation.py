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
unit vector along sqrt(w) (the bias), the rows g of a sentence have held-out residuals (I - H_gg)^-1 (Y - H Y)_g.

`method="paper"` is the paper's solver instead: minimum-norm least squares, no bias, no centring, no ridge.

Two findings set the defaults (see the README for the measurements). *Coverage* of a concept v,
v^T X^T X (X^T X + lambda I)^-1 v / |v|^2 with lambda = 1e-3 of the mean diagonal, is the share of v that the corpus lets the
map see; it needs the source alone and predicts the effect of a transplant, which held-out R2 does not. *Concept weighting*
gives every row the weight s_i^2, s_i = |(x_i - mean)^T (X^T X + lambda I)^-1 v|, so that the map is fitted where the corpus
speaks of the concept.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

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

RIDGES = tuple(10.0**k for k in torch.linspace(-7, 1, 17).tolist())
"""Ridge strengths tried, as multiples of the mean eigenvalue. Wide, because a few rows of huge norm (attention sinks) move
the best value a thousandfold."""
COVERAGE_RIDGE = 1e-3
"""Ridge of coverage and of the concept weights, as a multiple of the mean diagonal of X^T X."""
LOW_COVERAGE = 0.97
"""Below this a warning is given. On the embedded pair (README) corpora below it carried next to nothing."""


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
    """Share of the target's variance predicted, leave-one-sentence-out; 1 - residual / total over all dimensions."""


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
    rows: Float[Tensor, "row d_source"]
    """X itself."""
    root_weights: Float[Tensor, " row"] | None
    """q, the unit vector along sqrt(w), where there is a bias."""

    @property
    def scale(self) -> float:
        """The mean eigenvalue, the unit in which ridge strengths are given."""
        return float(self.eigenvalues.mean())

    @property
    def interpolates(self) -> bool:
        """Whether the rows determine every residual: with nothing left outside U, only the ridge keeps a map from
        reproducing its rows exactly."""
        return len(self.eigenvalues) == len(self.u) - (self.root_weights is not None)

    def dual(self, v: Float[Tensor, "d_source *vector"], ridge: float) -> Float[Tensor, "row *vector"]:
        """a = U (S^2 + lambda)^-1 U^T X v, lambda absolute, so that W v = Y^T a; equally X (X^T X + lambda I)^-1 v."""
        seen = self.u.T @ (self.rows @ v)
        return self.u @ (seen.T / (self.eigenvalues + ridge)).T

    def coverage(self, v: Float[Tensor, " d_source"], ridge: float) -> float:
        """v^T X^T X (X^T X + lambda I)^-1 v / |v|^2, lambda absolute."""
        seen = self.u.T @ (self.rows @ v)
        return float((seen**2 / (self.eigenvalues + ridge)).sum() / v.square().sum())


def decompose(
    x: Float[Tensor, "row d_source"], weights: Float[Tensor, " row"] | None = None, *, centre: bool = True
) -> Decomposition:
    """Thin decomposition of the rows by the smaller of their two Gram matrices, in float64.

    Without centring (the paper's solver) it is a singular value decomposition of X itself: squaring would cost half of the
    digits that a solve without ridge needs. Directions below the precision of the input are dropped.
    """
    x = x.double()
    if not centre:
        u, singular, _ = torch.linalg.svd(x, full_matrices=False)
        kept = singular > singular.max() * max(x.shape) * torch.finfo(torch.float64).eps
        return Decomposition(u[:, kept], singular[kept] ** 2, x, None)
    x, root = _weighted_centred(x, weights)
    rows, d_source = x.shape
    eigenvalues, vectors = torch.linalg.eigh(x @ x.T if rows <= d_source else x.T @ x)
    kept = eigenvalues > eigenvalues.max() * max(x.shape) * torch.finfo(torch.float64).eps
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    u = vectors if rows <= d_source else x @ (vectors / eigenvalues.sqrt())
    return Decomposition(u, eigenvalues, x, root)


def _weighted_centred(
    x: Float[Tensor, "row d_model"], weights: Float[Tensor, " row"] | None
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
    """sqrt(w_i) (x_i - mean_w x), and the unit vector along sqrt(w)."""
    if weights is None:
        return x - x.mean(0), torch.full((len(x),), len(x) ** -0.5, dtype=x.dtype)
    weights = weights.to(x)
    centred = x - (weights @ x) / weights.sum()
    return weights.sqrt()[:, None] * centred, (weights / weights.sum()).sqrt()


def leave_one_sentence_out(
    source: Decomposition, y: Float[Tensor, "row d_target"], ridge: float, sentences: Sequence[Int[Tensor, "sentence size"]]
) -> Float[Tensor, "row d_target"]:
    """Residuals of every sentence's rows under the map fitted without that sentence. Exact, without refitting.

    Args:
        y: weighted, centred target rows (raw ones for the paper's solver). The result is linear in them.
        ridge: absolute.
        sentences: the rows of each sentence, one tensor for each sentence length (see `group_rows`).
    """
    u = source.u.to(y)
    seen = u.T @ y
    if source.interpolates:
        # I - H = U g U^T with g = lambda / (S^2 + lambda). Residuals and hat matrix both vanish with lambda, their
        # quotient does not: any multiple of g will do, and one of order 1 loses no digits.
        g = (1 / (source.eigenvalues + ridge)).to(y)
        g = g / g.max()
        residuals = u @ (g[:, None] * seen)
    else:
        g = (ridge / (source.eigenvalues + ridge)).to(y)
        residuals = y - u @ ((1 - g)[:, None] * seen)
    for members in sentences:
        left = einsum(u[members], g, u[members], "sentence i rank, rank, sentence j rank -> sentence i j")
        if not source.interpolates:
            left = left + torch.eye(members.shape[1]).to(y) - einsum(u[members], u[members], "s i rank, s j rank -> s i j")
            if source.root_weights is not None:
                q = source.root_weights.to(y)[members]
                left = left - einsum(q, q, "sentence i, sentence j -> sentence i j")
        residuals[members] = torch.linalg.solve(left, residuals[members])
    return residuals


def group_rows(sentence: Int[Tensor, " row"]) -> list[Int[Tensor, "sentence size"]]:
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
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

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
            ValueError: different numbers of rows, fewer than two sentences, NaN or infinity, an unknown method.
        """
        source = _as_activations(source, "source", sentence)
        target = _as_activations(target, "target", sentence)
        source, target = pair(source, target)
        if method not in ("ridge", "paper"):
            raise ValueError(f"expected method 'ridge' or 'paper'; got {method!r}.")
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
        return self._once(("decomposition", layer), lambda: self._decompose(layer))

    def _decompose(self, layer: int) -> Decomposition:
        return decompose(self.source.at(layer), self._weights(layer), centre=self.method != "paper")

    def ridge(self, layer: int) -> float:
        """Ridge strength of one source layer, as a multiple of its mean eigenvalue."""
        if self.fixed_ridge is not None:
            return self.fixed_ridge
        return self._once(("ridge", layer), lambda: self._choose_ridge(layer))

    def _choose_ridge(self, layer: int) -> float:
        # One strength serves all target layers, each counted relative to its variance. Coarse first, then around the best.
        source, sentences = self.decomposition(layer), self._sentences
        targets = self._targets_alike(layer)

        def error(k: int) -> float:
            residuals = leave_one_sentence_out(source, targets, RIDGES[k] * source.scale, sentences)
            return float(residuals.square().sum())

        step = 4
        errors = {k: error(k) for k in range(0, len(RIDGES), step)}
        while step > 1:
            step //= 2
            best = min(errors, key=errors.__getitem__)
            errors |= {k: error(k) for k in (best - step, best + step) if 0 <= k < len(RIDGES)}
        return RIDGES[min(errors, key=errors.__getitem__)]

    def _targets_alike(self, layer: int) -> Float[Tensor, "row column"]:
        # Columns whose Gram matrix is the sum of all target layers', each scaled to unit variance; never more than rows.
        blocks = [y / y.norm() for y in (self._target_rows(t, layer).float() for t in self.target.layers)]
        if sum(y.shape[1] for y in blocks) <= len(self.source):
            return torch.cat(blocks, dim=1)
        eigenvalues, vectors = torch.linalg.eigh(sum(y @ y.T for y in blocks))
        return vectors * eigenvalues.clamp_min(0).sqrt()

    @cached_property
    def r2(self) -> Float[Tensor, "source_layer target_layer"]:
        """Held-out R2 of every pair, leave-one-sentence-out: 1 - residual / total, over all dimensions together."""
        grid = torch.empty(len(self.source.layers), len(self.target.layers))
        for i, s in track(enumerate(self.source.layers), "held-out R2", len(self.source.layers)):
            source, ridge = self.decomposition(s), self.ridge(s)
            ridge = ridge * source.scale
            if self._narrow:
                operator = leave_one_sentence_out(source, torch.eye(len(self.source)), ridge, self._sentences)
                quadratic = operator.T @ operator
            for j, t in enumerate(self.target.layers):
                if self._narrow:
                    gram = self._target_gram(t, s)
                    error, total = (quadratic * gram).sum(), gram.trace()
                else:
                    y = self._target_rows(t, s).float()
                    error = leave_one_sentence_out(source, y, ridge, self._sentences).square().sum()
                    total = y.square().sum()
                grid[i, j] = 1 - error / total
        return grid

    @cached_property
    def cka(self) -> Float[Tensor, "source_layer target_layer"]:
        """Linear centred kernel alignment of every pair: |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms."""
        xs = [_weighted_centred(self.source.at(s).double(), None)[0].float() for s in self.source.layers]
        ys = [_weighted_centred(self.target.at(t).double(), None)[0].float() for t in self.target.layers]
        if self._narrow:
            k, m = (torch.stack([a @ a.T for a in side]) for side in (xs, ys))
            shared = einsum(k, m, "s i j, t i j -> s t")
            norms = [gram.flatten(1).norm(dim=1) for gram in (k, m)]
        else:
            shared = torch.stack([torch.stack([(x.T @ y).square().sum() for y in ys]) for x in xs])
            norms = [torch.stack([(a.T @ a).norm() for a in side]) for side in (xs, ys)]
        return shared / (norms[0][:, None] * norms[1])

    @property
    def _narrow(self) -> bool:
        """Whether n x n Gram matrices are the smaller ones."""
        return len(self.source) <= self.source.values.shape[-1]

    @cached_property
    def _sentences(self) -> list[Int[Tensor, "sentence size"]]:
        return group_rows(self.source.sentence)

    def _weights(self, layer: int) -> Float[Tensor, " row"] | None:
        return None if self.weights is None else self.weights[self.source.layers.index(layer)].double()

    def _target_rows(self, target_layer: int, source_layer: int) -> Float[Tensor, "row d_target"]:
        y = self.target.at(target_layer).double()
        return y if self.method == "paper" else _weighted_centred(y, self._weights(source_layer))[0]

    def _target_gram(self, target_layer: int, source_layer: int) -> Float[Tensor, "row row"]:
        # The same for every source layer unless rows are weighted.
        key = ("gram", target_layer, None if self.weights is None else source_layer)
        y = self._target_rows(target_layer, source_layer).float()
        return self._once(key, lambda: y @ y.T)

    def _once(self, key: Any, compute: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    # --- what it is for ---------------------------------------------------------------------------------------------

    def __getitem__(self, layers: tuple[int, int]) -> AffineMap:
        """The affine map of one pair of layers, (source layer, target layer)."""
        s, t = layers
        source, y = self.decomposition(s), self._target_rows(t, s)
        ridge = self.ridge(s)
        weight = y.T @ (source.u @ ((source.u.T @ source.rows) / (source.eigenvalues + ridge * source.scale)[:, None]))
        if self.method == "paper":
            bias = torch.zeros(len(weight), dtype=torch.float64)
        else:
            x_mean, y_mean = (self._mean(activations.at(layer), s) for activations, layer in self._ends(s, t))
            bias = y_mean - weight @ x_mean
        residuals = leave_one_sentence_out(source, y, ridge * source.scale, self._sentences)
        report = FitReport(
            method=self.method,
            rows=len(self.source),
            sentences=len(self.source.sentence.unique()),
            rank=len(source.eigenvalues),
            ridge=ridge,
            r2=float(1 - residuals.square().sum() / y.square().sum()),
        )
        return AffineMap(weight.float(), bias.float(), report)

    def _ends(self, source_layer: int, target_layer: int) -> tuple[tuple[Activations, int], tuple[Activations, int]]:
        return (self.source, source_layer), (self.target, target_layer)

    def _mean(self, rows: Float[Tensor, "row d_model"], source_layer: int) -> Float[Tensor, " d_model"]:
        weights = self._weights(source_layer)
        return rows.double().mean(0) if weights is None else (weights @ rows.double()) / weights.sum()

    def carry(
        self, vectors: Float[Tensor, "source_layer d_source"], targets: Sequence[int] | None = None
    ) -> Float[Tensor, "source_layer target_layer d_target"]:
        """W v for a vector at every source layer, to every target layer (or those of `targets`), without forming any W."""
        targets = self.target.layers if targets is None else targets
        carried = []
        for s, v in zip(self.source.layers, vectors.double(), strict=True):
            source = self.decomposition(s)
            dual = source.dual(v, self.ridge(s) * source.scale)
            carried.append(torch.stack([self._target_rows(t, s).T @ dual for t in targets]))
        return torch.stack(carried).float()

    def coverage(self, concept: ConceptVector) -> Float[Tensor, " source_layer"]:
        """For every source layer, the share of the concept that the corpus lets a map see, from the source alone.

        v^T X^T X (X^T X + lambda I)^-1 v / |v|^2, lambda = 1e-3 of the mean diagonal of X^T X, X centred. Look at
        1 - coverage on a logarithmic scale: 0.93 carries nothing, 0.998 nearly all.
        """
        self._check_source(concept)
        return torch.tensor([self._uniform(s).coverage(concept.at(s).double(), self._floor(s)) for s in self.source.layers])

    def reweighted(self, concept: ConceptVector) -> "LayerMaps":
        """The same maps fitted with each row counted by what it says about the concept: weights s_i^2,
        s_i = |(x_i - mean)^T (X^T X + lambda I)^-1 v|, of mean one. Source only, no labels."""
        self._check_source(concept)
        if self.method == "paper":
            raise ValueError("the paper's solver has no row weights: pass weighting='uniform'.")
        weights = torch.stack([self._uniform(s).dual(concept.at(s).double(), self._floor(s)) ** 2 for s in self.source.layers])
        weights = weights / weights.mean(1, keepdim=True)
        return replace(self, weights=weights.float(), fixed_ridge=None, _memo=self._memo_for_weights())

    def _memo_for_weights(self) -> dict[Any, Any]:
        return {("ridge", s): self.ridge(s) for s in self.source.layers}

    def _uniform(self, layer: int) -> Decomposition:
        if self.method == "ridge" and self.weights is None:
            return self.decomposition(layer)
        return self._once(("uniform", layer), lambda: decompose(self.source.at(layer)))

    def _floor(self, layer: int) -> float:
        return COVERAGE_RIDGE * float(self._uniform(layer).eigenvalues.sum()) / self.source.values.shape[-1]

    def shuffled(self, *, seed: int) -> "LayerMaps":
        """The null control: the same rows with the target's permuted, so that nothing pairs them. Refitted like any map."""
        order = torch.randperm(len(self.target), generator=torch.Generator().manual_seed(seed))
        memo = {key: value for key, value in self._memo.items() if key[0] in ("decomposition", "uniform", "ridge")}
        return replace(self, target=replace(self.target, values=self.target.values[order]), _memo=memo)

    def only(self, sources: Sequence[int], targets: Sequence[int]) -> "LayerMaps":
        """The maps between these layers only."""
        memo = {key: value for key, value in self._memo.items() if key[1] in (sources if key[0] != "gram" else targets)}
        weights = None if self.weights is None else self.weights[[self.source.layers.index(s) for s in sources]]
        return replace(self, source=self.source.only(sources), target=self.target.only(targets), weights=weights, _memo=memo)

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
        about = {
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
        memo = dict(zip((("ridge", s) for s in source.layers), about["ridges"] or (), strict=False))
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
            f"the corpus hardly shows {concept.name!r}: coverage {lowest:.3f}. A map fitted on it cannot carry the concept; add "
            "sentences that mention it in passing.",
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
