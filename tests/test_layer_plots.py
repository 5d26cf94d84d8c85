"""Figures of the diagnostics by layer and of probes show every number, small and large."""

import io
from typing import Any

import pytest
import torch
from test_plots import drawn, heights, overlapping

from contrans_tl import plots
from contrans_tl.diagnostics import Grids, HeadProbes, Projections, Readout, Scores, Separability, Survival
from contrans_tl.diagnostics.layers import MEASURES as SURVIVAL
from contrans_tl.diagnostics.scores import heads, layers
from contrans_tl.diagnostics.separability import MEASURES

SIZES = [(3, 4), (40, 64)]
"""Of layers and heads."""


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def banded(axes: dict[str, Any]) -> dict[str, Scores]:
    values = numbers(*map(len, axes.values()))
    return {"scores": Scores(values, axes), "low": Scores(values - 0.5, axes), "high": Scores(values + 0.5, axes)}


def shown(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]


def named(figure: Any) -> Any:
    """The figure with every axis named; `overlapping` renders it."""
    assert all(axis.get_xlabel() for axis in shown(figure)), "an axis without a name"
    return figure


def shades(axis: Any) -> torch.Tensor:
    return torch.as_tensor(axis.images[0].get_array().filled(float("nan")))


def probes(n: int, m: int) -> HeadProbes:
    scores = Scores(
        0.5 + 0.5 * torch.rand(n, m, generator=torch.Generator().manual_seed(0)), {"layer": layers(n), "head": heads(m)}
    )
    return HeadProbes(about="probes", scores=scores, p_values=scores, threshold=0.9, method="mass", permutations=99)


@pytest.mark.parametrize("size", SIZES)
def test_the_probe_figure_shows_every_head_and_the_threshold(size):
    found = probes(*size)
    places, order = shown(named(figure := plots.probes_figure(found)))
    assert torch.equal(shades(places), found.scores.values) and figure.get_figwidth() < 16
    above = found.scores.values[found.scores.values > 0.9]
    assert len(order.lines[0].get_xdata()) == len(above) and [0.9, 0.9] in heights(order)
    assert sum(len(line.get_xdata()) for line in order.lines[:2]) == found.scores.values.numel()
    assert not overlapping(figure)


@pytest.mark.parametrize(("size", "prompts"), [((3, 4), 1), ((40, 40), 1), ((6, 12), 8)])
def test_the_projection_figure_shows_the_stream_and_what_changed_with_zero_in_white(size, prompts):
    axes = {
        "run": ("clean", "transplanted"),
        "layer": layers(size[0]),
        "position": tuple(f"{i} ' w{i}'" for i in range(size[1])),
    }
    found = Projections(about="projection on calm", prompts=prompts, **banded(axes))
    clean, change, last = shown(figure := named(plots.projections_figure(found)))
    assert torch.equal(shades(clean), found.scores.values[0]) and torch.allclose(shades(change), found.change.values)
    for panel in (clean, change):
        low, high = panel.images[0].get_clim()
        assert low == -high == -float(shades(panel).abs().max()), "zero is in the middle"
    assert heights(last)[:2] == [pytest.approx(run[:, -1].tolist()) for run in found.scores.values]
    assert clean.get_ylim()[0] < clean.get_ylim()[1], "the first layer at the bottom"
    assert not overlapping(figure)
    alone = Projections(about="x", prompts=1, **banded({**axes, "run": ("clean",)}))
    assert len(shown(plots.projections_figure(alone))) == 2


def test_below_zero_is_told_from_above_without_colour():
    axes = {"run": ("clean",), "layer": layers(40), "position": tuple(map(str, range(20)))}
    found = Projections(about="x", prompts=1, **banded(axes))
    [places, _] = shown(plots.projections_figure(found))
    marked = {(round(y), round(x)) for x, y in places.collections[0].get_offsets()}
    values = found.scores.values[0]
    below = {tuple(at) for at in (values < -0.1 * values.abs().max()).nonzero().tolist()}
    assert marked == below and len(below) > 50


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize("measures", [SURVIVAL, SURVIVAL[:-1]])
def test_the_survival_figure_has_a_panel_for_each_measure_with_the_random_vectors_beside_it(n, measures):
    axes = {"vector": ("concept", "random"), "measure": measures, "layer": layers(n)}
    found = Survival(about="calm × 2 injected", layer=0, strength=2.0, **banded(axes))
    panels = shown(figure := named(plots.survival_figure(found)))
    for m, panel in enumerate(panels):
        assert heights(panel)[:2] == [pytest.approx(found.scores.values[k, m].tolist()) for k in (0, 1)]
        assert len(panel.collections) == 2
    assert len(panels) == len(measures) and not overlapping(figure)


@pytest.mark.parametrize("n", [1, 40])
def test_the_separability_figure_shows_intervals_and_null(n):
    axes = {"measure": MEASURES, "layer": layers(n)}
    null = numbers(4, n, seed=1)
    null[3] = float("nan")
    values = banded(axes)
    values["low"].values[3] = values["high"].values[3] = float("nan")
    found = Separability(about="calm", null=Scores(null, axes), **values)
    panels = shown(figure := named(plots.separability_figure(found)))
    assert [len(panel.lines) for panel in panels] == [2, 2, 2, 1]
    assert heights(panels[0]) == [pytest.approx(found.scores.values[0].tolist()), pytest.approx(null[0].tolist())]
    assert not overlapping(figure)


@pytest.mark.parametrize("n", [1, 24])
def test_the_readout_figure_writes_the_tokens_as_they_are(n):
    tokens = tuple((("$a$", " {b}", "\n"), (" c", "d", "e")) for _ in range(n))
    axes = {"layer": layers(n), "way": ("up", "down"), "rank": ("1", "2", "3")}
    found = Readout(about="calm", scores=Scores(numbers(n, 2, 3), axes), tokens=tokens)
    figure = named(plots.readout_figure(found))
    cells = [text.get_text() for axis in shown(figure) for text in axis.texts]
    assert set(cells) == {r"\$a\$", "{b}", r"'\n'", "c", "d", "e"} and len(cells) == 6 * n
    assert not overlapping(figure)


@pytest.mark.parametrize("size", [(3, 4), (18, 24)])
def test_the_grids_figure_shows_every_measure_of_every_pair(size):
    axes = {"measure": ("R2", "coverage", "cosine to native", "effect"), "source_layer": layers(size[0])}
    axes["target_layer"] = layers(size[1])
    values = 1 - torch.rand(4, *size, generator=torch.Generator().manual_seed(0))
    values[2, 0, 0] = float("nan")
    found = Grids(about="calm", scores=Scores(values, axes), metric="token_accuracy", base=0.1)
    r2, cosine, effect, share = shown(figure := named(plots.grids_figure(found)))
    for axis, measure in ((r2, 0), (cosine, 2), (effect, 3)):
        assert torch.equal(shades(axis).nan_to_num(9), values[measure].nan_to_num(9))
    assert "×" in [text.get_text() for text in cosine.texts] and effect.get_title() == "gain in token accuracy"
    assert share.lines[0].get_xdata() == pytest.approx((1 - values[1, :, 0]).tolist())
    assert not overlapping(figure)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"contrans-tl\[plots\]"):
        plots.probes_figure(probes(2, 2))


def test_a_figure_of_nothing_but_zeros_and_equal_numbers_is_drawn():
    scores = Scores(torch.full((2, 3), 0.5), {"layer": layers(2), "head": heads(3)})
    found = HeadProbes(about="x", scores=scores, p_values=scores, threshold=0.6, method="mass", permutations=19)
    plots.probes_figure(found).savefig(io.BytesIO())
    axes = {"run": ("clean",), "layer": layers(2), "position": ("a", "b")}
    zeros = Scores(torch.zeros(1, 2, 2), axes)
    drawn(plots.projections_figure(Projections(about="x", prompts=1, scores=zeros, low=zeros, high=zeros)))
