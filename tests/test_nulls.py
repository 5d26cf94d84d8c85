"""Where nothing was carried the verdict says so: simulated nulls, and real models that have nothing to carry."""

import sys
from dataclasses import replace
from math import comb
from pathlib import Path

import numpy as np
import pytest
from conftest import CORPUS, TEXTS

from contrans_tl import ContrastPairs, LayerMaps, Question, collect, load_model, refine
from contrans_tl.data import read_sentences
from contrans_tl.demo import UNRELATED, demo_data
from contrans_tl.evaluation import Rivals, clopper_pearson, evaluate
from contrans_tl.reformulation import fit_maps

sys.path.insert(0, str(Path(__file__).parents[1]))  # data/studies are scripts beside the package

from data.studies.nulls import APART, N_RANDOM, VERDICT, Null, random_model, simulated  # noqa: E402

NO_TRANSFER = "no transfer beyond controls"
RIVALS = Rivals(n_random=20)


def most(runs: int, p: float) -> int:
    """The number that a rate p exceeds once in a thousand times."""
    chances = np.cumsum([comb(runs, k) * p**k * (1 - p) ** (runs - k) for k in range(runs + 1)])
    return int((chances < 0.999).sum())


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("prompts", "group"), [(20, 1), (200, 4)])
def test_of_exchangeable_vectors_at_most_one_is_apart_from_all_others(binary, prompts, group):
    # That bounds the false positives of any data at 1 in 25: whichever of them is the transplanted one, it has to be this one.
    found = 0
    for seed in range(12):
        null = Null(prompts, 0.2, 2.0, binary, group)
        run = null.draw(np.random.default_rng(seed))
        vectors = np.concatenate([run.moved[None], run.rivals])
        each = [replace(run, moved=v).apart(np.delete(vectors, i, axis=0)) for i, v in enumerate(vectors)]
        assert sum(each) <= 1
        found += sum(each)
    assert found > 0 or prompts == 20  # or this would test nothing


def test_nulls_are_called_transferred_in_at_most_1_of_20_runs_where_weaker_rules_are_wrong_far_more_often():
    runs, cells = 100, [Null(50, 0.2, 2.0), Null(200, 0.5, 2.0, False), Null(200, 0.2, 0.5, group=4)]
    counts = [simulated(null, runs, seed=seed) for seed, null in enumerate(cells)]
    total = {rule: sum(count[rule] for count in counts) for rule in counts[0]}
    assert 0 < total[APART] <= most(runs * len(cells), 1 / (1 + N_RANDOM))
    assert total[VERDICT] <= total[APART]
    for weaker in ("from 5", "from their mean", "from the base"):
        assert clopper_pearson(total[weaker], runs * len(cells))[0] > 0.05


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_the_best_of_many_settings_is_called_transferred_in_at_most_1_of_20_runs(spread):
    runs, null = 150, Null(50, 0.5, spread, False, choices=24)
    counts = simulated(null, runs, rules=[APART, VERDICT])
    assert counts[VERDICT] <= most(runs, 0.05)
    assert clopper_pearson(counts[APART], runs)[0] > 0.05  # nulls of one setting do not allow for it


@pytest.mark.parametrize("choices", [1, 24])
def test_a_planted_effect_is_found(choices):
    for null in (Null(50, choices=choices), Null(200, group=4, choices=choices)):
        assert simulated(null, 40, rules=[VERDICT], effect=3.0)[VERDICT] >= 36


# --- real models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair():
    """The embedded source and one target, at their upper layers, and what `evaluate` takes."""
    return World("target-gpt2")


class World:
    def __init__(self, target: str):
        folder = demo_data() / "pair"
        self.source, self.target = (load_model(folder / name, device="cpu") for name in ("source", target))
        self.layers = {"source": (2, 3), "target": (2, 3)}
        pairs = ContrastPairs.load(demo_data() / "concepts" / "anger.json")
        self.pairs = replace(pairs, test=pairs.test[::2])
        self.sentences, neutral = (read_sentences(demo_data() / f"{name}.txt") for name in ("generic", "neutral"))
        self.unrelated, self.neutral = neutral[:UNRELATED], neutral[-12:]
        self.seen = {}

    def maps(self, sentences, source=None) -> LayerMaps:
        """The target's rows are collected once for each corpus."""
        key = len(sentences)
        if key not in self.seen:
            self.seen[key] = collect(self.target, sentences, rows="words", layers=self.layers["target"])
        return LayerMaps.fit(
            collect(source or self.source, sentences, rows="words", layers=self.layers["source"]), self.seen[key]
        )

    def evaluate(self, maps, *, pairs=None, source=None, arms=("random",), rivals=None):
        pairs = pairs or self.pairs
        concept = refine(source or self.source, pairs)
        return evaluate(
            self.target, pairs, concept, maps, neutral=self.neutral, arms=arms, rivals=rivals or Rivals(n_random=20)
        )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["target-gpt2", "target-llama"])
def test_a_concept_of_the_embedded_pair_is_transferred(target, pair):
    world = pair if target == "target-gpt2" else World(target)
    other = refine(world.source, ContrastPairs.load(demo_data() / "concepts" / "fear.json"))
    rivals = Rivals(other, {"neutral_corpus": world.maps(world.unrelated)})
    nulls = ("shuffled_map", "random", "random_source", "other_concept", "sign_flipped", "neutral_corpus")
    report = world.evaluate(world.maps(world.sentences), arms=nulls, rivals=rivals)
    assert report.transferred and "apart from the base and every null control" in report.verdict


@pytest.mark.slow
def test_a_map_fitted_on_shuffled_pairs_carries_nothing(pair):
    report = pair.evaluate(pair.maps(pair.sentences).shuffled(seed=1))
    assert not report.transferred and NO_TRANSFER in report.verdict


def test_a_map_fitted_on_text_that_never_mentions_the_concept_carries_nothing(pair):
    report = pair.evaluate(pair.maps(pair.unrelated))
    assert not report.transferred and NO_TRANSFER in report.verdict


def test_a_contrast_that_the_source_knows_nothing_of_carries_nothing(pair):
    # Both sides are scenarios of anger.
    alike = replace(pair.pairs, positive=pair.pairs.positive[::2], negative=pair.pairs.positive[1::2])
    report = pair.evaluate(pair.maps(pair.sentences), pairs=alike)
    assert not report.transferred and NO_TRANSFER in report.verdict


@pytest.mark.slow
def test_an_untrained_source_gives_a_trained_target_nothing(pair):
    source = random_model(demo_data() / "pair" / "source", seed=0)
    report = pair.evaluate(pair.maps(pair.sentences, source), source=source)
    assert not report.transferred and NO_TRANSFER in report.verdict


def test_two_untrained_models_transfer_nothing(bridges):
    words = ("dog", "fox", "river", "letter", "quick", "lazy", "brown", "over")
    pairs = ContrastPairs(
        "happiness",
        positive=tuple(f"the {a} made me feel happy over the {b}" for a in words for b in words[:3]),
        negative=tuple(f"a {a} sleeps and the {b} jumps" for a in words for b in words[:3]),
        select=tuple(Question(f"brown {a} {b}", (" happy", " dog"), 0) for a in words for b in words[3:5]),
        test=tuple(Question(f"lazy {a} {b}", (" happy", " dog"), 0) for a in words for b in words[5:]),
    )
    source, target = bridges["llama"], bridges["gpt2"]
    maps = fit_maps(source, target, [f"{text} {a} {b}" for text in CORPUS for a in words for b in words])
    report = evaluate(target, pairs, refine(source, pairs), maps, neutral=TEXTS, arms=["random", "random_source"])
    assert not report.transferred and NO_TRANSFER in report.verdict
    assert report.null_vectors == 24 and "Null vectors" not in report.verdict
    few = evaluate(target, pairs, refine(source, pairs), maps, neutral=TEXTS, arms=["random"], rivals=Rivals(n_random=4))
    assert few.null_vectors == 4 and "apart from all of them up to once in 5" in few.verdict
