"""Heads as a place: what vectors at a few heads do, the target's own and the carried, and what controls at as many heads do.

    python -m data.studies.heads [data/pair] [--strengths 1 2 4] [--sentences 800]

The heads are those that a centre-of-mass probe in the target finds (`probe_heads`); effects are token accuracies on the select
split, which no head was chosen by. Columns: the target's own vectors; those carried from all source heads together; at their
norms, those carried from the best single head, by maps of shuffled rows, and drawn at random; and the target's own vectors at
the heads that the probe finds worst.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

from contrans_tl import (
    ContrastPairs,
    HeadVectors,
    fit_head_maps,
    load_model,
    read_sentences,
    refine_heads,
    reformulate_heads,
    transplant,
)
from contrans_tl.demo import TARGETS, demo_data
from contrans_tl.diagnostics import probe_heads
from contrans_tl.evaluation import Subject, Task, task_of
from contrans_tl.evaluation.tasks import measured
from contrans_tl.heads import Head
from contrans_tl.models import HookedModel

CONCEPTS = ("anger", "happiness", "honesty")
COUNTS = (4, 8)


def effect(model: HookedModel, task: Task, vectors: HeadVectors, heads: Sequence[Head], strength: float) -> float:
    """The task's metric on the select split with these vectors added at these heads."""
    with transplant(model, vectors, heads=heads, strength=strength):
        return float(measured(task, Subject(model), "select").metrics[task.metric].mean())


def as_long_as(vectors: HeadVectors, other: HeadVectors) -> HeadVectors:
    """Head by head of the other's norm."""
    norms = other.only(*vectors.heads).vectors.norm(dim=-1, keepdim=True)
    return replace(vectors, vectors=vectors.vectors * norms / vectors.vectors.norm(dim=-1, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="?", type=Path, default=demo_data() / "pair")
    parser.add_argument("--strengths", nargs="+", type=float, default=[1.0, 2.0, 4.0])
    parser.add_argument("--sentences", type=int, default=800)
    options = parser.parse_args()
    source = load_model(options.models / "source", device="cpu")
    sentences = read_sentences(demo_data() / "generic.txt")[: options.sentences]
    for name in TARGETS:
        target = load_model(options.models / name, device="cpu")
        pooled, single = (fit_head_maps(source, target, sentences, pooled=way) for way in (True, False))
        for label, r2 in (("all source heads together", pooled.r2), ("the best single one", single.r2)):
            best = r2.amax(0)
            print(f"{name}: R2 of the target's heads from {label} {float(best.min()):.2f} to {float(best.max()):.2f}")
        for concept in CONCEPTS:
            pairs = ContrastPairs.load(demo_data() / "concepts" / f"{concept}.json")
            task, own, native = task_of(pairs), refine_heads(source, pairs), refine_heads(target, pairs)
            found = probe_heads(target, pairs, method="mass")
            ranked = sorted(native.heads, key=lambda at: -float(found.scores.values[at]))
            moved = reformulate_heads(own, pooled)
            shuffled = reformulate_heads(own, replace(pooled, maps=pooled.maps.shuffled(seed=1)))
            drawn = torch.randn(moved.vectors.shape, generator=torch.Generator().manual_seed(0))
            columns = {
                "own": native,
                "carried": moved,
                "one by one": as_long_as(reformulate_heads(own, single), moved),
                "shuffled": as_long_as(shuffled, moved),
                "random": as_long_as(replace(moved, vectors=drawn), moved),
            }
            for kind in ("carried", "one by one"):
                near = cosine_similarity(columns[kind].only(*native.heads).vectors, native.vectors, dim=-1).mean()
                print(f"{name} {concept}: mean cosine with the own vectors, {kind}: {float(near):.2f}")
            print(f"{'heads':>5} {'strength':>8} " + " ".join(f"{kind:>10}" for kind in (*columns, "own, worst")))
            for count in (*COUNTS, len(found.above())):
                for strength in options.strengths:
                    row = [effect(target, task, vectors, ranked[:count], strength) for vectors in columns.values()]
                    row.append(effect(target, task, native, ranked[-count:], strength))
                    print(f"{count:>5} {strength:>8g} " + " ".join(f"{value:>10.2f}" for value in row), flush=True)


if __name__ == "__main__":
    main()
