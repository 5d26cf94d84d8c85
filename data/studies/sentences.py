"""Which sentences to fit on: effect against their number, for sentences chosen by `select_sentences` and for random ones.

    python -m data.studies.sentences data/pair /tmp/pairs/1 /tmp/pairs/2

The pool is ordinary text as in generic.txt, but with emotions in one sentence of twenty. Numbers are means over six emotions
(each with its own choice), two upper source layers and two upper target layers. Effects are token accuracies on every fourth
question of the test split; the last column but one has, for concept-weighted maps at strength 2, the least and greatest of the
training seeds. `of their lengths` draws sentences of as many words as the chosen ones have.
"""

import argparse
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import reduce
from jaxtyping import Int
from torch import Tensor

from contrans_tl import ContrastPairs, LayerMaps, collect, load_model, pair, refine
from contrans_tl.activations import Activations
from contrans_tl.demo import TARGETS, demo_data
from contrans_tl.evaluation import Forward, SteeredAt, answer_questions, carried, read_questions
from contrans_tl.experiment import check_inputs
from contrans_tl.models import HookedModel
from contrans_tl.moments import Moments, said_about
from contrans_tl.refinement import ConceptVector
from data.studies.effects import side_by_side
from data.world import EMOTIONS, World, distinct

POOL, MENTIONING = 3000, 0.05
SIZES = (50, 100, 200, 400, 800)
DRAWS = 3
LAYERS = {"source": (2, 3), "target-llama": (3, 4), "target-gpt2": (2, 3)}
WEIGHTINGS, STRENGTHS = ("concept", "uniform"), (2.0, 3.0)
CHOICES = ("chosen", "random", "of their lengths")


def write_pool(world: World) -> list[str]:
    """Half neutral text, the rest speakers and bare facts but for a twentieth of diary, which mentions emotions."""
    rng, facts = world.rng("pool"), world.facts["refine"]
    writers = {
        lambda: world.neutral(rng): 0.5,
        lambda: world.diary(rng): MENTIONING,
        lambda: world.speaker(rng, facts): 0.3,
        lambda: world.bare(rng, facts): 0.2 - MENTIONING,
    }
    lines = list(dict.fromkeys(line for write, share in writers.items() for line in distinct(round(share * POOL), write)))
    rng.shuffle(lines)
    return lines


def ranked(x: Activations, concepts: Sequence[ConceptVector]) -> list[list[int]]:
    """For every concept, the sentences by their mean concept weight. `select_sentences` takes the first n of these, and need
    not hold the rows."""
    moments = [Moments(x.values.shape[-1], 0).update(x.at(layer), x.at(layer)[:, :0]) for layer in x.layers]
    orders = []
    for concept in concepts:
        weigh = [said_about(m, v) for m, v in zip(moments, concept.vectors, strict=True)]
        weights = torch.stack([w(x.at(layer).double()) for w, layer in zip(weigh, x.layers, strict=True)]).mean(0)
        said = torch.zeros(int(x.sentence.max()) + 1).double().index_add_(0, x.sentence, weights)
        orders.append((said / x.sentence.bincount()).argsort(descending=True).tolist())
    return orders


def of_lengths(chosen: Sequence[int], words: Int[Tensor, " sentence"], seed: int) -> list[int]:
    """Sentences drawn at random, each of as many words as one that is chosen, or as near to it as are left."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i in random.Random(seed).sample(range(len(words)), len(words)):
        by_length[int(words[i])].append(i)
    drawn = []
    for i in chosen:
        nearest = min((length for length in by_length if by_length[length]), key=lambda length: abs(length - int(words[i])))
        drawn.append(by_length[nearest].pop())
    return drawn


class Trial:
    """Maps into one target, fitted on some of the pool, and what they do with the concepts."""

    def __init__(
        self, x: Activations, target: HookedModel, layers: Sequence[int], pool: Sequence[str], concepts: Sequence[ContrastPairs]
    ) -> None:
        self.target, self.at = target, {layer: SteeredAt(target, layer) for layer in layers}
        self.x, self.y = pair(x, collect(target, pool, rows="words", layers=layers))
        self.questions = [read_questions(target, pairs.test[::4]) for pairs in concepts]
        self.native = [refine(target, pairs, layers=layers) for pairs in concepts]

    def fit(self, sentences: Sequence[int]) -> LayerMaps:
        kept = torch.isin(self.x.sentence, torch.tensor(sentences)).nonzero()[:, 0]
        return LayerMaps.fit(self.x.take(kept), self.y.take(kept))

    def outcome(self, maps: LayerMaps, concept: ConceptVector, i: int) -> dict[str, float]:
        """Of the i-th concept."""
        found = {"unseen": float((1 - maps.coverage(concept)).mean()), "r2": float(maps.r2.mean())}
        vectors: dict[int, list[Tensor]] = {t: [] for t in self.at}
        for weighting in WEIGHTINGS:
            grid = carried(maps.reweighted(concept) if weighting == "concept" else maps, concept)
            for (_, t), v in grid.items():
                vectors[t] += [strength * v.at(t) for strength in STRENGTHS]
            cosines = [float(v.cosine(self.native[i].only(t))) for (_, t), v in grid.items()]
            found[f"cosine {weighting}"] = float(np.mean(cosines))
        hits = [[self._accuracy(i, f) for f in side_by_side(self.at[t], torch.stack(each))] for t, each in vectors.items()]
        shape = "target (weighting source strength) -> weighting strength"
        means = reduce(np.array(hits), shape, "mean", weighting=len(WEIGHTINGS), strength=len(STRENGTHS))
        return found | {f"{w} {s:g}": float(means[k, m]) for k, w in enumerate(WEIGHTINGS) for m, s in enumerate(STRENGTHS)}

    def _accuracy(self, i: int, forward: Forward) -> float:
        answers = answer_questions(self.target, self.questions[i], "token_accuracy", forward=forward)
        return float(answers.hits["token_accuracy"].mean())


def measure(folder: Path, pool: Sequence[str], concepts: Sequence[ContrastPairs]) -> Iterator[dict]:
    """A row for every target, number of sentences, way to choose them, draw and concept."""
    source = load_model(folder / "source", device="cpu")
    refined = [refine(source, pairs) for pairs in concepts]
    everywhere = collect(source, pool, rows="words")
    order = ranked(everywhere, refined)
    x, words = everywhere.only(LAYERS["source"]), everywhere.sentence.bincount()
    vectors = [concept.only(*LAYERS["source"]) for concept in refined]
    for name in TARGETS:
        trial = Trial(x, load_model(folder / name, device="cpu"), LAYERS[name], pool, concepts)
        for n in SIZES:
            about = {"seed": folder.name, "target": name, "n": n}
            for draw in range(DRAWS):
                drawn = random.Random(f"{n}/{draw}").sample(range(len(pool)), n)
                maps = trial.fit(drawn)
                for i, vector in enumerate(vectors):
                    row = about | {"choice": "random", "words": float(words[drawn].float().mean())}
                    yield row | trial.outcome(maps, vector, i)
            for i, vector in enumerate(vectors):
                for choice, sentences in (("chosen", order[i][:n]), ("of their lengths", of_lengths(order[i][:n], words, i))):
                    row = about | {"choice": choice, "words": float(words[sentences].float().mean())}
                    yield row | trial.outcome(trial.fit(sentences), vector, i)


def table(rows: Sequence[dict]) -> str:
    """Markdown; means over whatever is not named."""
    header = ["target", "sentences", "which", "words each", "1 - coverage", "R2"]
    header += [f"{weighting}, strength {strength:g}" for weighting in WEIGHTINGS for strength in STRENGTHS]
    header += ["least and greatest seed", "cosine to native"]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for target in TARGETS:
        for n in SIZES:
            for choice in CHOICES:
                here = [row for row in rows if (row["target"], row["n"], row["choice"]) == (target, n, choice)]
                if not here:
                    continue

                def mean(key: str, among: Sequence[dict] = here) -> float:
                    return float(np.mean([row[key] for row in among]))

                seeds = [mean("concept 2", [r for r in here if r["seed"] == seed]) for seed in {row["seed"] for row in here}]
                cells = [target, str(n), choice, f"{mean('words'):.1f}", f"{mean('unseen'):.4f}", f"{mean('r2'):.2f}"]
                cells += [f"{mean(f'{weighting} {strength:g}'):.2f}" for weighting in WEIGHTINGS for strength in STRENGTHS]
                cells += [f"{min(seeds):.2f} to {max(seeds):.2f}", f"{mean('cosine concept'):.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="each with source, target-llama and target-gpt2")
    folders = parser.parse_args().folders
    concepts = [ContrastPairs.load(demo_data() / "concepts" / f"{emotion}.json") for emotion in EMOTIONS]
    pool = write_pool(World())
    check_inputs(concepts, {"the pool": pool})
    mentioning = sum(not set(EMOTIONS).isdisjoint(re.findall(r"\w+", line)) for line in pool)
    print(f"{len(pool)} sentences, {mentioning} with an emotion", file=sys.stderr)
    rows: list[dict] = []
    for folder in folders:
        start = time.process_time()
        rows += measure(folder, pool, concepts)
        print(f"{folder}: {time.process_time() - start:.0f} s", file=sys.stderr)
    print(table(rows))
