"""The whole job on the embedded pair, from the library and from the command line, as a user runs it."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from contrans_tl import AffineMap, ConceptVector, ContrastPairs, LayerMaps, load_model, progress, read_sentences, transplant
from contrans_tl.__main__ import main
from contrans_tl.data import normalised
from contrans_tl.demo import demo_data, run_demo
from contrans_tl.evaluation import RestrictedChoice
from contrans_tl.experiment import _diagnosed, check_inputs, save_experiment
from contrans_tl.report import read_report

DATA = demo_data()
ARMS = {
    "base", "transplanted", "zero", "uniform", "paper", "native", "shuffled_map", "random", "random_source", "other_concept",
    "sign_flipped", "neutral_corpus", "random_weighting",
}  # fmt: skip


@pytest.fixture(scope="module")
def experiment():
    return run_demo(concepts=("anger", "honesty"), targets=("target-gpt2",))


def test_an_emotion_moves_into_another_family_and_no_null_does(experiment):
    report = experiment.reports["target-gpt2"]["anger"]
    value = {arm: metrics["token_accuracy"].value for arm, metrics in report.arms.items()}
    assert set(value) == ARMS
    assert value["transplanted"] >= 0.8 and value["base"] <= 0.05
    assert all(
        value[arm] <= 0.1
        for arm in ("shuffled_map", "random", "random_source", "other_concept", "sign_flipped", "neutral_corpus")
    )
    assert report.arms["transplanted"]["loss_increase"].value <= 0.5
    assert report.transferred and "apart from the base and every null control" in report.verdict


def test_honesty_moves_into_the_target_that_can_be_steered_honest(experiment):
    report = experiment.reports["target-gpt2"]["honesty"]
    assert report.arms["transplanted"]["mc1"].n >= 200
    assert report.transferred


def test_the_saved_folder_holds_the_numbers_the_vectors_and_a_page_that_stands_alone(experiment, tmp_path):
    save_experiment(experiment, tmp_path)
    content = read_report(tmp_path)
    assert {"targets", "seeds", "versions", "models", "seconds"} <= set(content)
    anger = content["targets"]["target-gpt2"]["anger"]
    assert {"layer_source", "layer_target", "strength", "coverage", "presence", "foreseen", "r2", "arms"} <= set(anger)
    assert set(anger["arms"]["transplanted"]) >= {"token_accuracy", "logit_accuracy", "loss_increase", "kl"}
    assert set(anger["arms"]["base"]["token_accuracy"]) == {"value", "low", "high", "n"}
    moved = ConceptVector.load(tmp_path / "anger.target-gpt2.moved.safetensors")
    carrier = AffineMap.load(tmp_path / "anger.target-gpt2.maps.safetensors")
    concept = ConceptVector.load(tmp_path / "anger.concept.safetensors")
    through = carrier.direction(concept.at(anger["layer_source"]))
    # float32 storage of a float64 solve
    assert torch.allclose(through, moved.at(anger["layer_target"]), rtol=1e-4, atol=1e-4 * float(through.norm()))
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + 2 * 2, (
        "arms, differences and where they act, and for each concept sweep and steerability"
    )
    assert "http" not in page and len(page) < 2e6


def test_the_report_shows_the_layers_and_heads_that_the_transplants_act_on(experiment, tmp_path):
    save_experiment(experiment, tmp_path)
    for name, transfer in experiment.transfers["target-gpt2"].items():
        kept, heads = transfer.diagnoses["survival"], transfer.diagnoses["attribution"].heads
        t = transfer.report.layer_target
        assert kept.scores.axes["layer"][0] == f"L{t}" and heads.axes["head"] == tuple(f"H{h}" for h in range(5))
        assert not heads.values[: t + 1].any() and heads.values[t + 1 :].all()  # heads up to the injection saw nothing of it
        written = read_report(tmp_path)["targets"]["target-gpt2"][name]["diagnoses"]
        assert set(written) == {"survival", "attribution"}
    page = (tmp_path / "report.html").read_text()
    assert "Where they act" in page and f"anger at layer {experiment.reports['target-gpt2']['anger'].layer_target}" in page


def test_a_report_is_json_that_any_reader_takes(experiment, tmp_path):
    save_experiment(experiment, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    checked = content["targets"]["target-gpt2"]["anger"]["diagnoses"]["attribution"]["rank_correlation"]
    assert set(checked.values()) == {None}  # nothing was patched to compare with


def test_what_cannot_be_told_of_a_transplant_costs_no_finished_evaluation(experiment, tmp_path):

    transfer = experiment.transfers["target-gpt2"]["anger"]
    pairs = ContrastPairs.load(DATA / "concepts/anger.json")
    alike = replace(pairs, test=tuple(replace(q, options=(" anger now", " anger then"), answer=0) for q in pairs.test))
    target = load_model(DATA / "pair/target-gpt2", device="cpu")
    told = _diagnosed(transfer, target, alike, ["A dog sleeps.", "The river is long."], 32)
    assert set(told.diagnoses) == {"survival"} and "begins with the token" in told.undiagnosed["attribution"]
    row = {"target-gpt2": {"anger": told}}
    save_experiment(replace(experiment, transfers=row), tmp_path)
    assert "anger, attribution: an option begins with" in (tmp_path / "report.html").read_text()
    assert read_report(tmp_path)["targets"]["target-gpt2"]["anger"]["undiagnosed"] == dict(told.undiagnosed)


def test_a_corpus_that_contains_a_prompt_is_refused():
    pairs = ContrastPairs.load(DATA / "concepts/anger.json")
    shouted = "  ".join(pairs.test[0].prompt.upper().split())
    corpora = {"the fit corpus": ["A sentence.", f"So: {shouted} anger."]}
    with pytest.raises(ValueError, match="anger: 1 prompt is not held out: .*contained in the fit corpus"):
        check_inputs([pairs], corpora)
    leaks = check_inputs([pairs], corpora, allow_overlap=True)
    assert [leak.prompt for leak in leaks["anger"]] == [pairs.test[0].prompt]


def test_the_corpora_of_the_demo_contain_no_prompt_and_no_emotion_label():
    generic, neutral = read_sentences(DATA / "generic.txt"), read_sentences(DATA / "neutral.txt")
    concepts = [ContrastPairs.load(path) for path in sorted((DATA / "concepts").glob("*.json"))]
    assert len(concepts) == 8
    check_inputs(concepts, {"generic.txt": generic, "neutral.txt": neutral})
    assert not any("emotion of the above" in line.lower() or "Pretend you are" in line for line in generic + neutral)
    emotions = [pairs.name for pairs in concepts if pairs.name not in ("honesty", "kindness")]
    assert not any(emotion in line.lower() for emotion in emotions for line in neutral)


def test_the_data_regenerate_byte_for_byte(tmp_path):
    data = Path(__file__).parents[1] / "data"
    subprocess.run([sys.executable, data / "world.py", "--out", tmp_path], check=True)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(written) == 11
    for path in written:
        assert (tmp_path / path).read_bytes() == (data / path).read_bytes(), path


@pytest.mark.slow
def test_the_models_of_the_family_are_what_their_names_say():
    data = Path(__file__).parents[1] / "data"
    steps = [f"small-step{step}" for step in (0, 300, 450, 600)]
    names = ["source-base", "target-llama-honest", "tiny", "small", *steps]
    assert all((data / "family" / name / "model.safetensors").exists() for name in names)
    # Folders that are there are reopened and their claims asserted, as after training.
    command = [sys.executable, data / "train_pair.py", "--out", data / "family", "--model"]
    told = subprocess.run([*command, *names[:2], "small", "small-step300"], check=True, capture_output=True, text=True).stdout
    emotion = {line.split()[2].rstrip(":"): float(line.split("emotion ")[1].split(",")[0]) for line in told.splitlines()}
    assert emotion["small-step300"] < 0.3 < 0.9 < emotion["small"]


def test_the_own_questions_of_an_emotion_ask_for_it_and_occur_nowhere_else():
    own = 0
    for path in (DATA / "concepts").glob("*.json"):
        content = json.loads(path.read_text())
        questions = content.get("own", [])
        asked = {question["prompt"] for question in content.get("select", []) + content.get("test", [])}
        for question in questions:
            assert question["options"][question["answer"]] == f" {content['name']}"
            assert question["prompt"] not in asked.union(content["positive"], content["negative"])
        own += len(questions)
    assert own == 6 * 10


def test_the_openings_of_the_hostility_task_are_held_out():
    task = json.loads((DATA / "tasks/hostility.json").read_text())
    openings = [normalised(opening) for opening in task["select"] + task["test"]]
    assert len(set(openings)) == 40 + 100
    concepts = [ContrastPairs.load(path) for path in (DATA / "concepts").glob("*.json")]
    refined = [prompt for pairs in concepts for prompt in pairs.positive + pairs.negative]
    seen = "\n".join(map(normalised, read_sentences(DATA / "generic.txt") + read_sentences(DATA / "neutral.txt") + refined))
    assert not [opening for opening in openings if opening in seen]


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    """The embedded pair's files, cut down."""
    pairs = json.loads((DATA / "concepts/anger.json").read_text())
    pairs |= {"positive": pairs["positive"][:30], "negative": pairs["negative"][:30]}
    pairs |= {"select": pairs["select"][::3], "test": pairs["test"][::3]}
    (tmp_path / "anger.json").write_text(json.dumps(pairs))
    (tmp_path / "corpus.txt").write_text("\n".join(read_sentences(DATA / "generic.txt")[:150]))
    return tmp_path


def test_run_from_the_command_line_leaves_a_report(small, capsys):
    source, target = str(DATA / "pair/source"), str(DATA / "pair/target-gpt2")
    files = ["--pairs", str(small / "anger.json"), "--sentences", str(small / "corpus.txt"), "--out", str(small / "out")]
    assert main(["run", source, target, *files, "--device", "cpu", "--random-vectors", "2"]) == 0
    assert "anger" in capsys.readouterr().out
    content = json.loads((small / "out/report.json").read_text())
    assert set(content["targets"]["target-gpt2"]) == {"anger"}
    assert content["command"].startswith("contrans run ") and "--random-vectors 2" in content["command"]
    assert {path.stem for path in (small / "out").glob("*.safetensors")} == {"concept", "moved", "maps"}


QUICK = ["--arms", "base,transplanted,native,random", "--random-vectors", "8", "--strengths", "2,3", "--device", "cpu"]


def run_quickly(folder: Path, *options: str) -> list[str]:
    source, target = str(DATA / "pair/source"), str(DATA / "pair/target-gpt2")
    return [
        "run",
        source,
        target,
        "--pairs",
        str(folder / "anger.json"),
        "--sentences",
        str(folder / "corpus.txt"),
        *QUICK,
        *options,
    ]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report_byte_for_byte_apart_from_times(small, capsys):
    options = ["--unit", "native", "--kl-budget", "0.5", "--max-depth", "0.6", "--instruction", "Be angry. "]
    pages, contents = set(), []
    for name in ("one", "two"):
        assert main(run_quickly(small, *options, "--out", str(small / name))) == 0
        page = (small / name / "report.html").read_text()
        pages.add(re.sub(r'<span id="seconds">[^<]+</span>', "", page).replace(str(small / name), ""))
        contents.append(read_report(small / name))
        assert contents[-1].pop("seconds") > 0 and contents[-1].pop("command").endswith(str(small / name))
    assert len(pages) == 1 and contents[0] == contents[1]
    search = contents[0]["targets"]["target-gpt2"]["anger"]["search"]
    assert {
        "unit": "native",
        "budget": 0.5,
        "budget_on": "kl",
        "max_depth": 0.6,
        "strengths": [2.0, 3.0],
    }.items() <= search.items()
    capsys.readouterr()
    assert main(["compare", str(small / "one"), str(small / "two")]) == 0
    assert "0 of 4 differ" in capsys.readouterr().out


def test_interrupted_it_leaves_a_report_that_says_it_is_partial(small, capsys, monkeypatch):
    asked, measure = [], RestrictedChoice.measure

    def interrupted(self, subject, split):
        marks = measure(self, subject, split)
        if split == "test":
            asked.append(split)
            if len(asked) == 2:  # of base and transplanted; the main thread, where Python delivers ^C, waits for this one
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(1)
        return marks

    monkeypatch.setattr(RestrictedChoice, "measure", interrupted)
    # A shell starts what runs in the background with ^C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(run_quickly(small, "--out", str(small / "cut"))) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "partial" in capsys.readouterr().err
    content = read_report(small / "cut")
    anger = content["targets"]["target-gpt2"]["anger"]
    assert content["partial"] and anger["partial"]
    assert set(anger["arms"]) == {"base", "transplanted"} and set(anger["missing"]) == {"native", "random"}
    assert "<strong>Partial.</strong>" in (small / "cut/report.html").read_text()


def test_interrupted_before_anything_was_measured_it_says_so(small, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("contrans_tl.loading.load_model", interrupted)
    monkeypatch.setattr("contrans_tl.load_model", interrupted, raising=False)
    assert main(run_quickly(small, "--out", str(small / "cut"))) == 130
    assert "no report was written" in capsys.readouterr().err and not (small / "cut").exists()


def test_a_saved_concept_and_saved_maps_are_evaluated_without_the_source(small, capsys):
    source, target = str(DATA / "pair/source"), str(DATA / "pair/target-gpt2")
    concept, maps, pairs, corpus = (str(small / name) for name in ("c.st", "m.st", "anger.json", "corpus.txt"))
    (small / "neutral.txt").write_text("\n".join(read_sentences(DATA / "neutral.txt")[-12:]))
    assert main(["refine", source, "--pairs", pairs, "--out", concept, "--device", "cpu"]) == 0
    assert main(["fit", source, target, "--sentences", corpus, "--out", maps, "--device", "cpu"]) == 0
    files = ["--pairs", pairs, "--neutral", str(small / "neutral.txt"), "--sentences", corpus, *QUICK]
    assert main(["evaluate", target, concept, maps, *files, "--out", str(small / "out")]) == 0
    content = read_report(small / "out")
    anger = content["targets"]["target-gpt2"]["anger"]
    assert set(anger["arms"]) == {"base", "transplanted", "native", "random"} and anger["transferred"]
    assert anger["held_out"]["texts of the fit corpus"] == 150 and content["sizes"]["fit_sentences"] == 150
    assert {path.stem for path in (small / "out").glob("*.safetensors")} == {"concept", "moved", "maps"}
    capsys.readouterr()
    assert main(["evaluate", target, concept, concept, *files]) == 2
    assert "expected a" in capsys.readouterr().err


@pytest.mark.slow
def test_the_steps_one_by_one_do_what_the_verbs_do(small, capsys):
    source, target = str(DATA / "pair/source"), str(DATA / "pair/target-gpt2")
    concept, maps, moved = (str(small / name) for name in ("c.safetensors", "m.safetensors", "v.safetensors"))
    assert main(["refine", source, "--pairs", str(small / "anger.json"), "--out", concept, "--device", "cpu"]) == 0
    assert main(["fit", source, target, "--sentences", str(small / "corpus.txt"), "--out", maps, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["reformulate", concept, maps, "--layers", "3:4", "--out", moved]) == 0
    assert str(LayerMaps.load(maps).verdict(ConceptVector.load(concept), 3)) in capsys.readouterr().out
    assert LayerMaps.load(maps).target.model.same_space(ConceptVector.load(moved).model)
    prompt = "Scenario: Anna sang with the kite.\nThe emotion of the above scenario is"
    capsys.readouterr()
    assert main(["generate", target, moved, prompt, "--strength", "3", "--tokens", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip().endswith("anger")
    model = load_model(target, device="cpu")
    with transplant(model, ConceptVector.load(moved), strength=3.0):
        assert model.generate(prompt, max_new_tokens=1, do_sample=False, verbose=False).strip().endswith("anger")


def test_sentences_are_chosen_and_fitted_by_another_estimator_on_the_command_line(small, capsys):
    source, corpus, out = str(DATA / "pair/source"), small / "corpus.txt", small / "chosen.txt"
    concept, maps = str(small / "c.safetensors"), str(small / "m.safetensors")
    assert main(["refine", source, "--pairs", str(small / "anger.json"), "--out", concept, "--device", "cpu"]) == 0
    assert main(["select", source, concept, str(corpus), "-n", "40", "--out", str(out), "--device", "cpu"]) == 0
    chosen = read_sentences(out)
    assert len(chosen) == 40 and set(chosen) <= set(read_sentences(corpus))
    options = ["--method", "pcr", "--rank", "20", "--standardise", "--out", maps, "--device", "cpu"]
    assert main(["fit", source, str(DATA / "pair/target-gpt2"), "--sentences", str(out), *options]) == 0
    loaded = LayerMaps.load(maps)
    assert (loaded.method, loaded.rank(3, 4), loaded.standardise) == ("pcr", 20, True)
    capsys.readouterr()
    assert main(["select", source, concept, str(corpus), "-n", "999", "--device", "cpu"]) == 2
    assert "999" in capsys.readouterr().err


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Command lines that cannot work, and what the one line of error has to say."""
    source, target = str(DATA / "pair/source"), str(DATA / "pair/target-gpt2")
    pairs, corpus = str(DATA / "concepts/anger.json"), str(folder / "corpus.txt")
    anger = json.loads(Path(pairs).read_text())

    def file(name: str, content: object) -> str:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
        return str(folder / name)

    def run(pairs: str = pairs, corpus: str = corpus, source: str = source, target: str = target) -> list[str]:
        return ["run", source, target, "--pairs", pairs, "--sentences", corpus, "--out", str(folder / "out")]

    leaking = anger | {"test": [anger["select"][0]]}
    return {
        "missing pairs": (run(pairs="nowhere.json"), "there is no file"),
        "missing corpus": (run(corpus="nowhere.txt"), "there is no file"),
        "missing model": (run(source="./nowhere"), "there is no folder"),
        "not a model": (run(target=str(DATA / "concepts")), "config.json"),
        "not JSON": (run(pairs=file("broken.json", b'{"positive": [')), "not valid JSON"),
        "other JSON": (run(pairs=file("other.json", {"scenarios": []})), "expected"),
        "one side": (run(pairs=file("one.json", {"positive": ["a"], "negative": []})), "needs both sides"),
        "one name twice": ([*run(), "--pairs", pairs], "different names"),
        "no questions": (run(pairs=file("bare.json", {"pos": ["a"], "neg": ["b"]})), "select and test questions"),
        "shared prompts": (run(pairs=file("leak.json", leaking)), "is not held out"),
        "encoding": (run(corpus=file("latin.txt", "caf\xe9 au lait".encode("latin-1"))), "expected UTF-8"),
        "empty corpus": (run(corpus=file("empty.txt", b"\n\n")), "the file has none"),
        "prompts in the corpus": (run(corpus=file("seen.json", [anger["test"][0]["prompt"], "b", "c"])), "not held out"),
        "not an artifact": (["reformulate", corpus, corpus, "--layers", "1:1"], "not a safetensors file"),
        "no such command": (["transmogrify"], "No such command"),
        "no such arm": ([*run(), "--arms", "base,vibes"], "got vibes"),
        "an arm without its words": ([*run(), "--arms", "instruction"], "needs --instruction"),
        "no numbers": ([*run(), "--strengths", "much"], "expected --strengths as in 1,2,4"),
        "no such unit": ([*run(), "--unit", "metres"], "expected --unit among raw"),
        "two budgets": ([*run(), "--budget", "1", "--kl-budget", "1"], "got both"),
        "maps of another kind": (
            ["evaluate", target, corpus, corpus, "--pairs", pairs, "--neutral", corpus],
            "not a safetensors file",
        ),
        "no such dtype": (["refine", source, "--pairs", pairs, "--dtype", "int3"], "expected dtype"),
    }


CASES = [
    "missing pairs", "missing corpus", "missing model", "not a model", "not JSON", "other JSON", "one side", "no questions",
    "shared prompts", "encoding", "empty corpus", "prompts in the corpus", "not an artifact", "no such command",
    "no such dtype", "one name twice", "no such arm", "an arm without its words", "no numbers", "no such unit", "two budgets",
    "maps of another kind",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_exit_code_2_before_any_model_is_loaded(case, small, capsys, monkeypatch):
    import contrans_tl.loading

    def never(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(contrans_tl.loading, "load_model", never)
    cases = bad_inputs(small)
    assert set(cases) == set(CASES)
    arguments, said = cases[case]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("contrans: ") and error.count("\n") == 1 and said in error, error


def test_help_answers_without_torch():
    code = "import sys; from contrans_tl.__main__ import main; main(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("False") and "demo" in out


def test_only_one_progress_bar_is_shown_at_a_time(monkeypatch):
    shown = []

    class Bar:
        def update(self, task, completed): ...

        def stop(self):
            shown.append("stopped")

    def bar(description, total):
        shown.append(description)
        return Bar(), 0

    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "_bar", bar)
    for _ in progress.track(range(3), "outer", 3):
        assert list(progress.track(range(3), "inner", 3)) == [0, 1, 2]
    assert shown == ["inner", "stopped", "outer", "stopped"]
    shown.clear()
    outer = progress.track(range(3), "outer", 3)
    next(outer), next(outer)
    assert list(progress.track(range(3), "inner", 3)) == [0, 1, 2]
    assert shown == ["outer"]
    outer.close()
    assert shown == ["outer", "stopped"] and not progress._TERMINAL.locked()
