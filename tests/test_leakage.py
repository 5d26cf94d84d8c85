"""A prompt that is not held out is found wherever it hides, and one that is held out is left alone."""

import random
import time

import pytest

from contrans_tl import ContrastPairs, Question, find_leaks
from contrans_tl.leakage import check_leaks


def how(prompt: str, text: str, *others: str) -> list[str]:
    return [leak.how for leak in find_leaks([prompt, *others], {"the text": [text]})]


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("The dog sleeps.", "The dog sleeps.", ["same"]),
        ("The dog sleeps.", " the DOG\n sleeps . ", ["same but for case and spacing"]),
        ("Caf\u00e9 au lait", "Cafe\u0301 au lait", ["same but for case and spacing"]),
        ("the dog", "So the  Dog, it sleeps.", ["contained"]),
        ("dog", "a dog", ["contained"]),
        ("我感到", "今天我感到很高兴", ["contained"]),
        ("Today the dog sleeps all day", "The dog sleeps all", ["contains"]),
        ("Today the dog sleeps all day", "the dog sleeps", []),
        ("Today, the dog; sleeps", "the dog; sleeps", []),
        ("a cat", "a catalogue of a scat", []),
        ("sleeps. The dog", "The dog sleeps.", []),
        ("The dog sleeps.", "The dog sleeps", []),
        ("the the the dog sleeps", "the the dog sleeps", ["contains"]),
        ("a", "", []),
        ("", "a", []),
    ],
)
def test_texts_are_compared_by_whole_words_whatever_case_and_spacing(prompt, text, expected):
    assert how(prompt, text) == expected


def test_the_most_literal_leak_of_a_prompt_and_a_place_is_told_with_its_text():
    known = {
        "the pairs": ["Well, the lazy dog sleeps.", "the LAZY dog sleeps", "the lazy dog sleeps"],
        "the corpus": ["the LAZY dog sleeps", "So the lazy dog sleeps."],
        "the neutral text": ["A river."],
    }
    leaks = find_leaks(["a brown fox", "the lazy dog sleeps"], known)
    assert [(leak.place, leak.how, leak.text) for leak in leaks] == [
        ("the pairs", "same", "the lazy dog sleeps"),
        ("the corpus", "same but for case and spacing", "the LAZY dog sleeps"),
    ]
    assert {leak.prompt for leak in leaks} == {"the lazy dog sleeps"}


def test_a_question_is_known_in_other_brackets_too():
    prompts = [f"[INST] {question} [/INST]" for question in ("What do lazy dogs eat?", "Where do the rivers end?")]
    refined = "[INST] Pretend you are honest. [/INST] Where do the rivers end?"
    assert [(leak.prompt, leak.how) for leak in find_leaks(prompts, {"": [refined]})] == [(prompts[1], "contained")]
    # Two words without their template would be found nearly everywhere.
    assert find_leaks(["I saw the dog", "I saw the river"], {"": ["A dog at the river."]}) == ()
    # Nor is a template shared with a known text a leak.
    assert find_leaks(prompts, {"": ["[INST] What do quick foxes eat? [/INST]"]}) == ()
    felt = [f"{what}.\nWhat I feel now is" for what in ("A dog sleeps", "A fox jumps")]
    assert find_leaks(felt, {"": ["What I feel now is"]}) == ()
    assert [leak.prompt for leak in find_leaks(felt, {"": ["sleeps. What I feel now is"]})] == felt[:1]


WORDS = "the quick brown fox jumps over a lazy dog and letter made me feel happy by rivers".split()


def test_the_index_finds_what_comparing_all_with_all_finds():
    rng = random.Random(0)

    def texts(n: int, longest: int) -> list[str]:
        return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]

    prompts, known = list(dict.fromkeys(texts(150, 7))), texts(600, 8)
    expected = {p for p in prompts for t in known if f" {p} " in f" {t} " or (len(t.split()) >= 4 and f" {t} " in f" {p} ")}
    assert {leak.prompt for leak in find_leaks(prompts, {"": known})} == expected
    assert 20 < len(expected) < 140


@pytest.mark.slow
def test_a_thousand_prompts_are_looked_for_in_a_hundred_thousand_lines_within_seconds():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    lines = [f"Scenario: {' '.join(rng.choices(vocabulary, k=15))}." for _ in range(100_000)]
    prompts = [f"Scenario: {' '.join(rng.choices(vocabulary, k=15))}.\nThe emotion is" for _ in range(1000)]
    prompts[7] = f"{lines[70_000]}\nThe emotion is"
    start = time.process_time()
    leaks = find_leaks(prompts, {"the fit corpus": lines})
    assert time.process_time() - start < 30  # two seconds on one idle core; comparing all with all takes many minutes
    assert [(leak.prompt, leak.text) for leak in leaks] == [(prompts[7], lines[70_000])]


# --- a concept's splits ---------------------------------------------------------------------------------------------


def question(prompt: str, prefix: str = "") -> Question:
    return Question(prompt, (" happy", " sad"), 0, prefix=prefix)


SPLITS = {
    "refine": "I smiled all the day",
    "select": "The letter made me feel",
    "test": "At the river I feel",
    "own": "My birthday made me feel",
}


def concept(**changed: str) -> ContrastPairs:
    texts = SPLITS | changed
    shots = "A gift is happy.\n"
    return ContrastPairs(
        "joy",
        (texts["refine"],),
        ("I frowned",),
        select=(question(texts["select"], shots),),
        test=(question(texts["test"], shots),),
        own=(question(texts["own"], shots),),
    )


def test_disjoint_splits_behind_common_demonstrations_are_no_leak():
    assert check_leaks(concept(), {"the fit corpus": ["A gift is happy.", "The dog sleeps."]}) == ()


@pytest.mark.parametrize(
    ("split", "text", "place"),
    [
        ("select", "I  SMILED all the day", "the refine pairs"),
        ("test", "I smiled all the day", "the refine pairs"),
        ("own", "I smiled all the day", "the refine pairs"),
        ("test", SPLITS["select"], "the select split"),
        ("own", SPLITS["select"], "the select split"),
        ("select", "A gift is", "the few-shot examples"),
        ("test", "A gift is", "the few-shot examples"),
        ("own", "A gift is", "the few-shot examples"),
        ("refine", "The dog sleeps", "the fit corpus"),
        ("select", "The dog sleeps", "the fit corpus"),
        ("test", "The dog sleeps", "the fit corpus"),
        ("own", "So the dog sleeps all day", "the fit corpus"),
    ],
)
def test_a_prompt_of_one_split_in_another_place_is_refused_or_told(split, text, place):
    pairs, corpora = concept(**{split: text}), {"the fit corpus": ["A river.", "the dog sleeps all day"]}
    with pytest.raises(ValueError, match="joy: 1 prompt is not held out: .*pass allow_overlap=True .*in-sample") as caught:
        check_leaks(pairs, corpora)
    assert "\n" not in str(caught.value) and place in str(caught.value)
    (leak,) = check_leaks(pairs, corpora, allow_overlap=True)
    assert (leak.prompt, leak.place) == (text, place)


def test_of_many_leaks_the_first_five_are_listed_in_one_line():
    prompts = tuple(f"Scene {i}:\nit  rains for {i} days" for i in range(9))
    pairs = ContrastPairs("rain", prompts, ("Sun",), test=tuple(map(question, prompts)))
    with pytest.raises(ValueError, match="rain: 9 prompts are not held out: 'Scene 0:") as caught:
        check_leaks(pairs)
    said = str(caught.value)
    assert "\n" not in said and said.count("same as in the refine pairs") == 5 and "; and 4 more. Take" in said
