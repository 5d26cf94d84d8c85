"""One source layer's ridge under row weights, and what it tells of itself without refitting."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, reduce
from jaxtyping import Float, Int
from torch import Tensor

Groups = Sequence[Int[Tensor, "sentence size"]]


@dataclass(frozen=True, eq=False)
class WeightedRidge:
    """X holds the rows sqrt(w_i) (x_i - mean_w x); W v = Y^T a with a = X (X^T X + lambda I)^-1 v."""

    x: Float[Tensor, "row d_source"]
    weights: Float[Tensor, " row"]
    factor: Float[Tensor, "d_source d_source"]
    """Cholesky factor of X^T X + lambda I."""

    @classmethod
    def of(cls, rows: Float[Tensor, "row d_source"], weights: Float[Tensor, " row"] | None, ridge: float) -> "WeightedRidge":
        """`ridge` is a multiple of the mean eigenvalue, as in `LayerMaps`."""
        w = torch.ones(len(rows)).double() if weights is None else weights.double() / weights.double().mean()
        x = w.sqrt()[:, None] * (rows.double() - (w @ rows.double()) / w.sum())
        gram = x.T @ x
        gram.diagonal().add_(ridge * float(gram.trace()) / min(len(x) - 1, x.shape[1]))
        return cls(x, w, torch.linalg.cholesky(gram))

    def solve(self, v: Float[Tensor, "d_source column"]) -> Float[Tensor, "d_source column"]:
        """(X^T X + lambda I)^-1 v."""
        return torch.cholesky_solve(v.double(), self.factor)

    def dual(self, v: Float[Tensor, " d_source"]) -> Float[Tensor, " row"]:
        """a, for target rows prepared like X."""
        return self.x @ self.solve(v[:, None])[:, 0]

    def prepared(self, y: Float[Tensor, "row d_target"]) -> Float[Tensor, "row d_target"]:
        """Target rows, weighted and centred like X."""
        y = y.double()
        return self.weights.sqrt()[:, None] * (y - (self.weights @ y) / self.weights.sum())

    def blocks(self, groups: Groups) -> list[Float[Tensor, "sentence size size"]]:
        """(I - H)_gg of every sentence, bias included."""
        q = (self.weights / self.weights.sum()).sqrt()
        inverse = self.solve(torch.eye(self.x.shape[1]))
        made = []
        for members in groups:
            x, qg = self.x[members], q[members]
            hat = einsum(x @ inverse, x, "g i d, g j d -> g i j") + einsum(qg, qg, "g i, g j -> g i j")
            made.append(torch.eye(members.shape[1]).double() - hat)
        return made


def left_out_changes(
    fit: WeightedRidge, v: Float[Tensor, " d_source"], y: Float[Tensor, "row d_target"], groups: Groups
) -> Float[Tensor, "sentence d_target"]:
    """By how much W v changes when a sentence is left out, for every sentence: exact, without refitting. `y` as prepared,
    in the precision wanted; several targets may stand side by side."""
    a, left = fit.dual(v), torch.zeros(len(fit.x)).double()
    for members, block in zip(groups, fit.blocks(groups), strict=True):
        left[members] = torch.linalg.solve(block, a[members][..., None])[..., 0]
    # sum over a sentence of left_i (y_i - W x_i), never forming the residuals
    x, left = fit.x.to(y), left.to(y)[:, None]
    weight = fit.solve(x.T @ y).to(y)
    return _sums(left * y, groups) - _sums(left * x, groups) @ weight


def _sums(rows: Float[Tensor, "row d"], groups: Groups) -> Float[Tensor, "sentence d"]:
    return torch.cat([reduce(rows[members], "g i d -> g d", "sum") for members in groups])
