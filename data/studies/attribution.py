"""How far gradient attribution can be trusted: its rank correlation with true effects, by metric and strength, one gradient
against gradients integrated along the strength, on the targets of the embedded pair with their own vectors.

    python data/studies/attribution.py

Every layer, the 12 foremost positions and the 12 foremost heads of each run are changed one at a time; the transplant whose
effect on the heads is attributed is amid the layers. Prints a table and, of each metric, the cases in which the ranks are least
those of the truth. About a minute of one core.
"""

from collections.abc import Sequence
from itertools import product
from statistics import mean
from time import process_time

import torch

from contrans_tl import ContrastPairs, load_model, refine
from contrans_tl.demo import TARGETS, demo_data
from contrans_tl.diagnostics import Attribution, attribute

CONCEPTS, METRICS, STRENGTHS = ("anger", "happiness"), ("logit_difference", "log_probability", "kl"), (1.0, 4.0)
PROMPTS, STEPS = 8, 6
KINDS = ("layer", "position", "head")


def measure() -> list[Attribution]:
    """Every concept in every target by every metric, strength and number of steps."""
    found = []
    for target, name in product(TARGETS, CONCEPTS):
        model = load_model(demo_data() / "pair" / target, device="cpu")
        pairs = ContrastPairs.load(demo_data() / "concepts" / f"{name}.json")
        concept, middle = refine(model, pairs), model.cfg.n_layers // 2 - 1
        for metric, strength, steps in product(METRICS, STRENGTHS, (1, STEPS)):
            options = {"metric": metric, "strength": strength, "steps": steps, "layer": middle}
            found.append(attribute(model, concept, pairs.test[:PROMPTS], **options))
    return found


def size(found: Attribution) -> float:
    """What all layers together are attributed, over their true effects."""
    layers = [one for one in found.checked if one.kind == "layer"]
    return sum(abs(one.attributed) for one in layers) / sum(abs(one.true) for one in layers)


def table(found: Sequence[Attribution]) -> str:
    lines = ["| metric | strength | gradient | layers | positions | heads | attributed / true, layers |", "| --- " * 7 + "|"]
    for metric, strength, steps in product(METRICS, STRENGTHS, (1, STEPS)):
        some = [one for one in found if (one.metric, one.strength, one.steps) == (metric, strength, steps)]
        ranks = [mean(one.rank_correlation[kind] for one in some) for kind in KINDS]
        lowest = [min(one.rank_correlation[kind] for one in some) for kind in KINDS]
        cells = [f"{value:+.2f} (least {least:+.2f})" for value, least in zip(ranks, lowest, strict=True)]
        how = "at 0" if steps == 1 else f"integrated, {steps}"
        lines.append(f"| {metric} | {strength:g} | {how} | {' | '.join(cells)} | {mean(map(size, some)):.2f} |")
    return "\n".join(lines)


def failures(found: Sequence[Attribution], each: int = 3) -> str:
    """Of each metric the runs and kinds with the lowest rank correlation, with the place that is farthest from the truth."""
    lines = []
    for metric in METRICS:
        cases = [(one.rank_correlation[kind], kind, one) for one in found if one.metric == metric for kind in KINDS]
        for rho, kind, one in sorted(cases, key=lambda case: case[0])[:each]:
            worst = max((c for c in one.checked if c.kind == kind), key=lambda c: abs(c.attributed - c.true))
            values = f"attributed {worst.attributed:+.3g}, true {worst.true:+.3g}"
            lines.append(f"{rho:+.2f} of {kind}s: {one.about}; farthest {worst.place}: {values}")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = measure()
    print(f"{len(runs)} runs, {PROMPTS} prompts each, {process_time():.0f} s of processor time\n")
    print(table(runs), "\n\nWhere it fails\n", failures(runs), sep="\n")
