"""Two concepts at once (ConTrans, Table 7).

    h <- h + a1 v1 + a2 v2

Each concept is first carried alone, with its own controls. Then both are added, each at the layer and with the strength that
was chosen for it alone - in the paper, and with `Setup.depth`, at one layer - and what each task shows under both is compared
with what it shows under one, prompt by prompt.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.data import ContrastPairs
from contrans_tl.evaluation import Forward, Subject, Task, TransferReport, difference, estimate, plain, side_effects, task_of
from contrans_tl.experiment import Transfer
from contrans_tl.models import HookedModel, check_ready
from contrans_tl.recipes.results import RecipeResult, Row
from contrans_tl.recipes.setup import ModelOrName, Models, Setup
from contrans_tl.transplantation import Injection, injection_hooks, injections


@dataclass(frozen=True, eq=False, kw_only=True)
class Together(Subject):
    """A model with several vectors added, at one layer or several: what `transplant` does, for a task to ask."""

    steps: tuple[Injection, ...]

    @classmethod
    def of(cls, model: HookedModel, transfers: Sequence[Transfer]) -> "Together":
        """Each concept where and as strong as it was alone."""
        strengths = [transfer.report.strength for transfer in transfers]
        return cls(model, steps=tuple(injections([transfer.moved for transfer in transfers], strength=strengths)))

    @property
    def forward(self) -> Forward:
        above = plain(self.model)

        def forward(tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos vocab"]:
            with self.running():
                return above(tokens, mask)

        return forward

    @contextmanager
    def running(self) -> Iterator[HookedModel]:
        check_ready(self.model)
        with self.model.hooks(fwd_hooks=injection_hooks(self.model, self.steps)):
            yield self.model


def two_concepts(
    source: ModelOrName,
    targets: Models,
    concepts: Sequence[ContrastPairs],
    setup: Setup,
    *,
    tasks: Mapping[str, Task] | None = None,
) -> RecipeResult:
    """Table 7: both concepts' tasks under none, each and both of two vectors.

    A row for each of these, a column for each task, with what it has over the base and over the concept alone.

    Args:
        tasks: {concept: what is asked}, where it is not the concept's own questions.

    Raises:
        ValueError: another number of concepts than two, or what `run_experiment` raises.
    """
    if len(concepts) != 2:
        raise ValueError(f"expected two concepts; got {', '.join(pairs.name for pairs in concepts) or 'none'}.")
    asked = {pairs.name: (tasks or {}).get(pairs.name) or task_of(pairs) for pairs in concepts}
    half = len(setup.neutral) // 2  # as in `evaluate`: strengths were chosen on the first half
    model, rows = setup.open(source), []
    reports: dict[str, TransferReport] = {}
    for name, target in setup.opened(targets):
        transfers = setup.carry(model, target, concepts, tasks=tasks)
        alone = {concept: Together.of(target, [transfer]) for concept, transfer in transfers.items()}
        subjects = {"none": Subject(target), **alone, "both": Together.of(target, list(transfers.values()))}
        forwards = [subject.forward for subject in subjects.values()]
        effects = side_effects(target, setup.neutral[half:], forwards, batch_size=setup.batch_size)
        measured = {
            (label, concept): task.measure(subject, "test").metrics[task.metric]
            for label, subject in subjects.items()
            for concept, task in asked.items()
        }
        for i, label in enumerate(subjects):
            values = {}
            for concept, task in asked.items():
                column, sign = f"{concept}: {task.metric}", 1.0 if task.wanted == "higher" else -1.0
                items, groups = sign * measured[label, concept], list(task.groups("test"))
                values[column] = estimate(sign * items[None], groups=groups, seed=setup.seed)
                for other, said in (("none", "over none"), (concept, "over alone")):
                    if label == "both":
                        rival = sign * measured[other, concept][None]
                        values[f"{column} {said}"] = difference(items, rival, groups=groups, seed=setup.seed)
            values["loss increase"] = estimate(effects.loss_increase[[i]], counts=effects.tokens, seed=setup.seed)
            report = transfers[label].report if label in transfers else None
            claim = (report.verdict, report.transferred) if report else ("", None)
            rows.append(Row({"target": name, "vectors": label}, values, *claim))
        reports |= {f"{concept} into {name}": transfer.report for concept, transfer in transfers.items()}
    return RecipeResult("two_concepts", "ConTrans, Table 7", tuple(rows), (setup.note,), reports)
