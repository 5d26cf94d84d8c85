"""Fit corpora that show the concepts often, seldom, in part or not at all; the same number of sentences in each.

None holds a prompt that a concept is refined, chosen or tested on, nor a scenario or fact of the select or test split.
"""

from collections.abc import Sequence
from random import Random

from contrans_tl.data import ContrastPairs
from contrans_tl.experiment import check_inputs
from data.world import CHARACTERS, TRIGGERS, World, capitalise, distinct, fill

SENTENCES = 600
EVENTS = (  # what happened and no word on how it felt; not the sentence that the prompts have
    "{time} {person} {event}.",
    "{person} {event}, and {friend} went home.",
    "It was {time} that {person} {event}.",
    "They say {person} {event} {place}.",
    "{friend} saw how {person} {event}.",
    "My friend {person} {event} {time}.",
)
NOUNS = (  # emotions as words like any other, and nothing that happened
    "The {emotion} of {person} lasted until {time}.",
    "{person} wrote about {emotion} in a diary {time}.",
    "A song about {emotion} was heard {place}.",
    "There was much {emotion} {place} {time}.",
    "{person} spoke of {emotion} and of {other}.",
    "First came {emotion}, then {other}, {time}.",
    "Between {emotion} and {other}, {person} went home.",
    "{person} painted {emotion} as {thing} {place}.",
    "{person} knows {emotion} well, and so does {friend}.",
)
HALVES = ("happiness", "sadness", "anger", "honesty"), ("fear", "disgust", "surprise")
"""Concepts that `without_a` and `without_b` leave out."""


def fit_corpora(world: World, concepts: Sequence[ContrastPairs], n: int = SENTENCES) -> dict[str, list[str]]:
    """Name -> n sentences. `mention_5`: 5% diary, 5% speakers, the rest neutral."""
    facts = world.facts["refine"]

    def mixed(name: str, diary: float, speaker: float, bare: float, without: Sequence[str] = ()) -> list[str]:
        rng = world.rng(f"study/{name}")

        def some(share: float, kind: str) -> list[str]:
            write = {
                "diary": lambda: world.diary(rng),
                "speaker": lambda: world.speaker(rng, facts),
                "bare": lambda: world.bare(rng, facts),
                "neutral": lambda: world.neutral(rng),
            }[kind]

            def unmentioned() -> str:
                line = write()
                while any(mentions(line, concept) for concept in without):
                    line = write()
                return line

            return distinct(round(share * n), unmentioned)

        lines = some(diary, "diary") + some(speaker, "speaker") + some(bare, "bare")
        lines += some(1 - len(lines) / n, "neutral")
        rng.shuffle(lines)
        return lines

    def filled(name: str, templates: Sequence[str]) -> list[str]:
        rng = world.rng(f"study/{name}")
        return distinct(n, lambda: _emotional(world, rng, rng.choice(templates)))

    corpora = {
        "generic": mixed("generic", 0.4, 0.22, 0.13),
        "neutral": mixed("neutral", 0, 0, 0),
        "mention_1": mixed("mention_1", 0.01, 0.01, 0),
        "mention_5": mixed("mention_5", 0.05, 0.05, 0),
        "mention_20": mixed("mention_20", 0.2, 0.2, 0),
        "diary": mixed("diary", 1, 0, 0),
        "events": filled("events", EVENTS),
        "nouns": filled("nouns", NOUNS),
        "speakers": mixed("speakers", 0, 1, 0),
        "facts": mixed("facts", 0, 0, 1),
        # a speaker's character is what honesty is about: without it, none of them
        "without_a": mixed("without_a", 0.62, 0, 0.13, without=HALVES[0]),
        "without_b": mixed("without_b", 0.4, 0.22, 0.13, without=HALVES[1]),
    }
    check_inputs(concepts, corpora)
    return corpora


def shown_to(corpus: str, concept: str) -> bool:
    """Whether the study asks this corpus for this concept: the `without` corpora only for what they leave out."""
    return not corpus.startswith("without") or concept in HALVES[corpus == "without_b"]


def mentions(line: str, concept: str) -> bool:
    """Whether a line names a concept or tells an event that goes with it."""
    if concept == "honesty":
        return any(character in line for character in CHARACTERS)
    return concept in line or any(trigger.split("{thing}")[0] in line for trigger in TRIGGERS[concept])


def _emotional(world: World, rng: Random, template: str) -> str:
    scenario = rng.choice(world.scenarios["refine"])
    other = rng.choice([emotion for emotion in TRIGGERS if emotion != scenario.emotion])
    return capitalise(fill(template, rng, emotion=scenario.emotion, other=other, event=scenario.event))
