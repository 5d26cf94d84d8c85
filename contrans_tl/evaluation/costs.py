"""Costs: what a transplant does to text that has nothing to do with the concept.

side_effects(target, texts, [subject.forward, ...]).loss_increase      nats a token
side_effects(target, texts, [subject.forward, ...]).kl                 KL(model as it is || subject) of the next token
strength_for_kl(SteeredAt(target, 9), moved, texts, kl=0.1)            the strength that costs so much
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.evaluation.subjects import Forward, SteeredAt, Subject, plain
from contrans_tl.models import HookedModel
from contrans_tl.passes import head_only_at
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import by_length, encode, pad
from contrans_tl.weights import device_of


@dataclass(frozen=True, eq=False)
class SideEffects:
    """Sums over the tokens of each text but the first, which nothing predicts."""

    loss: Float[np.ndarray, " text"]
    """Negative log-likelihood of the model as it is, nats."""
    loss_increase: Float[np.ndarray, "subject text"]
    kl: Float[np.ndarray, "subject text"]
    tokens: Float[np.ndarray, " text"]

    def per_token(self, sums: Float[np.ndarray, "subject text"]) -> Float[np.ndarray, " subject"]:
        """Means over all tokens."""
        return sums.sum(1) / self.tokens.sum()


def side_effects(
    model: HookedModel | Subject, texts: Sequence[str], forwards: Sequence[Forward], *, batch_size: int = 64
) -> SideEffects:
    """Loss and next-token KL of each of these, against the model as it is, or as a subject runs it."""
    clean_forward, model = (model.forward, model.model) if isinstance(model, Subject) else (plain(model), model)
    sequences = [encoding.ids for encoding in encode(model, texts, truncate=True)]
    loss, increase, kl = np.zeros(len(texts)), np.zeros((len(forwards), len(texts))), np.zeros((len(forwards), len(texts)))
    for batch in by_length([len(ids) for ids in sequences], batch_size):
        tokens, mask = pad([sequences[i] for i in batch], device_of(model))
        before = torch.nn.functional.pad(mask[:, 1:], (0, 1)).bool()  # where a token is followed by another
        following, texts_of = tokens[:, 1:][mask[:, 1:].bool()], torch.arange(len(batch), device=mask.device)[:, None]
        owner = texts_of.expand_as(mask)[before].cpu().numpy()

        def per_text(values: Float[Tensor, " place"]) -> Float[np.ndarray, " text"]:
            return np.bincount(owner, weights=values.double().cpu().numpy(), minlength=len(batch))  # noqa: B023 - called here

        with head_only_at(model, before):
            clean = clean_forward(tokens, mask)[before].log_softmax(-1)
            likely, own = clean.exp(), -clean.gather(-1, following[:, None])[:, 0]
            loss[batch] = per_text(own)
            for k, forward in enumerate(forwards):
                logprobs = forward(tokens, mask)[before].log_softmax(-1)
                shared = logprobs.shape[-1]  # a head may be padded beyond the vocabulary, others' heads less so
                increase[k, batch] = per_text(-logprobs.gather(-1, following[:, None])[:, 0] - own)
                kl[k, batch] = per_text((likely[:, :shared] * (clean[:, :shared] - logprobs)).sum(-1))
    return SideEffects(loss, increase, kl, np.array([len(ids) - 1.0 for ids in sequences]))


def strength_for_kl(
    at: SteeredAt, concept: ConceptVector, texts: Sequence[str], kl: float, *, batch_size: int = 64, steps: int = 12
) -> float:
    """The strength at which a vector costs so many nats of next-token KL on these texts, to about 1%.

    Doubling until it costs more, then bisection on the logarithm. ValueError for a vector that does not get there within a
    factor of 2^20: one of zeros, or in a model whose head is bounded by its last norm and says little.
    """
    if kl <= 0:
        raise ValueError(f"expected a KL budget above 0; got {kl}.")

    def cost(strength: float) -> float:
        effects = side_effects(at.base, texts, [at.by(concept, strength)], batch_size=batch_size)
        return float(effects.per_token(effects.kl)[0])

    high, doublings = 1.0, 0
    while cost(high) < kl:
        high, doublings = 2 * high, doublings + 1
        if doublings > 20:
            raise ValueError(
                f"{concept.name!r} costs less than {kl} nats of KL at any strength ({cost(high):.2g} at the last one tried): "
                "ask for less. (A vector of zeros costs none.)"
            )
    low = high / 2
    while doublings == 0 and cost(low) > kl and low > 2**-20:
        high, low = low, low / 2
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cost(middle) < kl else (low, middle)
        if high / low < 1.01:
            break
    return low
