"""Reformulation: affine maps between the residual streams of two models, and concepts carried through them (ConTrans 3.2).

    maps = fit_maps(source, target, sentences)        every source layer x every target layer
    maps[9, 18].point(x)                              W x + b, for activations
    maps[9, 18].direction(v)                          W v, for differences: the bias cancels
    moved = reformulate(concept, maps, layers={9: 18})

Rows are paired activations x_i, y_i with weights w_i; X and Y hold the rows sqrt(w_i) (x_i - mean_w x). Centred ridge is

    W = Y^T X (X^T X + lambda I)^-1 ,    b = mean_w y - W mean_w x

All pairs of layers share their work: one decomposition X = U S V^T of a source layer serves every target layer, and carries
a vector there without W (see `solvers`). The ridge is the one with the least error of leave-one-sentence-out over all target
layers; as residuals are linear in Y, a few random mixtures of its columns tell. Summed over all columns, for R2, they need
Y Y^T only.

`method="paper"` is the paper's solver instead: minimum-norm least squares, no bias, no centring, no ridge. `pcr` and
`reduced_rank` limit the rank, by held-out error; `procrustes` is a rotation and one scale; `identity`, for equal widths,
moves the mean only: W = I.

Two findings set the defaults (measured in the documentation, Evidence). *Coverage* of a concept v,
v^T X^T X (X^T X + lambda I)^-1 v / |v|^2 with lambda = 1e-3 of the mean diagonal, is the share of v that the corpus lets the
map see; it needs the source alone and predicts the effect of a transplant, which held-out R2 does not. *Concept weighting*
gives every row the weight 1/2 + s_i^2 / (2 mean s^2), s_i = (x_i - mean)^T (X^T X + lambda I)^-1 v, so that the map is fitted
where the corpus speaks of the concept.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl import artifacts
from contrans_tl.activations import Activations, Rows, check_texts, collect, pair
from contrans_tl.affine import DUAL, EXACT, RANKED, RIDGED, UNWEIGHTED, AffineMap, FitReport, Method, check_method
from contrans_tl.loading import load_model
from contrans_tl.models import HookedModel, ModelId, check_layers, check_model_name
from contrans_tl.moments import fit_streamed
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector
from contrans_tl.shards import StoredActivations, store
from contrans_tl.solvers import (
    COVERAGE_RIDGE,
    FOLDS,
    RIDGES,
    TINY,
    Decomposition,
    Groups,
    LeftOut,
    concept_weights,
    decompose,
    dual_coefficients,
    effective_rows,
    folds,
    group_rows,
    least_squares,
    leave_one_sentence_out,
    most_rank,
    products,
    rotation,
    target_directions,
    weighted_centred,
    weighted_mean,
    weighted_variance,
)
from contrans_tl.tokens import check_alignment
from contrans_tl.verdict import Verdict

Weighting = Literal["concept", "uniform"]
"""Rows count by what they say about the concept, or alike (the paper's)."""
Loadable = HookedModel | str | os.PathLike[str] | Callable[[], HookedModel]
"""A model, a name for `load_model`, or what loads one when called."""
COLUMNS = 64
"""Random mixtures of the target's dimensions, over all its layers, that ridge strengths are judged by."""
SAMPLE = 4000
"""Rows that the grids of a corpus on disk are fitted on: n x n products of so many are seconds for each layer."""
ALIGNMENT_TEXTS = 1000
"""Texts on which the alignment of two tokenizers is checked before a model runs; `pair` sees the rest."""


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
    fixed_rank: int | None = None
    """Of `pcr` and `reduced_rank`; None: by held-out error, one for each source layer or for each pair."""
    standardise: bool = False
    """Whether maps are fitted on source dimensions of standard deviation 1."""
    weights: Float[Tensor, "source_layer row"] | None = None
    """Row weights, a set for each source layer; None for uniform ones."""
    stored: tuple[StoredActivations, StoredActivations] | None = None
    """All rows, on disk, where `source` and `target` are a sample: `maps[s, t]` and what `reformulate` carries between the
    layers it was told are fitted on all of them, the grids on the sample."""
    weighted_for: ConceptVector | None = None
    """The concept that the rows are weighted for."""
    sinks: tuple[Activations, Activations] | None = None
    """Rows of massive norm in either model, which no map is fitted on."""
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
        rank: int | None = None,
        standardise: bool = False,
        sinks: Literal["drop", "keep"] = "drop",
        sentence: Int[Tensor, " row"] | None = None,
    ) -> "LayerMaps":
        """Maps from activations, or from paired tensors of your own.

        Args:
            method: `ridge`; `paper`, the paper's minimum-norm solver without centring or bias; `pcr`, on the leading principal
                components of the source; `reduced_rank`, ridge of limited rank; `procrustes`, a scaled rotation;
                `identity`, for equal widths. All but the paper's have a bias.
            ridge: of `ridge` and `reduced_rank`, as a multiple of the mean eigenvalue; None chooses it by
                leave-one-sentence-out.
            rank: of `pcr` and `reduced_rank`; None chooses it by the error on fifths of the sentences.
            standardise: fit on source dimensions divided by their standard deviation, so that a ridge or a rank counts them
                alike. Points and directions go in as they are.
            sinks: `drop` rows of massive norm in any layer of either model (`activations.SINK`): a few of them would outweigh
                all others, and what they say is the same in every sentence. `paper` keeps them, as the paper does.
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
        massive = source.sinks() | target.sinks() if sinks == "drop" and method != "paper" else torch.zeros(len(source)).bool()
        apart = None
        if bool(massive.any()):
            apart = source.take(massive.nonzero()[:, 0]), target.take(massive.nonzero()[:, 0])
            source, target = (side.take((~massive).nonzero()[:, 0]) for side in (source, target))
        check_method(method, ridge, rank, standardise, source.values.shape[-1], target.values.shape[-1])
        if len(source.sentence.unique()) < 2:
            raise ValueError(f"expected rows from at least two sentences; got {len(source)} from one.")
        for activations in (source, target):
            if not bool(torch.isfinite(activations.values).all()):
                raise ValueError(f"activations of {activations.model.name} hold NaN or infinity; try another dtype.")
        rows, d_source = len(source), source.values.shape[-1]
        if (method == "paper" or ridge == 0) and 0.5 < rows / d_source < 2:
            warnings.warn(
                f"minimum-norm least squares on {rows} rows of dimension {d_source}: it is at its worst when the two are near "
                "each other (vectors several times too long, in the wrong direction; `learning_curve` shows it). Leave the "
                "ridge to method='ridge'.",
                stacklevel=2,
            )
        return cls(source, target, method, ridge if method in RIDGED else 0.0, rank, standardise, sinks=apart)

    def __repr__(self) -> str:
        return (
            f"LayerMaps({self.source.model.name!r} {len(self.source.layers)} layers -> {self.target.model.name!r} "
            f"{len(self.target.layers)} layers, {self.method}{', standardised' if self.standardise else ''}, "
            f"{len(self.source)} rows{'' if self.weights is None else ', weighted'})"
        )

    @classmethod
    def fit_stored(
        cls,
        source: StoredActivations,
        target: StoredActivations,
        *,
        ridge: float | None = None,
        sample: int = SAMPLE,
    ) -> "LayerMaps":
        """Maps from rows on disk, that `store` left there; neither model is needed. Grids are of a sample of whole sentences,
        of at most so many rows; `maps[s, t]` and `reformulate` read all of them.

        Raises:
            ValueError: as `fit`.
        """
        maps = cls.fit(source.sample(sample), target.sample(sample), ridge=ridge)
        return replace(maps, stored=(source, target))

    # --- what is computed once --------------------------------------------------------------------------------------

    def decomposition(self, layer: int) -> Decomposition:
        """Of one source layer's rows, as the maps are fitted on them; computed when first asked for."""
        return self._once(
            ("decomposition", layer),
            lambda: decompose(self._fitted_rows(layer), self._weights(layer), centre=self.method != "paper"),
        )

    def reverse(self) -> "LayerMaps":
        """Maps of the same kind from the target to the source, fitted on the very same rows, those on disk included. ValueError
        for weighted maps, whose weights belong to source layers."""
        if self.weights is not None:
            raise ValueError("row weights belong to source layers: reverse the unweighted maps.")
        chosen: dict[str, Any] = {"ridge": self.fixed_ridge} if self.method in RIDGED else {}
        chosen |= {"rank": self.fixed_rank, "standardise": self.standardise}
        # Which rows are sinks was settled on the way there: looked for again, others could be found.
        back = LayerMaps.fit(self.target, self.source, method=self.method, sinks="keep", **chosen)
        return replace(back, stored=self.stored and self.stored[::-1], sinks=self.sinks and self.sinks[::-1])

    def ridge(self, layer: int) -> float:
        """Ridge strength of one source layer, as a multiple of its mean eigenvalue; 0 where the method has none."""
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
        y = source.prepare(self._columns).to(dtype)
        source = replace(source, u=source.u.to(dtype), eigenvalues=source.eigenvalues.to(dtype))
        seen = source.u.T @ y
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
                y = y @ torch.randint(0, 2, (y.shape[1], each), generator=g).to(y).mul_(2).sub_(1)
            columns.append(y / (y - y.mean(0)).norm().clamp_min(TINY))
        return torch.cat(columns, dim=1)

    def rank(self, source_layer: int, target_layer: int) -> int:
        """Rank of the map between two layers. `pcr` has one for each source layer, `reduced_rank` one for each pair."""
        if self.method == "identity":
            return self.source.values.shape[-1]
        if self.method not in RANKED:
            full = len(self.decomposition(source_layer).eigenvalues)
            return min(full, self.target.values.shape[-1]) if self.method == "procrustes" else full
        if self.method == "pcr":
            return self._once(("rank", source_layer), lambda: self._best_rank(source_layer, self.target.layers))
        return self._best_rank(source_layer, [target_layer])

    def _best_rank(self, layer: int, targets: Sequence[int]) -> int:
        # As for the ridge, every target layer counts relative to its variance.
        ranks, errors = self._tried(layer)
        relative = errors / torch.stack([self._variance(layer, t) for t in self.target.layers])[:, None]
        return ranks[int(relative[[self.target.layers.index(t) for t in targets]].sum(0).argmin())]

    def _tried(self, layer: int) -> tuple[list[int], Float[Tensor, "target_layer rank"]]:
        """The ranks tried and, for every target layer, the squared error by parts of the sentences at each."""
        most = 1 if self.method == "identity" else len(self.decomposition(layer).eigenvalues)
        if self.method not in RANKED or self.fixed_rank is not None:
            ranks = [min(most, self.fixed_rank or most)]
        else:
            steps = (round(2 ** (k / 2)) for k in range(2 * most.bit_length()))
            ranks = sorted({*(rank for rank in steps if rank < most), most})

        def errors() -> Float[Tensor, "target_layer rank"]:
            table = torch.zeros(len(self.target.layers), len(ranks), dtype=torch.float64)
            weights = self._weights(layer)
            for part in self._parts(layer):
                weight = 1.0 if weights is None else weights[part.held_out, None]
                for row, t in zip(table, self.target.layers, strict=True):
                    y = self.target.at(t)[part.held_out].double()
                    for k, predicted in enumerate(self._predictions(part, layer, t, ranks)):
                        row[k] += (weight * (y - predicted).square()).sum()
            return table

        return ranks, self._once(("errors", layer), errors)

    def _parts(self, layer: int) -> Iterator["Part"]:
        x, weights = self._fitted_rows(layer), self._weights(layer)
        for fitted, held_out in folds(self.source.sentence, FOLDS):
            inner = None if weights is None else weights[fitted]
            there = x[held_out].double()
            there = there if self.method == "paper" else there - weighted_mean(x[fitted], inner)
            if self.method == "identity":
                yield Part(fitted, held_out, inner, None, there)
            else:
                source = decompose(x[fitted], inner, centre=self.method != "paper")
                yield Part(fitted, held_out, inner, source, source.coordinates(there))

    def _predictions(self, part: "Part", s: int, t: int, ranks: Sequence[int]) -> Iterator[Float[Tensor, "held_out d_target"]]:
        y = self.target.at(t)[part.fitted]
        mean = 0 if self.method == "paper" else weighted_mean(y, part.weights)
        for coefficients in self._coefficients(part.source, y, s, ranks):
            yield mean + (part.there if coefficients is None else part.there @ coefficients)

    def _coefficients(
        self, source: Decomposition | None, y: Float[Tensor, "row d_target"], layer: int, ranks: Sequence[int]
    ) -> Iterator[Float[Tensor, "rank d_target"] | None]:
        """C of the map to these target rows, for every rank where the method limits it; None for the identity."""
        if source is None:
            yield None
            return
        seen, ridge = source.u.T @ source.prepare(y), self.ridge(layer) * source.scale
        if self.method == "procrustes":
            yield rotation(source, seen)
        elif self.method == "reduced_rank":
            directions = target_directions(source, seen, ridge)
            along = least_squares(source, seen, ridge) @ directions
            for rank in ranks:
                yield along[:, :rank] @ directions[:, :rank].T
        elif self.method == "pcr":
            falling = source.eigenvalues.argsort(descending=True)
            for rank in ranks:
                within = torch.zeros_like(seen)
                within[falling[:rank]] = seen[falling[:rank]]
                yield least_squares(source, within)
        else:
            yield least_squares(source, seen, ridge)

    def held_out(self, source_layer: int, target_layer: int) -> Float[Tensor, "row d_target"]:
        """Every row as the map fitted without its sentence predicts it; without its part of the sentences where the method has
        no closed form (all but `ridge` and `paper`), or with weights that are zero somewhere."""
        s, t = source_layer, target_layer
        y, weights = self.target.at(t).double(), self._weights(s)
        if self.method in EXACT and (weights is None or bool((weights > 0).all())):
            residuals = self._left_out(s).residuals(self.decomposition(s).prepare(y))
            return (y - (residuals if weights is None else residuals / weights.sqrt()[:, None])).float()
        predicted = torch.empty_like(y)
        for part in self._parts(s):
            predicted[part.held_out] = next(self._predictions(part, s, t, [self.rank(s, t)]))
        return predicted.float()

    def _left_out(self, layer: int) -> LeftOut:
        source = self.decomposition(layer)
        return leave_one_sentence_out(source, self.ridge(layer) * source.scale, self._sentences)

    def _variance(self, source_layer: int, target_layer: int) -> Float[Tensor, ""]:
        """What R2 is a share of: the target's squared deviations from the mean, weighted as this source layer's rows."""
        y, weights = self.target.at(target_layer), self._weights(source_layer)
        y = y.double() if self.method == "paper" else weighted_centred(y, weights)
        return y.square().sum().clamp_min(TINY)

    @cached_property
    def r2(self) -> Float[Tensor, "source_layer target_layer"]:
        """Held-out R2 of every pair, 1 - residual / total over all dimensions together; see `FitReport.r2`."""
        row = self._r2_row if self.method in EXACT else self._r2_row_by_parts
        return torch.tensor([row(s) for s in track(self.source.layers, "held-out R2", len(self.source.layers))])

    def _r2_row_by_parts(self, layer: int) -> list[float]:
        ranks, errors = self._tried(layer)
        best = [0 if len(ranks) == 1 else ranks.index(self.rank(layer, t)) for t in self.target.layers]
        return [
            float(1 - error[k] / self._variance(layer, t)) for t, error, k in zip(self.target.layers, errors, best, strict=True)
        ]

    def _r2_row(self, layer: int) -> list[float]:
        source, dtype, weights = self.decomposition(layer), self._dtype(layer), self._weights(layer)
        left_out = self._left_out(layer)
        errors, totals = [], []
        if self._narrow:
            # Residuals are linear in the target's rows as given, R = A Y: |R|^2 = <A^T A, Y Y^T>.
            whole = source.prepare(torch.eye(len(self.source)).to(source.u)).to(dtype)
            seen = source.u.to(dtype).T if weights is None else (weights.sqrt()[:, None] * source.u).to(dtype).T
            residuals = left_out.residuals(whole, seen)
            quadratic = products(residuals.T).flatten()
            for t in self.target.layers:
                gram = self._target_gram(t, dtype)
                errors.append(float(quadratic @ gram.flatten()))
                totals.append(float(gram.trace() if weights is None else weighted_variance(gram.double(), weights)))
        else:
            for t in self.target.layers:
                y = source.prepare(self.target.at(t)).to(dtype)
                errors.append(float(left_out.residuals(y).square().sum()))
                totals.append(float(y.square().sum()))
        return [1 - error / max(total, TINY) for error, total in zip(errors, totals, strict=True)]

    @cached_property
    def cka(self) -> Float[Tensor, "source_layer target_layer"]:
        """Linear centred kernel alignment of every pair: |X^T Y|^2 / (|X^T X| |Y^T Y|), Frobenius norms."""
        xs = [weighted_centred(self.source.at(s), None).float() for s in self.source.layers]
        ys = [weighted_centred(self.target.at(t), None).float() for t in self.target.layers]
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

    def _fitted_rows(self, layer: int) -> Float[Tensor, "row d_source"]:
        """Source rows in the units that maps are fitted in."""
        rows = self.source.at(layer)
        return rows / self._spread(layer).float() if self.standardise else rows

    def _spread(self, layer: int) -> Float[Tensor, " d_source"]:
        """Standard deviation of every source dimension, 1 for a constant one; all ones without `standardise`."""

        def spread() -> Float[Tensor, " d_source"]:
            if not self.standardise:
                return torch.ones(self.source.values.shape[-1], dtype=torch.float64)
            deviation = self.source.at(layer).double().std(0)
            return torch.where(deviation > 0, deviation, 1.0)

        return self._once(("spread", layer), spread)

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
        if (stored := self.stored) is not None:
            if self.weights is not None and self.weighted_for is None:
                raise ValueError("these maps have a weight for every row of the sample only; rows on disk have `reweighted`.")
            options: dict[str, Any] = {"ridge": self.fixed_ridge, "concept": self.weighted_for}
            return self._once((f"stored to {t}", s), lambda: fit_streamed(*stored, (s, t), **options))
        x, y, weights = self.source.at(s), self.target.at(t), self._weights(s)
        source = None if self.method == "identity" else self.decomposition(s)
        coefficients = next(self._coefficients(source, y, s, [self.rank(s, t)]))
        if source is None or coefficients is None:
            weight = torch.eye(y.shape[1]).to(y).double()
        else:
            weight = source.weight(coefficients) / self._spread(s)
        bias = torch.zeros(len(weight)).to(weight)
        if self.method != "paper":
            bias = weighted_mean(y, weights) - weight @ weighted_mean(x, weights)
        report = FitReport(
            method=self.method,
            rows=len(self.source),
            sentences=len(self.source.sentence.unique()),
            rank=self.rank(s, t),
            ridge=self.ridge(s),
            r2=float(self.only([s], [t]).r2),
            sinks=0 if self.sinks is None else len(self.sinks[0]),
        )
        return AffineMap(weight.float(), bias.float(), report)

    def carry(
        self, vectors: Float[Tensor, "source_layer d_source"], targets: Sequence[int] | None = None
    ) -> Float[Tensor, "source_layer target_layer d_target"]:
        """W v for a vector at every source layer, to every target layer (or those of `targets`), without forming any W."""
        targets = self.target.layers if targets is None else targets
        layers = list(zip(self.source.layers, vectors.to(self.source.values.device).double(), strict=True))
        progress = track(layers, "carrying the concept", len(layers))
        if self.method not in DUAL:
            return torch.stack([torch.stack([self._carry_one(s, t, v) for t in targets]) for s, v in progress]).float()
        duals = torch.stack([self._dual(s, v) for s, v in progress])
        # The dual coefficients of a centred fit sum to zero over rows: the target's mean need not be taken out.
        return torch.stack([duals @ self.target.at(t).double() for t in targets], dim=1).float()

    def carry_several(self, vectors: Float[Tensor, "vector d_source"]) -> Float[Tensor, "vector d_target"]:
        """W v of several vectors between the one pair of layers that these maps have: one factorisation serves all.

        ValueError for maps between more layers.
        """
        if len(self.source.layers) != 1 or len(self.target.layers) != 1:
            raise ValueError(f"expected maps between one pair of layers; got {self}. Use maps.only([s], [t]).")
        [s], [t] = self.source.layers, self.target.layers
        vectors = vectors.to(self.source.values.device).double()
        if self.method not in DUAL:
            return torch.stack([self._carry_one(s, t, v) for v in vectors]).float()
        return (self._dual(s, vectors.T).T @ self.target.at(t).double()).float()

    def _carry_one(self, s: int, t: int, v: Float[Tensor, " d_source"]) -> Float[Tensor, " d_target"]:
        if self.method == "identity":
            return v
        source = self.decomposition(s)
        coefficients = next(self._coefficients(source, self.target.at(t), s, [self.rank(s, t)]))
        assert coefficients is not None
        return source.coordinates(v / self._spread(s)) @ coefficients

    def _dual(self, layer: int, v: Float[Tensor, " d_source *vector"]) -> Float[Tensor, " row *vector"]:
        """The row coefficients a with W v = Y^T a, Y as given."""
        ridge, weights = self.ridge(layer), self._weights(layer)
        v = (v.reshape(len(v), -1) / self._spread(layer).reshape(-1, 1)).reshape(v.shape)
        if weights is None or ridge == 0:
            source = self.decomposition(layer)
            if self.method == "pcr":
                source = source.leading(self.rank(layer, self.target.layers[0]))
            dual = source.dual(source.along(v), ridge * source.scale)
        else:  # the ridge is known: one factorisation will do
            rows = weighted_centred(self._fitted_rows(layer), weights)
            dual = dual_coefficients(rows, v, ridge * float(rows.square().sum()) / most_rank(rows))
        return dual if weights is None else einsum(weights.sqrt(), dual, "row, row ... -> row ...")

    def coverage(self, concept: ConceptVector) -> Float[Tensor, " source_layer"]:
        """For every source layer, the share of the concept that the corpus lets a map see, from the source alone.

        v^T X^T X (X^T X + lambda I)^-1 v / |v|^2, lambda = 1e-3 of the mean diagonal of X^T X, X centred. Look at
        1 - coverage on a logarithmic scale. On the embedded pair, at the two upper source layers: 0.986 to 0.995 with the
        corpus that carries the emotions, 0.953 to 0.982 with the one that does not.
        """
        self._check_source(concept)
        return torch.tensor([self._shown(s, concept.at(s)).coverage for s in self.source.layers])

    def reweighted(self, concept: ConceptVector) -> "LayerMaps":
        """The same maps fitted with each row counted by what it says about the concept: half of the weight is uniform, half
        goes by s_i^2, s_i = (x_i - mean)^T (X^T X + lambda I)^-1 v, lambda that of coverage. Source only, no labels. The ridge
        strengths stay.

        Raises:
            ValueError: the concept lives elsewhere, no row says anything about it, or a method without row weights.
        """
        self._check_source(concept)
        if self.method in UNWEIGHTED:
            raise ValueError(f"method {self.method!r} has no row weights: pass weighting='uniform'.")
        shown = torch.stack([self._shown(s, concept.at(s)).by_row for s in self.source.layers])
        if not bool((shown != 0).any(1).all()):
            raise ValueError(f"no row says anything about {concept.name!r}: its coverage is 0, no map carries it.")
        weights = concept_weights(shown).float()
        memo = self._ridges(self.source.layers) | self._known("gram", self.target.layers)
        return replace(self, weights=weights, weighted_for=concept, _memo=memo)

    def _shown(self, layer: int, v: Float[Tensor, " d_source"]) -> "Shown":
        """What the rows, unweighted, say of a vector at a source layer."""
        v = v.to(self.source.values.device).double()
        if self.method not in UNWEIGHTED and self.weights is None and not self.standardise:
            source = self.decomposition(layer)
            seen, total = source.along(v), float(source.eigenvalues.sum())
            ridge = COVERAGE_RIDGE * total / len(v)
            by_row = source.dual(seen, ridge)
        else:
            rows = weighted_centred(self.source.at(layer), None)
            seen, total = rows @ v, float(rows.square().sum())
            ridge = COVERAGE_RIDGE * total / len(v)
            by_row = dual_coefficients(rows, v, ridge)
        size = float(v.square().sum())
        coverage = float(seen @ by_row) / max(size, TINY)
        unseen = (1 - coverage) * size / max(ridge, TINY)  # v^T (X^T X + lambda I)^-1 v
        squares = by_row.square()
        times = float((squares.square().sum() / squares.sum().clamp_min(TINY)).sqrt()) / max(unseen, TINY)
        presence = times * (size * len(by_row) / max(total, TINY)) ** 0.5
        return Shown(by_row, coverage, presence)

    def verdict(self, concept: ConceptVector, source_layer: int | None = None) -> Verdict:
        """Whether the corpus lets the maps carry a concept, with a reason and a remedy, from the source alone; see `verdict`.

        Args:
            source_layer: the layer to carry it from; None is the one whose maps predict the target's layers best (R2).

        Raises:
            ValueError: the concept lives elsewhere, or a layer that the maps or the concept do not have.
        """
        self._check_source(concept)
        if source_layer is None:
            source_layer = self.source.layers[int(self.r2.nan_to_num(-torch.inf).mean(1).argmax())]
        shown = self._shown(source_layer, concept.at(source_layer))
        effective = float(effective_rows(shown.by_row.square()))
        size = self.source.values.shape[-1]
        return Verdict(concept.name, source_layer, shown.presence, shown.coverage, effective, len(self.source), size)

    @property
    def effective_rows(self) -> Float[Tensor, " source_layer"]:
        """How many rows of equal weight the maps of each source layer rest on; all rows without weights."""
        if self.weights is None:
            return torch.full((len(self.source.layers),), float(len(self.source)))
        return effective_rows(self.weights)

    def shuffled(self, *, seed: int) -> "LayerMaps":
        """The null control: the same rows, weights and ridge strengths with the target's rows permuted, so that nothing pairs
        them, and fitted again."""
        order = torch.randperm(len(self.target), generator=torch.Generator().manual_seed(seed))
        memo = self._ridges(self.source.layers) | self._known("decomposition", self.source.layers)
        return replace(self, target=replace(self.target, values=self.target.values[order]), stored=None, _memo=memo)

    def only(self, sources: Sequence[int], targets: Sequence[int]) -> "LayerMaps":
        """The maps between these layers only, and no others: the ridge strengths are those of all layers."""
        sources, targets = tuple(sources), tuple(targets)
        source, target = self.source.only(sources), self.target.only(targets)
        if (source, target) == (self.source, self.target):
            return self
        weights = None if self.weights is None else self.weights[[self.source.layers.index(s) for s in sources]]
        memo = self._ridges(sources) | self._known("decomposition", sources) | self._known("gram", targets)
        if self.method == "pcr":  # its rank serves all target layers, as the ridge does
            memo |= {("rank", s): self.rank(s, self.target.layers[0]) for s in sources}
        apart = None if self.sinks is None else (self.sinks[0].only(sources), self.sinks[1].only(targets))
        return replace(self, source=source, target=target, weights=weights, sinks=apart, _memo=memo)

    def _check_source(self, concept: ConceptVector) -> None:
        if not concept.model.same_space(self.source.model):
            raise ValueError(
                f"the concept {concept.name!r} lives in {concept.model}; these maps start in {self.source.model}. "
                "Refine it there, with the same revision and basis."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write rows, weights and chosen ridges as safetensors; to keep the file small, save `maps.only(...)`. Rows on disk
        stay where they are, and their folders are written. ValueError for weighted maps of these: weigh them once loaded."""
        return artifacts.save(path, "layer maps", *self._written())

    def _written(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the header of a file."""
        if self.stored is not None and self.weights is not None:
            raise ValueError("row weights of a corpus on disk are not saved: save the unweighted maps, reweight them again.")
        tensors = {"source": self.source.values, "target": self.target.values}
        tensors |= {"sentence": self.source.sentence, "end": self.source.end}
        if self.sinks is not None:
            tensors |= {"source_sinks": self.sinks[0].values, "target_sinks": self.sinks[1].values}
            tensors |= {"sentence_sinks": self.sinks[0].sentence, "end_sinks": self.sinks[0].end}
        if self.weights is not None:
            tensors["weights"] = self.weights
        about: dict[str, Any] = {
            "method": self.method,
            "ridges": [self.ridge(s) for s in self.source.layers] if self.method in RIDGED else None,
            "fixed_ridge": self.fixed_ridge,
            "fixed_rank": self.fixed_rank,
            "standardise": self.standardise,
            "rows": self.source.rows,
            "texts_hash": self.source.texts_hash,
            "stored": None if self.stored is None else [str(side.folder.resolve()) for side in self.stored],
        }
        for side, activations in (("source", self.source), ("target", self.target)):
            about[side] = {
                "model": activations.model.to_dict(),
                "layers": activations.layers,
                "prepend_bos": activations.prepend_bos,
            }
        return tensors, about

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LayerMaps":
        """Read what `save` wrote.

        Raises:
            ValueError: a truncated, foreign or newer file, or rows on disk that are gone or damaged.
        """
        return cls._of(*artifacts.load(path, "layer maps"))

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> "LayerMaps":
        """From what `_written` gave."""

        def rows(side: str, suffix: str = "") -> Activations:
            return Activations(
                values=tensors[side + suffix],
                layers=tuple(about[side]["layers"]),
                sentence=tensors["sentence" + suffix],
                end=tensors["end" + suffix],
                model=ModelId(**about[side]["model"]),
                rows=about["rows"],
                prepend_bos=about[side]["prepend_bos"],
                texts_hash=about["texts_hash"],
            )

        source, target = rows("source"), rows("target")
        sinks = (rows("source", "_sinks"), rows("target", "_sinks")) if "source_sinks" in tensors else None
        folders = about.get("stored")
        stored = folders and (StoredActivations.load(folders[0]), StoredActivations.load(folders[1]))
        memo: dict[tuple[str, int | None], Any] = dict(
            zip((("ridge", s) for s in source.layers), about["ridges"] or (), strict=False)
        )
        options = (about["method"], about["fixed_ridge"], about.get("fixed_rank"), about.get("standardise", False))
        return cls(source, target, *options, tensors.get("weights"), stored=stored, sinks=sinks, _memo=memo)


@dataclass(frozen=True, eq=False)
class Shown:
    """What rows say of a vector."""

    by_row: Float[Tensor, " row"]
    """s_i = (x_i - mean)^T (X^T X + lambda I)^-1 v."""
    coverage: float
    presence: float
    """See `verdict`."""


@dataclass(frozen=True, eq=False)
class Part:
    """A fit without some sentences, and those sentences."""

    fitted: Int[Tensor, " fitted"]
    held_out: Int[Tensor, " held_out"]
    weights: Float[Tensor, " fitted"] | None
    source: Decomposition | None
    """Of the fitted rows; None for the identity."""
    there: Float[Tensor, "held_out coordinate"]
    """The rows held out, less the fitted ones' mean, in the coordinates of the decomposition."""


def fit_affine(
    x: Float[Tensor, "row d_source"],
    y: Float[Tensor, "row d_target"],
    *,
    method: Method = "ridge",
    ridge: float | None = None,
    rank: int | None = None,
    standardise: bool = False,
    sentence: Int[Tensor, " row"] | None = None,
) -> AffineMap:
    """The affine map between paired rows of your own; see `LayerMaps.fit` for the arguments and errors."""
    options: dict[str, Any] = {"method": method, "ridge": ridge, "rank": rank, "standardise": standardise}
    return LayerMaps.fit(x[:, None], y[:, None], sentence=sentence, **options)[0, 0]


def fit_maps(
    source: Loadable,
    target: Loadable,
    sentences: Sequence[str],
    *,
    rows: Rows = "words",
    method: Method = "ridge",
    ridge: float | None = None,
    rank: int | None = None,
    standardise: bool = False,
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    folder: str | os.PathLike[str] | None = None,
    sample: int = SAMPLE,
) -> LayerMaps:
    """Affine maps from every source layer to every target layer, fitted on the same sentences in both models (eq. 2).

    Args:
        source: a model, or a name for `load_model`, or a function that loads one, as in `functools.partial(load_model,
            "large", device_map="auto", dtype=torch.bfloat16)`: so one model is gone from memory before the other is loaded.
        target: likewise.
        sentences: neither labels nor the prompts of any concept, but text in which the concept occurs in passing: a corpus
            that never shows it cannot carry it (`LayerMaps.coverage`).
        rows: the end of every word, aligned by character between tokenizers, or the `last` token (the paper's).
        method: see `LayerMaps.fit`, also for `ridge`, `rank` and `standardise`.
        folder: for a corpus that memory does not hold: keep all rows below this folder (`shards.store`), where a second run
            finds them. Grids are then of a sample, and `maps[s, t]` and `reformulate` read all rows.
        sample: rows of that sample, at most; of whole sentences.

    Raises:
        ValueError: as `collect`, `check_alignment` and `LayerMaps.fit`; with a folder, a method other than `ridge`.
    """
    sentences = check_texts(sentences, rows)
    if folder is not None and (method != "ridge" or standardise):
        raise ValueError(f"rows on disk are fitted by plain ridge; got {method!r}. Leave out folder=, or the other options.")
    loaded = [model for model in (source, target) if _is_model(model)]
    for model in (source, target):
        if isinstance(model, (str, os.PathLike)):
            check_model_name(os.fspath(model))
    widths = [model.cfg.d_model for model in loaded]
    check_method(method, ridge, rank, standardise, widths[0] if widths else 0, widths[-1] if widths else 0)
    if len(loaded) == 2:
        check_layers(target_layers, loaded[1].cfg.n_layers, str(loaded[1].cfg.model_name))
        if rows == "words":
            check_alignment(loaded[0], loaded[1], sentences[:ALIGNMENT_TEXTS])
    options: dict[str, Any] = {"rows": rows, "prepend_bos": prepend_bos, "batch_size": batch_size}

    def load(model: Loadable) -> HookedModel:
        gc.collect()  # a bridge is a ring of references: what nobody holds any more is still there
        if isinstance(model, (str, os.PathLike)):
            return load_model(model)
        return model if _is_model(model) else model()

    if folder is None:
        x = collect(load(source), sentences, layers=source_layers, **options)
        y = collect(load(target), sentences, layers=target_layers, **options)
        return LayerMaps.fit(x, y, method=method, ridge=ridge, rank=rank, standardise=standardise)
    stored = (
        store(load(source), sentences, folder, layers=source_layers, **options),
        store(load(target), sentences, folder, layers=target_layers, **options),
    )
    return LayerMaps.fit_stored(*stored, ridge=ridge, sample=sample)


def _is_model(model: Loadable) -> TypeGuard[HookedModel]:
    return hasattr(model, "cfg")  # a model can be called too


def reformulate(
    concept: ConceptVector,
    maps: LayerMaps,
    *,
    layers: Mapping[int, int] | None = None,
    weighting: Weighting = "concept",
) -> ConceptVector:
    """The concept in the target's residual stream: W v, never the bias (eq. 2; a concept is a difference).

    Args:
        layers: {source layer: target layer}; None pairs every target layer with the source layer whose map into it has the
            highest held-out R2. (R2 tells layers apart, not corpora; for one target layer, ask `evaluation.choose`.)
        weighting: `concept` refits the maps with rows weighted by what they say about this concept; `uniform` is the paper's.

    Raises:
        ValueError: the concept lives in another model or basis than the maps' source, or a layer the maps do not have.

    Warns where `LayerMaps.verdict` says that the concept does not arrive.
    """
    maps._check_source(concept)
    pairs = _by_r2(maps) if layers is None else [(s, t) for s, t in layers.items()]
    for s, t in pairs:
        if s not in maps.source.layers or t not in maps.target.layers:
            raise ValueError(f"expected layers of the maps, {maps.source.layers} -> {maps.target.layers}; got {s} -> {t}.")
    pairs.sort(key=lambda pair: pair[1])
    used = maps.only(sorted({s for s, _ in pairs}), sorted({t for _, t in pairs}))
    concept = concept.only(*used.source.layers)
    verdicts = {s: used.verdict(concept, s) for s in used.source.layers}
    if (worst := min(verdicts.values(), key=lambda verdict: verdict.presence)).outlook == "does not arrive":
        warnings.warn(str(worst), stacklevel=2)
    if weighting == "concept":
        used = used.reweighted(concept)
    elif weighting != "uniform":
        raise ValueError(f"expected weighting 'concept' or 'uniform'; got {weighting!r}.")
    effective = dict(zip(used.source.layers, used.effective_rows.tolist(), strict=True))
    if used.stored is None:
        grid = used.carry(concept.vectors)
        picked = [grid[used.source.layers.index(s), used.target.layers.index(t)] for s, t in pairs]
    else:
        picked = [used[s, t].direction(concept.at(s)) for s, t in pairs]
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
            "coverage": [verdicts[s].coverage for s, _ in pairs],
            "presence": [verdicts[s].presence for s, _ in pairs],
            "effective_rows": [effective[s] for s, _ in pairs],
            "rows": maps.source.rows,
            "n_rows": len(maps.source if maps.stored is None else maps.stored[0]),
            "texts_hash": maps.source.texts_hash,
            "refined": concept.provenance,
        },
    )


def _by_r2(maps: LayerMaps) -> list[tuple[int, int]]:
    """For every target layer the source layer that predicts it best, held out; the last of them where none can be told."""
    r2 = maps.r2.nan_to_num(-torch.inf)
    best = len(r2) - 1 - r2.flip(0).argmax(0)
    return [(maps.source.layers[int(s)], t) for s, t in zip(best, maps.target.layers, strict=True)]


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
