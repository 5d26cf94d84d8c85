"""What tells, before a transplant, whether the concept will arrive - and between which layers?

    python -m data.studies.prediction MODELS... --out FILE.csv       measures, then prints
    python -m data.studies.prediction --out FILE.csv                 prints what the file holds

MODELS are folders of `data/train_pair.py`, one for each training seed. Every concept, fit corpus and pair of layers, in both
targets. *Effect*: by how many nats the margin of the concept's answer grows on questions of the test split, through
concept-weighted maps, at one strength for all. Nothing that predicts has seen the target's own vectors or answers.
"""

import argparse
import csv
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.activations import collect
from contrans_tl.evaluation import random_like
from contrans_tl.reformulation import LayerMaps
from contrans_tl.solvers import COVERAGE_RIDGE, effective_rows, group_rows
from data.studies.corpora import fit_corpora, shown_to
from data.studies.effects import Pair, concept_pairs, load_pair
from data.studies.fits import WeightedRidge, left_out_changes
from data.world import EMOTIONS, World

STRENGTH = 2.0
"""Where the default weighting has mostly arrived and the uniform one mostly not: hits have room on both sides."""


Row = dict[str, Any]
NAMES = ("seed", "target", "corpus", "concept", "weights")


def measure(pair: Pair, corpora: dict[str, list[str]]) -> Iterator[Row]:
    """A row for every target, corpus, concept, source and target layer: what could have been known, and what happened."""
    for corpus, sentences in corpora.items():
        x = collect(pair.source, sentences, rows="words")
        for name, target in pair.targets.items():
            maps = LayerMaps.fit(x, collect(target, sentences, rows="words"))
            known = Known(maps)
            for concept, v in pair.concepts.items():
                if not shown_to(corpus, concept):
                    continue
                exam, native = pair.exams[name, concept], pair.native[name, concept]
                weighted = maps.reweighted(v)
                assert weighted.weights is not None
                moved, uniform = weighted.carry(v.vectors), maps.carry(v.vectors)
                effects = [
                    exam.effects(torch.cat([moved[:, j], uniform[:, j]]), t, STRENGTH) for j, t in enumerate(maps.target.layers)
                ]
                for i, s in enumerate(maps.source.layers):
                    about = known.of(s, v.at(s), maps.verdict(v, s).presence, weighted.weights[i], moved[i], uniform[i])
                    for j, t in enumerate(maps.target.layers):
                        row = {"seed": pair.seed, "target": name, "corpus": corpus, "concept": concept, "s": s, "t": t}
                        row |= {key: values[j] for key, values in about.items()}
                        for kind, carried in (("weighted", moved), ("uniform", uniform)):
                            row[f"cos_{kind}"] = cosine(carried[i, j], native.at(t))
                        row |= effects[j][i]
                        row |= {f"uniform_{key}": e for key, e in effects[j][len(moved) + i].items()}
                        yield row


class Known:
    """The quantities of one corpus that need no look at the target's own vectors or answers."""

    def __init__(self, maps: LayerMaps):
        self.maps, self.r2, self.cka = maps, maps.r2, maps.cka
        self.groups = group_rows(maps.source.sentence)
        self.y = maps.target.values.flatten(1)
        self.there = {t: WeightedRidge.of(maps.target.at(t), None, COVERAGE_RIDGE) for t in maps.target.layers}

    def of(
        self,
        s: int,
        v: Float[Tensor, " d_source"],
        presence: float,
        weights: Float[Tensor, " row"],
        moved: Float[Tensor, "target_layer d_target"],
        uniform: Float[Tensor, "target_layer d_target"],
    ) -> dict[str, list[float]]:
        """For one source layer and every target layer. `moved` is the vector through the concept-weighted maps."""
        maps, layers = self.maps, self.maps.target.layers
        i, v, rows = maps.source.layers.index(s), v.double(), maps.source.at(s)
        refit = WeightedRidge.of(rows, weights, maps.ridge(s))
        plain = WeightedRidge.of(rows, None, COVERAGE_RIDGE)
        shown, x = plain.dual(v), plain.x
        spread = float(x.norm())
        per_sentence = torch.zeros(len(maps.source.sentence.unique())).double()
        per_sentence.index_add_(0, maps.source.sentence, refit.weights)
        about: dict[str, list[float]] = {
            "r2": self.r2[i].tolist(),
            "cka": self.cka[i].tolist(),
            "coverage": [float((x @ v) @ shown / v.square().sum())] * len(layers),
            "presence": [presence] * len(layers),
            "salience": [float(v.norm() / spread * len(x) ** 0.5)] * len(layers),
            "ess": [float(effective_rows(shown.square())) / len(shown)] * len(layers),
            "ess_sentences": [float(per_sentence.sum() ** 2 / per_sentence.square().sum() / len(per_sentence))] * len(layers),
        }
        changes = left_out_changes(refit, v, refit.prepared(self.y).float(), self.groups)
        for j, t in enumerate(layers):
            y = self.there[t].x
            there = {"uniform": uniform[j].double(), "weighted": moved[j].double()}
            changed = changes[:, j * y.shape[1] : (j + 1) * y.shape[1]]
            more = {
                "wobble": float(changed.norm() / moved[j].norm()),
                "concord": cosine(uniform[j], moved[j]),
                "kick": float(moved[j].norm() / y.norm()) * len(y) ** 0.5,
                "length": float(moved[j].norm() / y.norm() / (v.norm() / spread)),
            }
            for kind, carried in there.items():
                seen = self.there[t].dual(carried)
                more[f"cycle_{kind}"] = cosine(x.T @ seen, v)
                more[f"agreement_{kind}"] = cosine(seen, shown)
                more[f"coverage_there_{kind}"] = float((y @ carried) @ seen / carried.square().sum())
            for key, value in more.items():
                about.setdefault(key, []).append(value)
        depth = [(t + 1) / maps.target.model.n_layers for t in layers]
        here = (s + 1) / maps.source.model.n_layers
        return about | {"depth_t": depth, "depth_s": [here] * len(layers), "depth_gap": [abs(d - here) for d in depth]}


def nulls(pair: Pair, corpus: Sequence[str]) -> Iterator[Row]:
    """Vectors that are not the concept, with the norm of the target's own: random ones, other concepts', and the concept
    through maps fitted on shuffled rows."""
    x = collect(pair.source, corpus, rows="words")
    for name, target in pair.targets.items():
        maps = LayerMaps.fit(x, collect(target, corpus, rows="words"))
        shuffled = maps.shuffled(seed=0)
        for concept, v in pair.concepts.items():
            native = pair.native[name, concept]
            others = [other for other in pair.concepts if other != concept]
            wrong = shuffled.reweighted(v).carry(v.vectors)
            for j, t in enumerate(maps.target.layers):
                own = native.at(t)
                vectors = {"native": own, "sign_flipped": -own}
                vectors |= {f"random {k}": r.at(t) for k, r in enumerate(random_like(native, 3, seed=7))}
                vectors |= {f"other {o}": pair.native[name, o].at(t) for o in others[:3]}
                vectors |= {f"shuffled {s}": wrong[i, j] for i, s in enumerate(maps.source.layers) if i >= 2}
                same_norm = torch.stack([vector * own.norm() / vector.norm() for vector in vectors.values()])
                for arm, effect in zip(vectors, pair.exams[name, concept].effects(same_norm, t, STRENGTH), strict=True):
                    yield {"seed": pair.seed, "target": name, "corpus": arm, "concept": concept, "s": -1, "t": t} | effect


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-30))


def write(rows: Sequence[Row], file: Path) -> None:
    """A CSV of six digits; a column for every key that occurs."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read(file: Path) -> list[Row]:
    """What `write` wrote, numbers as numbers."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [
            {key: value if key in NAMES else float(value) for key, value in row.items() if value}
            for row in csv.DictReader(lines)
        ]


# --- tables ---------------------------------------------------------------------------------------------------------

QUANTITIES: dict[str, Callable[[Row], float]] = {
    "held-out R2": lambda r: r["r2"],
    "CKA": lambda r: r["cka"],
    "coverage": lambda r: r["coverage"],
    "few rows show it: 1 / effective share": lambda r: 1 / r["ess"],
    "**presence**": lambda r: r["presence"],
    "cycle cosine": lambda r: r["cycle_uniform"],
    "-log(1 - coverage) x cycle": lambda r: -np.log(1 - r["coverage"]) * r["cycle_uniform"],
    "coverage x R2": lambda r: r["coverage"] * r["r2"],
    "stability over sentences": lambda r: -r["wobble"],
    "uniform and weighted agree (cosine)": lambda r: r["concord"],
    "same rows show it on both sides": lambda r: r["agreement_uniform"],
    "kick: length over the target's spread": lambda r: r["kick"],
    "R2 x kick": lambda r: r["r2"] * r["kick"],
}
"""Higher is better, were they predictors."""
RICH, POOR = ("generic", "diary", "mention_20"), ("mention_5", "events", "nouns")
ARRIVED = 0.5
"""Share of test questions answered with the concept, at strength 2, from which a concept counts as arrived. The nulls stay at
0.1 or below for emotions; the target's own vector is at or near 1."""


def cluster(row: Row) -> tuple[str, str, str]:
    return row["seed"], row["target"], row["concept"]


def is_emotion(row: Row) -> bool:
    return row["concept"] != "honesty"


def grouped(rows: Sequence[Row], key: Callable[[Row], tuple], keep: Callable[[Row], bool]) -> list[list[Row]]:
    """Rows that share seed, target, concept and key."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if keep(row):
            groups[(*cluster(row), *key(row))].append(row)
    return list(groups.values())


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (x, y))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 0 else np.nan


def ranks(values: Sequence[float]) -> np.ndarray:
    """From 0; equals share their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def auroc(x: Sequence[float], positive: Sequence[bool]) -> float:
    """Chance that a positive one lies above a negative one."""
    yes, r = np.asarray(positive), ranks(x)
    n = yes.sum()
    return float((r[yes].sum() - n * (n - 1) / 2) / (n * (len(yes) - n))) if 0 < n < len(yes) else np.nan


def over_clusters(groups: Sequence[list[Row]], value: Callable[[list[Row]], float]) -> str:
    """Mean over clusters (seed, target, concept) of the groups' values, with its 95% bootstrap interval over clusters."""
    each: dict[tuple, list[float]] = defaultdict(list)
    for group in groups:
        if not np.isnan(x := value(group)):
            each[cluster(group[0])].append(x)
    means = np.array([np.mean(values) for values in each.values()])
    picked = np.random.default_rng(0).integers(len(means), size=(2000, len(means)))
    low, high = np.percentile(means[picked].mean(1), [2.5, 97.5])
    return f"{means.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def best_targets(rows: Sequence[Row]) -> dict[tuple[str, str, str], float]:
    """Where the target's own vector acts most, by the select split: (seed, target, concept) -> layer."""
    native = [row for row in rows if row["corpus"] == "native"]
    return {
        key: max((r for r in native if cluster(r) == key), key=lambda r: r["gain_select"])["t"] for key in map(cluster, native)
    }


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]) + "\n"


def prediction_table(rows: Sequence[Row]) -> str:
    """Rank correlations across corpora, at the upper source layers and where the target's own vector acts most; across pairs of
    layers, of the corpora that show the concepts; and how well a quantity tells what arrives."""
    carried, upper = [row for row in rows if row["s"] >= 0], at_upper_layers(rows)
    corpora = grouped(upper, lambda r: (r["s"],), is_emotion)
    layers = grouped(carried, lambda r: (r["corpus"],), lambda r: is_emotion(r) and r["corpus"] in RICH)
    honest = grouped(upper, lambda r: (r["s"],), lambda r: not is_emotion(r))
    judged = [r for r in upper if is_emotion(r)]
    lines = []
    for name, quantity in QUANTITIES.items():

        def with_(outcome: str, quantity: Callable[[Row], float] = quantity) -> Callable[[list[Row]], float]:
            return lambda group: spearman([quantity(r) for r in group], [r[outcome] for r in group])

        area = auroc([quantity(r) for r in judged], [r["hits_test"] >= ARRIVED for r in judged])
        cells = [over_clusters(corpora, with_("gain_test")), over_clusters(corpora, with_("cos_weighted")), f"{area:.2f}"]
        cells += [over_clusters(layers, with_("gain_test")), over_clusters(honest, with_("cos_weighted"))]
        lines.append([name, *cells])
    header = [
        "quantity",
        "corpora: effect",
        "corpora: cosine to native",
        "arrives? AUROC",
        "layer pairs: effect",
        "honesty, corpora: cosine",
    ]
    return table(header, lines)


RULES: dict[str, Callable[[Row], tuple | float]] = {
    "relative depth": lambda r: (-r["depth_gap"], r["depth_s"]),
    "held-out R2": lambda r: r["r2"],
    "CKA": lambda r: r["cka"],
    "coverage": lambda r: r["coverage"],
    "presence": lambda r: (r["presence"], r["r2"]),
    "cycle cosine": lambda r: r["cycle_uniform"],
    "kick": lambda r: r["kick"],
    "R2 x kick": lambda r: r["r2"] * r["kick"],
    "R2 x presence": lambda r: r["r2"] * r["presence"],
    "three quarters of the depth": lambda r: -abs(r["depth_s"] - 0.75) - abs(r["depth_t"] - 0.75),
    "last source layer, target by kick x cycle": lambda r: (r["depth_s"], r["kick"] * r["cycle_weighted"]),
    "last layers": lambda r: r["depth_s"] + r["depth_t"],
    "select questions (needs answers)": lambda r: r["gain_select"],
}


def layer_table(rows: Sequence[Row]) -> str:
    """The effect at the layers that each rule chooses, as a share of the effect at the best ones: of both layers, and of the
    source layer alone for each target layer at which the target's own vector has half of its best effect or more."""
    carried = [row for row in rows if row["s"] >= 0]
    own: dict[tuple, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["corpus"] == "native":
            own[cluster(row)][row["t"]] = row["gain_select"]
    acts = {(*key, t) for key, effects in own.items() for t, effect in effects.items() if effect >= 0.5 * max(effects.values())}
    sets: dict[str, Callable[[Row], bool]] = {
        "emotions": lambda r: is_emotion(r) and r["corpus"] in RICH,
        "emotions, poor corpora": lambda r: is_emotion(r) and r["corpus"] in POOR,
        "honesty": lambda r: not is_emotion(r) and r["corpus"] in ("generic", "speakers", "mention_20"),
    }
    groups = {}
    for name, keep in sets.items():
        groups[f"both layers: {name}"] = grouped(carried, lambda r: (r["corpus"],), keep)
    for name, keep in sets.items():
        some = [row for row in carried if (*cluster(row), row["t"]) in acts]
        groups[f"source layer: {name}"] = grouped(some, lambda r: (r["corpus"], r["t"]), keep)
    most = {name: np.mean([max(r["gain_test"] for r in group) for group in some]) for name, some in groups.items()}
    lines = []
    for rule, score in RULES.items():
        shares = [np.mean([max(g, key=score)["gain_test"] for g in some]) / most[name] for name, some in groups.items()]
        lines.append([rule, *(f"{share:.2f}" for share in shares)])
    return table(["rule", *groups], lines)


def verdict_table(rows: Sequence[Row]) -> str:
    """What two thresholds say of a concept's test questions that the select questions of the other emotions have set, and how
    often one threshold is right."""
    judged = at_upper_layers(rows)
    lines = []
    for name, quantity in QUANTITIES.items():
        said: dict[str, list[bool]] = {"will arrive": [], "doubtful": [], "will not": []}
        right = []
        for concept in EMOTIONS:
            others = [(quantity(r), r["hits_select"] >= ARRIVED) for r in judged if r["concept"] not in (concept, "honesty")]
            low, middle, high = thresholds(others)
            for r in (r for r in judged if r["concept"] == concept):
                arrived, x = r["hits_test"] >= ARRIVED, quantity(r)
                said["will arrive" if x >= high else "will not" if x < low else "doubtful"].append(arrived)
                right.append((x >= middle) == arrived)
        lines.append([name, *(f"{sum(some)} of {len(some)}" for some in said.values()), f"{np.mean(right):.2f}"])
    emotions = [r["hits_test"] >= ARRIVED for r in judged if r["concept"] != "honesty"]
    lines.append(["always the same", "", "", "", f"{max(np.mean(emotions), 1 - np.mean(emotions)):.2f}"])
    return table(["quantity", *(f"arrived, said: {what}" for what in said), "right with one threshold"], lines)


def presence_table(rows: Sequence[Row]) -> str:
    """What came of the concepts, by presence."""
    judged, steps = at_upper_layers(rows), (0, 0.03, 0.05, 0.07, 0.09, 0.12, 0.15, 1)
    lines = []
    for low, high in pairwise(steps):
        some = [r for r in judged if low <= r["presence"] < high]
        emotions, honesty = ([r for r in some if (r["concept"] == "honesty") == which] for which in (False, True))
        arrived = f"{sum(r['hits_test'] >= ARRIVED for r in emotions)} of {len(emotions)}"
        cosines = [f"{np.mean([r['cos_weighted'] for r in each]):.2f}" if each else "" for each in (emotions, honesty)]
        lines.append([f"{low} to {high}", arrived, *cosines, str(len(honesty))])
    return table(["presence", "emotions arrived", "cosine to native", "honesty: cosine to native", "cases"], lines)


FEATURES: dict[str, Callable[[Row], float]] = {
    "presence": lambda r: np.log(r["presence"]),
    "R2": lambda r: -np.log(1 - r["r2"]),
    "kick": lambda r: np.log(r["kick"]),
    "cycle": lambda r: r["cycle_uniform"],
    "stability": lambda r: -np.log(r["wobble"]),
    "depths": lambda r: r["depth_s"] + r["depth_t"],
}


def combination_table(rows: Sequence[Row]) -> str:
    """Linear combinations fitted to the select effect of the other emotions, as they rank the test effects of the one left
    out: over all corpora and layers, and over corpora or layers alone."""
    carried = [row for row in rows if row["s"] >= 0 and is_emotion(row)]
    lines = []
    for names in (["presence"], ["R2"], ["presence", "R2"], ["presence", "R2", "kick"], list(FEATURES)):
        x = np.array([[FEATURES[name](row) for name in names] + [1.0] for row in carried])
        y = np.array([row["gain_select"] for row in carried])
        for concept in EMOTIONS:
            out = np.array([row["concept"] == concept for row in carried])
            fitted = x[out] @ np.linalg.lstsq(x[~out], y[~out], rcond=None)[0]
            for row, value in zip((r for r in carried if r["concept"] == concept), fitted, strict=True):
                row["fitted"] = float(value)

        def rank(group: list[Row]) -> float:
            return spearman([r["fitted"] for r in group], [r["gain_test"] for r in group])

        corpora = grouped(at_upper_layers([*carried, *(r for r in rows if r["s"] < 0)]), lambda r: (r["s"],), is_emotion)
        layers = grouped(carried, lambda r: (r["corpus"],), lambda r: r["corpus"] in RICH)
        everything = grouped(carried, lambda r: (), is_emotion)
        lines.append([" + ".join(names), *(over_clusters(groups, rank) for groups in (everything, corpora, layers))])
    return table(["fitted on other emotions", "corpora and layers", "corpora", "layer pairs"], lines)


def at_upper_layers(rows: Sequence[Row]) -> list[Row]:
    """From the upper half of the source to where the target's own vector acts most."""
    at = best_targets(rows)
    return [r for r in rows if r["s"] >= 2 and r["t"] == at[cluster(r)]]


def thresholds(cases: Sequence[tuple[float, bool]]) -> tuple[float, float, float]:
    """The highest value below which at most one case in twenty arrived, the one with the fewest errors, and the lowest value
    above which at most one in twenty did not."""
    values, arrived = (np.array(side) for side in zip(*sorted(cases), strict=True))
    below = np.cumsum(arrived) / np.arange(1, len(arrived) + 1)
    above = (np.cumsum(arrived[::-1]) / np.arange(1, len(arrived) + 1))[::-1]
    errors = np.cumsum(arrived) - arrived + np.cumsum(~arrived[::-1])[::-1]
    low = np.flatnonzero(below <= 0.05).max(initial=0)
    high = np.flatnonzero(above >= 0.95).min(initial=len(arrived) - 1)
    return values[low], values[errors.argmin()], values[high]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="each with source, target-llama and target-gpt2")
    parser.add_argument("--out", type=Path, required=True, help="CSV of the measurements")
    arguments = parser.parse_args()
    concepts = concept_pairs()
    corpora = fit_corpora(World(), concepts) if arguments.folders else {}
    rows: list[Row] = []
    for folder in arguments.folders:
        start = time.process_time()
        pair = load_pair(folder, concepts)
        rows += [*measure(pair, corpora), *nulls(pair, corpora["generic"])]
        print(f"{folder}: {time.process_time() - start:.0f} s", file=sys.stderr)
        write(rows, arguments.out)
    measured = read(arguments.out)
    for title, made in (
        ("What predicts", prediction_table),
        ("Which layers", layer_table),
        ("A verdict on a concept left out", verdict_table),
        ("By presence", presence_table),
        ("Combinations", combination_table),
    ):
        print(f"{title}\n\n{made(measured)}")
