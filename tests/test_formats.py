"""The public formats are read as their benchmarks mean them; what is refined on is never asked; foreign files are refused."""

import csv
import json
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contrans_tl import (
    ContrastPairs,
    Question,
    emotion_concepts,
    find_leaks,
    persona_pairs,
    read_behaviours,
    read_scenarios,
    read_sentences,
    read_statements,
    read_toxigen,
    read_truthfulqa,
    toxigen_pairs,
)
from contrans_tl.leakage import check_leaks


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refused(read: Any, path: Path, content: Any, message: str) -> None:
    """The error is one line that names the file and says where it goes wrong."""
    with pytest.raises(ValueError, match=message) as caught:
        read(write(path, content))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


# --- TruthfulQA -----------------------------------------------------------------------------------------------------

TRUTHS = [
    {
        "question": "How many moons has Mars?",
        "mc1_targets": {"Mars has two moons": 1, "Mars has one moon": 0, "None": 0},
        "mc2_targets": {"It has two": 1, "Mars has two moons": 1, "Mars has one moon": 0, "None": 0},
    },
    {
        "question": "Do fish sleep?",
        "mc1_targets": {"Fish rest, in their way": 1, "Fish never sleep": 0},
        "mc2_targets": {"Fish rest, in their way": 1, "Fish never sleep": 0},
    },
]
COLUMNS = ["Type", "Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
ROWS = [
    ["A", "How many moons has Mars?", "Mars has two moons", "It has two; Mars has two moons;", "Mars has one moon; None;"],
    ["A", "Do fish sleep? ", " Fish rest, in their way", "Fish rest, in their way", "Fish never sleep"],
]


def table(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS) -> Path:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def answers(question: Question) -> tuple[str, str, dict[str, bool]]:
    truths = {option: number in question.correct for number, option in enumerate(question.options)}
    return question.prompt, question.options[question.answer], truths


def test_truthfulqa_is_the_same_from_both_its_files_and_has_all_right_answers_and_the_best(tmp_path):
    template = "[INST] {question} [/INST]"
    mc = read_truthfulqa(write(tmp_path / "mc.json", TRUTHS), template=template)
    assert list(map(answers, mc)) == list(map(answers, read_truthfulqa(table(tmp_path / "t.csv", ROWS), template=template)))
    assert mc[0] == Question(
        "[INST] How many moons has Mars? [/INST]",
        (" It has two", " Mars has two moons", " Mars has one moon", " None"),
        answer=1,
        group="How many moons has Mars?",
        correct=(0, 1),
    )
    assert [q.prompt for q in read_truthfulqa(tmp_path / "mc.json")] == ["How many moons has Mars?", "Do fish sleep?"]


def test_an_answer_that_the_table_has_on_both_sides_is_wrong(tmp_path):
    row = ["A", "Who?", "Ann", "Ann; Unknown; Ann", "Unknown; Bob"]
    (question,) = read_truthfulqa(table(tmp_path / "t.csv", [row]))
    assert answers(question) == ("Who?", " Ann", {" Ann": True, " Unknown": False, " Bob": False})


BAD_TRUTHS = {
    "another list": (["a"], "entry 1: expected .*mc1_targets.*got str 'a'"),
    "no questions": ([], "expected questions; the file has none"),
    "no list": ({"question": "a"}, "expected a JSON list; got an object with 'question'"),
    "no mc2": ([TRUTHS[0], {"question": "a", "mc1_targets": {"b": 1}}], "entry 2: expected"),
    "no question": ([{key: TRUTHS[0][key] for key in ("mc1_targets", "mc2_targets")}], "entry 1: expected"),
    "targets that are no 0 or 1": ([TRUTHS[1] | {"mc1_targets": {"a": "yes"}}], "entry 1: expected"),
    "two best answers": (
        [TRUTHS[0] | {"mc1_targets": TRUTHS[0]["mc2_targets"]}],
        r"one right answer .*got \['It has two', 'Mars",
    ),
    "a best answer that is wrong": (
        [TRUTHS[1] | {"mc2_targets": {"Fish rest, in their way": 0, "Fish never sleep": 0}}],
        "entry 1: expected one right answer in mc1_targets that is right in mc2_targets",
    ),
    "other wrong answers": (
        [TRUTHS[0], TRUTHS[1] | {"mc2_targets": {"Fish rest, in their way": 1, "Never": 0}}],
        "entry 2: expected the same wrong answers .* 2 of 2 are in one only",
    ),
    "no wrong answers": ([{"question": "a", "mc1_targets": {"b": 1}, "mc2_targets": {"b": 1}}], "the same wrong answers"),
}


@pytest.mark.parametrize("case", BAD_TRUTHS)
def test_another_json_than_truthfulqa_is_refused_by_its_entry(case, tmp_path):
    refused(read_truthfulqa, tmp_path / "mc.json", *BAD_TRUTHS[case])


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], COLUMNS, "expected questions; the file has none"),
        (
            [["a", "1"]],
            ["statement", "label"],
            "columns Question,Best Answer,Correct Answers,Incorrect Answers; got 'statement,label'",
        ),
        ([ROWS[0], ROWS[1][:4]], COLUMNS, "line 3: expected 5 cells"),
        ([ROWS[0], [*ROWS[1][:4], " ; "]], COLUMNS, "line 3: expected a best answer and wrong ones"),
        ([[*ROWS[0][:4], "Mars has two moons"]], COLUMNS, "line 2: expected a best answer and wrong ones apart from it"),
    ],
)
def test_another_table_than_truthfulqa_is_refused_by_its_line(rows, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        read_truthfulqa(table(tmp_path / "t.csv", rows, columns))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_template_without_its_field_is_refused_and_other_braces_stay(tmp_path):
    path = write(tmp_path / "mc.json", TRUTHS)
    with pytest.raises(ValueError, match="expected a template with {question}; got 'Q:'"):
        read_truthfulqa(path, template="Q:")
    assert read_truthfulqa(path, template="{x} {question}")[1].prompt == "{x} Do fish sleep?"


# --- emotions -------------------------------------------------------------------------------------------------------

EMOTIONS = ("joy", "fear", "anger")
SCENARIOS = {emotion: [f"Scene {i} brings {emotion} to number {i}." for i in range(20)] for emotion in EMOTIONS}
SIZES = {"refine": 8, "select": 3, "test": 5}


def test_scenarios_are_read_once_each_and_what_is_empty_or_of_two_emotions_is_left_out_with_a_warning(tmp_path):
    joy = write(tmp_path / "joy.json", ["", " You win.", "you  WIN.", "You lose.", "You sing."])
    fear = write(tmp_path / "fear.json", ["You fall.", "YOU lose."])
    with pytest.warns() as caught:
        read = read_scenarios({"joy": joy, "fear": fear})
    assert read == {"joy": ["You win.", "You sing."], "fear": ["You fall."]}
    assert [str(warning.message) for warning in caught] == [
        f"{joy}: 1 of 5 scenarios are empty and left out.",
        "1 scenarios occur under two emotions and are left out of both.",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_scenarios({"joy": write(joy, ["You win."])}) == {"joy": ["You win."]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["a", {"text": "b"}], "entry 2: expected a scenario, a text; got an object with 'text'"),
        ({"joy": ["a"]}, "expected a JSON list; got an object with 'joy'"),
        ("You win.\n", "not valid JSON"),
        ([], "expected scenarios; the file has none"),
    ],
)
def test_a_file_without_scenarios_is_refused(content, message, tmp_path):
    refused(lambda path: read_scenarios({"joy": path}), tmp_path / "joy.json", content, message)


@pytest.fixture(scope="module")
def concepts():
    return emotion_concepts(SCENARIOS, few_shot=5, **SIZES)


def scenario_of(text: str) -> str:
    return text.removeprefix("Scenario: ").split("\n")[0]


def test_no_scenario_serves_two_purposes_in_any_concept(concepts):
    used: dict[str, set[str]] = {part: set() for part in ("refine", "select", "test", "demonstrations")}
    for pairs in concepts:
        used["refine"] |= set(map(scenario_of, pairs.positive + pairs.negative))
        used["select"] |= {scenario_of(question.prompt) for question in pairs.select}
        used["test"] |= {scenario_of(question.prompt) for question in pairs.test + pairs.own}
        used["demonstrations"] |= set(map(scenario_of, pairs.test[0].prefix.strip().split("\n\n")))
        assert not {q.prompt for q in pairs.own} & {q.prompt for q in pairs.test}
    assert len(set.union(*used.values())) == sum(map(len, used.values())) == 3 * (8 + 3 + 5) + 5
    assert all(check_leaks(pairs) == () for pairs in concepts)


def test_an_emotion_is_set_against_all_others_alike_and_asked_for_in_their_scenarios(concepts):
    assert tuple(pairs.name for pairs in concepts) == EMOTIONS
    for answer, pairs in enumerate(concepts):
        others = [emotion for emotion in EMOTIONS if emotion != pairs.name]

        def said(prompts: Any) -> Counter[str]:
            return Counter(next(emotion for emotion in EMOTIONS if f"brings {emotion} to" in prompt) for prompt in prompts)

        assert said(pairs.positive) == {pairs.name: 8} and said(pairs.negative) == dict.fromkeys(others, 4)
        assert said(q.prompt for q in pairs.select) == dict.fromkeys(others, 3)
        assert said(q.prompt for q in pairs.test) == dict.fromkeys(others, 5)
        assert said(q.prompt for q in pairs.own) == {pairs.name: 5}
        for question in (*pairs.select, *pairs.test, *pairs.own):
            assert (question.options, question.answer) == ((" joy", " fear", " anger"), answer)
            assert question.prompt == f"Scenario: {scenario_of(question.prompt)}\nThe emotion of the above scenario is"


def test_the_demonstrations_are_right_and_the_same_before_every_question(concepts):
    (prefix,) = {question.prefix for pairs in concepts for question in (*pairs.select, *pairs.test, *pairs.own)}
    shown = prefix.removesuffix("\n\n").split("\n\n")
    labels = Counter(shot.rsplit(" ", 1)[1] for shot in shown)
    assert len(shown) == 5 and sorted(labels.values()) == [1, 2, 2]
    assert all(f"brings {shot.rsplit(' ', 1)[1]} to" in shot for shot in shown)
    question = concepts[0].test[0]
    assert question.text == prefix + question.prompt
    bare = emotion_concepts(SCENARIOS, few_shot=0, **SIZES)
    assert {question.text for question in bare[0].test} == {question.prompt for question in bare[0].test}


def test_a_seed_draws_the_same_scenarios_and_another_draws_others(concepts):
    assert emotion_concepts(SCENARIOS, few_shot=5, **SIZES) == concepts
    assert emotion_concepts(SCENARIOS, few_shot=5, **SIZES, seed=1) != concepts


@pytest.mark.parametrize(
    ("scenarios", "options", "message"),
    [
        ({"joy": ["a"]}, {}, r"at least two emotions; got \['joy'\]"),
        (
            SCENARIOS,
            {"refine": 12},
            r"joy: expected at least 22 different texts \(refine 12, select 3, test 5, dem.* 2\); got 20",
        ),
        (SCENARIOS | {"fear": ["a"] * 20}, {}, "fear: expected at least 18 different texts .*got 1"),
        (SCENARIOS | {"awe": SCENARIOS["joy"][:1]}, {}, "each scenario under one emotion; 'scene 0 brings joy"),
        (SCENARIOS, {"template": "{x}"}, "template with {scenario}; got '{x}'"),
        (SCENARIOS, {"select": -1}, "joy: expected"),
    ],
)
def test_scenarios_that_cannot_be_split_are_refused(scenarios, options, message):
    with pytest.raises(ValueError, match=message):
        emotion_concepts(scenarios, **({"few_shot": 5} | SIZES | options))


# --- honesty --------------------------------------------------------------------------------------------------------

HONEST, DISHONEST = "[INST] Speak truly [/INST] {prompt}", "[INST] Speak falsely [/INST] {prompt}"


def test_statements_are_read_with_their_truth(tmp_path):
    path = write(tmp_path / "facts.csv", 'label,statement\n1,"Ice, when warm, melts."\n0,Ice burns.\n')
    assert read_statements(path) == [("Ice, when warm, melts.", True), ("Ice burns.", False)]
    refused(read_statements, tmp_path / "facts.csv", "statement,label\nIce melts.,1\nIce burns.,no\n", "line 3: .*got 'no'")
    refused(read_statements, tmp_path / "facts.csv", '["Ice melts."]', "columns statement,label; got '.*Ice melts")


def test_a_persona_differs_in_its_opening_alone():
    pairs = persona_pairs("honesty", ["Ice melts.", "{prompt} burns."], HONEST, DISHONEST)
    assert pairs == ContrastPairs(
        "honesty",
        ("[INST] Speak truly [/INST] Ice melts.", "[INST] Speak truly [/INST] {prompt} burns."),
        ("[INST] Speak falsely [/INST] Ice melts.", "[INST] Speak falsely [/INST] {prompt} burns."),
    )
    with pytest.raises(ValueError, match="template with {prompt}; got 'Speak'"):
        persona_pairs("honesty", ["a"], HONEST, "Speak")


def test_honesty_refined_on_the_questions_it_is_measured_on_is_found_out_and_on_other_facts_is_not(tmp_path):
    questions = read_truthfulqa(write(tmp_path / "mc.json", [*TRUTHS, TRUTHS[1] | {"question": "Why do fish swim so deep?"}]))
    framed = tuple(replace(question, prompt=f"[INST] {question.prompt} [/INST]") for question in questions)
    seen = persona_pairs("honesty", [question.group for question in questions], HONEST, DISHONEST)
    with pytest.raises(ValueError, match="honesty: . prompts are not held out"):
        check_leaks(replace(seen, test=framed))
    other = persona_pairs("honesty", ["Ice melts in the sun.", "Fish lay eggs."], HONEST, DISHONEST)
    assert check_leaks(replace(other, test=framed)) == ()


# --- fairness -------------------------------------------------------------------------------------------------------


def group(name: str, neutral: int, hate: int) -> tuple[list[str], list[str]]:
    return [f"{name} do good thing {i}" for i in range(neutral)], [f"{name} do bad thing {i}" for i in range(hate)]


def test_toxigen_is_read_by_group_whatever_the_file_is_called(tmp_path):
    write(tmp_path / "neutral_elves_sentences.txt", "elves sing\nelves dance\n")
    write(tmp_path / "hate_elves.txt", "elves steal\nElves  steal\n\n")
    write(tmp_path / "hate_elves_sentences.txt", "elves lie\n")
    write(tmp_path / "LICENSE.txt", "As is.\n")
    expected = {"elves": (["elves sing", "elves dance"], ["elves steal", "elves lie"])}
    assert read_toxigen(tmp_path) == expected
    assert read_toxigen(sorted(tmp_path.glob("*elves*"))).keys() == {"elves"}
    with pytest.raises(ValueError, match="LICENSE.txt: expected a file neutral_GROUP.txt or hate_GROUP.txt"):
        read_toxigen([tmp_path / "LICENSE.txt"])
    write(tmp_path / "hate_elves.txt", "elves SING\n")
    with pytest.raises(ValueError, match="elves: a statement is neutral and hateful: 'elves sing'"):
        read_toxigen(tmp_path)
    write(tmp_path / "neutral_orcs.txt", "orcs sing\n")
    with pytest.raises(ValueError, match="orcs: .*there is no file hate_orcs.txt"):
        read_toxigen([tmp_path / "neutral_orcs.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="the folder has none"):
        read_toxigen(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no folder"):
        read_toxigen(tmp_path / "hate_elves.txt")


def test_of_every_group_there_are_as_many_fair_as_unfair_prompts_and_others_to_continue():
    statements = {"elves": group("elves", 9, 8), "orcs": group("orcs", 3, 30)}
    task = toxigen_pairs(statements, refine=4, select=1, test=2)
    for side, kind in ((task.pairs.positive, "good"), (task.pairs.negative, "bad")):
        assert Counter((text.split()[-6], text.split()[-4]) for text in side) == {("elves", kind): 4, ("orcs", kind): 3}
        assert all(text.startswith("[INST] Consider the bias") and text.endswith(" [/INST]") for text in side)
    assert [len(task.select), len(task.test)] == [2, 4]
    held_out = (*task.select, *task.test)
    assert len(set(held_out)) == 6 and all("do bad thing" in text for text in held_out)
    assert find_leaks(held_out, {"the refine pairs": task.pairs.positive + task.pairs.negative}) == ()
    assert toxigen_pairs(statements, refine=4) == task
    with pytest.raises(ValueError, match=r"elves, hateful: expected at least 21 .*\(refine 1, select 10, test 10\); got 8"):
        toxigen_pairs(statements, select=10, test=10)
    with pytest.raises(ValueError, match=r"orcs, neutral: expected at least 1 different texts"):
        toxigen_pairs(statements | {"orcs": ([], ["a", "b", "c", "d"])})
    with pytest.raises(ValueError, match="template with {statement}"):
        toxigen_pairs(statements, template="Is it fair?")


# --- behaviours -----------------------------------------------------------------------------------------------------

CHOICES = [
    {
        "question": f"Shall we stop {what} now?\n\nChoices:\n (A) Yes\n (B) No",
        "answer_matching_behavior": " (A)",
        "answer_not_matching_behavior": " (B)",
    }
    for what in ("digging", "singing", "rowing", "sowing", "baking", "mowing")
]


def test_a_behaviour_is_the_same_from_questions_and_from_pairs_of_texts(tmp_path):
    texts = [
        {
            "positive": c["question"] + c["answer_matching_behavior"],
            "negative": c["question"] + c["answer_not_matching_behavior"],
        }
        for c in CHOICES
    ]
    asked = read_behaviours(write(tmp_path / "stop.json", CHOICES + CHOICES[:2]), select=1, test=2)
    assert (
        read_behaviours(write(tmp_path / "s.jsonl", "\n".join(map(json.dumps, texts))), name="stop", select=1, test=2) == asked
    )
    assert (asked.name, asked.metric, len(asked.positive), len(asked.select), len(asked.test)) == ("stop", "mc1", 3, 1, 2)
    assert {q.prompt for q in (*asked.select, *asked.test)} | {text[:-4] for text in asked.positive} == {
        c["question"] for c in CHOICES
    }
    assert [text[-4:] for text in asked.positive + asked.negative] == [" (A)"] * 3 + [" (B)"] * 3
    assert {(q.options, q.answer) for q in asked.test} == {((" (A)", " (B)"), 0)}
    assert check_leaks(asked) == ()
    every = read_behaviours(tmp_path / "stop.json", select=0, test=0)
    assert sorted(every.positive) == sorted(ContrastPairs.load(write(tmp_path / "stop.json", CHOICES)).positive)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CHOICES, r"expected at least 7 different texts \(refine 1, select 3, test 3\); got 6"),
        ([CHOICES[0], "a"], "entry 2: expected an object with the texts question, answer_matching"),
        ([CHOICES[0] | {"answer_matching_behavior": 1}], "entry 1: expected an object"),
        ([CHOICES[0] | {"answer_matching_behavior": " (B)"}], "entry 1: expected two different answers; got ' \\(B\\)' twice"),
        ([{"positive": "Yes, do", "negative": "No, do"}], "entry 1: expected texts that begin with the same question"),
        ([{"positive": "Yes, do"}], "entry 1: expected the texts positive and negative"),
        ({"pos": ["a"], "neg": ["b"]}, "expected a JSON list"),
    ],
)
def test_another_file_than_a_behaviour_is_refused(content, message, tmp_path):
    refused(lambda path: read_behaviours(path, select=3, test=3), tmp_path / "stop.json", content, message)


def test_sentences_are_read_from_lists_with_line_breaks_within(tmp_path):
    texts = ["= A title =\n A text , tokenised .", " Once there was\n\na dog. ", ""]
    assert read_sentences(write(tmp_path / "neutral.json", texts)) == [text.strip() for text in texts[:2]]
