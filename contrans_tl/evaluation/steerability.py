"""Steerability: how each prompt's propensity follows the strength (Tan et al., 2407.12404).

Per prompt: the slope of a line through propensity against strength, and their rank correlation; over prompts the mean slope,
the share of prompts with a negative slope (anti-steerable) and the mean rank correlation. A mean effect can hide that half of
the prompts go the other way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from contrans_tl.evaluation.intervals import Estimate, estimate

MULTIPLES = (-1.0, -0.5, 0.5, 1.0, 1.5)
"""Of the chosen strength; 0, the model as it is, is always among the points."""


@dataclass(frozen=True)
class Steerability:
    """Propensity against strength, prompt by prompt."""

    strengths: tuple[float, ...]
    propensity: tuple[float, ...]
    """Mean over prompts at each strength, in nats or the scorer's units."""
    slope: Estimate
    """Change of propensity with a unit of strength."""
    anti_steerable: Estimate
    """Share of prompts with a negative slope."""
    spearman: Estimate
    """Rank correlation of propensity with strength, mean over prompts."""


def steerability(
    strengths: Sequence[float],
    propensity: Float[np.ndarray, "strength item"],
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Steerability:
    """From the propensity of every prompt at every strength. ValueError for fewer than two different strengths."""
    if len(set(strengths)) < 2:
        raise ValueError(f"expected at least two different strengths; got {list(strengths)}.")
    x = np.asarray(strengths, float) - np.mean(strengths)
    slopes = x @ (propensity - propensity.mean(0)) / (x @ x)
    rows = np.stack([ranks(column) for column in propensity.T])
    steps = ranks(np.asarray(strengths, float))
    centred, steps = rows - rows.mean(1, keepdims=True), steps - steps.mean()
    scale = np.sqrt((centred**2).sum(1) * (steps**2).sum())
    correlations = centred @ steps / np.where(scale == 0, 1.0, scale)  # a propensity that never changes has none: 0
    return Steerability(
        strengths=tuple(map(float, strengths)),
        propensity=tuple(map(float, propensity.mean(1))),
        slope=estimate(slopes[None], groups=groups, seed=seed),
        anti_steerable=estimate((slopes < 0).astype(float)[None], groups=groups, seed=seed),
        spearman=estimate(correlations[None], groups=groups, seed=seed),
    )


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks, equal values sharing theirs."""
    unique, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]
