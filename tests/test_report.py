"""The report: a page that stands alone, says what it must, and shows text from data as text."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

from contrans_tl import plots
from contrans_tl.evaluation import ARMS, NULLS, Estimate, TransferReport, difference, estimate, lead, steerability
from contrans_tl.evaluation.arms import DRAWN
from contrans_tl.experiment import Experiment, Transfer
from contrans_tl.leakage import Leak
from contrans_tl.models import ModelId
from contrans_tl.page import render
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import LayerMaps
from contrans_tl.report import read_report, tables, write_report

N = 40
RATES = {"base": 0.1, "transplanted": 0.8, "native": 0.9, "uniform": 0.6, "paper": 0.3} | dict.fromkeys(NULLS, 0.1)
"""Share of prompts that each arm gets right."""
MARKUP = "<script>alert('&amp;')</script> $x_1"


def transfer(concept: str = "anger", rates: dict[str, float] = RATES, *, n: int = N, **changes: Any) -> TransferReport:
    """A report of arms that get the first so many of n prompts right."""
    items = {arm: (np.arange(n) < round(rate * n)).astype(float) for arm, rate in rates.items()}
    points = [
        {"layer_source": 2, "layer_target": t, "setting": x, "strength": x, "effect": e, "loss_increase": c, "kl": 2 * c}
        for t, x, e, c in ((3, 1.0, 0.2, 0.01), (3, 2.0, 0.8, 0.05), (4, 1.0, 0.1, 0.02), (4, 2.0, 0.7, 0.2))
    ]
    screened = [{"layer_source": 2, "layer_target": t, "setting": 1.0, "strength": 1.0, "screened": 0.2} for t in (3, 4)]
    strengths = [-2.0, -1.0, 0.0, 1.0, 2.0]
    curve = np.linspace(-1, 1, 5)[:, None] * np.linspace(-0.1, 1, n)
    cost = Estimate(0.1, 0.0, 0.2, 9)
    made: dict[str, Any] = dict(
        concept=concept,
        target="big",
        metric="token_accuracy",
        wanted="higher",
        task={"task": "RestrictedChoice", "name": concept},
        layer_source=2,
        layer_target=3,
        strength=2.0,
        dose={"native": 1.5, "resid": 0.4},
        coverage=0.99,
        presence=0.2,
        foreseen=f"{concept}: arrives.",
        r2=0.9,
        arms={
            arm: {"token_accuracy": estimate(hits[None]), "loss_increase": cost, "kl": cost}
            for arm, hits in items.items()
        },
        differences={
            arm: difference(items["transplanted"], hits[None])
            for arm, hits in items.items()
            if arm != "transplanted" and "transplanted" in items
        },
        leads={
            arm: lead(items["transplanted"], items[arm][None].repeat(12, 0), settings=6)
            for arm in DRAWN
            if {arm, "transplanted"} <= set(items)
        },
        transfer_rate=Estimate(0.87, 0.7, 1.0, n),
        steerability={arm: steerability(strengths, curve) for arm in ("transplanted", "native") if arm in items},
        geometry={arm: {"cosine_to_native": 0.5, "norm": 3.0} for arm in items if arm != "base"},
        sweep=(*screened, *points),
        search={
            "unit": "raw", "strengths": [1.0, 2.0], "setting": 2.0, "budget": 0.1, "budget_on": "loss", "within_budget": True,
            "max_depth": 0.8, "layer_pairs": 2, "settings": 6,
        },
        held_out={"test_prompts": n, "select_prompts": 9, "refine_prompts": 8, "texts of the fit corpus": 77},
        items={arm: hits.tolist() for arm, hits in items.items()},
        items_hash="cafe",
        groups=("",) * n,
        prompts=("Is it so?", "Or so?"),
    )  # fmt: skip
    return TransferReport(**(made | changes))


def experiment(*reports: TransferReport, **about: Any) -> Experiment:
    """An experiment of these, all into one target, with some vector and some map."""
    model = ModelId("m", None, "f00d", 4, 8, "raw")
    made = {
        "seeds": {"controls": 0},
        "versions": {"contrans-tl": "0.1.0", "torch": "2.13"},
        "models": {"source": model.to_dict(), "big": model.to_dict()},
        "sizes": {"fit_sentences": 7, "fit_rows": 70, "neutral_texts": 4, "random_vectors": 20},
        "partial": False,
        "missing": [],
        "failures": {},
        "seconds": 12.3,
    }
    vector, rows = ConceptVector(torch.ones(1, 8), (0,), "some", model), torch.eye(8)[:, None]
    some_map = LayerMaps.fit(rows, rows)[0, 0]
    row = {report.concept: Transfer(report, vector, some_map) for report in reports}
    return Experiment({report.concept: vector for report in reports}, {"big": row} if row else {}, made | about)


class Elements(HTMLParser):
    """Tags, the attributes of images, and text, as a browser would read them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.images += [dict(attrs)] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return render(experiment(transfer(), transfer("fear", RATES | {"transplanted": 0.1}), command="contrans run a b"))


def test_the_page_says_first_what_was_found_then_what_was_asked_then_how_it_was_made(page: str) -> None:
    text = Elements(page).text
    places = [
        text.index(part) for part in ("Verdict", "What was asked", "Into big", "anger into big arrived", "How it was made")
    ]
    assert places == sorted(places)
    assert "1 of 2 transfers stood out" in text
    assert transfer().verdict in text and "no transfer beyond controls" in text and "not beyond controls" in text
    for part in ("contrans run a b", "torch 2.13", "controls 0", "f00d", "12.3", "77 texts", "6 settings in all", "1.50 norms"):
        assert part in text, part
    for arm in RATES:
        assert ARMS[arm] in text, f"what {arm} is"


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    found = Elements(page)
    assert not {"script", "link", "iframe"} & set(found.tags) and "http" not in page
    assert len(found.images) == 2 + 2 * 2 and all(str(image["src"]).startswith("data:image/png") for image in found.images)
    assert all(len(str(image["alt"])) > 40 for image in found.images), "what a figure shows is told to who does not see it"
    assert "transplanted 0.80" in str(found.images[0]["alt"])


def test_text_from_data_is_never_markup_in_the_report() -> None:
    leak = Leak(MARKUP, MARKUP, MARKUP, "same")
    arm = "base"
    hostile = transfer(
        MARKUP,
        target=MARKUP,
        foreseen=MARKUP,
        prompts=(MARKUP,),
        texts={arm: [MARKUP]},
        leaks=(leak,),
        failures={MARKUP: MARKUP},
        missing=(MARKUP,),
        held_out={f"texts of {MARKUP}": 3},
        task={"task": MARKUP},
    )
    made = experiment(
        hostile, failures={MARKUP: MARKUP}, missing=[MARKUP], partial=True, command=MARKUP, versions={MARKUP: MARKUP}
    )
    made.about["models"][MARKUP] = dict.fromkeys(made.about["models"]["big"], MARKUP)
    page = render(replace(made, transfers={MARKUP: made.transfers["big"]}))
    found = Elements(page)
    assert "script" not in found.tags and "<script" not in page
    assert found.text.count(MARKUP) >= 12
    assert tables(made), "and rich takes no markup from names either"


def test_a_partial_report_says_so_before_any_number_and_where_it_was_cut() -> None:
    cut = transfer("anger", {"base": 0.1, "transplanted": 0.8}, missing=("random", "shuffled_map"))
    page = render(experiment(cut, partial=True, missing=["fear into big"]))
    text = Elements(page).text
    assert text.index("Partial.") < text.index("Verdict")
    assert "Cut short: anger into big." in text and "Not reached: fear into big." in text
    assert "interrupted before random, shuffled map" in text and "undecided" in text


def test_an_in_sample_report_says_so_and_lists_the_prompts() -> None:
    leak = Leak("Is it so?", "the select split", "is it so?", "same but for case and spacing")
    page = render(experiment(transfer(leaks=(leak,))))
    text = Elements(page).text
    assert text.index("In-sample.") < text.index("Verdict") and "anger into big (1 prompt)" in text
    assert "the select split" in text and "arrived, in-sample" in text and "need no correction" not in text
    assert "In-sample." not in Elements(render(experiment(transfer()))).text


def test_arms_that_failed_are_named_with_the_reason() -> None:
    failed = {"random": "the scorer raised KeyError: 'x'"}
    text = Elements(render(experiment(transfer(failures=failed), failures={"fear into big": "the scorer returned 3"}))).text
    assert "anger into big: random" in text and failed["random"] in text and "the scorer returned 3" in text


@pytest.mark.parametrize("rates", [{}, {"base": 0.1}, {"transplanted": 0.5}, {"base": 0.1, "transplanted": 0.5}])
def test_a_report_of_few_arms_or_none_is_still_a_page_and_a_table(rates: dict[str, float]) -> None:
    made = experiment(transfer(rates=rates, missing=("random",), transfer_rate=None))
    assert "Partial." in render(made) and tables(made)[0].row_count == 1
    assert "Nothing was measured" in render(experiment())


def test_continuations_stand_behind_their_prompts() -> None:
    texts = {"base": ["eins", "zwei"], "transplanted": ["drei", "vier"]}
    text = Elements(render(experiment(transfer(texts=texts)))).text
    places = [text.index(part) for part in ("Is it so?", "eins", "drei", "Or so?", "zwei", "vier")]
    assert places == sorted(places)


def test_without_matplotlib_the_page_says_what_is_missing_and_shows_the_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    page = render(experiment(transfer()))
    assert "contrans-tl[plots]" in page and not Elements(page).images
    assert page.count("<svg") == len(RATES) and "0.80" in page


def test_the_same_experiment_gives_the_same_bytes_and_the_time_stands_in_one_place(tmp_path: Any) -> None:
    for name, seconds in (("a", 1.0), ("b", 98.7)):
        write_report(experiment(transfer(), seconds=seconds), tmp_path / name)
    pages = [(tmp_path / name / "report.html").read_text() for name in ("a", "b")]
    assert pages[0] != pages[1]
    assert len({re.sub(r'<span id="seconds">[\d.]+</span>', "", page) for page in pages}) == 1
    a, b = (read_report(tmp_path / name) for name in ("a", "b"))
    assert a.pop("seconds") == 1.0 and b.pop("seconds") == 98.7 and a == b


def test_a_concept_that_should_lower_a_score_is_told_in_that_direction() -> None:
    items = {"base": np.linspace(2, 6, N), "transplanted": np.linspace(-1, 1, N)} | {arm: np.linspace(2, 6, N) for arm in NULLS}
    report = transfer(
        "toxicity",
        metric="score",
        wanted="lower",
        arms={arm: {"score": estimate(values[None])} for arm, values in items.items()},
        differences={arm: difference(-items["transplanted"], -values[None]) for arm, values in items.items()},
    )
    assert report.transferred
    text = Elements(render(experiment(report))).text
    assert "score ↓" in text and "should become lower" in text and "strips span" in text
    low, high = plots.arms_figure({"toxicity": report}).axes[0].get_xlim()
    assert low < 0 and high > 4, "a score is not squeezed between 0 and 1"
