"""Quality: what the map between two layers is worth, before anything is transplanted through it.

    print(assess(maps, (9, 18)))
    print(assess(maps, (9, 18), concept=concept, native=native, ceiling=float(split_half(target, pairs, layers=[18]))))

Of the rows, all held out by leave-one-sentence-out, y_i the target's row, p_i its prediction, m the mean of the y_i:

    R2            1 - sum |y_i - p_i|^2 / sum |y_i - m|^2, over all dimensions together and for each alone
    cosine        mean of cos(p_i - m, y_i - m)
    retrieval@1   how often, by that cosine, y_i is the nearest of all rows to p_i; and p_i the nearest prediction to y_i
    linear CKA    |X^T Y|^2 / (|X^T X| |Y^T Y|), X and Y centred, beside that of permuted rows: the raw number grows with
                  the dimensions and falls with the rows, and means nothing alone (Groger et al., arXiv 2602.14486)
    cycle R2      of x_i -> target -> source against x_i, by the maps both ways: what survives the way, not whether it is paired
                  (with fewer rows than dimensions, maps between unrelated rows return what lies in their span)

*Sink rows*, of massive norm, are left out of all of these: a handful of them holds nearly all variance, any map predicts
it, and R2 says 0.9997 where content rows have 0.57. R2 with them is given beside it.

Of a concept v carried to W v:

    energy        |P v|^2 / |v|^2, P the projection on the span of the fitted rows: what lies outside is mapped to 0
    coverage      the share that the corpus lets the map see (`LayerMaps.coverage`)
    cycle         cos(W_back W v, v)
    cone          the angle about W v that holds 95% of the vectors that bootstrap resamples of the sentences carry
    native        cos(W v, u) with the target's own vector u, beside the most that even a perfect vector could reach, u
                  being an average over a few prompts (`split_half`)

Only the target's own vector needs a model; the rest is arithmetic on the rows that the maps were fitted on. None of it says
that the concept will act: that is `evaluate`'s to say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from contrans_tl.activations import collect, sink_rows
from contrans_tl.data import ContrastPairs
from contrans_tl.models import HookedModel
from contrans_tl.refinement import ConceptVector, mean_difference
from contrans_tl.reformulation import RANKED, UNWEIGHTED, LayerMaps
from contrans_tl.solvers import TINY, decompose

ROWS_COMPARED = 2048
"""At most so many rows, drawn at random, are compared with one another, for retrieval and for CKA: their products are the one
thing here that grows with the square of the rows."""
ALIKE = 1e-8
"""Rows whose cosine is nearer to 1 than this are the same row to retrieval: the first word of many sentences. Float32
activations of one token in two batches differ by about 1e-6 of their norm, which takes 1e-12 from the cosine."""


@dataclass(frozen=True)
class LinearCKA:
    """Linear CKA beside its permutation null."""

    value: float
    debiased: float
    """With the unbiased estimator of HSIC, which does not grow with dimensions over rows (Song et al. 2012)."""
    null_mean: float
    """Mean raw CKA when the rows of one side are permuted."""
    null_95: float
    """95th percentile of the same."""
    p_value: float
    """Share of permutations, the identity counted, that reach the value."""
    rows: int
    """One of each sentence, as rows of one sentence are not exchangeable."""


@dataclass(frozen=True)
class ConceptQuality:
    """What a map does to one concept."""

    name: str
    energy: float
    """Share of |v|^2 in the span of the fitted rows."""
    coverage: float
    norm_ratio: float
    """|W v| / |v|; ridge shrinks."""
    cone: float
    """Degrees."""
    cycle: float
    """Cosine of W_back W v with v."""
    norm_to_native: float | None = None
    """|W v| / |u|."""
    cosine_to_native: float | None = None
    ceiling: float | None = None
    """See `split_half`."""


@dataclass(frozen=True, eq=False)
class MapQuality:
    """What the map between two layers is worth; see the module. Rows are held out; sink rows are left out where not named."""

    source: str
    target: str
    layers: tuple[int, int]
    method: str
    weighted: bool
    rows: int
    sentences: int
    r2: float
    r2_by_dimension: Float[Tensor, " d_target"]
    """NaN for a dimension that is constant."""
    cosine: float
    """Below 0 for a map that knows nothing: it predicts the mean of the other sentences, which leans away from this one."""
    retrieval: float
    """Predictions whose nearest target row is their own."""
    retrieval_back: float
    """Target rows whose nearest prediction is their own."""
    candidates: int
    """Rows among which one is to be found; chance is one over it."""
    cka: LinearCKA
    spectrum: Float[Tensor, " rank"]
    """Singular values of W, largest first."""
    effective_rank: float
    """exp of the entropy of the squared singular values' shares: how many equal directions would spread as much."""
    sink_rows: int
    """In either model."""
    r2_with_sinks: float
    """Of all rows."""
    r2_refitted: float
    """Of the content rows, by a map that is fitted without sink rows too, as the default is."""
    cycle_r2: float
    """On a fifth of the sentences, by maps fitted on the others."""
    concept: ConceptQuality | None = None

    @property
    def r2_median(self) -> float:
        """Median over the dimensions that vary: R2 over all together is that of the few with the largest variance."""
        return float(self.r2_by_dimension.nanmedian())

    def to_dict(self) -> dict[str, Any]:
        """Plain values; tensors as lists."""
        return plain_values(self) | {"r2_median": self.r2_median}

    def __str__(self) -> str:
        a, c = self.cka, self.concept
        lines = [
            f"{self.source} L{self.layers[0]} -> {self.target} L{self.layers[1]}: {self.method}"
            f"{', weighted' if self.weighted else ''}, {self.rows} rows of {self.sentences} sentences, held out",
            f"  R2                 {self.r2:.3f}   median dimension {self.r2_median:.3f}",
            f"  centred cosine     {self.cosine:.3f}",
            f"  retrieval@1        {self.retrieval:.3f}   back {self.retrieval_back:.3f}, of {self.candidates} rows",
            f"  linear CKA         {a.value:.3f}   debiased {a.debiased:.3f}; permuted {a.null_mean:.3f}, 95% below "
            f"{a.null_95:.3f}, p = {a.p_value:.3g} ({a.rows} rows)",
            f"  effective rank     {self.effective_rank:.1f}   of {len(self.spectrum)}",
            f"  sink rows          {self.sink_rows / self.rows:.1%}"
            + (f"   R2 with them {self.r2_with_sinks:.4f}, fitted without {self.r2_refitted:.3f}" if self.sink_rows else ""),
            f"  cycle R2           {self.cycle_r2:.3f}",
        ]
        if c is not None:
            lines += [
                f"  {c.name}",
                f"    coverage         {c.coverage:.4f}   energy in the span {c.energy:.4f}",
                f"    norm ratio       {c.norm_ratio:.3f}" + _given("   to the native vector's ", c.norm_to_native),
                f"    cone             {c.cone:.1f} degrees",
                f"    cycle cosine     {c.cycle:.3f}",
            ]
            if c.cosine_to_native is not None:
                lines.append(f"    cosine to native {c.cosine_to_native:.3f}" + _given("   ceiling ", c.ceiling))
        return "\n".join(lines)


def assess(
    maps: LayerMaps,
    layers: tuple[int, int],
    *,
    concept: ConceptVector | None = None,
    native: ConceptVector | None = None,
    ceiling: float | None = None,
    seed: int = 0,
) -> MapQuality:
    """What the map from one source layer to one target layer is worth, as the maps are fitted and weighted: for the concept as
    `reformulate` carries it by default, pass `maps.reweighted(concept)`. Every row counts alike, whatever its weight.

    Args:
        concept: in the source; adds what the map does to it.
        native: the same concept refined in the target.
        ceiling: of the cosine to the native vector, from `split_half`.

    Raises:
        ValueError: a layer the maps do not have, a concept of another model, a ceiling or a native vector without what it
            belongs to, or fewer than five sentences.
    """
    s, t = layers
    one = maps.only([s], [t])
    check_vectors(one, concept, native, ceiling)
    x, y = one.source.at(s), one.target.at(t)
    content = ~(sink_rows(x).cpu() | sink_rows(y).cpu())
    kept = content.nonzero()[:, 0]
    sentences = one.source.sentence[kept].unique()
    if len(sentences) < 5:
        raise ValueError(f"expected maps of at least five sentences, to hold some out; got {len(sentences)}.")

    generator = torch.Generator().manual_seed(seed)
    predicted = one.held_out(s, t)
    everywhere, wanted, n_sinks = predicted, y, len(x) - len(kept)
    if one.sinks is not None:  # left out of the fit, hence held out
        apart = [side.at(layer).float() for side, layer in zip(one.sinks, layers, strict=True)]
        everywhere, wanted = torch.cat([predicted, one[s, t].point(apart[0])]), torch.cat([y, apart[1]])
        n_sinks += len(apart[0])
    p, a = predicted[content], y[content]
    compared = torch.randperm(len(kept), generator=generator)[:ROWS_COMPARED]
    found, found_back = retrieval(p[compared], a[compared])
    one_each = kept[_one_of_each(one.source.sentence[kept], generator)[:ROWS_COMPARED]]
    residual, total = _squares(p, a)
    r2 = _share(residual, total)
    spectrum = _singular_values(one[s, t].weight)
    return MapQuality(
        source=one.source.model.name,
        target=one.target.model.name,
        layers=(s, t),
        method=one.method,
        weighted=one.weights is not None,
        rows=len(wanted),
        sentences=len(sentences),
        r2=r2,
        r2_by_dimension=torch.where(total > 0, 1 - residual / total, torch.nan).float().cpu(),
        cosine=_mean_cosine(p, a),
        retrieval=found,
        retrieval_back=found_back,
        candidates=len(compared),
        cka=linear_cka(x[one_each], y[one_each], seed=seed),
        spectrum=spectrum.float(),
        effective_rank=effective_rank(spectrum),
        sink_rows=n_sinks,
        r2_with_sinks=_share(*_squares(everywhere, wanted)),
        r2_refitted=r2 if content.all() else _share(*_squares(refitted(one, kept).held_out(s, t), a)),
        cycle_r2=_cycle_r2(one, kept, generator),
        concept=None if concept is None else _assess_concept(one, concept, native, ceiling, seed),
    )


def check_vectors(
    maps: LayerMaps, concept: ConceptVector | None, native: ConceptVector | None, ceiling: float | None = None
) -> None:
    """ValueError for a concept elsewhere than where the maps begin, a native vector elsewhere than where they end, or one of
    these without what it belongs to."""
    if (native is not None and concept is None) or (ceiling is not None and native is None):
        raise ValueError("native= is compared with the carried concept=, ceiling= belongs to native=: pass those as well.")
    for name, vector, model in (("concept", concept, maps.source.model), ("native", native, maps.target.model)):
        if vector is not None and not vector.model.same_space(model):
            raise ValueError(f"expected {name}= in {model}, where these maps begin or end; it lives in {vector.model}.")


def _assess_concept(
    maps: LayerMaps, concept: ConceptVector, native: ConceptVector | None, ceiling: float | None, seed: int
) -> ConceptQuality:
    (s,), (t,) = maps.source.layers, maps.target.layers
    concept = concept.only(s)
    v, carried = concept.at(s).double().cpu(), maps.carry(concept.vectors)[0, 0].double().cpu()
    quality = ConceptQuality(
        name=concept.name,
        energy=_energy(maps, v),
        coverage=float(maps.coverage(concept)[0]),
        norm_ratio=float(carried.norm() / v.norm().clamp_min(TINY)),
        cone=cone_angle(maps, (s, t), concept, seed=seed),
        cycle=cycle_cosine(maps, (s, t), concept),
    )
    if native is None:
        return quality
    u = native.at(t).double().cpu()
    return replace(
        quality,
        norm_to_native=float(carried.norm() / u.norm().clamp_min(TINY)),
        cosine_to_native=float(cosine_similarity(carried, u, dim=0)),
        ceiling=ceiling,
    )


# --- rows -----------------------------------------------------------------------------------------------------------


def retrieval(predicted: Float[Tensor, "row d_model"], actual: Float[Tensor, "row d_model"]) -> tuple[float, float]:
    """How often a prediction's nearest actual row is its own, and an actual row's nearest prediction, by centred cosine.

    Rows that are the same row (`ALIKE`) do not compete with each other; otherwise a tie is a miss. NaN if a prediction is.
    """
    if not bool(torch.isfinite(predicted).all()):
        return np.nan, np.nan
    mean = actual.double().mean(0)
    p, a = normalize(predicted.double() - mean, dim=-1), normalize(actual.double() - mean, dim=-1)
    own = (p * a).sum(-1)
    rival, rival_back = torch.full_like(own, -torch.inf), torch.full_like(own, -torch.inf)
    for rows in torch.arange(len(p)).split(512):
        scores = (p[rows] @ a.T).masked_fill(a[rows] @ a.T > 1 - ALIKE, -torch.inf)
        rival[rows] = scores.amax(1)
        rival_back = torch.maximum(rival_back, scores.amax(0))
    return float((own > rival).double().mean()), float((own > rival_back).double().mean())


def linear_cka(
    x: Float[Tensor, "row d_source"], y: Float[Tensor, "row d_target"], *, permutations: int = 199, seed: int = 0
) -> LinearCKA:
    """Linear CKA of paired rows, raw and debiased, against permutations of whole rows. The test is exact if rows are
    exchangeable, as one row of each sentence is. ValueError for fewer than four rows."""
    if len(x) < 4:
        raise ValueError(f"expected at least four rows, as the debiased estimator divides by n - 3; got {len(x)}.")
    k, m = (_gram(rows) for rows in (x, y))
    observed, norm = float((k * m).sum()), float(np.linalg.norm(k) * np.linalg.norm(m))
    rng = np.random.default_rng(seed)
    null = np.empty(permutations)
    for i in range(permutations):
        order = rng.permutation(len(x))
        null[i] = (k * m[np.ix_(order, order)]).sum()
    unbiased = [_u_centred(gram) for gram in (k, m)]
    debiased = (unbiased[0] * unbiased[1]).sum() / max(np.linalg.norm(unbiased[0]) * np.linalg.norm(unbiased[1]), TINY)
    return LinearCKA(
        value=observed / max(norm, TINY),
        debiased=float(debiased),
        null_mean=float(null.mean() / max(norm, TINY)),
        null_95=float(np.quantile(null, 0.95) / max(norm, TINY)),
        p_value=float((1 + (null >= observed).sum()) / (1 + permutations)),
        rows=len(x),
    )


def effective_rank(singular: Float[Tensor, " rank"]) -> float:
    """exp of the entropy of the shares s_k^2 / sum s^2. (Roy and Vetterli, 2007, take the shares of s_k: a larger number.)"""
    shares = singular.double().square()
    return float(torch.special.entr(shares / shares.sum().clamp_min(TINY)).sum().exp())


def _gram(rows: Float[Tensor, "row d_model"]) -> Float[np.ndarray, "row row"]:
    centred = (rows.double() - rows.double().mean(0)).cpu().numpy()
    return centred @ centred.T


def _u_centred(gram: Float[np.ndarray, "row row"]) -> Float[np.ndarray, "row row"]:
    # Products of such matrices are unbiased for the products of the kernels they estimate (Szekely and Rizzo 2014, eq. 3.1).
    n = len(gram)
    gram = gram - np.diag(gram.diagonal())
    sums = gram.sum(0) / (n - 2)
    centred = gram - sums - sums[:, None] + sums.sum() / (n - 1)
    np.fill_diagonal(centred, 0)
    return centred


def _squares(
    predicted: Float[Tensor, "row d_model"], actual: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
    """Of every dimension, the squared residuals and the squared deviations from the mean; in float64, which no more than some
    columns at a time are held in."""
    sums = [
        ((a.double() - p).square().sum(0), (a.double() - a.double().mean(0)).square().sum(0))
        for p, a in zip(predicted.split(256, dim=1), actual.split(256, dim=1), strict=True)
    ]
    residuals, totals = zip(*sums, strict=True)
    return torch.cat(residuals), torch.cat(totals)


def _share(residual: Float[Tensor, " d_model"], total: Float[Tensor, " d_model"]) -> float:
    return float(1 - residual.sum() / total.sum().clamp_min(TINY))


def _mean_cosine(predicted: Float[Tensor, "row d_model"], actual: Float[Tensor, "row d_model"]) -> float:
    mean = actual.mean(0, dtype=torch.float64)
    pairs = zip(predicted.split(1024), actual.split(1024), strict=True)
    return float(torch.cat([cosine_similarity(p - mean, a - mean, dim=-1) for p, a in pairs]).mean())


def _singular_values(weight: Float[Tensor, "d_target d_source"]) -> Float[Tensor, " rank"]:
    # By the smaller Gram matrix: what squaring loses, below 1e-8 of the largest, a float32 weight does not have.
    w = weight.double().cpu().numpy()
    eigenvalues = np.linalg.eigvalsh(w @ w.T if len(w) <= w.shape[1] else w.T @ w)
    return torch.from_numpy(eigenvalues[::-1].clip(0)).sqrt()


def _one_of_each(sentence: Int[Tensor, " row"], generator: torch.Generator) -> Int[Tensor, " sentence"]:
    """A random row of every sentence, in random order."""
    order = torch.randperm(len(sentence), generator=generator)
    _, member = sentence[order].unique(return_inverse=True)
    first = torch.full((int(member.max()) + 1,), len(order)).scatter_reduce(0, member, torch.arange(len(order)), "amin")
    return order[first.sort().values]


# --- refitting ------------------------------------------------------------------------------------------------------


def refitted(
    maps: LayerMaps, rows: Int[Tensor, " kept"], counts: Int[Tensor, " kept"] | None = None, *, anew: bool = True
) -> LayerMaps:
    """The same maps, of one source and one target layer, fitted on these rows, each counted so often: with ridge or rank
    chosen `anew`, or as these have them."""
    weights = None if maps.weights is None else maps.weights[:, rows]
    if counts is not None:
        weights = counts[None].to(maps.source.values) * (1 if weights is None else weights)
    again = replace(maps, source=maps.source.take(rows), target=maps.target.take(rows), weights=weights, _memo={})
    if anew:
        return again
    (s,), (t,) = maps.source.layers, maps.target.layers
    return replace(again, fixed_ridge=maps.ridge(s), fixed_rank=maps.rank(s, t) if maps.method in RANKED else None, _memo={})


def reversed_maps(maps: LayerMaps) -> LayerMaps:
    """The maps the other way, for one source and one target layer, whose row weights serve both ways."""
    back = replace(maps, weights=None, _memo={}).reverse()
    return back if maps.weights is None else replace(back, weights=maps.weights, _memo={})


def cone_angle(
    maps: LayerMaps, layers: tuple[int, int], concept: ConceptVector, *, resamples: int = 60, seed: int = 0
) -> float:
    """The angle in degrees about the carried concept that holds 95% of the vectors carried by maps refitted on bootstrap
    resamples of the sentences, ridge or rank as these maps have them."""
    one, v = maps.only(layers[:1], layers[1:]), concept.only(layers[0]).vectors
    carried = one.carry(v)[0, 0].double()
    sentences, member = one.source.sentence.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    cosines = []
    for _ in range(resamples):
        drawn = torch.randint(len(sentences), (len(sentences),), generator=generator)
        counts = drawn.bincount(minlength=len(sentences))[member]
        if one.method in UNWEIGHTED:
            again = refitted(one, torch.arange(len(member)).repeat_interleave(counts), anew=False)
        else:
            rows = counts.nonzero()[:, 0]
            again = refitted(one, rows, counts[rows], anew=False)
        cosines.append(cosine_similarity(again.carry(v)[0, 0].double(), carried, dim=0))
    return float(torch.stack(cosines).clamp(-1, 1).arccos().quantile(0.95).rad2deg())


def cycle_cosine(maps: LayerMaps, layers: tuple[int, int], concept: ConceptVector) -> float:
    """Cosine of the concept with itself carried to the target and back, by the maps the other way."""
    one, v = maps.only(layers[:1], layers[1:]), concept.only(layers[0]).vectors
    back = reversed_maps(one).carry(one.carry(v)[0])[0, 0]
    return float(cosine_similarity(back.double(), v[0].to(back).double(), dim=0))


def _cycle_r2(maps: LayerMaps, rows: Int[Tensor, " kept"], generator: torch.Generator) -> float:
    (s,), (t,) = maps.source.layers, maps.target.layers
    sentence = maps.source.sentence[rows]
    sentences = sentence.unique()
    out = torch.isin(sentence, sentences[torch.randperm(len(sentences), generator=generator)[: len(sentences) // 5]])
    there = refitted(maps, rows[~out])
    x = maps.source.at(s)[rows[out]].float()  # as W is
    return _share(*_squares(reversed_maps(there)[t, s].point(there[s, t].point(x)), x))


def _energy(maps: LayerMaps, v: Float[Tensor, " d_source"]) -> float:
    (s,) = maps.source.layers
    source = decompose(maps.source.at(s)) if maps.standardise else maps.decomposition(s)
    return float(source.coordinates(v[None].to(source.u)).square().sum() / v.square().sum().clamp_min(TINY))


# --- the target's own vector ----------------------------------------------------------------------------------------


def split_half(
    model: HookedModel,
    pairs: ContrastPairs,
    *,
    layers: Sequence[int] | None = None,
    splits: int = 100,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Float[Tensor, " layer"]:
    """Per layer, the cosine that a concept's mean-difference vector can be expected to have with the one that endless prompts
    of the kind would give: sqrt(2 r / (1 + r)), r the mean cosine of the vectors of two random halves of the prompts.

    With v the endless vector and e the error of the whole set's, halves have twice the error: r = |v|^2 / (|v|^2 + 2 |e|^2)
    (Spearman-Brown), and cos(v + e, v)^2 = |v|^2 / (|v|^2 + |e|^2). No vector that knows nothing of e gets nearer; one refined
    from the very same prompts in another model may know some of it, and come out above.

    Raises:
        ValueError: fewer than two prompts on a side, or as `collect`.
    """
    if min(len(pairs.positive), len(pairs.negative)) < 2:
        raise ValueError(f"{pairs.name}: expected at least two prompts on each side, to make halves; got fewer.")
    prompts = [*pairs.positive, *pairs.negative]
    rows = collect(model, prompts, layers=layers, prepend_bos=prepend_bos, batch_size=batch_size)
    sides = rows.values.double().tensor_split([len(pairs.positive)])
    generator = torch.Generator().manual_seed(seed)
    cosines = []
    for _ in range(splits):
        orders = [torch.randperm(len(side), generator=generator) for side in sides]
        if len(sides[0]) == len(sides[1]):
            orders[1] = orders[0]  # prompts that are pairs stay together; where they are none, it makes no difference
        halves = [
            mean_difference(*(side[order[part::2][: len(order) // 2]] for side, order in zip(sides, orders, strict=True)))
            for part in (0, 1)
        ]
        cosines.append(cosine_similarity(halves[0], halves[1], dim=-1))
    r = torch.stack(cosines).mean(0).clamp_min(0)
    return (2 * r / (1 + r)).sqrt().float()


# --- plain values ---------------------------------------------------------------------------------------------------


def plain_values(value: Any) -> Any:
    """Dataclasses as dicts, tensors and tuples as lists, NaN as None: what JSON takes."""
    if is_dataclass(value):
        return {field.name: plain_values(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Tensor):
        return plain_values(value.tolist())
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_values(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _given(label: str, value: float | None) -> str:
    return "" if value is None else f"{label}{value:.3f}"
