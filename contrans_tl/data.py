"""Data: contrast pairs and sentences, and the files people have them in.

    ContrastPairs.load("happiness.json")      our own, the paper's {"pos", "neg"}, {"positive", "negative"}, JSONL, CSV
    read_sentences("corpus.txt")              plain text (a line each), JSON list of strings, JSONL, CSV

Nothing here loads a model: a wrong file is an error of one line before any work.
"""

import csv
import io
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Metric = Literal["token_accuracy", "mc1"]


@dataclass(frozen=True)
class Question:
    """A held-out prompt with the answers to choose from."""

    prompt: str
    options: tuple[str, ...]
    """As they follow the prompt, leading space included."""
    answer: int
    """Index of the option that the concept should bring about."""
    group: str = ""
    """Questions of one group (say, about one fact) are resampled together when an interval is computed."""


@dataclass(frozen=True)
class ContrastPairs:
    """Prompts with and without a concept, and, where there are any, held-out questions that tell whether it took effect.

    ValueError for an empty side, or for a prompt that occurs in two of refine, select and test.
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

    def __post_init__(self) -> None:
        for side in ("positive", "negative"):
            if not getattr(self, side):
                raise ValueError(f"{self.name}: expected {side} prompts; got none. A concept needs both sides.")
            if not all(prompt.strip() for prompt in getattr(self, side)):
                raise ValueError(f"{self.name}: a {side} prompt is empty; a concept is read off the last token of each.")
        if self.metric not in get_args(Metric):
            raise ValueError(f"{self.name}: expected metric {' or '.join(get_args(Metric))}; got {self.metric!r}.")
        splits = {
            "the refine pairs": (*self.positive, *self.negative),
            "select": [question.prompt for question in self.select],
            "test": [question.prompt for question in self.test],
        }
        seen = Counter(prompt for prompts in splits.values() for prompt in set(map(normalised, prompts)))
        if repeated := [prompt for prompt, times in seen.items() if times > 1]:
            raise ValueError(
                f"{self.name}: {len(repeated)} prompts occur in more than one of refine, select and test, for example "
                f"{repeated[0]!r}. An effect measured on them would not be held out; take them out of one."
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str | None = None) -> "ContrastPairs":
        """Pairs from a file. The name is the file's own, or its stem.

        Read are: JSON `{"positive": [...], "negative": [...]}` or the paper's `{"pos": [...], "neg": [...]}`, either with
        optional `name`, `metric`, `select`, `test`; JSON lists and JSONL of `{"positive": ..., "negative": ...}` (or `pos`,
        `neg`) objects or of two-element lists; CSV with the columns `statement,label` (label 1 is positive).

        Raises:
            ValueError: no such file, not UTF-8, or none of these forms.
        """
        path = Path(path)
        text = read_text(path)
        if path.suffix == ".csv":
            content: Any = _pairs_from_table(path, text)
        else:
            content = _parse_json(path, text, lines=path.suffix == ".jsonl")
        if isinstance(content, list):
            content = _pairs_from_rows(path, content)
        sides = ("positive", "negative") if isinstance(content, dict) and "positive" in content else ("pos", "neg")
        if not isinstance(content, dict) or not all(_is_texts(content.get(side)) for side in sides):
            raise ValueError(
                f'{path}: expected {{"positive": [texts], "negative": [texts]}} or {{"pos": [...], "neg": [...]}}, '
                f"a list of pairs, or CSV statement,label; got {_describe(content)}."
            )
        return cls(
            name=name or str(content.get("name", path.stem)),
            positive=tuple(content[sides[0]]),
            negative=tuple(content[sides[1]]),
            select=_questions(path, content, "select"),
            test=_questions(path, content, "test"),
            metric=content.get("metric", "token_accuracy"),
        )


def read_sentences(path: str | os.PathLike[str]) -> list[str]:
    """Sentences from plain text (one a line), a JSON list of strings, JSONL or CSV (`text`, `sentence` or `statement`).

    Empty lines are dropped. ValueError for a missing file, one that is not UTF-8, or one without sentences.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix in (".json", ".jsonl"):
        rows = _parse_json(path, text, lines=path.suffix == ".jsonl")
        if not isinstance(rows, list):
            raise ValueError(f"{path}: expected a JSON list of sentences; got {_describe(rows)}.")
        sentences = [_text_of(path, row) for row in rows]
    elif path.suffix == ".csv":
        sentences = [_text_of(path, row) for row in _read_table(path, text)]
    else:
        sentences = text.split("\n")
    sentences = [sentence.strip() for sentence in sentences if sentence.strip()]
    if not sentences:
        raise ValueError(f"{path}: expected sentences; the file has none.")
    return sentences


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


def _parse_json(path: Path, text: str, *, lines: bool) -> Any:
    # Not splitlines: a JSON string may hold the other separators of Unicode as they are.
    parts = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    parsed = []
    for place, part in parts if lines else [(str(path), text)]:
        try:
            parsed.append(json.loads(part))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{place}: not valid JSON ({error}).") from error
    return parsed if lines else parsed[0]


def _read_table(path: Path, text: str) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"{path}: not valid CSV ({error}).") from error


def _pairs_from_table(path: Path, text: str) -> dict[str, list[str]]:
    rows = _read_table(path, text)
    if not rows or not {"statement", "label"} <= set(rows[0]):
        raise ValueError(f"{path}: expected CSV with the columns statement,label; got {list(rows[0]) if rows else 'no rows'}.")
    if unknown := {row["label"] for row in rows} - {"0", "1"}:
        raise ValueError(f"{path}: expected labels 0 and 1; got {sorted(map(str, unknown))}.")
    return {
        "positive": [row["statement"] for row in rows if row["label"] == "1"],
        "negative": [row["statement"] for row in rows if row["label"] == "0"],
    }


def _pairs_from_rows(path: Path, rows: Iterable[Any]) -> dict[str, list[Any]]:
    sides: dict[str, list[Any]] = {"positive": [], "negative": []}
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            pair = [row.get("positive", row.get("pos")), row.get("negative", row.get("neg"))]
        else:
            pair = list(row) if isinstance(row, Sequence) and not isinstance(row, str) else []
        if len(pair) != 2 or not _is_texts(pair):
            raise ValueError(f"{path}: entry {number} is no pair of a positive and a negative text: {_describe(row)}.")
        sides["positive"].append(pair[0])
        sides["negative"].append(pair[1])
    return sides


def _questions(path: Path, content: Mapping[str, Any], split: str) -> tuple[Question, ...]:
    items = content.get(split, [])
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected {split} to be a list of questions; got {_describe(items)}.")
    questions = []
    for number, item in enumerate(items):
        try:
            prompt, options, answer, group = item["prompt"], item["options"], item["answer"], item.get("group", "")
            if not _is_texts([prompt, group]) or not _is_texts(options) or answer not in range(len(options)):
                raise TypeError
            question = Question(prompt, tuple(options), answer, group)
        except (KeyError, TypeError) as error:
            form = '{"prompt", "options": [texts], "answer": index}'
            raise ValueError(f"{path}: {split}[{number}] is no question {form}: {_describe(item)}.") from error
        questions.append(question)
    return tuple(questions)


def _text_of(path: Path, row: Any) -> str:
    text = next((row[key] for key in ("text", "sentence", "statement") if key in row), None) if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise ValueError(f"{path}: expected a text, or an object with 'text', 'sentence' or 'statement'; got {_describe(row)}.")
    return text


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, list(value)[:6])) or 'no keys'}"
    return f"{type(value).__name__} {str(value)[:60]!r}"
