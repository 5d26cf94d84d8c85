"""Formats: the public benchmarks as they are distributed, read into contrast pairs and questions.

    questions = read_truthfulqa("mc_task.json", template="[INST] {question} [/INST]")
    concepts = emotion_concepts(read_scenarios({"anger": "anger.json", "fear": "fear.json", "happiness": "happiness.json"}))
    honest = persona_pairs("honesty", facts, "Pretend you are an honest person.\\n{prompt}", "Pretend you lie.\\n{prompt}")
    fair = toxigen_pairs(read_toxigen("demonstrations/"))
    refusal = read_behaviours("refusal.json")

The files are the user's own; none comes with the package. What is made of one file for refining and for measuring is disjoint,
which the paper's released emotion data are not: its evaluation scenarios are the ones that the concepts were refined on.
Whether it is held out of other files too, `contrans_tl.leakage` tells.
"""

import os
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contrans_tl.data import ContrastPairs, Question, behaviour, describe, normalised, read_entries, read_sentences, read_table

# --- TruthfulQA -----------------------------------------------------------------------------------------------------


def read_truthfulqa(path: str | os.PathLike[str], *, template: str = "{question}") -> tuple[Question, ...]:
    """The questions of TruthfulQA, from its multiple-choice JSON (mc1_targets, mc2_targets) or from its CSV.

    The options are all right and all wrong answers; `answer` is the best one, `correct` are all right ones. MC1 asks whether
    the best answer is likelier than every wrong one, so the other right ones are not its rivals; MC2 is the share of
    probability on `correct`. An answer that the CSV lists as right and as wrong counts as wrong, as in the JSON made of it.

    Args:
        template: what the model reads, for example "[INST] {question} [/INST]", as the paper has it. Answers follow a space.

    Raises:
        ValueError: with the entry or line: another form, or MC1 with other wrong answers than MC2.
    """
    read = _truths_from_table if Path(path).suffix == ".csv" else _truths_from_json
    questions = []
    for place, question, best, answers in read(path):
        options = tuple(f" {answer}" for answer in answers)
        correct = tuple(number for number, right in enumerate(answers.values()) if right)
        try:
            prompt, answer = _fill(template, "question", question), list(answers).index(best)
            questions.append(Question(prompt, options, answer, group=question, correct=correct))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not questions:
        raise ValueError(f"{path}: expected questions; the file has none.")
    return tuple(questions)


Truth = tuple[str, str, str, dict[str, bool]]
"""Place, question, best answer, and every answer with whether it is right."""


def _truths_from_json(path: str | os.PathLike[str]) -> Iterator[Truth]:
    for place, item in read_entries(path):
        keys = ("mc1_targets", "mc2_targets")
        targets: list[Any] = [item.get(key) for key in keys] if isinstance(item, dict) else []
        if not targets or not isinstance(item.get("question"), str) or not all(map(_are_targets, targets)):
            raise ValueError(
                f'{place}: expected {{"question", "mc1_targets": {{answer: 0 or 1}}, "mc2_targets": {{...}}}}; '
                f"got {describe(item)}."
            )
        mc1, mc2 = targets
        best = [answer for answer, right in mc1.items() if right]
        if len(best) != 1 or not mc2.get(best[0]):
            raise ValueError(f"{place}: expected one right answer in mc1_targets that is right in mc2_targets; got {best}.")
        wrong1, wrong2 = ({answer for answer, right in target.items() if not right} for target in targets)
        if not wrong1 or wrong1 != wrong2:
            raise ValueError(
                f"{place}: expected the same wrong answers in mc1_targets and mc2_targets; {len(wrong1 ^ wrong2)} of "
                f"{len(wrong1 | wrong2)} are in one only."
            )
        yield place, item["question"].strip(), best[0], {answer: bool(right) for answer, right in mc2.items()}


def _are_targets(value: Any) -> bool:
    return isinstance(value, dict) and all(type(right) is int and right in (0, 1) for right in value.values())


def _truths_from_table(path: str | os.PathLike[str]) -> Iterator[Truth]:
    for place, row in read_table(path, ("Question", "Best Answer", "Correct Answers", "Incorrect Answers")):
        best = row["Best Answer"].strip()
        right, wrong = (_listed(row[f"{kind} Answers"]) for kind in ("Correct", "Incorrect"))
        answers = dict.fromkeys([best, *right], True) | dict.fromkeys(wrong, False)
        if not best or not wrong or not answers[best]:
            raise ValueError(f"{place}: expected a best answer and wrong ones apart from it; got {best!r} and {wrong}.")
        yield place, row["Question"].strip(), best, answers


def _listed(cell: str) -> list[str]:
    return [answer.strip() for answer in cell.split(";") if answer.strip()]


# --- emotions -------------------------------------------------------------------------------------------------------


def read_scenarios(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, list[str]]:
    """Scenarios of each emotion, from files of RepE's form: a JSON list of strings.

    A scenario that occurs twice is kept once. Empty ones, and those that occur under two emotions and so belong to none, are
    left out with a warning. ValueError, with the entry, for a file of another form.
    """
    scenarios = {}
    for emotion, path in paths.items():
        entries = read_entries(path)
        for place, entry in entries:
            if not isinstance(entry, str):
                raise ValueError(f"{place}: expected a scenario, a text; got {describe(entry)}.")
        if empty := sum(not text.strip() for _, text in entries):
            warnings.warn(f"{path}: {empty} of {len(entries)} scenarios are empty and left out.", stacklevel=2)
        scenarios[emotion] = _different(text.strip() for _, text in entries if text.strip())
        if not scenarios[emotion]:
            raise ValueError(f"{path}: expected scenarios; the file has none.")
    if shared := _shared(scenarios):
        warnings.warn(f"{len(shared)} scenarios occur under two emotions and are left out of both.", stacklevel=2)
    return {emotion: [text for text in texts if normalised(text) not in shared] for emotion, texts in scenarios.items()}


def _different(texts: Iterable[str]) -> list[str]:
    """Each text once, in the spelling that comes first."""
    seen: dict[str, str] = {}
    for text in texts:
        seen.setdefault(normalised(text), text)
    return list(seen.values())


def _shared(scenarios: Mapping[str, Sequence[str]]) -> set[str]:
    seen = Counter(text for texts in scenarios.values() for text in set(map(normalised, texts)))
    return {text for text, times in seen.items() if times > 1}


def emotion_concepts(
    scenarios: Mapping[str, Sequence[str]],
    *,
    template: str = "Scenario: {scenario}\nThe emotion of the above scenario is",
    few_shot: int = 6,
    refine: int = 120,
    select: int = 20,
    test: int = 40,
    seed: int = 0,
) -> tuple[ContrastPairs, ...]:
    """The paper's emotion experiment with held-out scenarios: for each emotion its contrast pairs and questions.

    Positive prompts are scenarios of the emotion, negative ones as many of all others, in equal shares. A question is a
    scenario of another emotion behind demonstrations, and its answer is the concept: what the model says when the concept
    arrives, and not without it. `own` are scenarios of the concept itself.

    Every scenario serves one purpose: refining, demonstrating, choosing, or testing, whichever the emotion. The demonstrations
    have their right labels, in equal shares, and are the same for all questions. In the files that the paper released, the
    scenarios evaluated on are the ones refined on, and all the demonstrations have a wrong label.

    Args:
        scenarios: emotion -> scenarios; the emotions' names, in their order, are the options.
        few_shot: demonstrations in all.
        refine: scenarios of each emotion to refine on.
        select: questions for every other emotion.
        test: questions for every other emotion, and as many of the concept's own.

    Raises:
        ValueError: fewer than two emotions, too few scenarios, a scenario that occurs twice, or a template without {scenario}.
    """
    emotions = list(scenarios)
    if len(emotions) < 2:
        raise ValueError(f"expected scenarios of at least two emotions; got {emotions}.")
    if shared := _shared(scenarios):
        raise ValueError(f"expected each scenario under one emotion; {min(shared)!r} occurs under two: see read_scenarios.")
    rng = random.Random(seed)
    shots = {emotion: len(range(number, few_shot, len(emotions))) for number, emotion in enumerate(emotions)}
    split = {
        emotion: _split(emotion, texts, rng, refine=refine, select=select, test=test, demonstrations=shots[emotion])
        for emotion, texts in scenarios.items()
    }
    demonstrations = [
        f"{_fill(template, 'scenario', text)} {emotion}\n\n"
        for emotion in emotions
        for text in split[emotion]["demonstrations"]
    ]
    rng.shuffle(demonstrations)
    prefix, options = "".join(demonstrations), tuple(f" {emotion}" for emotion in emotions)

    def prompts(emotion: str, part: str) -> list[str]:
        return [_fill(template, "scenario", text) for text in split[emotion][part]]

    def questions(asked: Iterable[str], part: str, answer: int) -> tuple[Question, ...]:
        return tuple(Question(text, options, answer, prefix=prefix) for emotion in asked for text in prompts(emotion, part))

    concepts = []
    for answer, emotion in enumerate(emotions):
        others = [other for other in emotions if other != emotion]
        in_turn = [prompt for row in zip(*(prompts(other, "refine") for other in others), strict=True) for prompt in row]
        concepts.append(
            ContrastPairs(
                name=emotion,
                positive=tuple(prompts(emotion, "refine")),
                negative=tuple(in_turn[:refine]),
                select=questions(others, "select", answer),
                test=questions(others, "test", answer),
                own=questions([emotion], "test", answer),
            )
        )
    return tuple(concepts)


def _split(name: str, texts: Iterable[str], rng: random.Random, **sizes: int) -> dict[str, list[str]]:
    """Disjoint random parts of these sizes."""
    different = _different(texts)
    if min(sizes.values()) < 0 or len(different) < sum(sizes.values()):
        parts = ", ".join(f"{part} {size}" for part, size in sizes.items())
        raise ValueError(f"{name}: expected at least {sum(sizes.values())} different texts ({parts}); got {len(different)}.")
    shuffled = iter(rng.sample(different, len(different)))
    return {part: [next(shuffled) for _ in range(size)] for part, size in sizes.items()}


# --- honesty --------------------------------------------------------------------------------------------------------


def persona_pairs(name: str, prompts: Iterable[str], positive: str, negative: str) -> ContrastPairs:
    """Each prompt behind two openings: what differs between the sides is who is asked, not what.

    The paper's honesty has "[INST] Pretend you're an honest person making statements about the world. [/INST] {prompt}" and
    the same with "a dishonest person". It refines on the very questions of TruthfulQA that it measures on; facts of another
    file, as from `read_statements`, are the stricter test.

    Args:
        positive: template with {prompt}.
        negative: likewise.
    """
    sides = [(_fill(positive, "prompt", prompt), _fill(negative, "prompt", prompt)) for prompt in prompts]
    return ContrastPairs.of(name, sides)


# --- fairness -------------------------------------------------------------------------------------------------------


def read_toxigen(files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> dict[str, tuple[list[str], list[str]]]:
    """Neutral and hateful statements about each group of people, from ToxiGen's demonstrations: one statement a line in
    neutral_GROUP.txt and hate_GROUP.txt. Of a folder these files are read and no others; GROUP and GROUP_sentences are one.

    ValueError for a file of another name, a group without its other file, or a statement that is neutral and hateful.
    """
    if isinstance(files, (str, os.PathLike)):
        if not Path(files).is_dir():
            raise ValueError(f"there is no folder {str(files)!r}.")
        paths = sorted(path for side in ("neutral", "hate") for path in Path(files).glob(f"{side}_*.txt"))
        if not paths:
            raise ValueError(f"{files}: expected files neutral_GROUP.txt and hate_GROUP.txt; the folder has none.")
    else:
        paths = [Path(file) for file in files]
    read: dict[str, dict[str, list[str]]] = {}
    for path in paths:
        side, _, group = path.stem.partition("_")
        if side not in ("neutral", "hate") or not group:
            raise ValueError(f"{path}: expected a file neutral_GROUP.txt or hate_GROUP.txt.")
        read.setdefault(group.removesuffix("_sentences"), {}).setdefault(side, []).extend(read_sentences(path))
    statements = {}
    for group, sides in read.items():
        if missing := {"neutral", "hate"} - set(sides):
            raise ValueError(f"{group}: expected neutral and hateful statements; there is no file {min(missing)}_{group}.txt.")
        neutral, hate = (_different(sides[side]) for side in ("neutral", "hate"))
        if both := set(map(normalised, neutral)) & set(map(normalised, hate)):
            raise ValueError(f"{group}: a statement is neutral and hateful: {min(both)!r}.")
        statements[group] = neutral, hate
    return statements


@dataclass(frozen=True)
class ToxigenTask:
    """A concept, and hateful statements that it was not refined on, to see how a model continues them."""

    pairs: ContrastPairs
    select: tuple[str, ...]
    """To choose layers and strength on."""
    test: tuple[str, ...]
    """To report on."""


def toxigen_pairs(
    statements: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    *,
    name: str = "fairness",
    template: str = "[INST] Consider the bias of the following scenario.\nScenario: {statement} [/INST]",
    refine: int = 50,
    select: int = 1,
    test: int = 2,
    seed: int = 0,
) -> ToxigenTask:
    """The paper's fairness: positive prompts hold neutral statements, negative ones hateful statements.

    Of each group of people there are as many positive as negative prompts, so that the concept is not who is spoken of.

    Args:
        statements: group -> neutral and hateful statements, as `read_toxigen` has them.
        refine: statements of each group and side at most; fewer where a group has fewer.
        select: hateful statements of each group to continue.
        test: likewise.

    Raises:
        ValueError: a group without statements enough for one of each, or a template without {statement}.
    """
    rng = random.Random(seed)
    positive: list[str] = []
    negative: list[str] = []
    held_out: dict[str, list[str]] = {"select": [], "test": []}
    for group, (neutral, hate) in statements.items():
        n = min(refine, max(1, len(neutral)), max(1, len(hate) - select - test))
        kept = _split(f"{group}, hateful", hate, rng, refine=n, select=select, test=test)
        positive += _split(f"{group}, neutral", neutral, rng, refine=n)["refine"]
        negative += kept["refine"]
        for part, prompts in held_out.items():
            prompts += kept[part]
    positive, negative = ([_fill(template, "statement", text) for text in side] for side in (positive, negative))
    sides = zip(positive, negative, strict=True)
    return ToxigenTask(ContrastPairs.of(name, sides), tuple(held_out["select"]), tuple(held_out["test"]))


# --- behaviours -----------------------------------------------------------------------------------------------------


def read_behaviours(
    path: str | os.PathLike[str], *, name: str | None = None, select: int = 50, test: int = 100, seed: int = 0
) -> ContrastPairs:
    """A behaviour of CAA (contrastive activation addition) with held-out questions, from JSON or JSONL: `{"question",
    "answer_matching_behavior", "answer_not_matching_behavior"}`, or `{"positive", "negative"}`, where the question is what both
    begin with.

    The prompts to refine on are questions with an answer behind them; those of `select` and `test` are drawn at random, and
    the two answers are the options. A question that occurs twice is kept once. `ContrastPairs.load` reads the same files for
    refining alone.

    Raises:
        ValueError: with the entry: another form. Or no question left to refine on.
    """
    found: dict[str, Question] = {}
    for place, entry in read_entries(path):
        if isinstance(entry, dict) and "positive" in entry:
            entry = _parted(place, entry)
        question, *answers = behaviour(place, entry)
        found.setdefault(normalised(question), Question(question, tuple(answers), 0))
    rest = len(found) - select - test
    split = _split(str(path), found, random.Random(seed), refine=max(1, rest), select=select, test=test)
    parts = {part: tuple(found[key] for key in keys) for part, keys in split.items()}
    positive, negative = (tuple(q.prompt + q.options[side] for q in parts["refine"]) for side in (0, 1))
    return ContrastPairs(name or Path(path).stem, positive, negative, parts["select"], parts["test"], metric="mc1")


def _parted(place: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """An entry of two texts in CAA's form, cut at the last space before they differ."""
    texts: list[Any] = [entry.get("positive"), entry.get("negative")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{place}: expected the texts positive and negative; got {describe(entry)}.")
    shared = os.path.commonprefix(texts)
    cut = max((i for i, letter in enumerate(shared) if letter.isspace()), default=0)
    if not shared[:cut].strip():
        raise ValueError(f"{place}: expected texts that begin with the same question; got {describe(entry)}.")
    question, matching, other = shared[:cut], *(text[cut:] for text in texts)
    return {"question": question, "answer_matching_behavior": matching, "answer_not_matching_behavior": other}


def _fill(template: str, field: str, text: str) -> str:
    # Not str.format: texts and templates may hold other braces.
    if f"{{{field}}}" not in template:
        raise ValueError(f"expected a template with {{{field}}}; got {template!r}.")
    return template.replace(f"{{{field}}}", text)
