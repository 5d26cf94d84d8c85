"""The paper's experiments (arXiv 2405.13578), each a function from models, concepts and a setup to a table.

All rest on `run_experiment`: strength (unless the experiment is about it) and, with `depth=None`, layers are chosen on the
select split; what is shown is the test split, and every claimed transfer has its nulls. Two concepts at once are in
`together`, token shifts in `shifts`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np

from contrans_tl.data import ContrastPairs
from contrans_tl.evaluation import Estimate, Rivals, Task, TransferReport, difference
from contrans_tl.formats import persona_pairs
from contrans_tl.recipes.results import RecipeResult, arm_rows, transfer_row
from contrans_tl.recipes.setup import ModelOrName, Models, Setup


def emotions(
    source: ModelOrName,
    targets: Models,
    concepts: Sequence[ContrastPairs],
    setup: Setup,
    *,
    strengths: Sequence[float] = (1.0, 2.0, 5.0),
) -> RecipeResult:
    """Fig. 2: token and logit accuracy of each emotion on prompts of the other emotions, at each strength, whatever it costs,
    with the controls of that strength. With `depth=None` the layers are chosen for each strength."""
    # One setting: nothing is left to choose within the budget.
    free, model = replace(setup, search=replace(setup.search, keep=1)), setup.open(source)
    rows, reports = [], {}
    for name, target in setup.opened(targets):
        for strength in strengths:
            for concept, transfer in free.carry(model, target, concepts, strengths=(strength,)).items():
                report = transfer.report
                logits = {
                    f"{arm} logit accuracy": report.arms[arm]["logit_accuracy"]
                    for arm in ("base", "transplanted")
                    if "logit_accuracy" in report.arms[arm]
                }
                rows.append(transfer_row({"target": name, "emotion": concept}, report, more=logits))
                reports[f"{concept} into {name} at {strength:g}"] = report
    notes = (setup.note, "Each strength as given: no budget.")
    return RecipeResult("emotions", "ConTrans, Fig. 2", tuple(rows), notes, reports)


def truthfulness(
    source: ModelOrName,
    targets: Models,
    refined_on: Mapping[str, ContrastPairs],
    setup: Setup,
    *,
    rivals: Mapping[str, Rivals] | None = None,
    allow_overlap: bool = False,
) -> RecipeResult:
    """Tables 1 and 10: MC1 and MC2 of honesty beside the paper's other ways to align.

    Args:
        refined_on: what the concept was refined on -> pairs with the same questions. Pairs refined on the questions themselves
            (`on_the_questions`), as in the paper's Table 1, need `allow_overlap` and are marked in-sample; its Table 10 has
            other facts.
        rivals: {target: what is given for it}: `instruction`, `aligned` and `proxy` are Inst-Align, Align-Training and EFT.
            Self-Align is `native`, among the setup's arms.
    """
    model, metrics = setup.open(source), ("mc1", "mc2")
    rows, reports = [], {}
    for name, target in setup.opened(targets):
        beside = (rivals or {}).get(name, Rivals())
        for place, pairs in refined_on.items():
            [transfer] = setup.carry(model, target, [pairs], rivals=beside, allow_overlap=allow_overlap).values()
            report = transfer.report
            labels = {"target": name, "refined on": place + (" (in-sample)" if report.in_sample else "")}
            rows += arm_rows(labels, report, metrics)
            reports[f"{place}, into {name}"] = report
    return RecipeResult("truthfulness", "ConTrans, Tables 1 and 10", tuple(rows), (setup.note, *_said(reports)), reports)


def on_the_questions(pairs: ContrastPairs, prompts: Iterable[str], positive: str, negative: str) -> ContrastPairs:
    """The same questions, with the concept refined on them: the paper's honesty, which is transductive.

    Args:
        prompts: the questions as the personas are to be asked them.
        positive: a template with {prompt}, as of `persona_pairs`.
        negative: likewise.
    """
    personas = persona_pairs(pairs.name, prompts, positive, negative)
    return replace(pairs, positive=personas.positive, negative=personas.negative)


def toxicity(
    source: ModelOrName,
    targets: Models,
    pairs: ContrastPairs,
    task: Task,
    setup: Setup,
    *,
    rivals: Mapping[str, Rivals] | None = None,
) -> RecipeResult:
    """Table 2: how often continuations are toxic, and what the transplant costs on neutral text, beside other ways to align.

    The cost is the increase of the loss in nats a token, the logarithm of the ratio of the paper's perplexities.

    Args:
        rivals: as of `truthfulness`.
    """
    model, rows, reports = setup.open(source), [], {}
    for name, target in setup.opened(targets):
        beside = (rivals or {}).get(name, Rivals())
        [transfer] = setup.carry(model, target, [pairs], tasks={pairs.name: task}, rivals=beside).values()
        rows += arm_rows({"target": name}, transfer.report, (task.metric,))
        reports[f"{pairs.name} into {name}"] = transfer.report
    return RecipeResult("toxicity", "ConTrans, Table 2", tuple(rows), (setup.note, *_said(reports)), reports)


def alignment(
    base: ModelOrName, aligned: ModelOrName, targets: Models, concepts: Sequence[ContrastPairs], setup: Setup
) -> RecipeResult:
    """Table 4: the concept of a source before and after its alignment, into the same targets."""
    result = _grid([base, aligned], targets, concepts, setup, against_first=True)
    return replace(result, recipe="alignment", source="ConTrans, Table 4")


def families(sources: Models, targets: Models, concepts: Sequence[ContrastPairs], setup: Setup) -> RecipeResult:
    """Table 3: sources of several families into one target; what each has over the first."""
    result = _grid(sources, targets, concepts, setup, against_first=True)
    return replace(result, recipe="families", source="ConTrans, Table 3")


def checkpoints(source: ModelOrName, targets: Models, concepts: Sequence[ContrastPairs], setup: Setup) -> RecipeResult:
    """Fig. 3: one source into a target as it was at several times of its training. The base column has the false positives."""
    return replace(_grid([source], targets, concepts, setup), recipe="checkpoints", source="ConTrans, Fig. 3")


def sizes(sources: Models, targets: Models, concepts: Sequence[ContrastPairs], setup: Setup) -> RecipeResult:
    """Fig. 4: models of several sizes into models of several sizes."""
    return replace(_grid(sources, targets, concepts, setup), recipe="sizes", source="ConTrans, Fig. 4")


def _grid(
    sources: Models, targets: Models, concepts: Sequence[ContrastPairs], setup: Setup, *, against_first: bool = False
) -> RecipeResult:
    """A row for every source, target and concept."""
    rows, reports = [], {}
    first: dict[tuple[str, str], TransferReport] = {}
    for source_name, source in setup.opened(sources):
        for target_name, target in setup.opened(targets):
            for concept, transfer in setup.carry(source, target, concepts).items():
                report = transfer.report
                known = first.setdefault((target_name, concept), report)
                more = {"over the first": _gain(report, known)} if against_first and known is not report else {}
                labels = {"source": source_name, "target": target_name, "concept": concept}
                rows.append(transfer_row(labels, report, more=more))
                reports[f"{concept} from {source_name} into {target_name}"] = report
    return RecipeResult("", "", tuple(rows), (setup.note,), reports)


def _gain(report: TransferReport, other: TransferReport) -> Estimate:
    """Transplanted here less transplanted there, paired by prompt, in the direction that is wanted."""
    sign = 1.0 if report.wanted == "higher" else -1.0
    here, there = (sign * np.array(one.items["transplanted"]) for one in (report, other))
    return difference(here, there[None])


def number_of_pairs(
    source: ModelOrName,
    targets: Models,
    pairs: ContrastPairs,
    setup: Setup,
    *,
    numbers: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
) -> RecipeResult:
    """Fig. 5: the concept refined on fewer prompts of each side. Beside the numbers, all there are."""
    every = max(len(pairs.positive), len(pairs.negative))
    concepts = [fewer(pairs, n, seed=setup.seed) for n in sorted({*(n for n in numbers if n < every), every})]
    model, rows, reports = setup.open(source), [], {}
    for name, target in setup.opened(targets):
        for concept, transfer in setup.carry(model, target, concepts).items():
            rows.append(transfer_row({"target": name, "pairs": concept}, transfer.report))
            reports[f"{concept} into {name}"] = transfer.report
    return RecipeResult("number_of_pairs", "ConTrans, Fig. 5", tuple(rows), (setup.note,), reports)


def fewer(pairs: ContrastPairs, n: int, *, seed: int = 0) -> ContrastPairs:
    """The same concept from at most n prompts of each side, drawn so that a smaller number is part of a larger one."""
    if n < 1:
        raise ValueError(f"{pairs.name}: expected at least one pair; got {n}.")

    def some(prompts: Sequence[str], side: str) -> tuple[str, ...]:
        order = Random(f"{seed}/{side}").sample(range(len(prompts)), len(prompts))
        return tuple(prompts[i] for i in sorted(order[:n]))

    # Sides of one length are pairs as they stand, and stay pairs.
    paired = len(pairs.positive) == len(pairs.negative)
    negative = some(pairs.negative, "positive" if paired else "negative")
    return replace(pairs, name=f"{pairs.name} of {n}", positive=some(pairs.positive, "positive"), negative=negative)


def _said(reports: Mapping[str, TransferReport]) -> list[str]:
    """Where layers and strength were chosen, for tables that have a row for every arm."""
    return [f"{name}: layer {r.layer_source}->{r.layer_target}, strength {r.strength:g}" for name, r in reports.items()]
