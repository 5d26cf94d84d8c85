"""Figures show what the reports say: every number at its place, every axis with its name."""

import io
import re
from typing import Any

import pytest
import torch
from test_quality import concept, draw, fitted, planted

from contrans_tl import plots
from contrans_tl.evaluation import Estimate
from contrans_tl.learning import LearningCurve, learning_curve
from contrans_tl.quality import MapQuality, assess
from contrans_tl.reformulation import LayerMaps
from contrans_tl.splicing import ARMS, Splice, SpliceReport


@pytest.fixture(scope="module")
def quality() -> MapQuality:
    maps = fitted(*planted(n=120, noise=0.5))
    return assess(maps, (0, 0), concept=concept(maps), native=concept(maps, draw(16, seed=3), side="target"), ceiling=0.9)


@pytest.fixture(scope="module")
def curve() -> LearningCurve:
    maps = fitted(*planted(n=200, d_source=20, noise=0.7))
    native = concept(maps, draw(16, seed=3), side="target")
    return learning_curve(maps, (0, 0), sizes=[10, 20, 40, 160], concept=concept(maps), native=native, draws=2)


def splices() -> SpliceReport:
    def made(offset: float) -> dict[str, Estimate]:
        return {arm: Estimate(offset + k, offset + k - 0.2, offset + k + 0.2, 9) for k, arm in enumerate(ARMS)}

    pairs = [Splice((s, t), made(1.0 + s), made(0.0), made(0.0), made(0.1 * s)) for s, t in ((0, 1), (2, 3))]
    return SpliceReport("small", "large", 9, 90, 0.8, tuple(pairs))


def drawn(figure: Any) -> Any:
    """The figure, once it has been rendered and every axis named."""
    figure.savefig(io.BytesIO())
    for axis in figure.axes:
        if axis.get_label() != "<colorbar>":
            assert axis.get_xlabel(), "an axis without a name"
    return figure


def heights(axis: Any) -> list[list[float]]:
    return [[float(y) for y in line.get_ydata()] for line in axis.lines]


def points(axis: Any) -> set[float]:
    return {round(float(x), 6) for line in axis.lines for x in line.get_xdata()}


def texts(figure: Any) -> str:
    parts = [figure.get_suptitle(), *(t.get_text() for axis in figure.axes for t in [*axis.texts, axis.title])]
    return " ".join(parts + [label.get_text() for axis in figure.axes for label in axis.get_yticklabels()])


def test_the_quality_figure_shows_every_score_and_its_chance(quality: MapQuality) -> None:
    figure = drawn(plots.quality_figure(quality))
    scores, dimensions, spectrum, carried = figure.axes
    a, c = quality.cka, quality.concept
    assert c is not None and c.cosine_to_native is not None
    for value in (
        quality.r2,
        quality.r2_median,
        quality.cosine,
        quality.retrieval,
        a.value,
        a.debiased,
        a.null_95,
        quality.cycle_r2,
    ):
        assert round(value, 6) in points(scores)
    assert round(1 / quality.candidates, 6) in points(scores)
    assert sum(patch.get_height() for patch in dimensions.patches) == 16
    assert spectrum.get_yscale() == "log" and len(heights(spectrum)[0]) == len(quality.spectrum)
    for value in (c.coverage, c.energy, c.cycle, 0.9):
        assert round(value, 6) in points(carried)
    assert f"cone {c.cone:.1f}°" in texts(figure) and "120 rows of 30 sentences" in texts(figure)


def test_without_a_concept_there_is_no_panel_for_it() -> None:
    maps = fitted(draw(60, 12), draw(60, 16, seed=1))
    figure = drawn(plots.quality_figure(assess(maps, (0, 0))))
    assert len(figure.axes) == 3
    assert "<" in {line.get_marker() for line in figure.axes[0].lines}, "a score below 0 points out of the figure"


def test_the_learning_curve_marks_n_equal_d_and_writes_what_is_off_the_scale(curve: LearningCurve) -> None:
    figure = drawn(plots.learning_curve_figure(curve))
    for axis in figure.axes:
        assert [20, 20] in [list(line.get_xdata()) for line in axis.lines] and axis.get_xscale() == "log"
        assert len(axis.collections) in (2, 4), "a band for each curve"
    lowest = float(curve.r2[1, 1].mean())
    assert lowest < -1 and f"{lowest:.0f}" in texts(figure) and "n = d = 20" in texts(figure)
    assert heights(figure.axes[0])[0] == pytest.approx(curve.r2[0].mean(1).tolist())
    assert curve.cosine_to_native is not None
    assert heights(figure.axes[1])[1] == pytest.approx(curve.cosine_to_native[0].mean(1).tolist())
    assert len({line.get_marker() for line in figure.axes[0].lines[:2]}) == 2, "methods differ without colour"


def test_the_splice_figure_shows_every_arm_with_its_interval() -> None:
    figure = drawn(plots.splice_figure(splices()))
    loss, recovered = figure.axes
    assert {1.0, 0.8, 1.2, 4.0, 3.0, 6.0} <= points(loss) and {0.8, 1.0, 1.2, 2.2} <= points(recovered)
    assert loss.get_ylim()[0] > loss.get_ylim()[1], "the first pair on top"
    assert "80% of tokens" in texts(figure)
    assert len({line.get_marker() for line in loss.lines if line.get_marker() != "None"}) == 4


def test_the_grid_figure_shows_every_pair_of_layers() -> None:
    x, y = planted(n=80, noise=0.5)
    maps = LayerMaps.fit(torch.stack([x, x + 1, x**2], dim=1), torch.stack([y, y.abs()], dim=1))
    vector = concept(maps)
    vector = type(vector)(vector.vectors.expand(3, -1), (0, 1, 2), "calm", maps.source.model)
    figure = drawn(plots.grid_figure(maps, vector))
    r2, cka, shown = (axis for axis in figure.axes if axis.get_label() != "<colorbar>")
    for axis, grid in ((r2, maps.r2), (cka, maps.cka)):
        written = [text.get_text() for text in axis.texts]
        assert written == [f"{value:.2f}" for value in grid.flatten()] and axis.get_xlabel() == "target layer"
    assert [float(x) for x in shown.lines[0].get_xdata()] == pytest.approx((1 - maps.coverage(vector)).tolist())
    assert r2.get_ylabel() == "source layer" and re.search("calm", texts(figure))
    assert len(drawn(plots.grid_figure(maps)).axes) == 4


def test_a_large_grid_is_drawn_without_numbers() -> None:
    x, y = planted(n=30, d_source=4, d_target=4)
    maps = LayerMaps.fit(x[:, None].expand(-1, 20, -1), y[:, None].expand(-1, 30, -1))
    figure = drawn(plots.grid_figure(maps))
    assert not figure.axes[0].texts and figure.get_figwidth() < 16
