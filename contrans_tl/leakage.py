"""The leakage guard: are the prompts that a concept is evaluated on in truth held out?

    find_leaks(["the  Dog sleeps"], {"the fit corpus": ["Yes, the dog sleeps."]})
    check_leaks(pairs, {"the fit corpus": sentences, "the neutral text": neutral})

An evaluation prompt that the concept was refined on, that the demonstrations already answer, that the layers and the strength
were chosen on, or that the map was fitted on, measures memory. The paper's released emotion data and its honesty vector,
refined on the questions of TruthfulQA, are of this kind.

Prompts are compared by their words and punctuation marks, whatever case and spacing, so that "a cat" is not in "a catalogue".
A text that says the same in other words is not found.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from contrans_tl.data import ContrastPairs

How = Literal["same", "same but for case and spacing", "contained", "contains"]
_HOWS: tuple[How, ...] = ("same", "same but for case and spacing", "contained", "contains")

PHRASE = 4
"""Words that a known text must have for a prompt that contains it to be a leak, and that must be left of a prompt without its
template: of two or three words, such as "I feel", nearly every text has some, and it says nothing."""

# Scripts written without spaces (Thai to Lao, kana, Han) have no words to split at: there each character is one.
_WORD = re.compile(r"[^\W\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+|\S")


@dataclass(frozen=True)
class Leak:
    """An evaluation prompt that is not held out."""

    prompt: str
    place: str
    """Where it was found: a key of `known`."""
    text: str
    """The known text that gives it away, the first such."""
    how: How
    """`contained`: the prompt is part of the text; `contains`: the text is part of the prompt."""

    def __str__(self) -> str:
        said = {"contained": "contained in", "contains": "contains a text of"}.get(self.how, f"{self.how} as in")
        return f"{_shown(self.prompt)} ({said} {self.place})"


def find_leaks(prompts: Sequence[str], known: Mapping[str, Sequence[str]]) -> tuple[Leak, ...]:
    """Prompts that occur in known texts, at most one leak for a prompt and a place: the most literal.

    What all prompts begin or end with, a template, is left out as long as `PHRASE` words remain: a question is as well known
    when it was seen in other brackets. Demonstrations before a prompt are to be left off by the caller, or every prompt
    contains them: pass `Question.prompt`, not `Question.text`.

    Args:
        known: {"the refine pairs": [...], "the fit corpus": [...]}: what must not hold the prompts.
    """
    search = _Search(prompts)
    found: dict[tuple[str, str], Leak] = {}
    for place, texts in known.items():
        for text in texts:
            for prompt, how in search.hits(text):
                leak = found.get((prompt, place))
                if leak is None or _HOWS.index(how) < _HOWS.index(leak.how):
                    found[prompt, place] = Leak(prompt, place, text, how)
    order = {prompt: number for number, prompt in enumerate(search.prompts)}
    return tuple(sorted(found.values(), key=lambda leak: order[leak.prompt]))


def check_leaks(
    pairs: ContrastPairs,
    corpora: Mapping[str, Sequence[str]] | None = None,
    *,
    splits: Mapping[str, Sequence[str]] | None = None,
    demonstrations: Sequence[str] | None = None,
    allow_overlap: bool = False,
) -> tuple[Leak, ...]:
    """The leaks of a concept: test and own prompts in the select split, these and the select prompts among the refine pairs and
    the demonstrations, and all of them and the refine pairs in the corpora, as a map fitted on a concept's own prompts
    proves nothing about other text.

    Args:
        corpora: {"the fit corpus": [...], "the neutral text": [...]}: texts that maps are fitted or losses measured on.
        splits: {"select": [...], "test": [...], "own": [...]}, prompts without demonstrations; None: the pairs' own questions.
        demonstrations: what stands before prompts; None: the prefixes of the pairs' questions.
        allow_overlap: return the leaks, for the report to be marked, instead of raising.

    Raises:
        ValueError: with the number of leaking prompts and the first few of them.
    """
    corpora = corpora or {}
    if splits is None:
        splits = {split: [question.prompt for question in getattr(pairs, split)] for split in ("select", "test", "own")}
    if demonstrations is None:
        demonstrations = [question.prefix for question in (*pairs.select, *pairs.test, *pairs.own) if question.prefix]
    select, test = list(splits.get("select", ())), [*splits.get("test", ()), *splits.get("own", ())]
    refined = [*pairs.positive, *pairs.negative]
    before = {"the refine pairs": refined, "the few-shot examples": list(dict.fromkeys(demonstrations)), **corpora}
    leaks = [
        *find_leaks(test, {"the select split": select}),
        *find_leaks([*select, *test], before),
        *find_leaks(refined, corpora),
    ]
    if leaks and not allow_overlap:
        n = len({leak.prompt for leak in leaks})
        listed = "; ".join(map(str, leaks[:5])) + (f"; and {len(leaks) - 5} more" if len(leaks) > 5 else "")
        raise ValueError(
            f"{pairs.name}: {n} {'prompt is' if n == 1 else 'prompts are'} not held out: {listed}. Take them out of one place, "
            "or pass allow_overlap=True to run all the same; the report is then marked in-sample."
        )
    return tuple(leaks)


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else f"{prompt[:50]}...{prompt[-25:]}")


Phrase = tuple[str, ...]


class _Search:
    """Prompts, indexed so that a text is compared only with those that share a telling run of words with it.

    Each prompt is found by its anchor, of its runs of `PHRASE` words the one that the fewest other prompts have: a template's
    words stand in all of them and would lead from every text to every prompt.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        words = {prompt: split for prompt in dict.fromkeys(prompts) if (split := _words(prompt))}
        self.prompts = list(words)
        self._whole = {prompt: _joined(split) for prompt, split in words.items()}
        cores = dict(zip(words, _without_template(list(words.values())), strict=True))
        self._core = {prompt: _joined(core) for prompt, core in cores.items()}
        self._with: dict[Phrase, list[str]] = {}
        for prompt, split in words.items():
            for run in set(_runs(split, PHRASE)):
                self._with.setdefault(run, []).append(prompt)
        self._anchored: dict[Phrase, list[str]] = {}
        for prompt, core in cores.items():
            anchor = min(_runs(core, min(PHRASE, len(core))), key=lambda run: len(self._with.get(run, ())))
            self._anchored.setdefault(anchor, []).append(prompt)
        self._lengths = {len(anchor) for anchor in self._anchored}

    def hits(self, text: str) -> Iterator[tuple[str, How]]:
        """Prompts that the text gives away."""
        words = _words(text)
        whole = _joined(words)
        for n in self._lengths:
            for run in self._anchored.keys() & set(_runs(words, n)):
                for prompt in self._anchored[run]:
                    if prompt == text:
                        yield prompt, "same"
                    elif self._whole[prompt] == whole:
                        yield prompt, "same but for case and spacing"
                    elif self._core[prompt] in whole:
                        yield prompt, "contained"
        if _long_enough(words):
            # A prompt that contains the text has all its runs: the first that no prompt has settles it.
            fewest: list[str] = self.prompts
            for run in _runs(words, PHRASE):
                if not (having := self._with.get(run)):
                    return
                fewest = min(fewest, having, key=len)
            holding = [prompt for prompt in fewest if whole in self._whole[prompt]]
            if len(holding) < max(2, len(self.prompts)):  # what all of several prompts hold is of their template
                yield from ((prompt, "contains") for prompt in holding)


def _words(text: str) -> Phrase:
    # One letter can be written as one character or two (NFKC), and in two cases.
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def _joined(words: Phrase) -> str:
    return f" {' '.join(words)} "


def _runs(words: Phrase, n: int) -> Iterator[Phrase]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _long_enough(words: Phrase) -> bool:
    return sum(word.isalnum() for word in words) >= PHRASE


def _without_template(prompts: list[Phrase]) -> list[Phrase]:
    """The prompts without what all of them begin with and end with; whole where too little would be left."""
    if len(prompts) < 2:
        return prompts
    begin, end = _shared(prompts), _shared([words[::-1] for words in prompts])
    cores = [words[begin : len(words) - end] for words in prompts]
    return [core if _long_enough(core) else words for core, words in zip(cores, prompts, strict=True)]


def _shared(prompts: list[Phrase]) -> int:
    columns = zip(*prompts, strict=False)
    return next((k for k, words in enumerate(columns) if len(set(words)) > 1), min(map(len, prompts)))
