"""How often does the verdict say "transferred" where nothing was? Simulated nulls, nulls on real models, and power.

    python -m data.studies.nulls [--runs N] [--real N] [--folder data/pair]

*Simulated.* Prompt i has a latent b_i ~ N(m, 1); a vector adds N(0, spread^2) to all prompts and mixes N(0, 1/4) into each,
which makes the propensity; a prompt is a hit where it is above 0 (binary) or scores it (continuous); prompts of a group share
all but a tenth. The base has the b_i only. The transplanted vector is one more draw, or the best of several on a select split;
power gives it an effect on top.

*Pools.* Random vectors of a real target, and random source vectors through real maps, at the layer, norm and strength of the
real transplanted one, each measured once; in every run one of them plays the transplanted arm, others the random arm. The
same pools tell whether effects are as normal as `lead` takes them to be.

*Whole evaluations.* `evaluate` as anyone calls it, with a random source vector for a concept: the choice of layers and strength
is then part of the null.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float

from contrans_tl import ConceptVector, ContrastPairs, LayerMaps, collect, load_model, refine
from contrans_tl.data import read_sentences
from contrans_tl.demo import NEUTRAL, TARGETS, UNRELATED, demo_data
from contrans_tl.evaluation import (
    Marks,
    Rivals,
    SteeredAt,
    Subject,
    Task,
    carried,
    clopper_pearson,
    difference,
    evaluate,
    intervals,
    lead,
    random_like,
    task_of,
)
from contrans_tl.evaluation.arms import DRAWN
from contrans_tl.evaluation.tasks import Split
from contrans_tl.evaluation.transfer import CHANCE
from contrans_tl.models import HookedModel

N_RANDOM = 24
"""Null vectors; half of them as random, half as random source vectors, as in an evaluation."""
SELECT = 25
Values = Float[np.ndarray, " item"]
Vectors = Float[np.ndarray, "vector item"]


@dataclass(frozen=True)
class Null:
    """What is simulated."""

    prompts: int = 50
    rate: float = 0.2
    """Of the base."""
    spread: float = 0.5
    """Of the vectors' effects, in standard deviations of the prompts."""
    binary: bool = True
    group: int = 1
    """Prompts that belong together."""
    choices: int = 1
    """Settings of the transplanted vector, each with an effect of its own, of which the best on `SELECT` other prompts is
    taken; the random vectors have one setting."""
    normal: bool = True
    """Effects; else heavy-tailed, Student's t of three degrees of freedom."""

    def groups(self) -> list[str]:
        return [f"group {i // self.group}" for i in range(self.prompts)]

    def draw(self, rng: np.random.Generator, effect: float = 0.0) -> "Run":
        """One run; the transplanted vector has the effect on top."""
        shape = (self.choices + N_RANDOM, 1)
        spread = self.spread * (rng.standard_normal(shape) if self.normal else rng.standard_t(3, shape) / 3**0.5)
        spread[: self.choices] += effect
        if self.choices > 1:
            hits = self._scored(self._propensities(spread[: self.choices], rng, SELECT)[1:])
            spread = np.concatenate([spread[hits.mean(1).argmax()][None], spread[self.choices :]])
        leanings = self._propensities(spread, rng, self.prompts)
        base, moved, *rivals = self._scored(leanings)
        return Run(base, moved, np.array(rivals), leanings[1], leanings[2:], self.groups(), self.choices)

    def _scored(self, leanings: Vectors) -> Vectors:
        return (leanings > 0).astype(float) if self.binary else leanings

    def _propensities(self, spread: Float[np.ndarray, "vector 1"], rng: np.random.Generator, n: int) -> Vectors:
        """Of the base, and of a vector of each spread."""

        def noise(rows: int) -> Float[np.ndarray, "row item"]:
            alone = rng.standard_normal((rows, n))
            if self.group == 1:
                return alone
            shared = rng.standard_normal((rows, -(-n // self.group))).repeat(self.group, 1)[:, :n]
            return 0.9**0.5 * shared + 0.1**0.5 * alone

        prompts, usual = noise(1)[0], NormalDist().inv_cdf(self.rate)
        # As wide as the base: noise alone would make rare hits more frequent.
        moved = usual + (prompts + 0.5 * noise(len(spread))) / 1.25**0.5 + spread
        return np.concatenate([(usual + prompts)[None], moved])


@dataclass(frozen=True, eq=False)
class Run:
    """What a verdict is given."""

    base: Values
    moved: Values
    rivals: Vectors
    leaning: Values
    """Propensities of the transplanted vector."""
    leanings: Vectors
    groups: Sequence[str]
    settings: int = 1

    def apart(self, *rivals: Vectors) -> bool:
        return all(difference(self.moved, rival, groups=self.groups).low > 0 for rival in rivals)

    def beyond_chance(self) -> bool:
        halves = np.array_split(self.leanings, 2)
        leads = [lead(self.leaning, half, settings=self.settings, groups=self.groups) for half in halves]
        return all(one.chance <= CHANCE for one in leads)


def without_sign_test(run: Run, *rivals: Vectors) -> bool:
    with patch.object(intervals, "FEW_DISCORDANT", 0):
        return run.apart(*rivals)


RULES: dict[str, Callable[[Run], bool]] = {
    "verdict": lambda run: run.apart(run.base[None], run.rivals) and run.beyond_chance(),
    f"apart from all {N_RANDOM}": lambda run: run.apart(run.base[None], run.rivals),
    "from 10": lambda run: run.apart(run.base[None], run.rivals[:10]),
    "from 5": lambda run: run.apart(run.base[None], run.rivals[:5]),
    "from their mean": lambda run: run.apart(run.base[None], run.rivals.mean(0, keepdims=True)),
    "from the base": lambda run: run.apart(run.base[None]),
    "from all, no sign test": lambda run: without_sign_test(run, run.base[None], run.rivals),
    "from the base, no sign test": lambda run: without_sign_test(run, run.base[None]),
}
VERDICT, APART = list(RULES)[:2]


def simulated(
    null: Null, runs: int, *, rules: Sequence[str] = tuple(RULES), effect: float = 0.0, seed: int = 0
) -> dict[str, int]:
    """Runs in which each rule says "transferred"."""
    rng = np.random.default_rng(seed)
    counts = dict.fromkeys(rules, 0)
    for _ in range(runs):
        run = null.draw(rng, effect)
        for rule in rules:
            counts[rule] += RULES[rule](run)
    return counts


def rate(count: int, runs: int) -> str:
    """With its 95% interval."""
    low, high = clopper_pearson(count, runs)
    return f"{count / runs:.3f} [{low:.3f}, {high:.3f}]"


# --- real models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Leaning(Task):
    """Any task by its propensity: every vector moves it a little, so that no null is safe for lack of hits."""

    asked: Task
    name: str
    metric: str = "propensity"

    def prompts(self, split: Split) -> Sequence[str]:
        return () if split == "own" else self.asked.prompts(split)

    def groups(self, split: Split) -> Sequence[str]:
        return self.asked.groups(split)

    def screening(self) -> Task:
        return replace(self, asked=self.asked.screening())

    def measure(self, subject: Subject, split: Split) -> Marks:
        marks = self.asked.measure(subject, split)
        assert marks.propensity is not None
        return Marks({"propensity": marks.propensity, **marks.metrics}, marks.propensity)


@dataclass(frozen=True, eq=False)
class World:
    """A source, a target, maps between them, and what is asked."""

    name: str
    source: HookedModel
    target: HookedModel
    maps: LayerMaps
    neutral: Sequence[str]

    @classmethod
    def of(cls, name: str, source: HookedModel, target: HookedModel) -> "World":
        texts, neutral = (read_sentences(demo_data() / f"{corpus}.txt") for corpus in ("generic", "neutral"))
        maps = LayerMaps.fit(collect(source, texts, rows="words"), collect(target, texts, rows="words"))
        return cls(name, source, target, maps, neutral[UNRELATED : UNRELATED + NEUTRAL])

    def evaluate(self, pairs: ContrastPairs, concept: ConceptVector, task: Task, arms: Sequence[str], seed: int = 0) -> Any:
        options: dict[str, Any] = {"neutral": self.neutral, "task": task, "arms": arms, "seed": seed}
        return evaluate(self.target, pairs, concept, self.maps, rivals=Rivals(n_random=N_RANDOM // 2), **options)


def random_model(folder: Path, seed: int) -> HookedModel:
    """As the one in the folder is before any training."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))  # beyond the 0.02 of initialisation, where hardly anything happens
    model.config._name_or_path = f"random-{folder.name}"
    return load_model(model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")


@dataclass(frozen=True, eq=False)
class Pool:
    """Vectors drawn at random, at the layers, norm and strength of the real transplanted one, each measured once."""

    base: Marks
    drawn: list[Marks]
    groups: Sequence[str]

    @classmethod
    def of(cls, world: World, pairs: ContrastPairs, size: int, *, sources: bool) -> "Pool":
        """Of the target's space, or of the source's through the maps."""
        task, concept = task_of(pairs), refine(world.source, pairs)
        report = world.evaluate(pairs, concept, task, ["base"])
        s, t = report.layer_source, report.layer_target
        maps, concept = world.maps.only([s], [t]).reweighted(concept.only(s)), concept.only(s)
        [moved] = carried(maps, concept).values()
        draws = random_like(concept if sources else moved, size, seed=1)
        if sources:
            draws = [v.matched_to(moved) for draw in draws for v in carried(maps, draw).values()]
        at = SteeredAt(world.target, t)
        drawn = [task.measure(at.subject(v, report.strength), "test") for v in draws]
        return cls(task.measure(Subject(world.target), "test"), drawn, list(task.groups("test")))

    def runs(self, metric: str, runs: int) -> Iterator[Run]:
        """Some of the pool in each, one of them as the transplanted vector."""
        rng = np.random.default_rng(0)
        leanings = np.stack([self._leaning(marks) for marks in self.drawn])
        values = leanings if metric == "propensity" else np.stack([marks.metrics[metric] for marks in self.drawn])
        base = self._leaning(self.base) if metric == "propensity" else self.base.metrics[metric]
        for _ in range(runs):
            moved, *rivals = rng.permutation(len(values))[: 1 + N_RANDOM]
            yield Run(base, values[moved], values[rivals], leanings[moved], leanings[rivals], self.groups)

    def tails(self, levels: Sequence[float], repeats: int = 20) -> list[float]:
        """How often `lead` gives a vector of the pool a chance below each level: as often, if effects are normal."""
        rng, chances = np.random.default_rng(0), []
        leanings = np.stack([self._leaning(marks) for marks in self.drawn])
        for moved in range(len(leanings)):
            for _ in range(repeats):
                rivals = rng.permutation(np.delete(np.arange(len(leanings)), moved))[: N_RANDOM // 2]
                chances.append(lead(leanings[moved], leanings[rivals], groups=self.groups).chance)
        return [float((np.array(chances) <= level).mean()) for level in levels]

    @staticmethod
    def _leaning(marks: Marks) -> Values:
        assert marks.propensity is not None
        return marks.propensity


def whole(world: World, pairs: ContrastPairs, runs: int, task: Task) -> Iterator[tuple[bool, bool, bool]]:
    """Of every evaluation of a random source vector: apart from the base, apart from every null, and transferred."""
    for seed, concept in enumerate(random_like(refine(world.source, pairs), runs, seed=2)):
        report = world.evaluate(pairs, concept, task, DRAWN, seed=seed)
        yield report.differences["base"].low > 0, not report.rivals, report.transferred


# --- tables ---------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


CELLS = [
    Null(prompts, rate, spread, binary, group)
    for (prompts, group), (binary, rate), spread in product(
        ((20, 1), (50, 1), (200, 1), (200, 4)), ((True, 0.02), (True, 0.2), (True, 0.5), (False, 0.5)), (0.0, 0.5, 2.0)
    )
]
EFFECTS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description="False positives and power of the verdict.")
    parser.add_argument("--runs", type=int, default=400, help="of each simulated cell and each pool")
    parser.add_argument("--pool", type=int, default=150, help="vectors of a pool; 0 for none")
    parser.add_argument("--real", type=int, default=30, help="whole evaluations of each pair of models; 0 for none")
    parser.add_argument("--folder", type=Path, default=demo_data() / "pair")
    options = parser.parse_args()
    runs, start = options.runs, time.process_time()

    print(f"**Simulated nulls**, {runs} runs a row: share called transferred\n")
    rows, total = [], dict.fromkeys(RULES, 0)
    for seed, null in enumerate(CELLS):
        counts = simulated(null, runs, seed=seed)
        total = {rule: total[rule] + count for rule, count in counts.items()}
        about = [f"{null.prompts}" + (f" in groups of {null.group}" if null.group > 1 else ""), f"{null.spread:g}"]
        about.append(f"hits, base {null.rate:g}" if null.binary else "continuous")
        rows.append([*about, *(f"{count / runs:.3f}" for count in counts.values())])
    rows.append(["all", "", "", *(rate(count, runs * len(CELLS)) for count in total.values())])
    table(["prompts", "spread", "metric", *RULES], rows)

    print(f"**Power**: share called transferred, by effect in the prompts' standard deviations; {runs} runs\n")
    rows = []
    for null in (Null(20), Null(50), Null(200), Null(50, spread=2.0), Null(50, binary=False), Null(200, group=4)):
        for k in (1, 24):
            tried = replace(null, choices=k)
            found = [simulated(tried, runs, rules=[VERDICT], effect=effect)[VERDICT] / runs for effect in EFFECTS]
            rows.append([str(null.prompts), str(null.group), f"{null.spread:g}", "hits" if null.binary else "continuous"])
            rows[-1] += [str(k), *(f"{share:.2f}" for share in found)]
    table(["prompts", "group", "spread", "metric", "settings", *(f"+{effect:g}" for effect in EFFECTS)], rows)

    print("**The best of several settings** of the transplanted vector, one of the random ones: share called transferred\n")
    settings, rows = (1, 2, 4, 16, 24), []
    for null in (Null(), Null(spread=2.0), Null(spread=2.0, binary=False), Null(200, spread=2.0)):
        for normal, rule in product((True, False), (APART, VERDICT)):
            tried = [replace(null, choices=k, normal=normal) for k in settings]
            found = [simulated(one, runs, rules=[rule])[rule] / runs for one in tried]
            about = [str(null.prompts), f"{null.spread:g}", "hits" if null.binary else "continuous"]
            rows.append([*about, "normal" if normal else "heavy-tailed", rule, *(f"{share:.3f}" for share in found)])
    table(["prompts", "spread", "metric", "effects", "rule", *(f"of {k}" for k in settings)], rows)

    source = load_model(options.folder / "source", device="cpu")
    worlds = [World.of(name, source, load_model(options.folder / name, device="cpu")) for name in TARGETS]
    untrained = [random_model(options.folder / name, seed) for seed, name in enumerate(("source", "target-gpt2"))]
    worlds.append(World.of("two untrained models", *untrained))
    anger, honesty = (ContrastPairs.load(demo_data() / "concepts" / f"{name}.json") for name in ("anger", "honesty"))
    if options.pool:
        levels, rows, tails = (0.05, 0.01, CHANCE / 24), [], []
        for world, pairs, sources in product(worlds, (anger, honesty), (False, True)):
            pool = Pool.of(world, pairs, options.pool, sources=sources)
            about = [world.name, pairs.name, "random source" if sources else "random"]
            tails.append([*about, *(f"{share:.4f}" for share in pool.tails(levels))])
            for metric in (pairs.metric, "propensity"):
                drawn = list(pool.runs(metric, runs))
                rows.append([*about, metric, *(f"{sum(map(rule, drawn)) / runs:.3f}" for rule in RULES.values())])
        print(f"**Pools of {options.pool} vectors drawn at random**, {runs} runs a row: share called transferred\n")
        table(["target", "concept", "vectors", "metric", *RULES], rows)
        print(f"**Are effects normal?** Share of a pool's vectors that {N_RANDOM // 2} others give so small a chance\n")
        table(["target", "concept", "vectors", *(f"{level:.2g}" for level in levels)], tails)

    if options.real:
        print(f"**Whole evaluations of random source vectors**, choice included; {options.real} runs a row\n")
        rows, counts = [], np.zeros(3)
        for world, leaning in product(worlds, (False, True)):
            task = Leaning(task_of(anger), anger.name) if leaning else task_of(anger)
            found = np.array(list(whole(world, anger, options.real, task))).sum(0)
            counts += found
            rows.append([world.name, task.metric, *(rate(int(count), options.real) for count in found)])
        rows.append(["all", "", *(rate(int(count), options.real * len(rows)) for count in counts)])
        table(["target", "metric", "apart from the base", "apart from every null", "transferred"], rows)
    print(f"{time.process_time() - start:.0f} processor seconds")


if __name__ == "__main__":
    main()
