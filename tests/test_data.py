"""Every file form people have is read, and a wrong file is one clear line before any model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import unchecked

from contrans_tl import ContrastPairs, Question, read_sentences
from contrans_tl.data import cut_short

POSITIVE, NEGATIVE = ["I smiled all day", "what a lovely gift"], ["I frowned all day", "what a dull gift"]
QUESTION = {"prompt": "The letter made me feel", "options": [" happy", " sad"], "answer": 0}


def write(path: Path, content: Any, encoding: str = "utf-8") -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode(encoding))
    return path


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


OBJECTS = [{"positive": p, "negative": n} for p, n in zip(POSITIVE, NEGATIVE, strict=True)]
FORMS = {
    "the paper's": ("happiness.json", {"pos": POSITIVE, "neg": NEGATIVE}),
    "ours": ("happiness.json", {"positive": POSITIVE, "negative": NEGATIVE}),
    "list of objects": ("happiness.json", OBJECTS),
    "list of pairs": ("happiness.json", [[p, n] for p, n in zip(POSITIVE, NEGATIVE, strict=True)]),
    "JSONL": ("happiness.jsonl", lines(OBJECTS)),
    "JSONL of pos and neg": (
        "happiness.jsonl",
        lines([{"pos": p, "neg": n} for p, n in zip(POSITIVE, NEGATIVE, strict=True)]) + "\n\n",
    ),
    "CAA's questions": (
        "happiness.json",
        [
            {"question": p[:2], "answer_matching_behavior": p[2:], "answer_not_matching_behavior": n[2:]}
            for p, n in zip(POSITIVE, NEGATIVE, strict=True)
        ],
    ),
    "CSV": (
        "happiness.csv",
        "statement,label\n" + "".join(f'"{p}",1\r\n{n},0\n' for p, n in zip(POSITIVE, NEGATIVE, strict=True)),
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("form", FORMS)
def test_pairs_are_the_same_from_every_form(tmp_path, form, encoding):
    file, content = FORMS[form]
    pairs = ContrastPairs.load(write(tmp_path / file, content, encoding))
    assert (pairs.positive, pairs.negative) == (tuple(POSITIVE), tuple(NEGATIVE))
    assert (pairs.name, pairs.select, pairs.test, pairs.metric) == ("happiness", (), (), "token_accuracy")


def test_names_metric_and_questions_are_read(tmp_path):
    content = {"name": "joy", "pos": POSITIVE, "neg": NEGATIVE, "metric": "mc1"}
    content |= {"select": [QUESTION], "test": [QUESTION | {"prompt": "Today I feel", "group": "g"}]}
    content |= {"own": [QUESTION | {"options": [" sad", " glad", " happy"], "answer": 2, "correct": [1, 2], "prefix": "So. "}]}
    path = write(tmp_path / "x.json", content)
    pairs = ContrastPairs.load(path)
    assert (pairs.name, pairs.metric) == ("joy", "mc1")
    assert pairs.select == (Question(QUESTION["prompt"], (" happy", " sad"), 0),)
    assert pairs.test == (Question("Today I feel", (" happy", " sad"), 0, "g"),)
    assert pairs.own == (Question(QUESTION["prompt"], (" sad", " glad", " happy"), 2, correct=(1, 2), prefix="So. "),)
    assert pairs.own[0].text == "So. The letter made me feel"
    assert ContrastPairs.load(path, name="glee").name == "glee"


def test_pairs_are_made_of_tuples_in_memory():
    pairs = ContrastPairs.of("happiness", zip(POSITIVE, NEGATIVE, strict=True))
    assert pairs == ContrastPairs("happiness", tuple(POSITIVE), tuple(NEGATIVE))
    with pytest.raises(ValueError, match="x: expected positive prompts; got none"):
        ContrastPairs.of("x", [])
    with unchecked(), pytest.raises(ValueError, match="x, pair 2 is no pair of a positive and a negative text: tuple"):
        ContrastPairs.of("x", [("a", "b"), ("a",)])


BAD_QUESTIONS = {
    "one option": ((" a",), 0, (), "at least two options of the question 'Why'; got 1"),
    "one option twice": ((" a", " b", " a"), 0, (), "different options .*' a' 2 times"),
    "an answer beyond": ((" a", " b"), 2, (), "answer .* from 0 to 1; got 2"),
    "an answer from the end": ((" a", " b"), -1, (), "answer .* from 0 to 1; got -1"),
    "an answer of yes": ((" a", " b"), True, (), "answer .* got True"),
    "nothing wrong": ((" a", " b"), 0, (0, 1), "at least one wrong option"),
    "correct beyond": ((" a", " b"), 0, (0, 2), "correct .* from 0 to 1; got 2"),
    "correct without the answer": ((" a", " b", " c"), 0, (1, 2), r"hold its answer 0; got \(1, 2\)"),
    "correct twice": ((" a", " b", " c"), 0, (0, 0), r"to be different .*got \(0, 0\)"),
}


@pytest.mark.parametrize("case", BAD_QUESTIONS)
def test_a_question_that_cannot_be_answered_is_refused(case):
    options, answer, correct, message = BAD_QUESTIONS[case]
    with unchecked(), pytest.raises(ValueError, match=message):
        Question("Why", options, answer, correct=correct)


def test_a_text_keeps_the_line_separators_of_unicode(tmp_path):
    text = "one\u2028line\x85still"
    raw = json.dumps({"positive": text, "negative": "other"}, ensure_ascii=False)
    assert ContrastPairs.load(write(tmp_path / "a.jsonl", raw)).positive == (text,)
    assert read_sentences(write(tmp_path / "a.txt", f"{text}\nother\r\n")) == [text, "other"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("s.txt", "The first.\n\n  The second, naïve.  \r\nThe third."),
        ("s.json", ["The first.", "The second, naïve.", "", "The third."]),
        ("s.jsonl", lines([{"text": "The first."}, {"sentence": "The second, naïve."}, "The third."])),
        ("s.csv", 'id,statement\n1,The first.\n2,"The second, naïve."\n3,The third.\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"], ids=["plain", "byte order mark"])
def test_sentences_are_the_same_from_every_form(tmp_path, file, content, encoding):
    expected = ["The first.", "The second, naïve.", "The third."]
    assert read_sentences(write(tmp_path / file, content, encoding)) == expected


LATIN = "caf\xe9".encode("latin-1")
BAD_PAIRS = {
    "not JSON": ("x.json", "{", "not valid JSON"),
    "not JSON in line 3": ("x.jsonl", lines(OBJECTS) + "\n{", "line 3: not valid JSON"),
    "no sides": ("x.json", {"happy": []}, "expected .*'happy'"),
    "one side missing": ("x.json", {"positive": POSITIVE}, "expected"),
    "sides of two conventions": ("x.json", {"positive": POSITIVE, "neg": NEGATIVE}, "expected"),
    "empty side": ("x.json", {"positive": POSITIVE, "negative": []}, "expected negative prompts; got none"),
    "both empty": ("x.json", {"pos": [], "neg": []}, "expected positive prompts; got none"),
    "no pairs": ("x.json", [], "expected positive prompts; got none"),
    "an empty prompt": ("x.json", {"pos": ["a", " "], "neg": ["b", "c"]}, "positive prompt 2 is empty"),
    "a number among texts": ("x.json", {"pos": ["a", 1], "neg": ["b"]}, "x.json, pos 2: expected a text; got int '1'"),
    "one text": ("x.json", {"pos": "happy", "neg": "sad"}, "expected"),
    "a number": ("x.json", 3, "expected"),
    "a pair of three": ("x.json", [["a", "b", "c"]], "entry 1 is no pair"),
    "a pair without its negative": ("x.jsonl", lines([OBJECTS[0]]) + '\n\n{"positive": "a"}', "line 3 is no pair"),
    "a question without its answer": (
        "x.json",
        [{"question": "Why?", "answer_matching_behavior": " (A)"}],
        "entry 1: expected an object with the texts question, answer_matching_behavior, answer_not",
    ),
    "CSV of other columns": ("x.csv", "text,score\na,1\n", "statement,label"),
    "CSV of other labels": ("x.csv", 'statement,label\n"a\nb",1\nc,no\n', "line 4: expected label 0 or 1; got 'no'"),
    "CSV without a label": ("x.csv", "statement,label\na,1\nb\n", "line 3: expected 2 cells, as the header has; got 1"),
    "CSV with a bare comma": (
        "x.csv",
        "statement,label\na,1\n\nb, c,0\n",
        "line 4: expected 2 cells.*got 3. Quote",
    ),
    "CSV without rows": ("x.csv", "statement,label\n", "rows of statement,label; got none"),
    "an empty CSV": ("x.csv", "", "statement,label; got no rows"),
    "CSV of one side": ("x.csv", "statement,label\na,1\n", "expected negative prompts; got none"),
    "CSV with an endless field": ("x.csv", 'statement,label\n"' + "a" * 200_000 + '",1\n', "not valid CSV"),
    "Latin-1": ("x.json", b'{"pos": ["' + LATIN + b'"], "neg": ["b"]}', "expected UTF-8.*byte 13"),
    "UTF-16": ("x.json", json.dumps({"pos": ["a"], "neg": ["b"]}).encode("utf-16"), "expected UTF-8"),
    "UTF-16 without mark": ("x.json", json.dumps({"pos": ["a"], "neg": ["b"]}).encode("utf-16-le"), "expected UTF-8"),
    "another metric": ("x.json", {"pos": POSITIVE, "neg": NEGATIVE, "metric": "vibes"}, "expected metric .*'vibes'"),
    "an answer that is no option": (
        "x.json",
        {"pos": POSITIVE, "neg": NEGATIVE, "test": [QUESTION, QUESTION | {"answer": 2}]},
        r"test\[1\] is no question .*answer of the question '.*' to be an index from 0 to 1; got 2",
    ),
    "a text for a question": ("x.json", {"pos": ["a"], "neg": ["b"], "own": ["p"]}, r"own\[0\] is no question"),
    "an answer in words": ("x.json", {"pos": ["a"], "neg": ["b"], "test": [QUESTION | {"answer": "0"}]}, "no question"),
    "options in one text": ("x.json", {"pos": ["a"], "neg": ["b"], "test": [QUESTION | {"options": "ab"}]}, "no question"),
    "a question without options": ("x.json", {"pos": ["a"], "neg": ["b"], "select": [{"prompt": "p"}]}, "no question"),
    "a correct option that is none": (
        "x.json",
        {"pos": ["a"], "neg": ["b"], "test": [QUESTION | {"correct": [0, 5]}]},
        r"test\[0\] is no question .*correct of the question .* from 0 to 1; got 5",
    ),
    "correct options in a text": ("x.json", {"pos": ["a"], "neg": ["b"], "test": [QUESTION | {"correct": "0"}]}, "no question"),
    "questions that are no list": ("x.json", {"pos": ["a"], "neg": ["b"], "select": None}, "select to be a list"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_wrong_pairs_are_one_line_of_error(tmp_path, case):
    file, content, message = BAD_PAIRS[case]
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        ContrastPairs.load(write(tmp_path / file, content))
    assert "\n" not in str(caught.value)
    assert "x" in str(caught.value)  # the file or the concept is named


BAD_SENTENCES = {
    "empty": ("s.txt", "\n  \n", "expected sentences; the file has none"),
    "Latin-1": ("s.txt", LATIN, "expected UTF-8 text; byte 3 is none. Convert it"),
    "UTF-16": ("s.txt", "plain words\n".encode("utf-16-le"), "expected UTF-8 text"),
    "an object": ("s.json", {"sentences": ["a"]}, "JSON list; got an object with 'sentences'"),
    "numbers": ("s.json", ["a", 2], "entry 2: expected a text"),
    "no text in the object": ("s.jsonl", "\n" + lines([{"body": "a"}]), "line 2: .*'text', 'sentence' or 'statement'"),
    "CSV of a row too short": ("s.csv", "id,text\n1,a\n2\n", "line 3: expected 2 cells, as the header has; got 1"),
    "not JSON": ("s.jsonl", "The first.", "line 1: not valid JSON"),
    "CSV of other columns": ("s.csv", "body\na\n", "'text', 'sentence' or 'statement'"),
}


@pytest.mark.parametrize("case", BAD_SENTENCES)
def test_wrong_sentences_are_one_line_of_error(tmp_path, case):
    file, content, message = BAD_SENTENCES[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_sentences(write(tmp_path / file, content))
    assert "\n" not in str(caught.value) and str(tmp_path / file) in str(caught.value)


@pytest.mark.parametrize("read", [ContrastPairs.load, read_sentences])
def test_a_missing_file_or_a_folder_is_one_line_of_error(tmp_path, read):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(ValueError, match="there is no file"):
            read(path)


def test_cut_short_drops_two_to_four_words_and_the_same_ones_every_time():
    sentences = [" ".join(f"w{i}" for i in range(n)) for n in (5, 6, 12, 40, 40, 40, 40)]
    cut = cut_short(sentences)
    assert cut == cut_short(sentences)
    dropped = [len(a.split()) - len(b.split()) for a, b in zip(sentences, cut, strict=True)]
    assert dropped[0] == 0 and set(dropped[1:]) <= {2, 3, 4} and len(set(dropped[1:])) > 1
    assert all(a.startswith(b) for a, b in zip(sentences, cut, strict=True))
