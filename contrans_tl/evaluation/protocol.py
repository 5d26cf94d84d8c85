"""Protocol: `evaluate`, step by step.

    report = evaluate(target, pairs, concept, maps, neutral=sentences)
    print(report.verdict)

Layers and strength are chosen on the select split under a budget (`selection`); everything reported is measured on the test
split (`measuring`), the same prompts for all arms (`arms`), so that differences are paired (`intervals`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from contrans_tl.activations import hash_texts
from contrans_tl.data import ContrastPairs
from contrans_tl.evaluation.arms import ARMS, NULLS, Rivals, arms_of, carried
from contrans_tl.evaluation.measuring import SHOWN, Measurements
from contrans_tl.evaluation.selection import Choice, Search, choose
from contrans_tl.evaluation.steerability import Steerability
from contrans_tl.evaluation.subjects import SteeredAt
from contrans_tl.evaluation.tasks import Split, Task, task_of
from contrans_tl.evaluation.transfer import Interrupted, TransferReport
from contrans_tl.leakage import Leak, check_leaks
from contrans_tl.models import HookedModel, identify
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector, refine
from contrans_tl.reformulation import UNWEIGHTED, LayerMaps, Weighting


def evaluate(
    target: HookedModel,
    pairs: ContrastPairs,
    concept: ConceptVector,
    maps: LayerMaps,
    *,
    neutral: Sequence[str],
    task: Task | None = None,
    arms: Sequence[str] | None = None,
    rivals: Rivals = Rivals(),  # noqa: B008 - frozen
    search: Search = Search(),  # noqa: B008 - frozen
    weighting: Weighting = "concept",
    known: Mapping[str, Sequence[str]] | None = None,
    allow_overlap: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> TransferReport:
    """Carry a concept into the target and measure it against every control.

    Args:
        pairs: what the concept was refined from; the native vector is refined from them in the target.
        concept: refined in the source, at the maps' source layers.
        neutral: texts that no map was fitted on; the first half serves the choice of strength, the second the report.
        task: what is asked; None is the pairs' own select and test questions.
        arms: names out of `arms.ARMS` and of `rivals.maps`; None is all that can be made. Base and transplanted always run.
        rivals: what further arms are made from.
        weighting: how the concept is carried; see `reformulate`.
        known: texts that the evaluation prompts must not occur in, beside the refine pairs and the select split; name the fit
            corpus here, {"the fit corpus": sentences}.
        allow_overlap: run although they do; the report is marked in-sample.
        stopped: asked between arms; true ends the evaluation as ^C does.

    Raises:
        ValueError: no select or test prompts, fewer than two neutral texts, an arm that cannot be made, maps that lead into
            another model, a concept of another model than the maps', evaluation prompts that were seen (`leakage`).
        Interrupted: ^C; a report of the arms measured so far is in its `.report`.
    """
    task = task_of(pairs) if task is None else task
    if lacking := [split for split in ("select", "test") if not task.prompts(split)]:
        raise ValueError(
            f"{task.name}: expected select questions to choose by and test questions to report on; there are no "
            f"{' and no '.join(lacking)} questions. Add them to the pairs' file, or pass a task."
        )
    if not maps.target.model.same_space(here := identify(target)):
        raise ValueError(f"these maps lead into {maps.target.model}, the model is {here}: fit maps into this one.")
    if len(neutral) < 2:
        raise ValueError("expected at least two neutral texts: half to choose the strength on, half to report on.")
    weighted = weighting == "concept" and maps.method not in UNWEIGHTED
    wanted_arms = _check_arms(arms, rivals, weighted)
    for role, model in (("concept", concept.model), ("source", rivals.source and identify(rivals.source))):
        if model and not model.same_space(maps.source.model):
            raise ValueError(f"expected a {role} of {maps.source.model}, where these maps start; got one of {model}.")
    leaks = leaks_of(task, pairs, known or {}, allow_overlap=allow_overlap)
    neutral_select, neutral_test = neutral[: len(neutral) // 2], neutral[len(neutral) // 2 :]
    concept = concept.only(*maps.source.layers)
    native = refine(target, pairs, layers=maps.target.layers)

    def resid_norm(layer: int) -> float:
        return float(maps.target.at(layer).float().norm(dim=-1).mean())

    def native_norm(layer: int) -> float:
        return float(native.at(layer).norm())

    choice = choose(
        target,
        carried(maps.reweighted(concept) if weighted else maps, concept),
        task,
        neutral_select,
        search=search,
        norms=native_norm if search.unit == "native" else resid_norm,
        batch_size=batch_size,
    )
    s, t = choice.layer_source, choice.layer_target
    here_maps, steering = maps.only([s], [t]), SteeredAt(target, t)
    makers = arms_of(steering, choice, concept.only(s), native.only(t), here_maps, rivals, weighted=weighted, seed=seed)
    moved = makers["transplanted"]().vectors[0]
    names = [name for name in makers if name in wanted_arms]
    test = Measurements(target, task, neutral_test, batch_size)
    foreseen = here_maps.verdict(concept.only(s), s)

    def report(missing: Sequence[str] = ()) -> TransferReport:
        sign = 1.0 if task.wanted == "higher" else -1.0
        return TransferReport(
            concept=pairs.name,
            target=maps.target.model.name,
            metric=task.metric,
            wanted=task.wanted,
            task=task.describe(),
            layer_source=s,
            layer_target=t,
            strength=choice.strength,
            dose={
                "native": choice.strength * float(moved.vectors.norm()) / max(native_norm(t), 1e-12),
                "resid": choice.strength * float(moved.vectors.norm()) / max(resid_norm(t), 1e-12),
            },
            coverage=foreseen.coverage,
            presence=foreseen.presence,
            foreseen=str(foreseen),
            r2=float(here_maps.r2),
            arms=test.estimates(seed),
            differences=test.differences(sign, seed),
            leads=test.leads(sign, choice.settings),
            transfer_rate=test.transfer_rate(seed),
            steerability=curves,
            geometry=test.geometry(native.only(t)),
            sweep=choice.sweep,
            search=_describe(search, choice),
            held_out={
                "test_prompts": len(task.prompts("test")),
                "select_prompts": len(task.prompts("select")),
                "refine_prompts": len(pairs.positive) + len(pairs.negative),
                "neutral_texts_select": len(neutral_select),
                "neutral_texts_test": len(neutral_test),
                **{f"texts of {place}": len(texts) for place, texts in (known or {}).items()},
            },
            items={name: values.mean(0).round(6).tolist() for name, values in test.headline().items()},
            items_hash=hash_texts(list(task.prompts("test"))),
            groups=tuple(test.groups()),
            prompts=tuple(task.prompts("test")[:SHOWN]),
            texts=test.texts(),
            leaks=leaks,
            failures=dict(test.failures),
            missing=tuple(missing),
            null_vectors=sum(len(marks) for name, marks in test.marks.items() if name in NULLS),
        )

    curves: dict[str, Steerability] = {}
    try:
        for name in track(names, f"{pairs.name} into {maps.target.model.name}", len(names)):
            if stopped():
                raise KeyboardInterrupt
            test.measure(name, makers[name]())
        for name in ("transplanted", "native"):
            if name in test.marks:
                curves |= test.steered(name, steering, choice.strength, seed)
    except KeyboardInterrupt as stop:
        missing = [name for name in names if name not in test.marks and name not in test.failures]
        raise Interrupted(report(missing or ["steerability"])) from stop
    return report()


def leaks_of(
    task: Task, pairs: ContrastPairs, known: Mapping[str, Sequence[str]], *, allow_overlap: bool = False
) -> tuple[Leak, ...]:
    """Prompts of the task that occur where they should not; see `check_leaks`."""
    splits = {split: task.prompts(split) for split in get_args(Split)}
    return check_leaks(pairs, known, splits=splits, demonstrations=task.demonstrations(), allow_overlap=allow_overlap)


def _check_arms(arms: Sequence[str] | None, rivals: Rivals, weighted: bool) -> set[str]:
    """The arms to run. ValueError for one that does not exist or that nothing was given for."""
    given = {
        "other_concept": rivals.other is not None,
        "source_own": rivals.source is not None,
        "instruction": bool(rivals.instruction),
        "aligned": rivals.aligned is not None,
        "proxy_tuning": rivals.proxy is not None,
        "uniform": weighted,
        "random_weighting": weighted,
    } | {name: name in rivals.maps for name in ("paper", "neutral_corpus")}
    available = {name for name in ARMS if given.get(name, True)} | set(rivals.maps)
    if arms is None:
        return available
    if unknown := [name for name in arms if name not in available]:
        raise ValueError(
            f"expected arms among {', '.join(sorted(available))}; got {', '.join(unknown)}. (Some need something in rivals=.)"
        )
    return {"base", "transplanted", *arms}


def _describe(search: Search, choice: Choice) -> dict[str, Any]:
    """What was swept, so that a reader can tell how much choosing there was."""
    return {
        "unit": search.unit,
        "strengths": list(search.tried),
        "setting": choice.setting,
        "budget": search.budget,
        "budget_on": search.budget_on,
        "within_budget": choice.within_budget,
        "max_depth": search.max_depth,
        "layer_pairs": sum("screened" in setting for setting in choice.sweep),
        "settings": choice.settings,
    }
