"""Intervals hold what they should as often as they say, and differences are believed for the right reasons."""

import math

import numpy as np
import pytest

from contrans_tl.evaluation import clopper_pearson, difference, estimate, frontier, lead, steerability, transfer_rate


def tail_below(hits: int, n: int, p: float) -> float:
    """P(X <= hits), by its definition."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(hits + 1))


@pytest.mark.parametrize(("hits", "n", "low", "high"), [(0, 50, 0, 0.0711), (10, 20, 0.272, 0.728), (50, 50, 0.9289, 1)])
def test_clopper_pearson_gives_the_published_intervals(hits, n, low, high):
    assert clopper_pearson(hits, n) == pytest.approx((low, high), abs=5e-5 if hits % 50 == 0 else 5e-4)  # as printed


@pytest.mark.parametrize(("hits", "n"), [(1, 7), (3, 20), (17, 50), (49, 50), (250, 400)])
def test_each_end_of_clopper_pearson_leaves_a_fortieth_beyond_what_was_seen(hits, n):
    low, high = clopper_pearson(hits, n)
    assert 1 - tail_below(hits - 1, n, low) == pytest.approx(0.025, abs=1e-9)
    assert tail_below(hits, n, high) == pytest.approx(0.025, abs=1e-9)
    mirrored = clopper_pearson(n - hits, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_clopper_pearson_of_thousands_of_questions_is_near_the_normal_interval():
    low, high = clopper_pearson(2000, 5000)
    error = 1.96 * (0.4 * 0.6 / 5000) ** 0.5
    assert (low, high) == pytest.approx((0.4 - error, 0.4 + error), abs=2 / 5000)  # the two differ by half a question or so


@pytest.mark.parametrize("n", [10, 50, 100, 200])
def test_the_interval_of_a_rate_holds_it_in_at_least_95_of_100_cases(n):
    # Exactly, over all numbers of hits; the bootstrap's had 85 of 100 at n = 100 and a rate of 3%.
    of_hits = [estimate((np.arange(n) < hits).astype(float)[None]) for hits in range(n + 1)]
    for p in np.linspace(0.005, 0.995, 67):
        held = (math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if of_hits[k].low <= p <= of_hits[k].high)
        assert sum(held) >= 0.95


def test_the_interval_of_a_mean_holds_it_in_94_of_100_cases():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        values = estimate(rng.exponential(size=(1, 100)))  # skew, as losses are
        held += values.low <= 1 <= values.high
    assert held / 400 > 0.916  # 94% less two standard errors of 400 draws


def test_a_paired_difference_is_narrower_than_that_of_two_arms_where_they_rise_and_fall_together():
    rng = np.random.default_rng(0)
    prompts = rng.standard_normal(200)
    moved, rival = (prompts + shift + 0.2 * rng.standard_normal(200) for shift in (0.1, 0.0))
    paired = difference(moved, rival[None])
    strangers = difference(moved, rng.permutation(rival)[None])
    assert strangers.value == pytest.approx(paired.value)
    # Standard deviations of the difference: 0.2 sqrt(2), and sqrt(2 + 2 * 0.04).
    assert (strangers.high - strangers.low) / (paired.high - paired.low) == pytest.approx((2.08 / 0.08) ** 0.5, rel=0.2)
    assert paired.low > 0 > strangers.low


@pytest.mark.parametrize("n", [50, 200])
@pytest.mark.parametrize(("ahead", "behind"), [(1, 0), (3, 0), (5, 0), (6, 0), (8, 1), (9, 1), (12, 3), (14, 4), (20, 8)])
def test_a_difference_of_few_prompts_excludes_0_only_if_the_sign_test_does(ahead, behind, n):
    moved, rival = np.zeros(n), np.zeros(n)
    moved[:ahead], rival[ahead : ahead + behind] = 1, 1
    found = difference(moved, rival[None])
    sure = tail_below(behind, ahead + behind, 0.5) <= 0.025
    assert (found.low > 0) <= sure
    assert found.value == pytest.approx((ahead - behind) / n)
    if behind == 0:
        assert (found.low > 0) == (ahead >= 6)  # 1/32 > 2.5% > 1/64
    turned = difference(rival, moved[None])
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=2 / n)  # quantiles, but for a step


def test_an_arm_of_several_vectors_is_judged_by_the_nearest():
    rng = np.random.default_rng(0)
    moved = 1.0 + 0.1 * rng.standard_normal(50)
    rivals = rng.standard_normal((20, 50)) * 0.1
    far = difference(moved, rivals)
    rivals[13] += 1.0
    near = difference(moved, rivals)
    assert far.low > 0.9 and near.low < 0 < near.high
    alone = difference(moved, rivals[13][None])
    assert (near.value, near.low, near.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-12)


def test_items_of_one_group_are_resampled_together_in_differences_as_well():
    rng = np.random.default_rng(0)
    groups = [f"fact {i // 8}" for i in range(400)]
    moved, rival = (np.repeat(rng.standard_normal(50), 8) for _ in range(2))
    alone, grouped = difference(moved, rival[None]), difference(moved, rival[None], groups=groups)
    assert grouped.value == pytest.approx(alone.value)
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(8**0.5, rel=0.15)
    # Six prompts of one fact are one: no sign test is passed.
    moved, rival = np.zeros(48), np.zeros(48)
    moved[:6] = 1
    assert difference(moved, rival[None]).low > 0
    assert difference(moved, rival[None], groups=[f"fact {i // 6}" for i in range(48)]).low <= 0
    # What order the prompts come in makes no difference to what is a group; without a name each is its own.
    assert difference(moved, rival[None], groups=[""] * 48) == difference(moved, rival[None])


def test_a_transfer_rate_is_the_planted_ratio_and_its_interval_is_calibrated():
    rng, held, widths = np.random.default_rng(0), 0, []
    for _ in range(200):
        base = rng.standard_normal(100)
        possible = 2 + 0.5 * rng.standard_normal(100)
        moved = base + 0.6 * possible + 0.3 * rng.standard_normal(100)
        rate = transfer_rate(moved, base, base + possible)
        held += rate.low <= 0.6 <= rate.high
        widths.append(rate.high - rate.low)
        assert rate.value == pytest.approx(0.6, abs=0.1)  # standard error 0.3 / sqrt(100) / 2 = 0.015
    assert 0.9 < held / 200 < 0.99  # 95% +- three standard errors of 200 draws
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 0.015, rel=0.1)


def test_there_is_no_transfer_rate_where_the_native_vector_is_not_apart_from_the_base():
    rng = np.random.default_rng(0)
    base, moved = rng.standard_normal(50), 1 + rng.standard_normal(50)
    assert transfer_rate(moved, base, base) is None
    assert transfer_rate(moved, base, base + 0.01 * rng.standard_normal(50)) is None
    hits = (np.arange(50) < 4).astype(float)
    assert transfer_rate(hits, np.zeros(50), hits) is None  # four prompts: no sign test is passed
    assert transfer_rate(moved, base, base - 3).value == pytest.approx(-float((moved - base).mean()) / 3)


def test_steerability_finds_the_planted_slopes_and_those_that_go_the_other_way():
    rng = np.random.default_rng(0)
    strengths = [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0]
    slopes = np.where(np.arange(200) < 50, -0.5, 1.5)
    noise = 0.1 * rng.standard_normal((6, 200))
    found = steerability(strengths, np.outer(strengths, slopes) + rng.standard_normal(200) + noise)
    # Over all prompts; the noise of one slope is 0.1 / sqrt(17.5).
    assert found.slope.value == pytest.approx(1.0, abs=0.01) and found.slope.low < 1 < found.slope.high
    assert found.anti_steerable.value == 0.25
    assert (found.anti_steerable.low, found.anti_steerable.high) == clopper_pearson(50, 200)
    assert found.spearman.value == pytest.approx(0.5, abs=0.02)  # 150 prompts near 1, 50 near -1
    assert found.propensity == pytest.approx(tuple(1.0 * np.array(strengths) + found.propensity[2]), abs=0.05)


def test_rank_correlations_share_ranks_among_ties():
    # By hand: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    tied = steerability([0.0, 1.0, 2.0, 3.0], np.array([[0.0], [1.0], [1.0], [2.0]]))
    assert tied.spearman.value == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    flat = steerability([0.0, 1.0, 2.0], np.zeros((3, 4)))
    assert flat.spearman.value == flat.slope.value == flat.anti_steerable.value == 0
    curved = steerability([3.0, 1.0, 2.0], np.array([[9.0], [1.0], [4.0]]))  # in any order
    assert curved.spearman.value == pytest.approx(1)
    with pytest.raises(ValueError, match="two different strengths"):
        steerability([1.0, 1.0], np.zeros((2, 3)))


@pytest.mark.parametrize("wanted", ["higher", "lower"])
def test_the_frontier_holds_every_setting_that_no_other_beats_and_no_more(wanted):
    rng = np.random.default_rng(0)
    points = [{"effect": float(e), "kl": float(c)} for e, c in rng.integers(0, 8, (60, 2))]
    sign = 1 if wanted == "higher" else -1

    def beaten(p, q):
        gain, saving = sign * (q["effect"] - p["effect"]), p["kl"] - q["kl"]
        return gain >= 0 and saving >= 0 and (gain, saving) != (0, 0)

    kept = frontier([*points, {"screened": 9.0, "kl": 0.0}], wanted=wanted)
    best = {(p["effect"], p["kl"]) for p in points if not any(beaten(p, q) for q in points)}
    assert [(p["effect"], p["kl"]) for p in kept] == sorted(best, key=lambda point: point[1])


def test_every_vector_of_an_arm_has_to_pass_the_sign_test_not_only_the_one_with_the_lowest_resamples():
    moved = np.ones(200)
    ahead_everywhere_by_little = moved.copy()
    ahead_everywhere_by_little[:40] = 0.0  # 40 prompts apart: enough for the resamples alone
    alike_but_for_five = moved.copy()
    alike_but_for_five[:5] = -9.0  # five prompts apart, by much: resamples exclude 0, a coin would do it in 1 of 32
    alone = difference(moved, alike_but_for_five[None])
    assert alone.low == 0
    both = difference(moved, np.stack([ahead_everywhere_by_little, alike_but_for_five]))
    assert both.low == 0
    assert difference(moved, ahead_everywhere_by_little[None]).low > 0


@pytest.mark.parametrize(("t", "df", "tail"), [(6.314, 1, 0.05), (2.920, 2, 0.05), (3.106, 11, 0.005), (3.232, 60, 0.001)])
def test_the_lead_has_the_chances_of_students_t_as_tables_print_them(t, df, tail):
    # n vectors of mean 0 and deviation 1, and a value so far off that its prediction t is t.
    n = df + 1
    drawn = np.linspace(-1, 1, n)
    drawn = (drawn - drawn.mean()) / drawn.std(ddof=1)
    value = t * (1 + 1 / n) ** 0.5
    found = lead(np.full(40, value), drawn[:, None].repeat(40, 1))
    assert found.deviations == pytest.approx(value)
    assert found.chance == pytest.approx(tail, rel=2e-3)
    assert lead(np.full(40, -value), drawn[:, None].repeat(40, 1)).chance == pytest.approx(1 - tail, rel=2e-3)
    assert lead(np.full(40, value), drawn[:, None].repeat(40, 1), settings=5).chance == pytest.approx(5 * tail, rel=2e-3)


def test_the_best_of_several_settings_of_a_random_vector_leads_by_chance_as_rarely_as_stated():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 24 + 12, 1)).repeat(3, 2)
    called = sum(lead(row[:24].max(0), row[24:], settings=24).chance <= 0.05 for row in rows)
    assert clopper_pearson(called, 500)[0] < 0.05
    blind = sum(lead(row[:24].max(0), row[24:]).chance <= 0.05 for row in rows)
    assert blind > 250


def test_where_no_vector_does_anything_the_prompts_decide_and_one_vector_tells_nothing():
    hits = (np.arange(50) < 2).astype(float)
    nothing = np.zeros((12, 50))
    assert lead(hits, nothing).deviations == pytest.approx(0.04 / (0.04 * 0.96 / 50) ** 0.5)
    assert lead(hits, nothing, settings=24).chance > 0.05
    assert lead(np.ones(50), nothing, settings=24).chance < 1e-9
    grouped = lead(hits, nothing, groups=[f"{i // 2}" for i in range(50)])
    assert grouped.deviations < lead(hits, nothing).deviations  # both hits are of one group
    assert lead(hits, nothing[:1]).chance == 1.0
