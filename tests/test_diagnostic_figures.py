"""Figures of attribution, sweeps and patching say what the reports say, also of large models."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TEXTS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_attribution import difference, ramp

from contrans_tl import plots
from contrans_tl.diagnostics import Scores, attribute, patch, sweep
from contrans_tl.diagnostics.runs import place_labels
from contrans_tl.diagnostics.scores import heads, layers

LAYERS, HEADS, PLACES = 40, 64, 50


def texts(figure: Any) -> str:
    FigureCanvasAgg(figure).draw()
    found = [figure.get_suptitle(), *(t.get_text() for axis in figure.axes for t in (axis.title, axis.xaxis.label))]
    for part in figure.subfigs:
        found += [t.get_text() for axis in part.axes for t in (axis.title, axis.xaxis.label)]
    return "\n".join(found)


def no_labels_overlap(figure: Any) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axis in figure.axes:
        for ticks in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [t.get_window_extent(renderer) for t in ticks if t.get_text() and t.get_visible()]
            boxes = [box for box in boxes if box.width > 0]
            for one, two in zip(boxes, boxes[1:], strict=False):
                assert not one.overlaps(two), f"labels overlap in {axis.get_title()!r}"


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_figures_of_an_attribution(bridges):
    report = attribute(bridges["llama"], ramp(bridges["llama"]), TEXTS, metric=difference, layer=0, check=5)
    figure = plots.attribution_figure(report)
    places, by_head = figure.axes[:2]
    assert torch.allclose(torch.tensor(places.images[0].get_array().data), report.scores.values)
    assert torch.allclose(torch.tensor(by_head.images[0].get_array().data), report.heads.values)
    assert "the gradient at strength 0" in texts(figure)
    no_labels_overlap(figure)
    agreement = plots.agreement_figure(report)
    heads_axis = agreement.axes[2]
    assert sorted(heads_axis.lines[1].get_xdata()) == pytest.approx(
        sorted(one.attributed for one in report.checked if one.kind == "head")
    )
    assert f"rank correlation {report.rank_correlation['head']:+.2f} of 5" in texts(agreement)
    no_labels_overlap(agreement)
    with pytest.raises(ValueError, match="check of 1 or more"):
        plots.agreement_figure(replace(report, checked=()))
    large = replace(
        report,
        scores=Scores(draws(LAYERS, PLACES), {"layer": layers(LAYERS), "position": place_labels(PLACES)}),
        heads=Scores(draws(LAYERS, HEADS), {"layer": layers(LAYERS), "head": heads(HEADS)}),
        tokens=("emotion",) * PLACES,
    )
    no_labels_overlap(plots.attribution_figure(large))


def test_figures_of_a_sweep(bridges):
    report = sweep(bridges["llama"], ramp(bridges["llama"]), TEXTS, metric=difference, positions=("all", "last"))
    figure = plots.strengths_figure(report)
    curve = figure.axes[1].lines[1 + 2]  # behind the line at 0: layer 2
    expected = report.effect.at(layer="L2", positions="last").values
    assert torch.allclose(torch.tensor(curve.get_ydata()), expected)
    assert "standard error over prompts" in texts(figure)
    no_labels_overlap(figure)
    axes = {"layer": layers(LAYERS), "strength": ("x1", "x2"), "positions": ("all",), "prompt": ("0",)}
    large = plots.strengths_figure(replace(report, scores=Scores(draws(LAYERS, 2, 1, 1), axes), base=torch.zeros(1)))
    assert large.axes[0].images and "strength" in texts(large)
    no_labels_overlap(large)


def test_figures_of_patching(bridges):
    whole = patch(bridges["llama"], ramp(bridges["llama"]), TEXTS[:2], metric=difference, layer=0)
    assert "one position" not in texts(plots.patching_figure(whole))
    values = draws(*whole.by_position.values.shape)
    report = replace(whole, by_position=replace(whole.by_position, values=values))
    figure = plots.patching_figure(report)
    assert torch.allclose(torch.tensor(figure.subfigs[1].axes[1].images[0].get_array().data), values[1])
    assert "share brought" in texts(figure) and "attn out, one position" in texts(figure)
    no_labels_overlap(figure)
    noised = plots.patching_figure(replace(report, direction="noise"))
    assert "share lost" in texts(noised)
    sites = ("resid_pre", "attn_out", "mlp_out")
    large = replace(
        report,
        scores=Scores(draws(LAYERS, HEADS), {"layer": layers(LAYERS), "head": heads(HEADS)}),
        by_layer=Scores(draws(LAYERS, 3), {"layer": layers(LAYERS), "site": sites}),
        by_position=Scores(
            draws(3, LAYERS, PLACES), {"site": sites, "layer": layers(LAYERS), "position": place_labels(PLACES)}
        ),
        tokens=("emotion",) * PLACES,
    )
    no_labels_overlap(plots.patching_figure(large))
