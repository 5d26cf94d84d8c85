"""Readout: the words that a direction speaks for and against, by the final norm and the unembedding (ConTrans, Table 8).

    shift(v) = (read(v) - read(-v)) / 2          read(x) = unembed(ln_final(x)), soft cap included

The odd part, as the biases of norm and head are no doing of the vector. Its size hardly depends on the vector's length, which
the norm divides out: it ranks words, and says nothing of how strongly a transplant pushes them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.diagnostics.scores import Diagnosis, Scores
from contrans_tl.diagnostics.scores import layers as layer_labels
from contrans_tl.models import HookedModel, check_ready, identify
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import check_home
from contrans_tl.weights import materialised

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False, kw_only=True)
class Readout(Diagnosis):
    """Per layer, the tokens whose logits a concept's vector raises and lowers most. Axes of the scores: layer, way, rank."""

    tokens: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """Per layer, those raised and those lowered, the most first."""

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k tokens moved most at any layer."""
        n = self.scores.values.shape[-1]
        places = self.scores.values.flatten().abs().argsort(descending=True, stable=True)[:k].tolist()
        found = []
        for place in places:
            layer, way, rank = place // (2 * n), place // n % 2, place % n
            name = f"{self.scores.axes['layer'][layer]} {self.tokens[layer][way][rank]!r}"
            found.append((name, float(self.scores.values[layer, way, rank])))
        return found

    def to_dataframe(self) -> "DataFrame":
        """The scores as a table in long form, with the `token` of each."""
        table = self.scores.to_dataframe()
        table["token"] = [token for layer in self.tokens for way in layer for token in way]
        return table

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"tokens": [[list(way) for way in layer] for layer in self.tokens]}

    def __str__(self) -> str:
        rows = [
            f"  {layer:<4} {way:<4} {' '.join(map(repr, tokens))}"
            for layer, both in zip(self.scores.axes["layer"], self.tokens, strict=True)
            for way, tokens in zip(self.scores.axes["way"], both, strict=True)
        ]
        return "\n".join([f"Readout: {self.about}", *rows, *(f"  {note}" for note in self.notes)])


def readout(model: HookedModel, concept: ConceptVector, *, layers: Sequence[int] | None = None, k: int = 10) -> Readout:
    """The k tokens that the concept's vectors raise and lower most, at every layer that it has or at these.

    Raises:
        ValueError: a concept of another model, a layer it has no vector for, k beyond the vocabulary.
    """
    check_ready(model)
    here = identify(model)
    check_home(concept, here)
    words = len(model.tokenizer)
    if not 1 <= k <= words:
        raise ValueError(f"expected k from 1 to {words}, the tokens of {model.cfg.model_name}; got {k}.")
    concept = concept.only(*(concept.layers if layers is None else layers))
    # A head may be padded beyond the vocabulary.
    shift = token_shift(model, concept.vectors)[:, :words]
    best = torch.stack([shift.topk(k).indices, (-shift).topk(k).indices], dim=1)
    values = torch.stack([shift.gather(1, best[:, way]) for way in (0, 1)], dim=1)
    axes = {"layer": layer_labels(concept.layers), "way": ("up", "down"), "rank": tuple(str(i + 1) for i in range(k))}

    def spelt(ids: Tensor) -> tuple[str, ...]:
        return tuple(model.tokenizer.decode([token]) for token in ids.tolist())

    return Readout(
        about=f"{concept.name} in {here.name}, read through the final norm and the unembedding",
        scores=Scores(values, axes, "logits"),
        tokens=tuple((spelt(up), spelt(down)) for up, down in best),
    )


def token_shift(model: HookedModel, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    """By how much each vector, read by itself, raises and lowers the logit of each token."""
    up, down = (_read(model, sign * vectors) for sign in (1.0, -1.0))
    return (up - down) / 2


def _read(model: HookedModel, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    weights: Any = model  # the protocol asks for no final norm
    with materialised(weights.ln_final, model.unembed):
        try:
            from transformer_lens.tools.analysis import logit_readout
        except ImportError:  # 3.9
            return through_head(model, vectors)
        return logit_readout(model, vectors).values.float().cpu()


def through_head(model: HookedModel, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    """What TransformerLens's `logit_readout` (from 4 on) gives, by the model's own weights."""
    weights: Any = model  # the protocol asks for no head
    with torch.no_grad():
        logits = weights.ln_final(vectors.to(weights.W_U)[None])[0] @ weights.W_U + weights.b_U
        if (cap := getattr(model.cfg, "output_logits_soft_cap", None) or 0.0) > 0:
            logits = cap * torch.tanh(logits / cap)
    return logits.float().cpu()
