"""Affine maps: y = W x + b from one residual stream to another, how one can be fitted, and what one was fitted on.

    found.point(x)          W x + b, for activations
    found.direction(v)      W v, for differences of activations: the bias cancels

`solvers` says what the methods do, `LayerMaps` fits them.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from contrans_tl import artifacts

Method = Literal["ridge", "paper", "pcr", "reduced_rank", "procrustes", "identity"]
"""How a map is fitted; see `LayerMaps.fit`."""
EXACT = ("ridge", "paper")
"""Methods whose held-out residuals have a closed form."""
RIDGED = ("ridge", "reduced_rank")
RANKED = ("pcr", "reduced_rank")
DUAL = ("ridge", "paper", "pcr")
"""Methods whose maps are W = Y^T A with A the same for all targets."""
UNWEIGHTED = ("paper", "identity")
"""Methods that row weights change nothing in, or that have none."""


@dataclass(frozen=True)
class FitReport:
    """What an affine map was fitted on and how well it does."""

    method: Method
    rows: int
    sentences: int
    rank: int
    """Rank of the map; without a limit that of the centred source rows, at most the smaller of rows - 1 and d_source."""
    ridge: float
    """As a multiple of the mean eigenvalue."""
    r2: float
    """Share of the target's variance predicted, 1 - residual / total over all dimensions: leave-one-sentence-out for `ridge`
    and `paper` (NaN if, without ridge, some sentence alone decides its own fit), by fifths of the sentences for the
    others, on one fifth for rows on disk."""
    sinks: int = 0
    """Rows of massive norm that were left out."""


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


def check_method(method: str, ridge: float | None, rank: int | None, standardise: bool, d_source: int, d_target: int) -> None:
    """ValueError for an unknown method, or options that it does not have."""
    if method not in get_args(Method):
        raise ValueError(f"expected a method among {', '.join(get_args(Method))}; got {method!r}.")
    if ridge is not None and not 0 <= ridge < math.inf:
        raise ValueError(f"expected a ridge of at least 0, as a multiple of the mean eigenvalue; got {ridge}.")
    if ridge and method not in RIDGED:
        raise ValueError(f"method={method!r} has no ridge; use method='ridge'.")
    if rank is not None and (method not in RANKED or rank < 1):
        raise ValueError(f"expected a rank of at least 1 for {' or '.join(RANKED)}; got {rank} for {method!r}.")
    if standardise and method in UNWEIGHTED:
        raise ValueError(f"method={method!r} is defined on the rows as they are; standardise belongs to the others.")
    if method == "identity" and d_source != d_target:
        raise ValueError(f"method='identity' needs streams of one width; got {d_source} and {d_target}. Use 'procrustes'.")
