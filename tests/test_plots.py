"""Figures show what the reports say: every number at its place, every axis with its name."""

import io
import re
from typing import Any

import pytest
import torch
from conftest import unchecked
from matplotlib.backends.backend_agg import FigureCanvasAgg
from test_quality import concept, draw, fitted, planted
from test_report import RATES, transfer

from contrans_tl import plots
from contrans_tl.evaluation import ARMS as EVERY_ARM
from contrans_tl.evaluation import NULLS, Estimate, frontier
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


# --- evaluation -----------------------------------------------------------------------------------------------------


def overlapping(figure: Any) -> list[str]:
    """Labels, titles and legend entries that lie on one another."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    parts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axis in figure.axes:
        parts += [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())  # ticks beyond it exist, and are not drawn
            parts += [
                tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high and tick.label1.get_visible()
            ]
    shown = [(text, text.get_window_extent(renderer)) for text in parts if text is not None and text.get_text().strip()]
    drawn_in = figure.bbox
    outside = [text.get_text() for text, box in shown if box.x0 < -1 or box.x1 > drawn_in.x1 + 1 or box.y1 > drawn_in.y1 + 1]
    pairs = [
        (a, b) for i, a in enumerate(shown) for b in shown[i + 1 :] if a[1].shrunk(0.96, 0.9).overlaps(b[1].shrunk(0.96, 0.9))
    ]
    return outside + [f"{a[0].get_text()!r} on {b[0].get_text()!r}" for a, b in pairs]


def everything() -> dict[str, Any]:
    """Seven concepts, 17 arms each."""
    rates = {arm: RATES.get(arm, 0.4) for arm in EVERY_ARM}
    names = ("happiness", "sadness", "anger", "fear", "disgust", "surprise", "a concept whose name is long and costs $5_000$")
    return {name: transfer(name, rates, target="a target of some name") for name in names}


@pytest.mark.parametrize("figure_of", [plots.arms_figure, plots.differences_figure])
def test_seventeen_arms_of_seven_concepts_are_drawn_without_overlap(figure_of: Any) -> None:
    reports = everything()
    figure = drawn(figure_of(reports))
    assert len(EVERY_ARM) == 17 and len(figure.axes) == 7
    assert not overlapping(figure)
    assert all("share" in axis.get_xlabel() for axis in figure.axes), "the unit"
    assert "95% intervals" in texts(figure) and "a target of some name" in texts(figure)


def test_the_arms_figure_shows_every_arm_with_its_interval_and_shades_the_nulls() -> None:
    report = transfer()
    [axis] = drawn(plots.arms_figure({"anger": report})).axes
    for arm, values in report.arms.items():
        one = values["token_accuracy"]
        assert {round(x, 6) for x in (one.value, one.low, one.high)} <= points(axis), arm
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels[:3] == ["base", "transplanted", "native"] and labels[-len(NULLS) :] == [
        arm.replace("_", " ") for arm in NULLS
    ]
    [shade] = axis.patches
    assert shade.get_height() == pytest.approx(len(NULLS)) and shade.get_y() == pytest.approx(len(labels) - len(NULLS) - 0.5)
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "base on top"
    markers = {arm: line.get_marker() for arm, line in zip(labels, axis.lines[2::2], strict=True)}
    assert len({markers[arm] for arm in ("base", "transplanted", "native", "uniform", "paper", "random")}) == 6


def test_what_is_not_told_apart_is_drawn_hollow() -> None:
    report = transfer(rates=RATES | {"uniform": 0.8})
    [axis] = drawn(plots.differences_figure({"anger": report})).axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    hollow = {labels[int(line.get_ydata()[0])] for line in axis.lines if line.get_markerfacecolor() == "white"}
    assert "uniform" in hollow and "base" not in hollow and "transplanted" not in labels
    assert {round(report.differences["base"].low, 6), round(report.differences["base"].high, 6)} <= points(axis)


@pytest.mark.parametrize("budget_on", ["loss", "kl"])
def test_the_sweep_figure_shows_every_setting_the_frontier_the_budget_and_what_was_chosen(budget_on: str) -> None:
    report = transfer()
    report.search["budget_on"] = budget_on
    figure = drawn(plots.sweep_figure(report))
    assert not overlapping(figure)
    settings = [point for point in report.sweep if "effect" in point]
    for axis, cost in zip(figure.axes, ("setting", "loss_increase", "kl"), strict=True):
        lines = {line.get_label(): line for line in axis.lines}
        xs = {(round(x, 6), round(y, 6)) for k in ("$L$2 → $L$3", "$L$2 → $L$4") for x, y in lines[k].get_xydata().tolist()}
        assert xs == {(point[cost], point["effect"]) for point in settings}
        assert lines["chosen"].get_xydata().tolist() == [[next(p[cost] for p in settings if p["effect"] == 0.8), 0.8]]
        if cost != "setting":
            best = [[point[cost], point["effect"]] for point in frontier(settings, cost=cost)]
            assert lines["frontier"].get_xydata().tolist() == best and len(best) == 2
            assert "nats/token" in axis.get_xlabel()
    spent = figure.axes[1 if budget_on == "loss" else 2]
    assert [line.get_xdata()[0] for line in spent.lines if line.get_label() == "budget"] == [0.1]
    assert "share" in figure.axes[0].get_ylabel() and "select split" in texts(figure)


def test_the_steerability_figure_shows_curves_slopes_and_shares() -> None:
    report = transfer()
    figure = drawn(plots.steerability_figure(report))
    assert not overlapping(figure)
    curves, shares = figure.axes
    one = report.steerability["transplanted"]
    assert curves.lines[0].get_ydata().tolist() == pytest.approx(list(one.propensity)) and "nats" in curves.get_ylabel()
    assert f"slope {one.slope.value:.2g}" in curves.get_legend().get_texts()[0].get_text()
    for estimate in (one.anti_steerable, one.spearman):
        assert {round(x, 6) for x in (estimate.value, estimate.low, estimate.high)} <= points(shares)
    with pytest.raises(ValueError, match="steerability was not measured"):
        plots.steerability_figure(transfer(steerability={}))


def test_a_figure_of_few_arms_or_of_an_empty_sweep_is_still_drawn() -> None:
    drawn(plots.arms_figure({"anger": transfer(rates={"base": 0.1})}))
    drawn(plots.differences_figure({"anger": transfer(rates={"transplanted": 0.1})}))
    drawn(plots.sweep_figure(transfer(sweep=())))


def test_what_no_diagnostic_reports_has_no_figure_of_its_kind() -> None:
    with unchecked(), pytest.raises(ValueError, match="expected a report of diagnostics; got dict"):
        plots.figure_of({})
