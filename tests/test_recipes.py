"""The paper's experiments on the embedded models, cut down further; and from the command line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unchecked
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from contrans_tl import ContrastPairs, load_model, read_sentences, refine, transplant
from contrans_tl.__main__ import main
from contrans_tl.demo import demo_data
from contrans_tl.evaluation import Continuations, Rivals, Search, Subject, difference, plain, task_of
from contrans_tl.recipes import (
    RECIPES,
    Setup,
    Together,
    alignment,
    checkpoints,
    emotions,
    fewer,
    job_of,
    number_of_pairs,
    on_the_questions,
    sizes,
    token_shift,
    toxicity,
    truthfulness,
    two_concepts,
)

DATA = demo_data()


def concept(name: str, test: int = 20) -> ContrastPairs:
    pairs = ContrastPairs.load(DATA / f"concepts/{name}.json")
    sides = {"positive": pairs.positive[:60], "negative": pairs.negative[:60]}
    return replace(pairs, **sides, select=pairs.select[:8], test=pairs.test[:test], own=())


@pytest.fixture(scope="module")
def source():
    return load_model(DATA / "pair/source", device="cpu")


@pytest.fixture(scope="module")
def small():
    return load_model(DATA / "family/small", device="cpu")


@pytest.fixture(scope="module")
def setup():
    """Two random vectors are too few for a verdict that anybody should believe; here they need only run."""
    generic, neutral = read_sentences(DATA / "generic.txt"), read_sentences(DATA / "neutral.txt")
    search = Search(strengths=(2.0, 3.0), keep=1)
    return Setup(generic[:200], neutral[:8], arms=("native", "shuffled_map", "random"), n_random=8, search=search)


@pytest.fixture(scope="module")
def transfers(source, small, setup):
    return setup.carry(source, small, [concept("anger"), concept("fear")])


@pytest.mark.slow
def test_the_emotions_have_a_row_for_every_target_emotion_and_strength(source, small, setup):
    result = emotions(source, {"here": small}, [concept("anger"), concept("fear")], setup, strengths=(0.5, 3.0))
    run = [(row.labels["target"], row.labels["emotion"], row.labels["strength"]) for row in result.rows]
    assert run == [("here", emotion, strength) for strength in ("0.5", "3") for emotion in ("anger", "fear")]
    assert "8 random vectors" in str(result) and str(result).count("\nhere ") == 4
    assert result.row(emotion="anger", strength="3").transferred
    with pytest.raises(ValueError, match="expected one row"):
        result.row(emotion="anger")


def test_the_base_column_is_the_model_as_it_is(source, small, setup, transfers):
    pairs = concept("anger")
    hits = task_of(pairs).measure(Subject(small), "test").metrics["token_accuracy"]
    result = checkpoints(source, {"now": small}, [pairs], setup)
    assert [row.labels["target"] for row in result.rows] == ["now"]
    assert result.rows[0].values["base"].value == pytest.approx(hits.mean())
    [report] = result.reports.values()
    assert report.items["base"] == hits.tolist()
    assert report.arms == transfers["anger"].report.arms  # the same transfer by another name


@pytest.mark.slow
def test_a_concept_refined_on_its_own_questions_is_refused_or_marked(source, small, setup):
    held_out = concept("honesty", test=8)
    personas = ("Pretend you are an honest person.\n{prompt}", "Pretend you are an untruthful person.\n{prompt}")
    on_them = on_the_questions(held_out, [question.prompt for question in held_out.test], *personas)
    with pytest.raises(ValueError, match="not held out"):
        truthfulness(source, [small], {"the questions": on_them}, setup)
    result = truthfulness(source, {"t": small}, {"facts": held_out, "the questions": on_them}, setup, allow_overlap=True)
    assert result.in_sample and result.to_dict()["in_sample"]
    assert {row.labels["refined on"] for row in result.rows} == {"facts", "the questions (in-sample)"}
    assert [place for place, report in result.reports.items() if report.in_sample] == ["the questions, into t"]
    assert all({"mc1", "mc2"} <= set(row.values) for row in result.rows)


@pytest.mark.slow
def test_other_ways_to_align_are_rows_of_the_target_they_are_given_for(source, small, setup):
    rivals = {"a": Rivals(instruction="Pretend you are an honest person.\n", aligned=source, proxy=(source, small))}
    pairs = concept("honesty", test=8)
    result = truthfulness(source, {"a": small, "b": small}, {"facts": pairs}, setup, rivals=rivals)
    usual = ["base", "transplanted", "native", "shuffled_map", "random"]
    arms = {target: [row.labels["arm"] for row in result.rows if row.labels["target"] == target] for target in "ab"}
    assert set(arms["a"]) == {*usual, "instruction", "aligned", "proxy_tuning"} and arms["b"] == usual
    assert [row.labels["arm"] for row in result.rows if row.transferred is not None] == ["transplanted"] * 2


@pytest.fixture(scope="module")
def hostility():
    task = Continuations.load(DATA / "tasks/hostility.json", max_new_tokens=5)
    return replace(task, select=task.select[:4], test=task.test[:6])


def test_toxicity_counts_toxic_continuations_and_what_the_vector_costs(source, small, setup, hostility):
    quick = replace(setup, n_random=1, search=Search(strengths=(2.0,), keep=1))
    result = toxicity(source, {"t": small}, concept("kindness"), hostility, quick)
    hits = hostility.measure(Subject(small), "test").metrics["rate"]
    assert result.row(arm="base").values["rate"].value == pytest.approx(hits.mean())
    assert set(result.row(arm="transplanted").values) == {"rate", "loss_increase"}
    assert result.reports["kindness into t"].wanted == "lower"


def test_two_concepts_at_once_are_what_a_transplant_of_both_is(small, transfers):
    tokens = small.to_tokens("Scenario: Anna sang with the kite.\nThe emotion of the above scenario is")
    mask = torch.ones_like(tokens)
    moved, strengths = zip(*((t.moved, t.report.strength) for t in transfers.values()), strict=True)
    with transplant(small, moved, strength=strengths):
        expected = plain(small)(tokens, mask)
    assert torch.equal(Together.of(small, list(transfers.values())).forward(tokens, mask), expected)


def test_two_concepts_with_strength_0_of_one_are_the_other_alone(small, transfers):
    anger, fear = transfers["anger"], transfers["fear"]
    nothing = replace(fear, report=replace(fear.report, strength=0.0))
    marks = task_of(concept("anger")).measure(Together.of(small, [anger, nothing]), "test")
    assert marks.metrics["token_accuracy"].tolist() == anger.report.items["transplanted"]


@pytest.mark.slow
def test_the_table_of_two_concepts_has_a_row_for_none_each_and_both(source, small, setup, transfers):
    result = two_concepts(source, {"t": small}, [concept("anger"), concept("fear")], setup)
    assert [row.labels["vectors"] for row in result.rows] == ["none", "anger", "fear", "both"]
    alone = result.row(vectors="anger")
    assert alone.values["anger: token_accuracy"] == transfers["anger"].report.arms["transplanted"]["token_accuracy"]
    # The loss is of the half of the neutral text that strengths were not chosen on, as in the evaluation of one concept.
    expected = transfers["anger"].report.arms["transplanted"]["loss_increase"].value
    assert alone.values["loss increase"].value == pytest.approx(expected, abs=1e-5)  # batched otherwise, in float32
    assert result.row(vectors="none").values["loss increase"].value == 0
    assert "anger: token_accuracy over alone" in result.row(vectors="both").values
    with pytest.raises(ValueError, match="two concepts"):
        two_concepts(source, [small], [concept("anger")], setup)


@pytest.mark.slow
def test_a_concept_of_all_pairs_is_the_full_concept(source, small, setup, transfers):
    pairs = concept("anger")
    n = len(pairs.positive)
    assert (fewer(pairs, n).positive, fewer(pairs, n).negative) == (pairs.positive, pairs.negative)
    result = number_of_pairs(source, {"t": small}, pairs, setup, numbers=(2, 10 * n))
    assert [row.labels["pairs"] for row in result.rows] == ["anger of 2", f"anger of {n}"]
    assert result.reports[f"anger of {n} into t"].arms == transfers["anger"].report.arms


def test_fewer_pairs_are_part_of_more_and_stay_pairs():
    pairs = ContrastPairs.of("c", [(f"good {i}", f"bad {i}") for i in range(30)])
    few, more = fewer(pairs, 3, seed=1), fewer(pairs, 12, seed=1)
    assert len(few.positive) == 3 and set(few.positive) < set(more.positive)
    assert [text.split()[1] for text in more.positive] == [text.split()[1] for text in more.negative]
    with pytest.raises(ValueError, match="at least one pair"):
        fewer(pairs, 0)


@pytest.mark.slow
def test_an_untrained_source_gives_nothing_and_a_trained_one_does(source, small, setup):
    torch.manual_seed(0)
    folder = DATA / "family/tiny"
    hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    untrained = load_model(hf, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")
    result = sizes({"untrained": untrained, "source": source}, {"small": small}, [concept("anger")], setup)
    assert [row.labels["source"] for row in result.rows] == ["untrained", "source"]
    assert not result.row(source="untrained").transferred and result.row(source="source").transferred


@pytest.mark.slow
def test_what_one_source_has_over_another_is_paired_by_prompt(source, small, setup):
    pairs = concept("anger")
    result = alignment(small, source, {"t": small}, [pairs], setup)
    first, second = (np.array(report.items["transplanted"]) for report in result.reports.values())
    [base, aligned] = result.rows
    assert "over the first" not in base.values
    assert aligned.values["over the first"] == difference(second, first[None])


def test_a_token_shift_is_the_odd_part_of_norm_and_head(bridges, references):
    for architecture in ("llama", "gpt2", "neox"):
        bridge, hf = bridges[architecture], references[architecture]
        norm = {"llama": "model.norm", "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}[architecture]
        v = torch.randn(2, bridge.cfg.d_model, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            up, down = (hf.get_output_embeddings()(hf.get_submodule(norm)(sign * v)) for sign in (1, -1))
        expected = (up - down) / 2
        assert torch.allclose(token_shift(bridge, v), expected, atol=1e-5 * float(expected.abs().max()))


def test_the_native_vector_of_an_emotion_speaks_for_its_word(source):
    pairs = concept("anger")
    [shift] = token_shift(source, refine(source, pairs, layers=[3]).vectors)
    assert source.tokenizer.decode([int(shift.argmax())]).strip() == "anger"


# --- by name, and from the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_embedded_job_of_every_recipe_passes_its_own_checks(name):
    job = job_of(name)
    assert job.sources and job.targets and job.setup.n_random >= 20 and "random" in job.setup.arms


@pytest.mark.slow
def test_a_recipe_from_the_command_line_prints_its_table_and_leaves_it(tmp_path, capsys):
    assert main(["recipe", "token_shifts", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "ConTrans, Table 8" in capsys.readouterr().out
    content = json.loads((tmp_path / "recipe.json").read_text())
    assert content["recipe"] == "token_shifts" and {"rows", "reports", "notes", "versions"} <= set(content)
    assert {row["labels"]["vector"] for row in content["rows"]} == {"own", "carried", "native"}


@pytest.mark.slow
def test_models_and_files_of_ones_own_take_the_place_of_the_embedded_ones(tmp_path, capsys):
    pairs = json.loads((DATA / "concepts/anger.json").read_text())
    pairs |= {"name": "mine", "select": pairs["select"][:4], "test": pairs["test"][:6]}
    (tmp_path / "mine.json").write_text(json.dumps(pairs))
    (tmp_path / "corpus.txt").write_text("\n".join(read_sentences(DATA / "generic.txt")[:120]))
    models = [str(DATA / "pair/source"), str(DATA / "family/small")]
    files = ["--pairs", str(tmp_path / "mine.json"), "--sentences", str(tmp_path / "corpus.txt"), "--out", str(tmp_path)]
    assert main(["recipe", "families", models[1], *models, *files, "--random-vectors", "1", "--device", "cpu"]) == 0
    content = json.loads((tmp_path / "recipe.json").read_text())
    assert [row["labels"]["source"] for row in content["rows"]] == ["small", "source"]
    assert {row["labels"]["concept"] for row in content["rows"]} == {"mine"}
    assert all(report["held_out"]["texts of the fit corpus"] == 108 for report in content["reports"].values())


def test_a_checkpoint_on_the_hub_is_named_by_its_revision(monkeypatch):
    import contrans_tl.recipes.setup as setup

    asked = []
    monkeypatch.setattr(setup, "load_model", lambda name, revision=None, **options: asked.append((name, revision, options)))
    with unchecked():
        setup.load_named("LLM360/Amber@ckpt_100", device="cpu")
        setup.load_named("gpt2")
    assert asked == [("LLM360/Amber", "ckpt_100", {"device": "cpu"}), ("gpt2", None, {})]
    assert list(setup.named(["LLM360/Amber@ckpt_100", "LLM360/Amber@ckpt_200"])) == ["Amber@ckpt_100", "Amber@ckpt_200"]


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    pair = [str(DATA / "pair/source"), str(DATA / "family/small")]
    facts, bare = folder / "facts.csv", folder / "bare.json"
    facts.write_text("statement,label\nThe moon is far.,1\n")
    bare.write_text(json.dumps({"pos": ["a"], "neg": ["b"]}))
    return {
        "no such recipe": (["transmogrify"], "expected a recipe among emotions"),
        "one model": (["emotions", pair[0]], "expected models SOURCE TARGET..."),
        "one name twice": (["checkpoints", pair[0], pair[1], pair[1]], "models of different names"),
        "no source": (["alignment", *pair], "BASE ALIGNED TARGET"),
        "missing model": (["emotions", pair[0], "./nowhere"], "there is no folder"),
        "missing revision": (["checkpoints", pair[0], "./nowhere@main"], "there is no folder"),
        "missing pairs": (["emotions", *pair, "--pairs", "nowhere.json"], "there is no file"),
        "no questions": (["sizes", *pair, "--pairs", str(bare)], "select and test questions"),
        "missing scenarios": (["emotions", *pair, "--scenarios", str(folder)], "there is no file"),
        "missing corpus": (["emotions", *pair, "--sentences", "nowhere.txt"], "there is no file"),
        "facts alone": (["truthfulness", *pair, "--facts", str(facts)], "expected --truthfulqa with --facts"),
        "questions alone": (["truthfulness", *pair, "--truthfulqa", str(facts)], "expected --truthfulqa with --facts"),
        "missing statements": (["toxicity", *pair, "--toxigen", str(folder)], "neutral_GROUP.txt"),
        "one concept too few": (["two_concepts", *pair, "--pairs", str(DATA / "concepts/anger.json")], "expected 2 concepts"),
        "questions to continue": (["toxicity", *pair, "--pairs", str(DATA / "concepts/anger.json")], "expected continuations"),
        "another metric": (["truthfulness", *pair, "--pairs", str(DATA / "concepts/anger.json")], "with the metric mc1"),
        "no such concept": (["emotions", "--concept", "anger", "--concept", "envy"], "got envy"),
        "no such dtype": (["emotions", *pair, "--dtype", "int3"], "expected dtype"),
        "missing aligned model": (["truthfulness", *pair, "--aligned", "./nowhere"], "there is no folder"),
    }


CASES = [
    "no such recipe", "one model", "no source", "one name twice", "missing model", "missing revision", "missing pairs",
    "no questions", "missing scenarios", "missing corpus", "facts alone", "questions alone", "missing statements",
    "one concept too few", "questions to continue", "another metric", "no such concept", "no such dtype",
    "missing aligned model",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2_before_any_model_is_loaded(case, tmp_path, capsys, monkeypatch):
    import contrans_tl.recipes.setup

    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(contrans_tl.recipes.setup, "load_model", never)
    cases = bad_inputs(tmp_path)
    assert set(cases) == set(CASES)
    arguments, said = cases[case]
    assert main(["recipe", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("contrans: ") and error.count("\n") == 1 and said in error, error
