"""By what should the rows be weighted when a map is fitted for one concept, and why does it help?

    python -m data.studies.weighting MODELS... --out FOLDER      measures, then prints
    python -m data.studies.weighting --out FOLDER                prints what the folder holds

`shown` is s_i = (x_i - mean)^T (X^T X + lambda I)^-1 v, what a row says about the concept; the library's default weighs rows
by s_i^2. Target layer: where the target's own vector acts most on the select split. Source layer: the last, which held-out R2
chooses.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.activations import collect
from contrans_tl.reformulation import LayerMaps
from contrans_tl.solvers import COVERAGE_RIDGE, group_rows
from data.studies.corpora import fit_corpora
from data.studies.effects import Pair, concept_pairs, load_pair
from data.studies.fits import WeightedRidge, left_out_changes
from data.studies.prediction import STRENGTH, Row, cluster, cosine, grouped, over_clusters, read, table, write
from data.world import World

CORPORA = ("generic", "mention_5", "diary", "neutral")
SOURCE_LAYERS = (3,)
Weights = Float[Tensor, " row"]


def variants(
    rows: Float[Tensor, "row d_source"], v: Float[Tensor, " d_source"], others: list[Float[Tensor, " d_source"]]
) -> dict[str, Weights]:
    """Every weighting of the rows. `others`: the vectors of all concepts of its kind, its own among them."""
    plain = WeightedRidge.of(rows, None, COVERAGE_RIDGE)
    signed = plain.dual(v)
    s = signed.abs()
    square = s**2 / (s**2).mean()
    ones = torch.ones_like(s)
    made = {"uniform": ones}
    made |= {f"s^{p:g}": s**p for p in (0.5, 1, 2, 3, 4)}
    each = [plain.dual(other) ** 2 for other in others]
    made["pooled s^2"] = torch.stack([w / w.mean() for w in each]).sum(0)
    again = square
    for turn in ("second", "third"):
        fit = WeightedRidge.of(rows, again, COVERAGE_RIDGE)
        again = (fit.dual(v) / fit.weights.sqrt().clamp_min(1e-12)) ** 2
        made[f"s^2, {turn} round"] = again
    made |= {f"s^2, s at most its {q}th percentile": s.clamp(max=s.quantile(q / 100)) ** 2 for q in (95, 99)}
    made["s^2 / (s^2 + median)"] = s**2 / (s**2 + (s**2).median())
    made |= {f"{a:.0%} s^2, rest uniform": a * square + (1 - a) * ones for a in (0.25, 0.5, 0.75)}
    made["s^2 where s > 0"] = signed.clamp(min=0) ** 2
    made["s^2 where s < 0"] = signed.clamp(max=0) ** 2
    made["leverage"] = (plain.x * plain.solve(plain.x.T).T).sum(1)
    generator = torch.Generator().manual_seed(3)
    made["random direction"] = plain.dual(torch.randn(len(v), generator=generator)) ** 2
    made["projection on v, squared"] = (plain.x @ v.double()) ** 2
    top = s > s.quantile(0.8)
    made["top 20% by s, uniform"] = top.double()
    made["other 80%, uniform"] = (~top).double()
    made["random 20%, uniform"] = (torch.rand(len(s), generator=generator) < 0.2).double()
    return made


def measure(pair: Pair, corpora: dict[str, list[str]]) -> Iterator[Row]:
    """A row for every target, corpus, concept, source layer and weighting."""
    places = {key: best_layer(pair, *key) for key in pair.exams}
    for corpus in CORPORA:
        x = collect(pair.source, corpora[corpus], rows="words", layers=SOURCE_LAYERS)
        for name, target in pair.targets.items():
            maps = LayerMaps.fit(x, collect(target, corpora[corpus], rows="words"))
            for concept, v in pair.concepts.items():
                t, kin = places[name, concept], [c for c in pair.concepts if (c == "honesty") == (concept == "honesty")]
                own = pair.native[name, concept].at(t)
                about, vectors = [], []
                for s in SOURCE_LAYERS:
                    rows, y = maps.source.at(s), maps.target.at(t).double()
                    ridges = {
                        label: (weights, maps.ridge(s))
                        for label, weights in variants(rows, v.at(s), [pair.concepts[c].at(s) for c in kin]).items()
                    }
                    for label in ("s^2", "50% s^2, rest uniform", "pooled s^2"):
                        again = chosen_again(maps, s, t, ridges[label][0])
                        ridges[f"{label}, ridge chosen again"] = (ridges[label][0], again)
                    for label, (weights, ridge) in ridges.items():
                        fit = WeightedRidge.of(rows, weights, ridge)
                        moved = fit.prepared(y).T @ fit.dual(v.at(s))
                        vectors.append(moved.float())
                        size = float(weights.sum() ** 2 / weights.square().sum())
                        sentences = torch.zeros(int(maps.source.sentence.max()) + 1).double()
                        sentences.index_add_(0, maps.source.sentence, weights.double())
                        size_sentences = float(sentences.sum() ** 2 / sentences.square().sum())
                        row = {"seed": pair.seed, "target": name, "corpus": corpus, "concept": concept, "s": s, "t": t}
                        row |= {"weights": label, "rows": size, "sentences": size_sentences, "cosine": cosine(moved, own)}
                        about.append(row | {"norm": float(moved.norm() / own.norm()), "ridge": ridge})
                stacked, exam = torch.stack(vectors), pair.exams[name, concept]
                unit = stacked * (own.norm() / stacked.norm(dim=1))[:, None]
                effects = exam.effects(torch.cat([stacked, unit]), t, STRENGTH)
                for row, effect, direction in zip(about, effects, effects[len(about) :], strict=False):
                    yield row | effect | {f"direction_{key}": value for key, value in direction.items()}


def best_layer(pair: Pair, target: str, concept: str) -> int:
    """Where the target's own vector moves the margin of the select questions most."""
    native, exam = pair.native[target, concept], pair.exams[target, concept]
    return max(native.layers, key=lambda t: exam.effects(native.at(t)[None], t, 1.0)[0]["gain_select"])


def chosen_again(maps: LayerMaps, s: int, t: int, weights: Weights) -> float:
    """The ridge that leave-one-sentence-out chooses for weighted rows."""
    some = maps.only([s], [t])
    return replace(some, weights=(weights / weights.mean()).float()[None], fixed_ridge=None, _memo={}).ridge(s)


WORLDS = ("one map, residuals exchanged", "one map, residuals' signs by lot", "two maps, residuals exchanged", "as it is")


def why(pair: Pair, corpus: list[str]) -> Iterator[Row]:
    """Does the weighting help where the world is linear? The source's rows are real; the target's are made of

    - one map (the concept-weighted one) and its residuals, exchanged between rows: nothing depends on the row any more;
    - the same map and its residuals, the sign of every sentence by lot: how large they are still depends on the row;
    - two maps: the twentieth of the rows that shows the concept most follows the first, the others one fitted on them alone;
    - or are as they are.

    In all but the last it is known what the carried vector should be; there the target's own vector stands for it.
    """
    x = collect(pair.source, corpus, rows="words", layers=SOURCE_LAYERS)
    for name, target in pair.targets.items():
        maps = LayerMaps.fit(x, collect(target, corpus, rows="words", layers=[target.cfg.n_layers - 1]))
        [t], sentence, groups = maps.target.layers, maps.source.sentence, group_rows(maps.source.sentence)
        g = torch.Generator().manual_seed(11)
        order = torch.randperm(len(sentence), generator=g)
        signs = (torch.randint(0, 2, (int(sentence.max()) + 1,), generator=g) * 2 - 1)[sentence].double()[:, None]
        for concept, v in pair.concepts.items():
            for s in SOURCE_LAYERS:
                rows, ridge, y = maps.source.at(s), maps.ridge(s), maps.target.at(t).double()
                signed = WeightedRidge.of(rows, None, COVERAGE_RIDGE).dual(v.at(s))
                shows = signed.abs() > signed.abs().quantile(0.95)
                fits = {"uniform": WeightedRidge.of(rows, None, ridge), "weighted": WeightedRidge.of(rows, signed**2, ridge)}
                duals = {kind: fit.dual(v.at(s)) for kind, fit in fits.items()}
                first, second = fits["weighted"], WeightedRidge.of(rows, (~shows).double(), ridge)
                linear = predicted(first, rows, y)
                residual = y - linear
                made = {
                    WORLDS[0]: linear + residual[order],
                    WORLDS[1]: linear + residual * signs,
                    WORLDS[2]: torch.where(shows[:, None], linear, predicted(second, rows, y)) + residual[order],
                    WORLDS[3]: y,
                }
                own = pair.native[name, concept].at(t).double()
                planted = first.prepared(y).T @ duals["weighted"]
                row = {"seed": pair.seed, "target": name, "concept": concept, "s": s}
                for world, rows_there in made.items():
                    truth = own if world == WORLDS[3] else planted
                    for kind, fit in fits.items():
                        row[f"{world}: {kind}"] = cosine(fit.prepared(rows_there).T @ duals[kind], truth)
                real = {kind: fit.prepared(y).T @ duals[kind] for kind, fit in fits.items()}
                changes = {kind: left_out_changes(fit, v.at(s), fit.prepared(y), groups) for kind, fit in fits.items()}
                row["difference"] = float((real["weighted"] - real["uniform"]).norm() / real["weighted"].norm())
                row["its standard error"] = float((changes["weighted"] - changes["uniform"]).norm() / real["weighted"].norm())
                # what the uniform map leaves along the concept, by how much of it a row holds, in units of the native vector
                times = signed / (v.at(s).double() @ fits["uniform"].solve(v.at(s)[:, None])[:, 0])
                left = (y - predicted(fits["uniform"], rows, y)) @ own / own.square().sum()
                for where, here in (("that show it", shows), ("that do not", ~shows)):
                    row[f"left in rows {where}"] = float(times[here] @ left[here] / times[here].square().sum())
                yield row


def predicted(
    fit: WeightedRidge, rows: Float[Tensor, "row d_source"], y: Float[Tensor, "row d_target"]
) -> Float[Tensor, "row d_target"]:
    """W x + b for every row."""
    weight = fit.solve(fit.x.T @ fit.prepared(y))
    x_mean, y_mean = (fit.weights @ side.double() / fit.weights.sum() for side in (rows, y))
    return (rows.double() - x_mean) @ weight + y_mean


def key(row: Row) -> tuple:
    return (*cluster(row), row["corpus"], row["s"])


def weighting_table(rows: Sequence[Row]) -> str:
    """Means over emotions, targets, seeds and all corpora but the neutral one, ordered by the select questions. Effects are at
    the native vector's length, so that only the direction counts; against s^2 they are those of the test questions."""
    shown = [row for row in rows if row["corpus"] != "neutral"]
    emotions = [row for row in shown if row["concept"] != "honesty"]
    honesty = [row for row in shown if row["concept"] == "honesty"]

    def mean(some: Sequence[Row], weights: str, key: str, corpus: str | None = None) -> float:
        return float(np.mean([r[key] for r in some if r["weights"] == weights and corpus in (None, r["corpus"])]))

    places = {key(row): row["direction_gain_test"] for row in emotions if row["weights"] == "s^2"}

    def against(weights: str) -> str:
        some = [row for row in emotions if row["weights"] == weights]
        by_cluster = grouped(some, lambda r: (), lambda r: True)
        return over_clusters(
            by_cluster, lambda group: float(np.mean([r["direction_gain_test"] - places[key(r)] for r in group]))
        )

    def line(weights: str) -> list[str]:
        cells = [f"{mean(emotions, weights, 'rows'):.0f}, {mean(emotions, weights, 'sentences'):.0f}"]
        cells += [f"{mean(emotions, weights, 'cosine', corpus):.2f}" for corpus in CORPORA if corpus != "neutral"]
        cells += [f"{mean(rows_neutral, weights, 'cosine'):.2f}", f"{mean(emotions, weights, 'norm'):.2f}"]
        cells += [
            f"{mean(emotions, weights, 'direction_gain_select'):.2f}",
            f"{mean(emotions, weights, 'direction_gain_test'):.2f}",
        ]
        cells += [against(weights), f"{mean(emotions, weights, 'hits_test'):.2f}"]
        return [weights, *cells, f"{mean(honesty, weights, 'cosine'):.2f}"]

    rows_neutral = [row for row in rows if row["corpus"] == "neutral" and row["concept"] != "honesty"]
    names = sorted({row["weights"] for row in rows}, key=lambda name: -mean(emotions, name, "direction_gain_select"))
    header = ["weights", "effective rows, sentences", *(f"cosine, {corpus}" for corpus in CORPORA), "length / native"]
    header += ["effect, select", "effect, test", "against s^2", "hits", "honesty: cosine"]
    return table(header, [line(name) for name in names])


def why_table(reasons: Sequence[Row]) -> str:
    """Cosine of the carried vector to what it should be, uniform and weighted, in worlds of known and of unknown truth."""

    def mean(key: str, some: Sequence[Row]) -> float:
        return float(np.mean([row[key] for row in some]))

    emotions = [row for row in reasons if row["concept"] != "honesty"]
    lines = [[world, *(f"{mean(f'{world}: {kind}', emotions):.2f}" for kind in ("uniform", "weighted"))] for world in WORLDS]
    said = [key for key in emotions[0] if key.startswith(("difference", "its standard", "left"))]
    return (
        table(["world", "uniform", "weighted"], lines) + "\n" + "; ".join(f"{k}: {mean(k, emotions):.2f}" for k in said) + "\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="each with source, target-llama and target-gpt2")
    parser.add_argument("--out", type=Path, required=True, help="folder for weighting.csv and why.csv")
    arguments = parser.parse_args()
    concepts = concept_pairs()
    corpora = fit_corpora(World(), concepts) if arguments.folders else {}
    rows: list[Row] = []
    reasons: list[Row] = []
    for folder in arguments.folders:
        start = time.process_time()
        pair = load_pair(folder, concepts)
        rows += measure(pair, corpora)
        reasons += why(pair, corpora["generic"])
        print(f"{folder}: {time.process_time() - start:.0f} s", file=sys.stderr)
        arguments.out.mkdir(parents=True, exist_ok=True)
        write(rows, arguments.out / "weighting.csv")
        write(reasons, arguments.out / "why.csv")
    print(f"Weighting\n\n{weighting_table(read(arguments.out / 'weighting.csv'))}")
    print(f"Why\n\n{why_table(read(arguments.out / 'why.csv'))}")
