"""Theorems of the learning curve: the paper's solver fails where rows are as many as dimensions, the default does not."""

import json
from typing import Any

import pytest
import torch
from test_quality import concept, draw, fitted, planted

from contrans_tl.learning import LearningCurve, learning_curve

D = 40


@pytest.fixture(scope="module")
def curve() -> LearningCurve:
    """Noisy rows of 40 dimensions, three a sentence."""
    maps = fitted(*planted(n=750, d_source=D, noise=0.7), rows_each=3)
    return learning_curve(maps, (0, 0), sizes=(10, 20, 40, 80, 160, 600), concept=concept(maps))


def test_the_papers_solver_fails_at_n_equal_d_and_the_default_does_not(curve: LearningCurve) -> None:
    r2, cosine = (dict(zip(curve.methods, values.mean(-1), strict=True)) for values in (curve.r2, curve.cosine))  # type: ignore[arg-type]
    at = {size: k for k, size in enumerate(curve.sizes)}
    assert r2["paper"][at[D]] < -1 < 0 < r2["paper"][at[4 * D]], "worse than the mean with n = d rows"
    assert r2["paper"][at[D]] < r2["paper"][at[D // 4]] - 1, "and than with a quarter of the rows: double descent"
    assert cosine["paper"][at[D]] < cosine["ridge"][at[D]] - 0.1
    # Three draws of the sentences: from one size to the next the default's mean may fall by what they differ.
    assert bool((r2["ridge"].diff() > -0.05).all()) and r2["ridge"].min() > -0.2
    assert bool((cosine["ridge"].diff() > -0.05).all())


def test_with_all_rows_the_methods_agree(curve: LearningCurve) -> None:
    assert curve.r2[:, -1].mean(-1).diff().abs() < 0.05
    assert curve.cosine is not None and bool((curve.cosine[:, -1] > 0.95).all())
    assert curve.rows == 750 and curve.d_source == D and curve.r2.shape == (2, 6, 3)


def test_a_planted_map_is_learnt_as_soon_as_rows_outnumber_dimensions() -> None:
    maps = fitted(*planted(n=200, d_source=12))
    native = concept(maps, draw(12, 16, seed=1).T @ draw(12, seed=9), side="target")
    curve = learning_curve(maps, (0, 0), methods=["ridge"], sizes=[16, 100], concept=concept(maps), native=native, draws=2)
    assert curve.cosine is not None and curve.cosine_to_native is not None
    # Rows are float64 but W is float32, and a ridge of 1e-7 is always left.
    assert all(bool((values > 0.999).all()) for values in (curve.r2, curve.cosine, curve.cosine_to_native))


def test_sizes_are_nested_and_the_held_out_sentences_in_none(monkeypatch: pytest.MonkeyPatch) -> None:
    from contrans_tl import learning

    seen: list[list[int]] = []
    fit = learning.LayerMaps.fit

    def look(source: Any, target: Any, **options: Any) -> Any:
        seen.append(source.end.tolist())  # end tells rows of tensors apart
        return fit(source, target, **options)

    maps = fitted(*planted(n=90), rows_each=3)
    monkeypatch.setattr(learning.LayerMaps, "fit", look)
    learning_curve(maps, (0, 0), methods=["ridge"], sizes=[10, 25, 72], draws=1)
    assert [len(rows) for rows in seen] == [10, 25, 72]
    assert seen[1][:10] == seen[0] and seen[2][:25] == seen[1]
    held_out = set(range(90)) - set(seen[2])
    assert len(held_out) == 18 and not {row // 3 for row in held_out} & {row // 3 for row in seen[2]}


def test_sizes_by_default_hold_n_equal_d_and_all_rows() -> None:
    curve = learning_curve(fitted(*planted(n=240)), (0, 0), methods=["ridge"], draws=1)
    assert {6, 12, 24, 192} <= set(curve.sizes) and curve.sizes == tuple(sorted(curve.sizes))
    assert curve.sizes[0] > 4, "two sentences at least"
    assert curve.cosine is None and curve.cosine_to_native is None


def test_a_curve_is_short_to_print_and_plain_to_save(curve: LearningCurve) -> None:
    lines = str(curve).splitlines()
    assert len(lines) == 3 + len(curve.sizes) and max(map(len, lines)) <= 128 and "n = d at 40 rows" in lines[0]
    assert json.loads(json.dumps(curve.to_dict()))["sizes"] == list(curve.sizes)


def test_what_makes_no_curve_is_said() -> None:
    maps = fitted(*planted(n=40))
    for sizes in ([3], [4], [33], []):
        with pytest.raises(ValueError, match="sizes between 5 rows, of two sentences, and 32"):
            learning_curve(maps, (0, 0), sizes=sizes)
    with pytest.raises(ValueError, match="at least five sentences"):
        learning_curve(fitted(*planted(n=16)), (0, 0))
    with pytest.raises(ValueError, match="pass those as well"):
        learning_curve(maps, (0, 0), native=concept(maps, side="target"))
    with pytest.raises(ValueError, match="lives in target"):
        learning_curve(maps, (0, 0), concept=concept(maps, side="target"))
    assert torch.isfinite(learning_curve(maps, (0, 0), sizes=[5, 32], draws=1).r2).all()
