"""Figures of heads show what their reports say, of three layers and of forty."""

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted import N_HEADS, PAIRS, planted
from test_plots import drawn, overlapping

from contrans_tl import plots
from contrans_tl.diagnostics import (
    PathEffects,
    PatternChanges,
    Readers,
    Scores,
    Writers,
    patch_paths,
    pattern_changes,
    readers,
    writers,
)
from contrans_tl.diagnostics.scores import Diagnosis, heads, layers
from contrans_tl.evaluation.intervals import Estimate

FIGURES: dict[str, Callable[[Any], Any]] = {
    "Writers": plots.writers_figure,
    "Readers": plots.readers_figure,
    "PatternChanges": plots.patterns_figure,
    "PathEffects": plots.paths_figure,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: Any) -> dict[str, Diagnosis]:
    case = planted(tmp_path_factory.mktemp("planted"), by="q")
    model, concept, prompts = case.model, case.concept(), PAIRS.negative
    reports = [
        writers(model, concept, PAIRS, layer=2),
        readers(model, concept, prompts, layer=1, draws=40),
        pattern_changes(model, concept, prompts, layer=1, draws=1),
        patch_paths(model, concept, prompts, metric=case.metric, layer=1, at=[(3, 1), (2, 0)]),
    ]
    return {type(report).__name__: report for report in reports}


@pytest.fixture(scope="module")
def large() -> dict[str, Diagnosis]:
    """Of 40 layers of 64 heads, with names as long as they come."""
    generator = torch.Generator().manual_seed(0)
    about = "a concept with a rather long name in meta-llama/Llama-2-13b-chat-hf, 2 at layer 9, 200 prompts: logit_difference"

    def spread(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) ** 3

    def around(values: torch.Tensor) -> tuple[Estimate, ...]:
        return tuple(Estimate(value, value - 0.1, value + 0.1, 50) for value in values.flatten().tolist())

    labels = ("tokens", *(part for m in range(40) for part in (*(f"L{m}H{head}" for head in range(64)), f"L{m} MLP")))
    axes = {"by": ("q", "k", "v"), "layer": layers(range(10, 40)), "head": heads(64)}
    parts, read, moved, acts = spread(len(labels)), spread(3, 30, 64), spread(30, 64).abs(), spread(4, 30, 64)
    acts[:, :, ::2] = torch.nan
    whole = Estimate(3.0, 2.0, 4.0, 9)
    common: dict[str, Any] = dict(about=about, layer=9)
    family = Scores((read.abs() < 20).float(), axes)
    grid = {name: axes[name] for name in ("layer", "head")}
    return {
        "Writers": Writers(
            **common | {"layer": 39},
            scores=Scores(parts, {"part": labels}, "projection on the unit vector"),
            positive=parts[None],
            negative=0 * parts[None],
            whole=whole,
            intervals=around(parts),
            chance=torch.ones(len(labels)),
            completeness=1e-7,
        ),
        "Readers": Readers(
            **common,
            scores=Scores(read, axes, "sd of 500 random directions"),
            strength=1.0,
            size=family,
            p=family,
            family=family,
            draws=500,
        ),
        "PatternChanges": PatternChanges(
            **common,
            scores=Scores(moved, grid),
            strength=1.0,
            positions="all",
            intervals=around(moved),
            random=Scores(moved, grid),
        ),
        "PathEffects": PathEffects(
            **common,
            scores=Scores(acts, axes | {"by": ("q", "k", "v", "qkv")}, "change of the metric in logits"),
            strength=1.0,
            positions="all",
            metric="m",
            intervals=around(acts),
            whole=whole,
        ),
    }


@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_every_figure_is_drawn_with_named_axes_and_no_overlap(kind, size, request):
    report = request.getfixturevalue(size)[kind]
    figure = drawn(FIGURES[kind](report))
    assert not overlapping(figure)
    assert " ".join(report.about.split())[:40] in figure.get_suptitle()


@pytest.mark.parametrize("kind", FIGURES)
def test_bars_are_the_largest_places_with_their_intervals(small, kind):
    report = small[kind]
    bars = [axis for axis in drawn(FIGURES[kind](report)).axes if axis.patches][-1]
    top = report.top(12)
    assert [label.get_text() for label in bars.get_yticklabels()] == [label for label, _ in top]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([value for _, value in top], abs=1e-6)
    if kind != "Readers":
        table = {report.scores.label(i): one for i, one in enumerate(report.intervals)}
        drawn_ = [tuple(line.get_xdata()) for line in bars.lines if len(line.get_xdata()) == 2]
        assert all((table[label].low, table[label].high) in drawn_ for label, _ in top)


def test_maps_hold_every_head_and_mark_rings_and_what_was_not_asked(small):
    writers_ = drawn(plots.writers_figure(small["Writers"])).axes[0]
    assert writers_.images[0].get_array().tolist() == pytest.approx(small["Writers"].heads.values.numpy(), abs=1e-6)
    assert "3.0" in [text.get_text() for text in writers_.texts]
    for axis, by in zip(drawn(plots.readers_figure(small["Readers"])).axes, "qkv", strict=False):
        rings = {(y, x) for line in axis.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
        assert rings == ({(1, 1)} if by == "q" else set())
    paths = drawn(plots.paths_figure(small["PathEffects"])).axes[0]
    assert [text.get_text() for text in paths.texts].count("×") == 2 * N_HEADS - 2


def test_below_zero_is_told_apart_without_colour_and_nan_is_crossed_out(large):
    axis = drawn(plots.writers_figure(large["Writers"])).axes[0]
    values = large["Writers"].heads.values
    marked = {(round(y), round(x)) for x, y in axis.collections[0].get_offsets()}
    limit = float(large["Writers"].scores.values[1:].abs().max())
    assert marked == {tuple(place) for place in (values < -0.1 * limit).nonzero().tolist()}
    crossed = drawn(plots.paths_figure(large["PathEffects"])).axes[0].collections[1].get_offsets()
    assert len(crossed) == int(large["PathEffects"].scores.at(by="q").values.isnan().sum())


def test_without_matplotlib_the_extra_is_named(small, monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for kind, figure in FIGURES.items():
        with pytest.raises(ImportError, match=r"contrans-tl\[plots\]"):
            figure(small[kind])
