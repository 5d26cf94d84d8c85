"""How often does the verdict say "transferred" where nothing was? Simulated nulls, nulls on real models, and power.

    python -m data.studies.nulls [--runs N] [--real N] [--folder data/pair]

*Simulated.* Prompt i has a latent b_i ~ N(m, 1); a vector adds N(0, spread^2) to all prompts and mixes N(0, 1/4) into each; a
prompt is a hit where the result is above 0 (binary) or scores it (continuous); prompts of a group share all but a tenth. The
base has the b_i only. The transplanted vector is one more draw; power gives it an effect on top.

*Pools.* Random vectors of a real target, at the layer, norm and strength of the real transplanted one, each measured once; in
every run one of them plays the transplanted arm, others the random arm.

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
    clopper_pearson,
    difference,
    evaluate,
    intervals,
    random_like,
    task_of,
)
from contrans_tl.evaluation.tasks import Split
from contrans_tl.models import HookedModel, identify

N_RANDOM = 20
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

    def groups(self) -> list[str]:
        return [f"group {i // self.group}" for i in range(self.prompts)]

    def draw(self, vectors: int, rng: np.random.Generator, effect: float = 0.0) -> tuple[Values, Vectors]:
        """The base and the vectors on the test prompts; the first of them has the effect on top."""
        spread = self.spread * rng.standard_normal((self.choices + vectors - 1, 1))
        spread[: self.choices] += effect
        if self.choices > 1:
            chosen = self._responses(spread[: self.choices], rng, SELECT)[1].mean(1).argmax()
            spread = np.concatenate([spread[chosen][None], spread[self.choices :]])
        return self._responses(spread, rng, self.prompts)

    def _responses(self, spread: Float[np.ndarray, "vector 1"], rng: np.random.Generator, n: int) -> tuple[Values, Vectors]:
        def noise(rows: int) -> Float[np.ndarray, "row item"]:
            alone = rng.standard_normal((rows, n))
            if self.group == 1:
                return alone
            shared = rng.standard_normal((rows, -(-n // self.group))).repeat(self.group, 1)[:, :n]
            return 0.9**0.5 * shared + 0.1**0.5 * alone

        prompts, usual = noise(1)[0], NormalDist().inv_cdf(self.rate)
        # As wide as the base: noise alone would make rare hits more frequent.
        base, moved = usual + prompts, usual + (prompts + 0.5 * noise(len(spread))) / 1.25**0.5 + spread
        return ((base > 0).astype(float), (moved > 0).astype(float)) if self.binary else (base, moved)


def apart(moved: Values, base: Values, rivals: Vectors, groups: Sequence[str]) -> bool:
    """What `TransferReport.transferred` asks of base and random vectors."""
    return all(difference(moved, rival, groups=groups).low > 0 for rival in (base[None], rivals))


def apart_from_mean(moved: Values, base: Values, rivals: Vectors, groups: Sequence[str]) -> bool:
    """The rule that it is not: the mean of the random arm, as if it were one control."""
    return apart(moved, base, rivals.mean(0, keepdims=True), groups)


def apart_without_sign_test(moved: Values, base: Values, rivals: Any, groups: Sequence[str]) -> bool:
    with patch.object(intervals, "FEW_DISCORDANT", 0):
        return apart(moved, base, rivals, groups)


RULES: dict[str, Callable[[Values, Values, Any, Sequence[str]], bool]] = {
    f"every one of {N_RANDOM}": apart,
    "of 10": lambda moved, base, rivals, groups: apart(moved, base, rivals[:10], groups),
    "of 5": lambda moved, base, rivals, groups: apart(moved, base, rivals[:5], groups),
    f"mean of {N_RANDOM}": apart_from_mean,
    "base only": lambda moved, base, rivals, groups: difference(moved, base[None], groups=groups).low > 0,
    "no sign test": apart_without_sign_test,
    "base only, no sign test": lambda moved, base, rivals, groups: apart_without_sign_test(moved, base, base[None], groups),
}


def simulated(
    null: Null, runs: int, *, rules: Sequence[str] = tuple(RULES), effect: float = 0.0, seed: int = 0
) -> dict[str, int]:
    """Runs in which each rule says "transferred"."""
    rng, groups = np.random.default_rng(seed), null.groups()
    counts = dict.fromkeys(rules, 0)
    for _ in range(runs):
        base, (moved, *rivals) = null.draw(1 + N_RANDOM, rng, effect)
        for rule in rules:
            counts[rule] += RULES[rule](moved, base, np.array(rivals), groups)
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
        return evaluate(self.target, pairs, concept, self.maps, rivals=Rivals(n_random=N_RANDOM), **options)


def random_model(folder: Path, seed: int) -> HookedModel:
    """As the one in the folder is before any training."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    for weight in model.parameters():
        weight.data.add_(0.05 * torch.randn_like(weight))  # beyond the 0.02 of initialisation, where hardly anything happens
    model.config._name_or_path = f"random-{folder.name}"
    return load_model(model, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu")


def pool(world: World, pairs: ContrastPairs, size: int, metric: str) -> tuple[Values, Vectors, list[str]]:
    """Base and random vectors at the layer, norm and strength of the real transplanted vector."""
    task = task_of(pairs)
    report = world.evaluate(pairs, refine(world.source, pairs), task, ["base"])
    layer, target = report.layer_target, identify(world.target)
    norm = report.geometry["transplanted"]["norm"]
    like = ConceptVector(torch.full((1, target.d_model), norm / target.d_model**0.5), (layer,), "like", target)
    at = SteeredAt(world.target, layer)

    def values(subject: Subject) -> Values:
        marks = task.measure(subject, "test")
        assert marks.propensity is not None
        return marks.propensity if metric == "propensity" else marks.metrics[metric]

    vectors = [at.subject(vector, report.strength) for vector in random_like(like, size, seed=1)]
    return values(Subject(world.target)), np.stack([values(v) for v in vectors]), list(task.groups("test"))


def from_pool(base: Values, vectors: Vectors, groups: Sequence[str], runs: int) -> dict[str, int]:
    """Runs that draw their transplanted and random vectors from a pool."""
    rng, counts = np.random.default_rng(0), dict.fromkeys(RULES, 0)
    for _ in range(runs):
        moved, *rivals = rng.permutation(len(vectors))[: 1 + N_RANDOM]
        for name, rule in RULES.items():
            counts[name] += rule(vectors[moved], base, vectors[rivals], groups)
    return counts


def whole(world: World, pairs: ContrastPairs, runs: int) -> Iterator[tuple[bool, bool]]:
    """Of every evaluation of a random source vector, by its propensity: apart from the base, and transferred."""
    like, task = refine(world.source, pairs), Leaning(task_of(pairs), pairs.name)
    for seed, concept in enumerate(random_like(like, runs, seed=2)):
        report = world.evaluate(pairs, concept, task, ["random"], seed=seed)
        yield report.differences["base"].low > 0, report.transferred


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
    rule, rows = next(iter(RULES)), []
    for null in (Null(20), Null(50), Null(200), Null(50, spread=2.0), Null(50, binary=False), Null(200, group=4)):
        found = [simulated(null, runs, rules=[rule], effect=effect)[rule] / runs for effect in EFFECTS]
        rows.append([str(null.prompts), str(null.group), f"{null.spread:g}", "hits" if null.binary else "continuous"])
        rows[-1] += [f"{share:.2f}" for share in found]
    table(["prompts", "group", "spread", "metric", *(f"+{effect:g}" for effect in EFFECTS)], rows)

    print("**The best of several settings** of the transplanted vector, one of the random ones: share called transferred\n")
    settings, rows = (1, 2, 4, 16), []
    for null in (Null(), Null(spread=2.0), Null(spread=2.0, binary=False), Null(200, spread=2.0)):
        found = [simulated(replace(null, choices=k), runs, rules=[rule])[rule] / runs for k in settings]
        rows.append([str(null.prompts), f"{null.spread:g}", "hits" if null.binary else "continuous"])
        rows[-1] += [f"{share:.3f}" for share in found]
    table(["prompts", "spread", "metric", *(f"of {k}" for k in settings)], rows)

    source = load_model(options.folder / "source", device="cpu")
    worlds = [World.of(name, source, load_model(options.folder / name, device="cpu")) for name in TARGETS]
    untrained = [random_model(options.folder / name, seed) for seed, name in enumerate(("source", "target-gpt2"))]
    worlds.append(World.of("two untrained models", *untrained))
    print(f"**Pools of 60 random vectors in a target**, {runs} runs a row\n")
    rows = []
    for world, concept, metric in product(worlds, ("anger", "honesty"), ("hits", "propensity")):
        pairs = ContrastPairs.load(demo_data() / "concepts" / f"{concept}.json")
        counts = from_pool(*pool(world, pairs, 60, pairs.metric if metric == "hits" else metric), runs)
        rows.append([world.name, concept, metric, *(f"{count / runs:.3f}" for count in counts.values())])
    table(["target", "concept", "metric", *RULES], rows)

    if options.real:
        print(f"**Whole evaluations of random source vectors**, by propensity, {options.real} runs a row\n")
        anger = ContrastPairs.load(demo_data() / "concepts" / "anger.json")
        rows = []
        for world in worlds:
            base, called = np.array(list(whole(world, anger, options.real))).sum(0)
            rows.append([world.name, rate(int(base), options.real), rate(int(called), options.real)])
        table(["target", "apart from the base", "transferred"], rows)
    print(f"{time.process_time() - start:.0f} processor seconds")


if __name__ == "__main__":
    main()
