"""Intervals: 95%, over the questions an arm was asked and, where an arm has several, over its vectors.

    estimate(hits)                           a mean with its interval
    difference(hits, rival)                  the same questions, so resampled together
    transfer_rate(moved, base, native)       (moved - base) / (native - base), likewise
    lead(values, drawn, settings=24)         how far beyond vectors drawn at random, the best of 24 settings allowed for

Bootstrap percentiles. Questions of one group (two phrasings of one fact) are drawn together. Two places where the bootstrap is
too sure of itself are mended: a rate has the Clopper-Pearson interval (of 100 questions, the bootstrap's holds a rate of 3% in
85% of cases only); and a difference that rests on few questions excludes 0 only if the exact sign test does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
FEW_DISCORDANT = 30
"""Groups that differ between two arms, below which the sign test has to agree: with five, all for one side, it does not
(1/32 > 2.5%)."""
_TAIL = 0.025


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval."""

    value: float
    low: float
    high: float
    n: int
    """Questions or texts."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def estimate(
    values: Float[np.ndarray, "vector item"],
    *,
    counts: Float[np.ndarray, " item"] | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean over vectors of sum(values) / sum(counts) over items. Without groups each item is its own."""
    sums, sizes = _by_group(values, counts, groups)
    value = float(sums.mean(0).sum() / sizes.sum())
    shares = sums.mean(0) / sizes
    if counts is None and bool(np.isin(shares, (0.0, 1.0)).all()):
        return Estimate(value, *clopper_pearson(round(float(shares.sum())), len(shares)), values.shape[1])
    return Estimate(value, *_percentiles(_resampled(sums, sizes, seed)), values.shape[1])


def difference(
    values: Float[np.ndarray, " item"],
    rival: Float[np.ndarray, "vector item"],
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Estimate:
    """The mean of values - rival over items, for the vector of the rival that comes nearest to the values.

    That vector is picked by its interval: n vectors as good as the one they are compared with are all below it once in n + 1
    times only, which no mean over them would show.
    """
    sums, sizes = _by_group(values[None] - rival, None, groups)
    means = _resampled_each(sums, sizes, seed)
    bounds = np.percentile(means, [100 * _TAIL, 100 * (1 - _TAIL)], axis=1).T
    intervals = [_by_sign_test(row, low, high) for row, (low, high) in zip(sums, bounds, strict=True)]
    nearest = min(range(len(intervals)), key=lambda vector: intervals[vector])
    return Estimate(float(sums[nearest].sum() / sizes.sum()), *intervals[nearest], values.shape[0])


def mean_differences(
    values: Float[np.ndarray, "item part"], rival: Float[np.ndarray, "other part"], *, seed: int = 0
) -> list[Estimate]:
    """Of every part, the mean of values less that of the rival: as `difference` where there are as many of either, which are
    then pairs; else the items of both are drawn apart."""
    n, m = len(values), len(rival)
    if n == m:
        bounds = np.percentile(_draws(n, 1, seed)[0] @ (values - rival) / n, [100 * _TAIL, 100 * (1 - _TAIL)], axis=0).T
        intervals = [_by_sign_test(row, low, high) for row, (low, high) in zip((values - rival).T, bounds, strict=True)]
    else:
        of_values, of_rival = _draws(n, m, seed)
        means = of_values @ values / n - of_rival @ rival / m
        intervals = [
            (float(low), float(high)) for low, high in np.percentile(means, [100 * _TAIL, 100 * (1 - _TAIL)], axis=0).T
        ]
    middle = (values.mean(0) - rival.mean(0)).tolist()
    return [Estimate(value, *interval, n if n == m else n + m) for value, interval in zip(middle, intervals, strict=True)]


def _by_sign_test(sums: Float[np.ndarray, " group"], low: float, high: float) -> tuple[float, float]:
    """The interval of a difference, widened to 0 where few groups differ and the sign test does not exclude 0."""
    ahead, behind = int((sums > 0).sum()), int((sums < 0).sum())
    apart = ahead + behind
    if apart >= FEW_DISCORDANT:
        return float(low), float(high)
    below = low if _binomial_tail(behind, apart, 0.5) <= _TAIL else min(low, 0.0)
    above = high if _binomial_tail(ahead, apart, 0.5) <= _TAIL else max(high, 0.0)
    return float(below), float(above)


def transfer_rate(
    moved: Float[np.ndarray, " item"],
    base: Float[np.ndarray, " item"],
    native: Float[np.ndarray, " item"],
    *,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Estimate | None:
    """(moved - base) / (native - base), all three on the same resampled items; None where native and base are not apart, as the
    ratio then says nothing."""
    ceiling = difference(native, base[None], groups=groups, seed=seed)
    if ceiling.low <= 0 <= ceiling.high:
        return None
    sums, sizes = _by_group(np.stack([moved - base, native - base]), None, groups)
    gained, possible = _resampled_each(sums, sizes, seed)
    ratios = gained / np.where(possible == 0, np.nan, possible)
    low, high = np.nanpercentile(ratios, [100 * _TAIL, 100 * (1 - _TAIL)])
    return Estimate(float(sums[0].sum() / sums[1].sum()), float(low), float(high), len(moved))


@dataclass(frozen=True)
class Lead:
    """How far a mean lies beyond those of vectors drawn at random."""

    deviations: float
    """Standard deviations of theirs."""
    chance: float
    """That the best of `settings` such vectors lies as far beyond."""
    vectors: int
    settings: int

    def __str__(self) -> str:
        return f"{self.deviations:.1f} sd, chance {self.chance:.2g}"


def lead(
    values: Float[np.ndarray, " item"],
    drawn: Float[np.ndarray, "vector item"],
    *,
    settings: int = 1,
    groups: Sequence[str] | None = None,
) -> Lead:
    """The mean of values above the means of `drawn`, where the values are of the best of several settings.

    To first order a vector acts linearly on what it moves, so that random directions act normally, whatever the model: the
    chance is that of Student's t for one more draw of a normal distribution, n - 1 degrees of freedom, times the settings
    (Bonferroni). The deviation is not taken to be smaller than the standard error over items, which matters where the vectors
    do nothing at all.
    """
    sums, sizes = _by_group(np.concatenate([values[None], drawn]), None, groups)
    value, *others = sums.sum(1) / sizes.sum()
    n = len(others)
    if n < 2:
        return Lead(math.nan, 1.0, n, settings)
    beyond = sums[0] - sums[1:].mean(0)
    error = np.sqrt(((beyond - beyond.sum() / sizes.sum() * sizes) ** 2).sum()) / sizes.sum()
    deviation = max(float(np.std(others, ddof=1)), float(error), 1e-12)
    deviations = float(value - np.mean(others)) / deviation
    return Lead(deviations, min(1.0, settings * _t_tail(deviations / math.sqrt(1 + 1 / n), n - 1)), n, settings)


def _t_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t: with t = sqrt(df) tan(angle), the density is a power of the cosine."""

    def below_the_pole(angle: float) -> float:
        steps = angle + (math.pi / 2 - angle) * (np.arange(4000) + 0.5) / 4000
        return float((np.cos(steps) ** (df - 1)).mean() * (math.pi / 2 - angle))

    return below_the_pole(math.atan(t / math.sqrt(df))) / below_the_pole(-math.pi / 2)


def clopper_pearson(hits: int, n: int) -> tuple[float, float]:
    """The exact 95% interval of a rate of `hits` out of `n` independent questions."""
    low = 0.0 if hits == 0 else _solve(lambda p: _binomial_tail(n - hits, n, 1 - p) - _TAIL)
    high = 1.0 if hits == n else _solve(lambda p: _TAIL - _binomial_tail(hits, n, p))
    return low, high


def _binomial_tail(at_most: int, n: int, p: float) -> float:
    """P(X <= at_most) of a binomial. In logarithms: of a thousand questions, the coefficients exceed any float."""
    k = np.arange(n + 1)
    factorial = np.cumsum(np.log(np.maximum(k, 1)))
    chances = np.exp(factorial[n] - factorial - factorial[::-1] + k * math.log(p) + (n - k) * math.log1p(-p))
    return float(chances[: at_most + 1].sum())


def _solve(rising: Callable[[float], float]) -> float:
    """The root between 0 and 1 of a function that rises."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def _by_group(
    values: Float[np.ndarray, "vector item"], counts: Float[np.ndarray, " item"] | None, groups: Sequence[str] | None
) -> tuple[Float[np.ndarray, "vector group"], Float[np.ndarray, " group"]]:
    """Sums over each group, and what they are divided by."""
    n = values.shape[1]
    labels = [group or f"item {i}" for i, group in enumerate(groups or [""] * n)]
    names, member = np.unique(labels, return_inverse=True)
    sums = np.zeros((len(values), len(names)))
    for row, value in zip(sums, values, strict=True):
        np.add.at(row, member, value)
    return sums, np.bincount(member, weights=np.ones(n) if counts is None else counts, minlength=len(names)).astype(float)


@lru_cache(maxsize=8)
def _draws(n: int, vectors: int, seed: int) -> tuple[Float[np.ndarray, "resample n"], Float[np.ndarray, "resample vectors"]]:
    """How often each of n groups, and each of some vectors, is drawn. Every arm of an evaluation asks for the same."""
    rng = np.random.default_rng(seed)
    picked = [rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES).astype(float) for k in (n, vectors)]
    for counts in picked:
        counts.flags.writeable = False
    return picked[0], picked[1]


def _resampled_each(
    sums: Float[np.ndarray, "vector group"], sizes: Float[np.ndarray, " group"], seed: int
) -> Float[np.ndarray, "vector resample"]:
    """Means of every vector over the same resampled groups."""
    picked, _ = _draws(len(sizes), 1, seed)
    return sums @ picked.T / (picked @ sizes)


def _resampled(
    sums: Float[np.ndarray, "vector group"], sizes: Float[np.ndarray, " group"], seed: int
) -> Float[np.ndarray, " resample"]:
    """Means over resampled vectors and groups."""
    picked, vectors = _draws(len(sizes), len(sums), seed)
    return (((vectors / len(sums)) @ sums) * picked).sum(1) / (picked @ sizes)


def _percentiles(means: Float[np.ndarray, " resample"]) -> tuple[float, float]:
    low, high = np.percentile(means, [100 * _TAIL, 100 * (1 - _TAIL)])
    return float(low), float(high)
