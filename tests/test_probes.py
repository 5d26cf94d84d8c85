"""Probes find the heads that tell sides apart, score nothing they were fitted on, and find none on labels that mean nothing."""

from typing import Any

import pytest
import torch
from conftest import D_MODEL, N_LAYERS, TEXTS, hooks_on, unchecked
from torch import Tensor

from contrans_tl import ContrastPairs
from contrans_tl.diagnostics import probe_heads
from contrans_tl.diagnostics.folds import Sides, p_values
from contrans_tl.diagnostics.probes import PENALTY, _logistic, accuracies
from contrans_tl.heads import collect_heads
from contrans_tl.refinement import _logistic_dual

N_HEADS = 4


def drawn(heads: int, n: int, width: int = 6, seed: int = 0) -> Tensor:
    """Rows that mean nothing, "head row width", half of them positive."""
    return torch.randn(heads, 2 * n, width, generator=torch.Generator().manual_seed(seed)).double()


def sides(n: int) -> Sides:
    return Sides.of(ContrastPairs("x", tuple(f"p{i}" for i in range(n)), tuple(f"n{i}" for i in range(n))))


@pytest.mark.parametrize("method", ["logistic", "mass"])
def test_the_head_that_was_planted_is_found_and_no_other(method):
    z, of = drawn(20, 60), sides(60)
    z[7, :60, 2] += 2.0
    fold = of.folds(5, seed=0)
    labels = torch.cat([of.side[None], of.permuted(40, seed=1)])
    found, null = (x := accuracies(z, labels, fold, method))[0], x[1:]
    # the best cut between two normals 2 apart is right in Phi(1) = 84% of cases, +- 3.3% with 120 rows
    assert int(found.argmax()) == 7 and abs(float(found[7]) - 0.84) < 0.1
    threshold = null.amax(1).quantile(0.95)
    assert (found > threshold).nonzero().flatten().tolist() == [7]
    assert float(p_values(found, null)[7]) == pytest.approx(1 / 41)


@pytest.mark.parametrize("method", ["logistic", "mass"])
def test_on_labels_that_mean_nothing_p_values_and_threshold_keep_their_rates(method):
    of = sides(24)
    fold, small, alarms = of.folds(4, seed=0), [], 0
    for seed in range(20):
        labels = torch.cat([of.side[None], of.permuted(39, seed=seed + 100)])
        found, null = (x := accuracies(drawn(6, 24, seed=seed), labels, fold, method))[0], x[1:]
        small.append(p_values(found, null) <= 0.1)
        alarms += bool((found > null.amax(1).quantile(0.95, interpolation="higher")).any())
    # 120 p-values: a rate of 10% has a standard error of 2.7%; discrete accuracies make it a little less than 10%
    assert 0.02 < float(torch.stack(small).double().mean()) < 0.19
    assert alarms <= 4  # of 20, at 5%: more than 4 once in 400 times


def test_a_probe_scores_no_row_that_it_was_fitted_on():
    z, of = drawn(3, 20, width=200), sides(20)  # with more dimensions than rows a probe separates what it was fitted on
    found = accuracies(z, of.side[None], of.folds(5, seed=0))
    assert float(found.max()) < 0.8
    w, b = _logistic(z, of.side[None])
    own = (torch.einsum("hrd,lhd->lhr", z, w) + b[..., None]) * of.side
    assert bool((own > 0).all())


def test_the_logistic_probe_is_the_regression_that_refinement_solves_by_newtons_method():
    z, of = drawn(2, 30, seed=5), sides(30)
    z[:, :30, 0] += 1.5
    w, _ = _logistic(z, of.side[None])
    for head in (0, 1):
        x = z[head] - z[head].mean(0)
        x = x / x.norm(dim=-1).mean()
        expected = x.T @ _logistic_dual(x @ x.T, of.side, PENALTY)
        assert torch.nn.functional.cosine_similarity(w[0, head], expected, dim=0) > 0.999


def test_every_labelling_and_head_is_probed_as_if_it_were_alone():
    z, of = drawn(3, 15, seed=2), sides(15)
    fold, labels = of.folds(3, seed=0), of.permuted(4, seed=0)
    for method in ("logistic", "mass"):
        whole = accuracies(z, labels, fold, method)
        for i in range(4):
            for h in range(3):
                assert float(accuracies(z[[h]], labels[[i]], fold, method)) == pytest.approx(float(whole[i, h]))


PAIRS = ContrastPairs("words", tuple(f"happy {t}" for t in TEXTS), tuple(f"{t} sleeps" for t in TEXTS))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_the_map_of_a_model_is_of_z_at_the_last_real_token_head_by_head(bridges: dict[str, Any], architecture):
    model = bridges[architecture]
    found = probe_heads(model, PAIRS, layers=[0, 2], folds=2, permutations=19, batch_size=3)
    assert found.scores.axes == {"layer": ("L0", "L2"), "head": ("H0", "H1", "H2", "H3")}
    z = collect_heads(model, [*PAIRS.positive, *PAIRS.negative]).values.double()
    of = Sides.of(PAIRS)
    fold = of.folds(2, seed=0)
    for layer in (0, 2):
        for head in range(N_HEADS):
            alone = float(accuracies(z[None, :, layer * N_HEADS + head], of.side[None], fold))
            assert found.scores.at(layer=f"L{layer}", head=head) == pytest.approx(alone)
    assert z.shape[1:] == (N_LAYERS * N_HEADS, D_MODEL // 4) and not hooks_on(model)
    assert float(found.p_values.values.min()) >= 1 / 20 and found.to_dict()["threshold"] == found.threshold
    assert "heads above" in str(found) and len(found.top(3)) == 3
    for layer, head in found.above():
        assert found.scores.at(layer=f"L{layer}", head=head) > found.threshold


def test_the_heads_above_the_threshold_are_named_by_their_own_layers():
    from contrans_tl.diagnostics import HeadProbes, Scores

    values = Scores(torch.tensor([[0.5, 0.9], [0.8, 0.7]]), {"layer": ("L3", "L5"), "head": ("H0", "H1")})
    found = HeadProbes(about="", scores=values, p_values=values, threshold=0.75, method="mass", permutations=19)
    assert found.above() == [(3, 1), (5, 0)]


def test_what_cannot_be_probed_is_one_line_of_error(bridges):
    model = bridges["llama"]
    with unchecked(), pytest.raises(ValueError, match="'logistic' or 'mass'"):
        probe_heads(model, PAIRS, method="ridge")
    with pytest.raises(ValueError, match="between 0 and 2"):
        probe_heads(model, PAIRS, layers=[3])
    with pytest.raises(ValueError, match="got 9 folds"):
        probe_heads(model, PAIRS, folds=9)
    with pytest.raises(ValueError, match="19 permutations"):
        probe_heads(model, PAIRS, permutations=5)
