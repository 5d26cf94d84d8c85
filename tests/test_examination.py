"""Every diagnostic of a concept together: what is run, what is refused, and what `contrans diagnose` leaves."""

import json
from dataclasses import replace

import pytest

from contrans_tl import ContrastPairs, Question, refine
from contrans_tl.__main__ import main
from contrans_tl.diagnostics import diagnose
from contrans_tl.diagnostics.page import SAYS, render_examination, write_examination
from contrans_tl.evaluation import random_like

WORDS = ("dog", "fox", "river", "letter", "lazy", "brown")
PAIRS = ContrastPairs(
    "<b>joy</b>",
    positive=tuple(f"the {a} made me feel happy over the {b}" for a in WORDS for b in WORDS[:2]),
    negative=tuple(f"a {a} sleeps and the {b} jumps" for a in WORDS for b in WORDS[:2]),
    select=tuple(Question(f"brown {a} {b}", (" happy", " dog"), 0) for a in WORDS for b in WORDS[3:4]),
    test=tuple(Question(f"lazy {a} {b}", (" happy", " dog"), 0) for a in WORDS for b in WORDS[5:]),
)


@pytest.fixture(scope="module")
def examined(bridges):
    model = bridges["llama"]
    native = refine(model, PAIRS)
    concept = replace(random_like(native, 1, seed=0)[0], name=PAIRS.name, provenance={"refined": {}})
    return diagnose(model, concept, PAIRS, layer=0, strength=0.5, native=native, texts=["the dog", "a quick river"])


def test_every_diagnostic_is_run_and_says_something(examined):
    assert set(examined.reports) == set(SAYS) and not examined.refused
    for name, report in examined.reports.items():
        assert report.top(1) and name in json.dumps(examined.to_dict())
    assert examined.reports["survival"].scores.axes["measure"][-1] == "cosine to native"
    assert str(examined).startswith("<b>joy</b> in llama at layer 0")


def test_behind_the_last_layer_nothing_reads(bridges):
    model = bridges["gpt2"]
    found = diagnose(model, refine(model, PAIRS), PAIRS, layer=2)
    assert not found.refused and set(found.reports) == set(SAYS) - {"readers", "patterns", "paths"}


def test_answers_that_their_first_token_does_not_tell_apart_cost_what_needs_answers_only(bridges):
    alike = replace(PAIRS, test=tuple(replace(q, options=(" happy dog", " happy fox")) for q in PAIRS.test))
    found = diagnose(bridges["llama"], refine(bridges["llama"], PAIRS), alike, layer=0)
    assert set(found.refused) == {"attribution", "patching", "paths"} and "begins with the token" in found.refused["paths"]
    assert set(found.reports) == set(SAYS) - set(found.refused)


def test_what_an_architecture_does_not_allow_is_refused_with_the_reason_and_costs_nothing_else(bridges, monkeypatch):
    from contrans_tl.diagnostics import whole

    def refuses(*args, **options):
        raise ValueError("the parts do not sum to the whole")

    monkeypatch.setattr(whole, "writers", refuses)
    found = diagnose(bridges["neox"], refine(bridges["neox"], PAIRS), replace(PAIRS, test=()), layer=1)
    assert found.refused["writers"] == "the parts do not sum to the whole"
    assert {"readers", "survival"} <= set(found.reports) and "attribution" not in found.reports
    assert "do not sum" in str(found) and "do not sum" in render_examination(found, {})


def test_the_page_holds_every_figure_and_names_from_data_are_text(examined, tmp_path):
    write_examination(examined, tmp_path, command="contrans diagnose m c")
    page = (tmp_path / "diagnosis.html").read_text()
    assert page.count("<img") == len(examined.reports) and "contrans diagnose m c" in page
    assert "<b>joy" not in page and "&lt;b&gt;joy" in page
    assert {path.stem for path in tmp_path.glob("*.png")} == set(examined.reports)
    content = json.loads((tmp_path / "diagnosis.json").read_text())
    json.loads((tmp_path / "diagnosis.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert content["kind"] == "contrans diagnosis" and set(content["reports"]) == set(examined.reports)


def test_bad_input_is_refused_before_anything_runs(bridges):
    model = bridges["llama"]
    concept = refine(model, PAIRS)
    for options, said in (
        ({"layer": 7}, "between 0 and 2"),
        ({"layer": 0, "strength": 0.0}, "strength other than 0"),
        ({"layer": 0, "native": refine(bridges["gpt2"], PAIRS)}, "lives in"),
    ):
        with pytest.raises(ValueError, match=said):
            diagnose(model, concept, PAIRS, **options)
    with pytest.raises(ValueError, match="reformulate it first"):
        diagnose(bridges["gpt2"], concept, PAIRS, layer=0)


def test_from_the_command_line(folders, tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("pairs.json", "concept.safetensors", "out")]
    sides = {"name": "joy", "positive": list(PAIRS.positive), "negative": list(PAIRS.negative)}
    (tmp_path / "pairs.json").write_text(json.dumps(sides))
    folder = str(folders["llama"])
    assert main(["refine", folder, "--pairs", files[0], "--out", files[1], "--device", "cpu"]) == 0
    assert main(["diagnose", folder, files[1], "--pairs", files[0], "--device", "cpu"]) == 2
    assert "choose one with --layer" in capsys.readouterr().err
    options = ["--pairs", files[0], "--layer", "1", "--device", "cpu", "--out", files[2]]
    assert main(["diagnose", folder, files[1], *options]) == 0
    assert "Writers: joy in llama after layer 1" in capsys.readouterr().out
    assert (tmp_path / "out" / "diagnosis.html").stat().st_size > 10_000 and (tmp_path / "out" / "writers.png").exists()
