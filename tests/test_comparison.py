"""Two reports side by side: what differs beyond its interval, and what cannot be compared."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import RATES, experiment, transfer

from contrans_tl.__main__ import main
from contrans_tl.comparison import compare, unpaired
from contrans_tl.evaluation import Estimate, estimate
from contrans_tl.report import read_report, write_report


def report(rates: dict[str, float] = RATES, **changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(experiment(transfer(rates=rates, **changes)).to_dict()))


def with_items(values: np.ndarray, items_hash: str = "cafe", **changes: Any) -> dict[str, Any]:
    """A report whose transplanted arm has these values, prompt by prompt."""
    one = report(items_hash=items_hash, n=len(values), **changes)
    anger = one["targets"]["big"]["anger"]
    anger["items"]["transplanted"] = values.tolist()
    found = estimate(values[None])
    anger["arms"]["transplanted"]["token_accuracy"] = {"value": found.value, "low": found.low, "high": found.high, "n": found.n}
    return one


def test_identical_reports_differ_nowhere() -> None:
    compared = compare(report(), report())
    assert len(compared.arms) == len(RATES) and not compared.differing and not compared.made
    assert not compared.only_a and not compared.only_b
    assert all(one.how == "paired" and one.difference.value == 0 for one in compared.arms)
    assert compared.summary.startswith(f"0 of {len(RATES)} differ beyond their intervals (paired by prompt")


def test_a_planted_difference_is_found_and_nothing_else() -> None:
    compared = compare(report(), report(RATES | {"transplanted": 0.5}))
    [found] = compared.differing
    assert (found.target, found.concept, found.arm, found.how) == ("big", "anger", "transplanted", "paired")
    assert found.difference.value == pytest.approx(-0.3) and found.difference.high < 0
    assert compared.summary.startswith(f"1 of {len(RATES)} differs")
    plain = json.loads(json.dumps(compared.to_dict()))
    assert [arm["arm"] for arm in plain["arms"] if arm["differs"]] == ["transplanted"] and plain["summary"] == compared.summary


def test_paired_needs_fewer_prompts_than_unpaired() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(0, 1, 60)  # prompts differ among each other by 1, the two reports on each of them by 0.2
    after = before + 0.2 + rng.normal(0, 0.2, 60)
    paired = compare(with_items(before), with_items(after))
    apart = compare(with_items(before), with_items(after, items_hash="beef"))
    assert [one.arm for one in paired.differing] == ["transplanted"] and not apart.differing
    assert all(one.how == "unpaired" for one in apart.arms) and "unpaired" in apart.summary
    assert apart.made["anger into big: hash of the test prompts"] == ("cafe", "beef")


def test_prompts_of_one_group_count_once() -> None:
    before, after = np.zeros(40), np.tile([0.0] * 6 + [1.0] * 2, 5)
    alone = compare(with_items(before), with_items(after))
    groups = tuple(f"fact {i // 20}" for i in range(40))
    grouped = compare(with_items(before, groups=groups), with_items(after, groups=groups))
    assert "transplanted" in {one.arm for one in alone.differing}
    assert "transplanted" not in {one.arm for one in grouped.differing}, "two facts differ in nothing"


def test_unpaired_intervals_hold_the_true_difference_nineteen_times_in_twenty() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        a, b = (estimate((rng.random(150) < rate)[None].astype(float)) for rate in (0.3, 0.5))
        gap = unpaired(a, b)
        hits += gap.low <= 0.2 <= gap.high
    assert 0.92 <= hits / 400 <= 0.98  # 95%, three standard errors of 400 runs


def test_rates_of_nought_are_not_taken_for_certain() -> None:
    few = Estimate(0.0, *(0.0, 0.26), 12)  # none of 12, by Clopper-Pearson
    gap = unpaired(few, Estimate(0.25, 0.05, 0.57, 12))
    assert gap.low < 0 < gap.high


def test_what_differs_in_how_they_were_made_is_named() -> None:
    other = report(strength=3.0, layer_target=4)
    other["versions"]["torch"] = "2.14"
    other["targets"]["big"]["anger"]["in_sample"] = True
    other["targets"]["big"]["anger"]["search"]["unit"] = "native"
    other["seconds"], other["command"] = 99.0, "contrans run"
    assert compare(report(), other).made == {
        "versions.torch": ("2.13", "2.14"),
        "anger into big: layer_target": (3, 4),
        "anger into big: strength": (2.0, 3.0),
        "anger into big: search.unit": ("raw", "native"),
        "anger into big: in_sample": (False, True),
    }


def test_what_only_one_of_them_has_is_told() -> None:
    fewer = {arm: rate for arm, rate in RATES.items() if arm != "paper"}
    compared = compare(report(), report(fewer))
    assert compared.only_a == ("anger into big: paper",) and not compared.only_b
    assert len(compared.arms) == len(fewer)


def test_reports_with_nothing_in_common_are_refused() -> None:
    moved = copy.deepcopy(report())
    moved["targets"] = {"small": moved["targets"]["big"]}
    for other in (moved, report(metric="mc1", arms={arm: {"mc1": Estimate(0.0, 0.0, 1.0, 9)} for arm in RATES})):
        with pytest.raises(ValueError, match=r"nothing in common: anger \(token_accuracy\) into big in one"):
            compare(report(), other)


def test_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(experiment(transfer()), tmp_path / "a")
    write_report(experiment(transfer(rates=RATES | {"transplanted": 0.5}, strength=3.0)), tmp_path / "b")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b" / "report.json")]) == 0
    said = capsys.readouterr().out
    assert "1 of 11 differs" in said.splitlines()[-1] and "-0.30" in said and "differs" in said
    assert "strength" in said and "native" in said and "sign_flipped" not in said
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--all"]) == 0
    assert "sign_flipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no file"),
        ("{", "not valid JSON"),
        ("[1]", "something else"),
        ('{"scenarios": []}', "something else"),
        ('{"kind": "shopping list", "format": 2, "targets": {}}', "something else"),
        ('{"targets": {}}', "no format number"),
        ('{"kind": "contrans report", "format": 99, "targets": {}}', "has format 99; this version reads format 2"),
        ('{"kind": "contrans report", "format": 2, "targets": {}}', "nothing in common"),
    ],
)
def test_a_foreign_file_is_one_line_of_error(
    content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_report(experiment(transfer()), tmp_path / "a")
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("contrans: ") and error.count("\n") == 1 and said in error, error


def test_a_written_report_reads_back(tmp_path: Path) -> None:
    made = experiment(transfer())
    write_report(made, tmp_path)
    assert read_report(tmp_path) == read_report(tmp_path / "report.json") == json.loads(json.dumps(made.to_dict()))
