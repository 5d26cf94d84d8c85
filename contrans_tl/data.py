"""Data: contrast pairs, questions and sentences, and the files people have them in.

    ContrastPairs.load("happiness.json")      our own, the paper's {"pos", "neg"}, {"positive", "negative"}, JSONL, CSV
    read_sentences("corpus.txt")              plain text (a line each), JSON list of strings, JSONL, CSV

Nothing here loads a model: a wrong file is an error of one line before any work. That evaluation prompts are held out is the
affair of `contrans_tl.leakage`; the public benchmarks are read by `contrans_tl.formats`.
"""

import csv
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Metric = Literal["token_accuracy", "mc1"]
"""See `ContrastPairs.metric`."""


@dataclass(frozen=True)
class Question:
    """A held-out prompt with the answers to choose from.

    ValueError for fewer than two options, an option that occurs twice, or an index that points at none.
    """

    prompt: str
    options: tuple[str, ...]
    """As they follow the prompt, leading space included."""
    answer: int
    """Index of the option that the concept should bring about."""
    group: str = ""
    """Questions of one group (say, about one fact) are resampled together when an interval is computed."""
    correct: tuple[int, ...] = ()
    """Indices of all options that count as right, `answer` among them (TruthfulQA's MC2). Empty: the answer alone."""
    prefix: str = ""
    """What stands before the prompt and is the same for many questions, such as labelled demonstrations. Apart from the prompt,
    so that a demonstration is not mistaken for part of every question when leaks are looked for."""

    def __post_init__(self) -> None:
        n, of = len(self.options), f"of the question {self.prompt[-60:]!r}"
        if n < 2:
            raise ValueError(f"expected at least two options {of}; got {n}.")
        if twice := [option for option in self.options if self.options.count(option) > 1]:
            raise ValueError(f"expected different options {of}; got {twice[0]!r} {len(twice)} times.")
        for name, index in (("answer", self.answer), *(("correct", index) for index in self.correct)):
            if type(index) is not int or not 0 <= index < n:
                raise ValueError(f"expected {name} {of} to be an index from 0 to {n - 1}; got {index!r}.")
        if len(set(self.correct)) == n:
            raise ValueError(f"expected at least one wrong option {of}; all {n} are correct.")
        if self.correct and (self.answer not in self.correct or len(set(self.correct)) < len(self.correct)):
            raise ValueError(
                f"expected the correct options {of} to be different and to hold its answer {self.answer}; got {self.correct}."
            )

    @property
    def text(self) -> str:
        """What the model reads before an option: prefix and prompt."""
        return self.prefix + self.prompt


@dataclass(frozen=True)
class ContrastPairs:
    """Prompts with and without a concept, and, where there are any, held-out questions that tell whether it took effect.

    ValueError for an empty side, an empty prompt, or an unknown metric. Whether the questions are in truth held out is looked
    into by `check_leaks`, which whatever evaluates them calls.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    select: tuple[Question, ...] = ()
    """To choose layers and strength on."""
    test: tuple[Question, ...] = ()
    """To report on."""
    metric: Metric = "token_accuracy"
    """`token_accuracy`: the next token over the whole vocabulary; `mc1`: the most likely of the options."""
    own: tuple[Question, ...] = ()
    """Held-out prompts of the concept itself, the answer of which is the concept's without any transplant."""

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            if not (prompts := getattr(self, side)):
                raise ValueError(f"{self.name}: expected {side} prompts; got none. A concept needs both sides.")
            for number, prompt in enumerate(prompts, 1):
                if not prompt.strip():
                    raise ValueError(
                        f"{self.name}: {side} prompt {number} is empty; a concept is read off the last token of each."
                    )
        if self.metric not in get_args(Metric):
            raise ValueError(f"{self.name}: expected metric {' or '.join(get_args(Metric))}; got {self.metric!r}.")

    @classmethod
    def of(cls, name: str, pairs: Iterable[tuple[str, str]]) -> "ContrastPairs":
        """From (positive, negative) texts, as the package steering-vectors takes them."""
        sides = _pairs_from((f"{name}, pair {number}", pair) for number, pair in enumerate(pairs, 1))
        return cls(name, tuple(sides["positive"]), tuple(sides["negative"]))

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str | None = None) -> "ContrastPairs":
        """Pairs from a file. The name is the file's own, or its stem.

        Read are: JSON `{"positive": [...], "negative": [...]}` or the paper's `{"pos": [...], "neg": [...]}`, either with
        optional `name`, `metric`, `select`, `test`, `own`; JSON lists and JSONL of `{"positive": ..., "negative": ...}` (or
        `pos`, `neg`) objects, of two-element lists or of CAA's `{"question", "answer_matching_behavior",
        "answer_not_matching_behavior"}`; CSV with the columns `statement,label` (label 1 is positive).

        Raises:
            ValueError: no such file, not UTF-8, or none of these forms.
        """
        path = Path(path)
        if path.suffix == ".csv":
            statements = read_statements(path)
            content: Any = {
                "positive": [text for text, label in statements if label],
                "negative": [text for text, label in statements if not label],
            }
        elif path.suffix == ".jsonl":
            content = _pairs_from(read_entries(path))
        elif isinstance(content := read_json(path), list):
            content = _pairs_from(_numbered(path, content))
        sides = ("positive", "negative") if isinstance(content, dict) and "positive" in content else ("pos", "neg")
        if not isinstance(content, dict) or not all(isinstance(content.get(side), list) for side in sides):
            raise ValueError(
                f'{path}: expected {{"positive": [texts], "negative": [texts]}} or {{"pos": [...], "neg": [...]}}, '
                f"a list of pairs, or CSV statement,label; got {describe(content)}."
            )
        for side in sides:
            for number, text in enumerate(content[side], 1):
                if not isinstance(text, str):
                    raise ValueError(f"{path}, {side} {number}: expected a text; got {describe(text)}.")
        return cls(
            name=name or str(content.get("name", path.stem)),
            positive=tuple(content[sides[0]]),
            negative=tuple(content[sides[1]]),
            select=_questions(path, content, "select"),
            test=_questions(path, content, "test"),
            metric=content.get("metric", "token_accuracy"),
            own=_questions(path, content, "own"),
        )


def read_sentences(path: str | os.PathLike[str]) -> list[str]:
    """Sentences from plain text (one a line), a JSON list of strings, JSONL or CSV (`text`, `sentence` or `statement`).

    Empty lines are dropped. ValueError for a missing file, one that is not UTF-8, or one without sentences.
    """
    path = Path(path)
    if path.suffix in (".json", ".jsonl", ".csv"):
        sentences = [_text_of(place, entry) for place, entry in read_entries(path)]
    else:
        sentences = read_text(path).split("\n")
    sentences = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not sentences:
        raise ValueError(f"{path}: expected sentences; the file has none.")
    return sentences


def read_statements(path: str | os.PathLike[str]) -> list[tuple[str, bool]]:
    """Statements and whether they are true, from CSV with the columns `statement,label` (1 or 0): RepE's facts, the files of
    the geometry of truth. As they stand: a statement may occur twice. ValueError for other columns, labels or no rows."""
    statements = []
    for place, row in read_table(Path(path), ("statement", "label")):
        if row["label"] not in ("0", "1"):
            raise ValueError(f"{place}: expected label 0 or 1; got {row['label']!r}.")
        statements.append((row["statement"], row["label"] == "1"))
    if not statements:
        raise ValueError(f"{path}: expected rows of statement,label; got none.")
    return statements


def normalised(text: str) -> str:
    """The text in lower case with single spaces: what it takes to tell that two prompts are the same."""
    return " ".join(text.lower().split())


def cut_short(sentences: Sequence[str], *, seed: int = 42) -> list[str]:
    """Sentences without their last two to four words, as the paper prepares its corpus, so that the last token stands
    amid a sentence rather than on a full stop. Sentences of fewer than six words stay whole."""
    rng = random.Random(seed)
    cut = []
    for sentence in sentences:
        words = sentence.split(" ")
        drop = rng.randint(2, 4)
        cut.append(" ".join(words[:-drop]) if len(words) >= 6 else sentence)
    return cut


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file. ValueError, with what to do, for a missing file or another encoding."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text; byte {error.start} is none. Convert it: iconv -t UTF-8.") from error
    if "\0" in text:  # UTF-16 of plain English is valid UTF-8, with a NUL beside every letter
        raise ValueError(f"{path}: expected UTF-8 text; got NUL characters, as in UTF-16. Convert it: iconv -t UTF-8.")
    return text


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds. ValueError where it is none."""
    return _parse(str(path), read_text(path))


def read_entries(path: str | os.PathLike[str]) -> list[tuple[str, Any]]:
    """The entries of a JSON list, the lines of JSONL or the rows of CSV, each with its place to name in an error.

    ValueError for a file that is none of these.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return list(read_table(path))
    if path.suffix == ".jsonl":
        # Not splitlines: a JSON string may hold the other separators of Unicode as they are.
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(read_text(path).split("\n"), 1))
        return [(place, _parse(place, line)) for place, line in lines if line.strip()]
    if not isinstance(content := read_json(path), list):
        raise ValueError(f"{path}: expected a JSON list; got {describe(content)}.")
    return _numbered(path, content)


def read_table(path: str | os.PathLike[str], columns: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, each with its place to name in an error. ValueError for a column that is missing, or a row that
    has fewer or more cells than the header."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        header = next(reader, [])
        if not set(columns) <= set(header):
            got = repr(",".join(header)[:90]) if header else "no rows"
            raise ValueError(f"{path}: expected CSV with the columns {','.join(columns)}; got {got}.")
        begin = reader.line_num + 1
        for cells in reader:
            place = f"{path}, line {begin}"
            if cells and len(cells) != len(header):
                raise ValueError(
                    f"{place}: expected {len(header)} cells, as the header has; got {len(cells)}. Quote texts with commas."
                )
            if cells:
                yield place, dict(zip(header, cells, strict=True))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from error


def behaviour(place: str, entry: Any) -> tuple[str, str, str]:
    """The question of an entry in CAA's form, the answer that matches the behaviour, and the one that does not.

    ValueError, with the place, for an entry of another form.
    """
    keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    texts: list[Any] = [entry.get(key) for key in keys] if isinstance(entry, dict) else []
    if len(texts) != 3 or not _is_texts(texts):
        raise ValueError(f"{place}: expected an object with the texts {', '.join(keys)}; got {describe(entry)}.")
    question, matching, other = texts
    if matching == other:
        raise ValueError(f"{place}: expected two different answers; got {matching!r} twice.")
    return question, matching, other


def describe(value: Any) -> str:
    """What came instead, short enough for a line of error."""
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, list(value)[:6])) or 'no keys'}"
    return f"{type(value).__name__} {str(value)[:60]!r}"


def _numbered(path: Path, entries: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{path}, entry {n}", entry) for n, entry in enumerate(entries, 1)]


def _parse(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not valid JSON ({error}).") from error


def _pairs_from(entries: Iterable[tuple[str, Any]]) -> dict[str, list[str]]:
    sides: dict[str, list[str]] = {"positive": [], "negative": []}
    for place, entry in entries:
        pair: list[Any] = []
        if isinstance(entry, dict) and "answer_matching_behavior" in entry:
            question, *answers = behaviour(place, entry)
            pair = [question + answer for answer in answers]
        elif isinstance(entry, dict):
            pair = [entry.get("positive", entry.get("pos")), entry.get("negative", entry.get("neg"))]
        elif isinstance(entry, (list, tuple)):
            pair = list(entry)
        if len(pair) != 2 or not _is_texts(pair):
            raise ValueError(f"{place} is no pair of a positive and a negative text: {describe(entry)}.")
        sides["positive"].append(pair[0])
        sides["negative"].append(pair[1])
    return sides


def _questions(path: Path, content: Mapping[str, Any], split: str) -> tuple[Question, ...]:
    items = content.get(split, [])
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected {split} to be a list of questions; got {describe(items)}.")
    return tuple(_question(f"{path}: {split}[{number}]", item) for number, item in enumerate(items))


def _question(place: str, item: Any) -> Question:
    form = '{"prompt", "options": [texts], "answer": index}, with "group", "correct": [indices], "prefix" where wanted'
    try:
        texts = [item["prompt"], item.get("group", ""), item.get("prefix", "")]
        if not _is_texts(texts) or not _is_texts(item["options"]) or not isinstance(item.get("correct", []), list):
            raise ValueError(f"got {describe(item)}.")
        prompt, group, prefix = texts
        return Question(prompt, tuple(item["options"]), item["answer"], group, tuple(item.get("correct", ())), prefix)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place} is no question {form}: got {describe(item)}.") from error
    except ValueError as error:
        raise ValueError(f"{place} is no question {form}: {error}") from error


def _text_of(place: str, row: Any) -> str:
    text = next((row[key] for key in ("text", "sentence", "statement") if key in row), None) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected a text, or an object with 'text', 'sentence' or 'statement'; got {describe(row)}.")
    return text


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
