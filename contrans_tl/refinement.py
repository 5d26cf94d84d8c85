"""Refinement: contrast pairs -> the concept's direction in the residual stream, at every layer (ConTrans 3.1).

    v^l = 1/N sum_i (h+_i^l - h-_i^l)                     eq. 1; h is the last token's residual after block l

`mean` is that. `pca` is the first principal direction of the differences, *not* re-centred: subtracting their mean first, as
the paper's code and its relatives do, takes away the very thing that is looked for. `logistic` is the direction of a
regularised logistic regression between the two sides. Both give a direction only; it is scaled to the mean difference's
projection on it, so that a strength means the same with all three, and its sign is towards the positive side.

    concept = refine(source, ContrastPairs.load("data/concepts/happiness.json"))
    concept.at(9), concept.cosine(other), 0.5 * concept + other
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from contrans_tl import artifacts
from contrans_tl.activations import collect, hash_texts
from contrans_tl.data import ContrastPairs
from contrans_tl.models import HookedModel, ModelId

Method = Literal["mean", "pca", "logistic"]
"""Mean difference, first principal direction of the differences, or logistic regression."""
Positive = Float[Tensor, "positive layer d_model"]
"""Rows of the prompts with the concept."""
Negative = Float[Tensor, "negative layer d_model"]
"""Rows of those without."""


@dataclass(frozen=True, eq=False)
class ConceptVector:
    """A concept as one direction per layer of one model's residual stream, refined there or carried there."""

    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    """Block outputs (`resid_post`), counted from 0."""
    name: str
    model: ModelId
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where it comes from: method, number and hash of the pairs; if carried, from which model, by which map."""

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.vectors):
            raise ValueError(f"expected one vector a layer; got {len(self.vectors)} vectors for layers {self.layers}.")
        if self.vectors.shape[-1] != self.model.d_model:
            raise ValueError(f"expected vectors of d_model = {self.model.d_model}; got width {self.vectors.shape[-1]}.")
        if not bool(torch.isfinite(self.vectors).all()):
            raise ValueError(f"the vectors of {self.name!r} hold NaN or infinity; the activations behind them must have too.")

    def __repr__(self) -> str:
        norms = self.vectors.norm(dim=-1)
        span = f"{self.layers[0]}" if len(self.layers) == 1 else f"{self.layers[0]}..{self.layers[-1]}"
        return f"ConceptVector({self.name!r}, layers {span}, norm {norms.min():.3g}..{norms.max():.3g}, in {self.model.name!r})"

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The vector of one layer. ValueError if the concept has none there."""
        if layer not in self.layers:
            raise ValueError(f"the concept {self.name!r} has vectors at layers {self.layers}; there is none at {layer}.")
        return self.vectors[self.layers.index(layer)]

    def only(self, *layers: int) -> "ConceptVector":
        """The same concept at these layers only."""
        return replace(self, vectors=torch.stack([self.at(layer) for layer in layers]), layers=layers)

    def cosine(self, other: "ConceptVector") -> Float[Tensor, " layer"]:
        """Cosine with another vector of the same model, layer by layer."""
        self._check_like(other)
        return torch.nn.functional.cosine_similarity(self.vectors.double(), other.vectors.double(), dim=-1).float()

    def matched_to(self, other: "ConceptVector") -> "ConceptVector":
        """Rescaled to the other's norm, layer by layer: how a control is made comparable."""
        self._check_like(other)
        scale = other.vectors.norm(dim=-1) / self.vectors.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return replace(self, vectors=self.vectors * scale[:, None])

    def __add__(self, other: "ConceptVector") -> "ConceptVector":
        self._check_like(other)
        return replace(
            self,
            vectors=self.vectors + other.vectors,
            name=f"{self.name} + {other.name}",
            provenance={"sum": [self.provenance, other.provenance]},
        )

    def __mul__(self, factor: float) -> "ConceptVector":
        return replace(
            self,
            vectors=self.vectors * factor,
            name=f"{factor:g} * {self.name}",
            provenance={"factor": factor, "of": self.provenance},
        )

    __rmul__ = __mul__

    def __neg__(self) -> "ConceptVector":
        return -1.0 * self

    def __sub__(self, other: "ConceptVector") -> "ConceptVector":
        return self + (-other)

    def _check_like(self, other: "ConceptVector") -> None:
        if not self.model.same_space(other.model):
            raise ValueError(f"{self.name!r} lives in {self.model}, {other.name!r} in {other.model}: reformulate one of them.")
        if self.layers != other.layers:
            raise ValueError(f"expected the same layers; got {self.layers} and {other.layers}. Use .only(...).")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as safetensors with its provenance in the header."""
        about = {"name": self.name, "layers": self.layers, "model": self.model.to_dict(), "provenance": self.provenance}
        return artifacts.save(path, "concept vector", {"vectors": self.vectors}, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ConceptVector":
        """Read what `save` wrote. ValueError for a truncated, foreign or newer file."""
        tensors, about = artifacts.load(path, "concept vector")
        model = ModelId(**about["model"])
        return cls(tensors["vectors"], tuple(about["layers"]), about["name"], model, about["provenance"])


def refine(
    model: HookedModel,
    pairs: ContrastPairs,
    *,
    method: Method = "mean",
    layers: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> ConceptVector:
    """The concept's vector at every layer, from the last real token of every prompt, in one pass over the prompts.

    Statistics are float64 whatever the model's dtype. Eq. 1 of the paper with `method="mean"`.

    Raises:
        ValueError: an unknown method, `pca` with sides of different size, a layer the model does not have.
    """
    if method not in _METHODS:
        raise ValueError(f"expected method 'mean', 'pca' or 'logistic'; got {method!r}.")
    if method == "pca" and len(pairs.positive) != len(pairs.negative):
        raise ValueError("method='pca' works on differences: it needs as many negative prompts as positive ones.")
    prompts = [*pairs.positive, *pairs.negative]
    rows = collect(model, prompts, layers=layers, prepend_bos=prepend_bos, batch_size=batch_size)
    positive, negative = rows.values.double().tensor_split([len(pairs.positive)])
    return ConceptVector(
        vectors=_METHODS[method](positive, negative).float(),
        layers=rows.layers,
        name=pairs.name,
        model=rows.model,
        provenance={
            "method": method,
            "positive": len(positive),
            "negative": len(negative),
            "prompts_hash": hash_texts(prompts),
            "prepend_bos": rows.prepend_bos,
        },
    )


def mean_difference(positive: Positive, negative: Negative) -> Float[Tensor, "layer d_model"]:
    """Eq. 1."""
    return positive.mean(0) - negative.mean(0)


def first_component(
    positive: Float[Tensor, "pair layer d_model"], negative: Float[Tensor, "pair layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """First right singular direction of the differences, about zero rather than about their mean."""
    differences = (positive - negative).transpose(0, 1)
    directions = torch.linalg.svd(differences, full_matrices=False).Vh[:, 0]
    return _scaled_to_mean(directions, mean_difference(positive, negative))


def logistic_direction(positive: Positive, negative: Negative, penalty: float = 1e-2) -> Float[Tensor, "layer d_model"]:
    """Normal of the plane that an L2-regularised logistic regression puts between the two sides, layer by layer.

    Features are centred and scaled by one number a layer; `penalty` multiplies |w|^2 / 2 beside the mean log loss. Newton's
    method in the span of the rows, so that its cost grows with the prompts and not with d_model.
    """
    rows = torch.cat([positive, negative]).transpose(0, 1)
    side = torch.cat([torch.ones(len(positive)), -torch.ones(len(negative))]).to(rows)
    centred = rows - rows.mean(1, keepdim=True)
    centred = centred / centred.norm(dim=-1).mean(1)[:, None, None]
    directions = torch.stack([x.T @ _logistic_dual(x @ x.T, side, penalty) for x in centred])
    return _scaled_to_mean(directions, mean_difference(positive, negative))


def _logistic_dual(
    gram: Float[Tensor, "row row"], side: Float[Tensor, " row"], penalty: float, steps: int = 50
) -> Float[Tensor, " row"]:
    # minimise mean log(1 + exp(-side * (K a + b))) + penalty/2 a^T K a over a, b; damped Newton (IRLS).
    n = len(side)
    features = torch.cat([gram, torch.ones(n, 1).to(gram)], 1)
    curvature = torch.block_diag(penalty * gram, torch.zeros(1, 1).to(gram))
    jitter = 1e-10 * torch.eye(n + 1).to(gram) * gram.diagonal().mean()
    a = torch.zeros(n + 1).to(gram)

    def objective(a: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-side * (features @ a)).mean() + a @ curvature @ a / 2

    for _ in range(steps):
        p = torch.sigmoid(-side * (features @ a))
        gradient = -features.T @ (side * p) / n + curvature @ a
        hessian = features.T @ ((p * (1 - p) / n)[:, None] * features) + curvature + jitter
        step = torch.linalg.solve(hessian, gradient)
        while objective(a - step) > objective(a) and step.norm() > 1e-12 * (1 + a.norm()):
            step = step / 2
        a = a - step
        if step.norm() <= 1e-9 * (1 + a.norm()):
            break
    return a[:n]


def _scaled_to_mean(
    directions: Float[Tensor, "layer d_model"], mean: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    unit = directions / directions.norm(dim=-1, keepdim=True).clamp_min(math.ulp(0.0))
    return einsum(unit, mean, "layer d_model, layer d_model -> layer")[:, None] * unit


_METHODS = {"mean": mean_difference, "pca": first_component, "logistic": logistic_direction}
