"""Experiment: the whole job - refine, fit, choose, transplant, evaluate - for some concepts and some targets.

    experiment = run_experiment(source, {"big": target}, [pairs], sentences, neutral)
    experiment.reports["big"]["happiness"].verdict
    save_experiment(experiment, "out")          # report.json, report.html, *.safetensors

    evaluate_saved(target, pairs, concept, maps, neutral)      the last step alone, of a concept and maps from files

It is what `contrans demo`, `run` and `evaluate` do. Each step is a public function of its own module.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch

from contrans_tl.activations import Activations, Rows, collect
from contrans_tl.affine import UNWEIGHTED
from contrans_tl.artifacts import versions
from contrans_tl.data import ContrastPairs, cut_short
from contrans_tl.diagnostics.attribution import attribute
from contrans_tl.diagnostics.layers import survival
from contrans_tl.diagnostics.scores import Diagnosis
from contrans_tl.evaluation import (
    Interrupted,
    Rivals,
    ScoringFailed,
    Search,
    Task,
    TransferReport,
    evaluate,
    leaks_of,
    task_of,
)
from contrans_tl.leakage import Leak
from contrans_tl.models import HookedModel, ModelId, identify
from contrans_tl.refinement import ConceptVector, refine
from contrans_tl.reformulation import AffineMap, LayerMaps, reformulate
from contrans_tl.weights import device_of

DIAGNOSED = 48
"""Test questions that the effect is attributed to heads on."""
KIND, FORMAT = "contrans report", 2
"""What report.json says it is. Format 1, which did not say so, had no prompts, doses and paired differences."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """One concept in one target: what was measured, and the vector and the map that did it."""

    report: TransferReport
    moved: ConceptVector
    map: AffineMap
    diagnoses: Mapping[str, Diagnosis] = field(default_factory=dict)
    """`survival` of the injection by layer and, for questions, `attribution` of its effect to heads."""
    undiagnosed: Mapping[str, str] = field(default_factory=dict)
    """Which of them could not be told, and why."""

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds of it."""
        diagnoses = {name: found.to_dict() for name, found in self.diagnoses.items()}
        return {**self.report.to_dict(), "diagnoses": diagnoses, "undiagnosed": dict(self.undiagnosed)}


@dataclass(frozen=True, eq=False)
class Experiment:
    """Everything an experiment found and made."""

    concepts: dict[str, ConceptVector]
    """As refined in the source."""
    transfers: dict[str, dict[str, Transfer]]
    """Target -> concept -> transfer."""
    about: dict[str, Any]
    """Models, sizes, seeds, versions, seconds; `partial`, and with it the concepts not reached; `failures`; the command."""

    @property
    def reports(self) -> dict[str, dict[str, TransferReport]]:
        """Target -> concept -> report."""
        return {target: {name: t.report for name, t in row.items()} for target, row in self.transfers.items()}

    def to_dict(self) -> dict[str, Any]:
        """What report.json holds."""
        targets = {
            target: {name: transfer.to_dict() for name, transfer in row.items()} for target, row in self.transfers.items()
        }
        return {"kind": KIND, "format": FORMAT, **self.about, "targets": targets}


def check_inputs(
    concepts: Sequence[ContrastPairs],
    corpora: Mapping[str, Sequence[str]],
    *,
    tasks: Mapping[str, Task] | None = None,
    allow_overlap: bool = False,
) -> dict[str, tuple[Leak, ...]]:
    """The leaks of each concept, none of them unless overlap is allowed.

    ValueError for two concepts of one name, and for prompts that are not held out (`check_leaks`).
    """
    names = [pairs.name for pairs in concepts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"expected concepts of different names, as reports and files are named by them; got {twice[0]!r} twice."
        )
    asked = {pairs.name: (tasks or {}).get(pairs.name) or task_of(pairs) for pairs in concepts}
    return {pairs.name: leaks_of(asked[pairs.name], pairs, corpora, allow_overlap=allow_overlap) for pairs in concepts}


def run_experiment(
    source: HookedModel,
    targets: Mapping[str, HookedModel],
    concepts: Sequence[ContrastPairs],
    sentences: Sequence[str],
    neutral: Sequence[str],
    *,
    unrelated: Sequence[str] | None = None,
    tasks: Mapping[str, Task] | None = None,
    arms: Sequence[str] | None = None,
    rivals: Rivals = Rivals(),  # noqa: B008 - frozen
    search: Search = Search(),  # noqa: B008 - frozen
    depth: float | None = None,
    allow_overlap: bool = False,
    diagnosed: bool = True,
    batch_size: int = 32,
    seed: int = 0,
) -> Experiment:
    """Carry every concept into every target and evaluate it beside its controls.

    The source runs once over each corpus, whatever the number of targets. On a CPU the targets are evaluated side by side.

    Args:
        sentences: the fit corpus.
        neutral: texts that no map is fitted on, for the cost of a transplant.
        unrelated: a corpus that never shows the concepts; maps fitted on it are one more control, `neutral_corpus`.
        tasks: {concept: what is asked}, where it is not the concept's own questions.
        arms: as for `evaluate`, like `search` and `allow_overlap`.
        rivals: likewise; the concept after each (the first after the last) is its `other_concept`, and the paper's map an arm.
        diagnosed: also look at the layers and heads that each transplant acts on.
        depth: the one layer of each model at this share of its depth (`layer_at`); None: all pairs of layers are looked at.

    Raises:
        ValueError: what `check_inputs` or `evaluate` raises.
        Interrupted: ^C, with an `Experiment` of what had been measured by then in its `.report`.
    """
    start = time.monotonic()
    corpora_known = {"the fit corpus": sentences, "the neutral text": neutral, "the unrelated corpus": unrelated or ()}
    check_inputs(concepts, corpora_known, tasks=tasks, allow_overlap=allow_overlap)

    def layers(model: HookedModel) -> list[int] | None:
        return None if depth is None else [layer_at(model, depth)]

    refined = {pairs.name: refine(source, pairs, layers=layers(source), batch_size=batch_size) for pairs in concepts}
    names = list(refined)
    # The paper's rows: the last token of each sentence, its end cut off so that it is not always a full stop.
    corpora: dict[str, tuple[Sequence[str], Rows]] = {"": (sentences, "words")}
    if arms is None or "paper" in arms:
        corpora["paper"] = (cut_short(sentences), "last")
    if unrelated is not None:
        corpora["neutral_corpus"] = (unrelated, "words")

    def rows(model: HookedModel) -> dict[str, Activations]:
        options: dict[str, Any] = {"layers": layers(model), "batch_size": batch_size}
        return {name: collect(model, texts, rows=kind, **options) for name, (texts, kind) in corpora.items()}

    seen_by_source = rows(source)
    found: dict[str, dict[str, Transfer]] = {name: {} for name in targets}
    failures: dict[str, str] = {}
    stop = Event()

    def into(name: str) -> None:
        target, seen = targets[name], rows(targets[name])
        maps = {
            corpus: LayerMaps.fit(seen_by_source[corpus], seen[corpus], method="paper" if corpus == "paper" else "ridge")
            for corpus in corpora
        }
        main = maps.pop("")
        for pairs, concept, other in zip(concepts, names, names[1:] + names[:1], strict=True):
            if stop.is_set():
                return
            try:
                report = evaluate(
                    target,
                    pairs,
                    refined[concept],
                    main,
                    neutral=neutral,
                    task=(tasks or {}).get(concept),
                    arms=arms,
                    rivals=replace(rivals, other=refined[other] if other != concept else rivals.other, maps=maps),
                    search=search,
                    known={place: texts for place, texts in corpora_known.items() if texts},
                    allow_overlap=allow_overlap,
                    seed=seed,
                    stopped=stop.is_set,
                )
            except ScoringFailed as error:
                failures[f"{concept} into {name}"] = str(error)
                continue
            except Interrupted as interrupted:
                report = interrupted.report
                stop.set()
            found[name][concept] = _transfer(report, refined[concept], main)
            if diagnosed and not stop.is_set():
                found[name][concept] = _diagnosed(found[name][concept], target, pairs, neutral, batch_size)

    def experiment() -> Experiment:
        reached = {f"{concept} into {name}" for name, row in found.items() for concept in row} | set(failures)
        about = _about(
            identify(source),
            {name: identify(model) for name, model in targets.items()},
            {"fit_sentences": len(sentences), "fit_rows": len(seen_by_source[""]), "neutral_texts": len(neutral)}
            | {"random_vectors": rivals.n_random},
            partial=stop.is_set(),
            missing=[way for name in targets for concept in names if (way := f"{concept} into {name}") not in reached],
            failures=dict(sorted(failures.items())),  # targets run side by side, so that they come in any order
            seed=seed,
            start=start,
        )
        return Experiment(refined, {name: row for name, row in found.items() if row}, about)

    try:
        with _side_by_side(targets) as pool:
            running = [pool.submit(into, name) for name in targets]
            try:
                for one in running:
                    one.result()
            except BaseException:
                stop.set()
                raise
    except KeyboardInterrupt as interrupt:
        raise Interrupted(experiment()) from interrupt
    if stop.is_set():  # in one of the threads
        raise Interrupted(experiment())
    return experiment()


def evaluate_saved(
    target: HookedModel,
    pairs: ContrastPairs,
    concept: ConceptVector,
    maps: LayerMaps,
    neutral: Sequence[str],
    *,
    known: Mapping[str, Sequence[str]] | None = None,
    rivals: Rivals = Rivals(),  # noqa: B008 - frozen
    seed: int = 0,
    **options: Any,
) -> Experiment:
    """`evaluate` as an experiment of one concept and one target, to be saved and reported on as any other.

    Args:
        known: the fit corpus, if it is at hand: {"the fit corpus": sentences}. Maps from a file know its hash only.
        options: further ones of `evaluate`.

    Raises:
        ValueError, Interrupted: as `run_experiment`.
    """
    start, model = time.monotonic(), identify(target)
    known = {**(known or {}), "the neutral text": neutral}

    def experiment(report: TransferReport) -> Experiment:
        about = _about(
            concept.model,
            {model.name: model},
            {"fit_sentences": len(maps.source.sentence.unique()), "fit_rows": len(maps.source), "neutral_texts": len(neutral)}
            | {"random_vectors": rivals.n_random},
            partial=report.partial,
            seed=seed,
            start=start,
        )
        return Experiment({pairs.name: concept}, {model.name: {pairs.name: _transfer(report, concept, maps)}}, about)

    try:
        return experiment(
            evaluate(target, pairs, concept, maps, neutral=neutral, known=known, rivals=rivals, seed=seed, **options)
        )
    except Interrupted as interrupted:
        raise Interrupted(experiment(interrupted.report)) from interrupted


def _diagnosed(
    transfer: Transfer, target: HookedModel, pairs: ContrastPairs, texts: Sequence[str], batch_size: int
) -> Transfer:
    """With where it acts: its way through the layers and, where the concept has questions, the heads that carry its effect."""
    placed: dict[str, Any] = {"layer": transfer.report.layer_target, "strength": transfer.report.strength}
    native, questions = refine(target, pairs, batch_size=batch_size), pairs.test[:DIAGNOSED]
    todo: dict[str, Callable[[], Diagnosis]] = {
        "survival": lambda: survival(target, transfer.moved, texts[:16], native=native, batch_size=batch_size, **placed)
    }
    if questions:
        todo["attribution"] = lambda: attribute(target, transfer.moved, questions, check=0, batch_size=batch_size, **placed)
    diagnoses: dict[str, Diagnosis] = {}
    undiagnosed: dict[str, str] = {}
    for name, diagnose in todo.items():
        try:
            diagnoses[name] = diagnose()
        # The evaluation is finished: answers that their first token does not tell apart, or gradients that do not fit the
        # memory, cost their own figure only.
        except (ValueError, torch.OutOfMemoryError) as error:
            undiagnosed[name] = str(error)
    return replace(transfer, diagnoses=diagnoses, undiagnosed=undiagnosed)


def _transfer(report: TransferReport, concept: ConceptVector, maps: LayerMaps) -> Transfer:
    s, t = report.layer_source, report.layer_target
    here, weighted = maps.only([s], [t]), maps.method not in UNWEIGHTED
    moved = reformulate(concept, here, layers={s: t}, weighting="concept" if weighted else "uniform")
    return Transfer(report, moved, (here.reweighted(concept.only(s)) if weighted else here)[s, t])


def _about(
    source: ModelId,
    targets: Mapping[str, ModelId],
    sizes: Mapping[str, int],
    *,
    partial: bool,
    missing: Sequence[str] = (),
    failures: Mapping[str, str] | None = None,
    seed: int,
    start: float,
) -> dict[str, Any]:
    """What was not measured but decides what was; `seconds` is the only thing in it that two runs do not have in common."""
    return {
        "seeds": {"controls": seed},
        "versions": versions(),
        "models": {"source": source.to_dict()} | {name: model.to_dict() for name, model in targets.items()},
        "sizes": dict(sizes),
        "partial": partial,
        "missing": list(missing),
        "failures": dict(failures or {}),
        "seconds": round(time.monotonic() - start, 1),
    }


def layer_at(model: HookedModel, depth: float) -> int:
    """The layer at a share of the depth, as the paper's code has 24 of 32, 30 of 40 and 60 of 80 at 0.75."""
    if not 0 <= depth < 1:
        raise ValueError(f"expected a depth from 0 up to, not including, 1; got {depth}.")
    return int(depth * model.cfg.n_layers)


@contextmanager
def _side_by_side(targets: Mapping[str, HookedModel]) -> Any:
    # Small matrices gain little from many threads; models on a CPU run side by side instead, sharing the cores.
    threads = torch.get_num_threads()
    on_cpu = all(device_of(model).type == "cpu" for model in targets.values())
    workers = min(len(targets), threads) if on_cpu else 1
    try:
        torch.set_num_threads(max(1, threads // workers))
        with ThreadPoolExecutor(workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def save_experiment(experiment: Experiment, folder: str | os.PathLike[str]) -> None:
    """Write report.json, report.html and, as safetensors, the refined and the carried concepts and the map between them:
    `concept`, `moved` and `maps`, with concept and target before the name where there are several."""
    from contrans_tl.report import write_report

    folder = Path(folder)
    alone = len(experiment.concepts) == len(experiment.transfers) == 1

    def file(*parts: str) -> Path:
        return folder / ".".join([*(() if alone else parts[:-1]), parts[-1], "safetensors"])

    for name, concept in experiment.concepts.items():
        concept.save(file(name, "concept"))
    for target, row in experiment.transfers.items():
        for name, transfer in row.items():
            transfer.moved.save(file(name, target, "moved"))
            transfer.map.save(file(name, target, "maps"))
    write_report(experiment, folder)
