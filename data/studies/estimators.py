"""Every estimator on three fit corpora: held-out R2, what a splice recovers, cosine to the native vector, effect.

    python -m data.studies.estimators MODELS...

MODELS are folders of `data/train_pair.py`. Layers are fixed (the source's last into the target's last but one), and
so is the strength; every carried vector is given the native vector's norm, as estimators differ in how much they
shrink. Values are means over six emotions, both targets and the seeds. Cosine and effect come twice:
through the maps as fitted, and refitted with concept weights.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contrans_tl.activations import collect
from contrans_tl.data import cut_short, read_sentences
from contrans_tl.demo import NEUTRAL, UNRELATED, demo_data
from contrans_tl.reformulation import UNWEIGHTED, LayerMaps
from contrans_tl.splicing import splice
from data.studies.corpora import fit_corpora
from data.studies.effects import Pair, concept_pairs, load_pair
from data.world import World

CORPORA = ("generic", "mention_5", "neutral")
ESTIMATORS: dict[str, dict[str, Any]] = {
    "ridge": {},
    "ridge, standardised": {"standardise": True},
    "pcr": {"method": "pcr"},
    "reduced rank": {"method": "reduced_rank"},
    "procrustes": {"method": "procrustes"},
    "paper, word ends": {"method": "paper"},
    "paper": {"method": "paper"},
}
STRENGTH = 2.0
Cell = dict[str, float]


def measure(pair: Pair, corpora: dict[str, list[str]]) -> Iterator[tuple[str, str, Cell]]:
    """(estimator, corpus, what was measured) for every target and, where it matters, emotion."""
    texts = read_sentences(demo_data() / "neutral.txt")[UNRELATED : UNRELATED + NEUTRAL]
    emotions = {name: concept for name, concept in pair.concepts.items() if name != "honesty"}
    for corpus in CORPORA:
        rows: dict[str, Any] = {"words": (corpora[corpus], "words"), "last": (cut_short(corpora[corpus]), "last")}
        seen = {kind: collect(pair.source, lines, rows=ends) for kind, (lines, ends) in rows.items()}
        for name, target in pair.targets.items():
            s, t = pair.source.cfg.n_layers - 1, target.cfg.n_layers - 2
            wanted = {kind: collect(target, lines, rows=ends, layers=[t]) for kind, (lines, ends) in rows.items()}
            for estimator, options in ESTIMATORS.items():
                kind = "last" if estimator == "paper" else "words"
                maps = LayerMaps.fit(seen[kind].only([s]), wanted[kind], **options)
                recovered = splice(pair.source, target, maps, texts, layers=[(s, t)]).splices[0].recovered
                yield estimator, corpus, {"R2": float(maps.r2), "splice": recovered["spliced"].value}
                for concept, vector in emotions.items():
                    native, exam = pair.native[name, concept].at(t), pair.exams[name, concept]
                    fits = {"": maps}
                    if maps.method not in UNWEIGHTED:
                        fits["weighted "] = maps.reweighted(vector)
                    for weighting, fit in fits.items():
                        carried = fit.carry(vector.only(s).vectors)[:, 0]
                        carried = carried / carried.norm() * native.norm()
                        cosine = float(torch.cosine_similarity(carried, native[None]))
                        effect = exam.effects(carried, t, STRENGTH)[0]["hits_test"]
                        yield estimator, corpus, {f"{weighting}cosine": cosine, f"{weighting}effect": effect}


def main() -> None:
    parser = argparse.ArgumentParser(description="Every estimator on three fit corpora.")
    parser.add_argument("models", type=Path, nargs="+", help="each with source, target-llama and target-gpt2")
    concepts = concept_pairs()
    corpora = fit_corpora(World(), concepts)
    table: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for folder in parser.parse_args().models:
        for estimator, corpus, cell in measure(load_pair(folder, concepts), corpora):
            for quantity, value in cell.items():
                table[corpus, estimator][quantity].append(value)
    columns = ("R2", "splice", "cosine", "weighted cosine", "effect", "weighted effect")
    print(f"| corpus | estimator | {' | '.join(columns)} |\n|{'---|' * (2 + len(columns))}")
    for (corpus, estimator), cell in table.items():
        shown = (f"{np.mean(cell[column]):.2f}" if column in cell else "-" for column in columns)
        print(f"| {corpus} | {estimator} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
