"""Solvers: the linear algebra behind the maps, on plain tensors.

Rows are paired activations x_i, y_i with weights w_i; X and Y hold the rows sqrt(w_i) (x_i - mean_w x), and everything starts
from the thin decomposition X = U S V^T of one source layer - from X^T X when rows outnumber dimensions, from X X^T otherwise,
whichever is smaller. V need not be formed: V^T v = S^-1 U^T X v. A map is its *coefficients* C, "rank d_target", with
W v = C^T V^T v:

    ridge           C = S (S^2 + lambda)^-1 U^T Y              least squares is lambda = 0
    pcr             the same with lambda = 0 on the leading k directions: principal component regression
    reduced_rank    ridge's C, projected on the k directions of the target that hold most of the (ridge-augmented) fit
    procrustes      C = c P, P the polar factor of S U^T Y: a rotation and one scale c, by least squares

Ridge alone also has a dual form that serves every target layer, W v = Y^T a with a = U (S^2 + lambda)^-1 U^T X v, and
residuals of leave-one-sentence-out that are exact without refitting: with H = q q^T + U S^2 (S^2 + lambda)^-1 U^T, q the unit
vector along sqrt(w) (the bias), the rows g of a sentence have held-out residuals (I - H_gg)^-1 (Y - H Y)_g.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

Groups = Sequence[Int[Tensor, "_ _"]]
"""The rows of each sentence, "sentence size", one tensor for each sentence length."""

RIDGES = tuple(10.0**k for k in torch.linspace(-7, 1, 17).tolist())
"""Ridge strengths tried, as multiples of the mean eigenvalue. Wide, because a few rows of huge norm (attention sinks) move
the best value a thousandfold."""
COVERAGE_RIDGE = 1e-3
"""Ridge of coverage and of the concept weights, as a multiple of the mean diagonal of X^T X."""
FOLDS = 5
"""Parts of the sentences held out in turn where leave-one-sentence-out has no closed form."""
CONCEPT_SHARE = 0.5
"""Share of all weight that goes by what rows say about a concept; the rest is uniform, so that no few rows decide the fit.
`data/studies/weighting.py` chose it on select questions: as good as all of it, with three times the effective rows."""
TINY = torch.finfo(torch.float64).tiny
"""Keeps a layer whose rows are all alike from dividing zero by zero: it counts as not predicted at all."""
DECIDED = 1e-9
"""Without ridge, a sentence whose rows keep less than this of their residuals decides its own fit; far above float64's
rounding, far below what two rows in general position keep."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """X = U S V^T of the weighted, centred rows of one source layer, without V."""

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
        return self.prepare(self.x)

    def prepare(self, y: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
        """Rows of either side as the fit sees them: weighted and centred, or as given."""
        return weighted_centred(y, self.weights) if self.centre else y.double()

    @property
    def scale(self) -> float:
        """The mean eigenvalue, the unit in which ridge strengths are given."""
        return float(self.eigenvalues.sum()) / most_rank(self.x)

    @property
    def singular(self) -> Float[Tensor, " rank"]:
        """S."""
        return self.eigenvalues.sqrt()

    def leading(self, rank: int) -> "Decomposition":
        """The directions of most variance only."""
        kept = self.eigenvalues.argsort(descending=True)[:rank]
        return replace(self, u=self.u[:, kept], eigenvalues=self.eigenvalues[kept])

    def coordinates(self, x: Float[Tensor, "*new d_source"]) -> Float[Tensor, "*new rank"]:
        """x V of a vector, or of rows less the mean."""
        back = self.u / self.singular
        return (self.rows @ x) @ back if x.ndim == 1 else x @ (self.rows.T @ back)

    def weight(self, coefficients: Float[Tensor, "rank d_target"]) -> Float[Tensor, "d_target d_source"]:
        """W = C^T V^T."""
        return (coefficients / self.singular[:, None]).T @ (self.u.T @ self.rows)

    @property
    def interpolates(self) -> bool:
        """Whether the rows determine every residual: with nothing left outside U, only the ridge keeps a map from
        reproducing its rows exactly."""
        return len(self.eigenvalues) == len(self.u) - self.centre

    def along(self, v: Float[Tensor, " d_source *vector"]) -> Float[Tensor, " row *vector"]:
        """X v. The mean is taken out of the products, which spares a copy of the rows."""
        seen = self.x.double() @ v
        return self.prepare(seen.reshape(len(seen), -1)).reshape(seen.shape)

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
        return torch.eye(members.shape[1]).to(self.u) - between

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
    rows = weighted_centred(x, weights)
    n, d_source = x.shape
    gram = products(rows if n <= d_source else rows.T)
    if gram.is_cpu:  # three quarters of the time of torch's at n = 800 and 1600 on one core (OpenBLAS, MKL)
        eigenvalues, vectors = map(torch.from_numpy, np.linalg.eigh(gram.numpy()))
    else:
        eigenvalues, vectors = torch.linalg.eigh(gram)
    kept = eigenvalues > eigenvalues.max() * max(x.shape) * torch.finfo(torch.float64).eps
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    u = vectors if n <= d_source else rows @ (vectors / eigenvalues.sqrt())
    return Decomposition(u, eigenvalues, x, weights, centre)


def dual_coefficients(
    rows: Float[Tensor, "row d_source"], v: Float[Tensor, " d_source *vector"], ridge: float
) -> Float[Tensor, " row *vector"]:
    """a = X (X^T X + lambda I)^-1 v = (X X^T + lambda I)^-1 X v, for one lambda > 0: a Cholesky factorisation of the smaller
    Gram matrix, some twenty times cheaper than the decomposition that serves every lambda."""
    n, d_source = rows.shape
    gram = products(rows if n <= d_source else rows.T)
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    columns = v.reshape(d_source, -1)
    if n <= d_source:
        duals = torch.cholesky_solve(rows @ columns, factor)
    else:
        duals = rows @ torch.cholesky_solve(columns, factor)
    return duals.reshape(n, *v.shape[1:])


def products(x: Float[Tensor, "row column"]) -> Float[Tensor, "row row"]:
    """X X^T. On the CPU by numpy, which sees that both factors are the same and computes half."""
    if not x.is_cpu:
        return x @ x.T
    rows = x.numpy()
    return torch.from_numpy(rows @ rows.T)


def weighted_mean(x: Float[Tensor, "row d_model"], weights: Float[Tensor, " row"] | None) -> Float[Tensor, " d_model"]:
    """mean_w x, in float64."""
    return x.double().mean(0) if weights is None else (weights @ x.double()) / weights.sum()


def weighted_centred(x: Float[Tensor, "row d_model"], weights: Float[Tensor, " row"] | None) -> Float[Tensor, "row d_model"]:
    """sqrt(w_i) (x_i - mean_w x), in float64."""
    centred = x.double() - weighted_mean(x, weights)
    return centred if weights is None else weights.sqrt()[:, None] * centred


def _unit_weights(x: Float[Tensor, "row d_model"], weights: Float[Tensor, " row"] | None) -> Float[Tensor, " row"]:
    """q, the unit vector along sqrt(w)."""
    return torch.full((len(x),), len(x) ** -0.5).to(x).double() if weights is None else (weights / weights.sum()).sqrt()


def weighted_variance(gram: Float[Tensor, "row row"], weights: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    """sum_i w_i |y_i - mean_w y|^2 from the rows' Gram matrix."""
    return weights @ gram.diagonal() - weights @ gram @ weights / weights.sum()


def most_rank(x: Float[Tensor, "row d_model"]) -> int:
    """The most directions that centred rows can have."""
    return min(len(x) - 1, x.shape[1])


def least_squares(
    source: Decomposition, seen: Float[Tensor, "rank d_target"], ridge: float = 0.0
) -> Float[Tensor, "rank d_target"]:
    """C of ridge (lambda absolute) or least squares, `seen` = U^T Y."""
    return (source.singular / (source.eigenvalues + ridge))[:, None] * seen


def target_directions(
    source: Decomposition, seen: Float[Tensor, "rank d_target"], ridge: float
) -> Float[Tensor, "d_target component"]:
    """Orthonormal directions of the target, those first that hold most of ridge's fit: principal axes of the fitted values
    with the rows sqrt(lambda) W appended, as ridge is least squares on such rows. The best map of rank k is ridge's,
    projected on the first k (reduced-rank ridge regression, Mukherjee and Zhu 2011)."""
    fitted = (source.eigenvalues / (source.eigenvalues + ridge)).sqrt()[:, None] * seen
    return torch.linalg.svd(fitted, full_matrices=False).Vh.T


def rotation(source: Decomposition, seen: Float[Tensor, "rank d_target"]) -> Float[Tensor, "rank d_target"]:
    """C of the scaled orthogonal Procrustes map: orthonormal rows or columns, whichever are fewer (the narrower space is
    padded with zeros), times the scale that leaves the least residual."""
    left, sizes, right = torch.linalg.svd(source.singular[:, None] * seen, full_matrices=False)
    polar = left @ right
    return polar * (sizes.sum() / (source.singular[:, None] * polar).square().sum().clamp_min(TINY))


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


def folds(sentence: Int[Tensor, " row"], n: int) -> list[tuple[Int[Tensor, " fitted"], Int[Tensor, " held_out"]]]:
    """n ways to set aside every n-th sentence: the rows that are fitted and those that are held out."""
    number = sentence.unique(return_inverse=True)[1]
    n = min(n, int(number.max()) + 1)
    return [((number % n != k).nonzero()[:, 0], (number % n == k).nonzero()[:, 0]) for k in range(n)]


def concept_weights(shown: Float[Tensor, "*layer row"]) -> Float[Tensor, "*layer row"]:
    """Row weights of mean one from s_i, what each row says about a concept: 1 - c + c s_i^2 / mean s^2, c = `CONCEPT_SHARE`."""
    squares = shown.square()
    return 1 - CONCEPT_SHARE + CONCEPT_SHARE * squares / squares.mean(-1, keepdim=True)


def effective_rows(weights: Float[Tensor, "*layer row"]) -> Float[Tensor, " *layer"]:
    """How many rows of one weight would say as much: (sum w)^2 / sum w^2 (Kish)."""
    return weights.sum(-1).square() / weights.square().sum(-1)
