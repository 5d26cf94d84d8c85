"""Jobs: a recipe by name, with all that it runs on.

    RECIPES["emotions"](embedded("emotions"))                          what `contrans recipe emotions` does
    RECIPES["sizes"](job_of("sizes", ["gpt2", "gpt2-medium"]))         the same concepts in models of one's own

A job is read and checked before any model is loaded.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contrans_tl.data import ContrastPairs, read_sentences
from contrans_tl.demo import NEUTRAL, TARGETS, UNRELATED, demo_data
from contrans_tl.evaluation import Continuations, Rivals, Search, Task
from contrans_tl.experiment import check_inputs
from contrans_tl.models import HookedModel, check_model_name
from contrans_tl.recipes.experiments import (
    alignment,
    checkpoints,
    emotions,
    families,
    number_of_pairs,
    on_the_questions,
    sizes,
    toxicity,
    truthfulness,
)
from contrans_tl.recipes.files import INSTRUCTION, read_materials
from contrans_tl.recipes.results import RecipeResult
from contrans_tl.recipes.setup import Setup, load_named, named, split_revision
from contrans_tl.recipes.shifts import token_shifts
from contrans_tl.recipes.together import two_concepts

WORLD_PERSONAS = ("Pretend you are an honest person.\n{prompt}", "Pretend you are an untruthful person.\n{prompt}")
"""The embedded world's."""


@dataclass(frozen=True, eq=False)
class Job:
    """What a recipe is run on: names of models, concepts, tasks, corpora."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    concepts: tuple[ContrastPairs, ...]
    setup: Setup
    tasks: Mapping[str, Task] = field(default_factory=dict)
    """{concept: what is asked}, where it is not the concept's own questions."""
    transductive: ContrastPairs | None = None
    """For `truthfulness`: the concept refined on the questions themselves."""
    instruction: str = ""
    """Put before every prompt of `truthfulness`, whatever the target."""
    aligned: str | None = None
    """The first target's size, aligned by training."""
    proxy: tuple[str, str] | None = None
    """A small model after and before alignment, with the first target's tokens."""

    def rivals(self) -> dict[str, Rivals]:
        """What each target is compared with, the models loaded."""
        first, *others = named(self.targets)
        aligned = None if self.aligned is None else self.setup.open(self.aligned)
        proxy = None if self.proxy is None else (self.setup.open(self.proxy[0]), self.setup.open(self.proxy[1]))
        told = Rivals(instruction=self.instruction)
        return {first: replace(told, aligned=aligned, proxy=proxy)} | dict.fromkeys(others, told)

    def check(self, recipe: str) -> None:
        """ValueError for a name that is no model, concepts that do not suit the recipe, prompts that are not held out."""
        names = [pairs.name for pairs in self.concepts]
        wanted = {"truthfulness": 1, "toxicity": 1, "number_of_pairs": 1, "two_concepts": 2}.get(recipe, len(names) or 1)
        if len(names) != wanted:
            raise ValueError(f"{recipe}: expected {wanted} concept{'s'[: wanted > 1]}; got {', '.join(names) or 'none'}.")
        written = [name for name in names if isinstance(self.tasks.get(name), Continuations)]
        if recipe == "toxicity" and not written:
            raise ValueError(f"toxicity: expected continuations to score, as of --toxigen; got questions about {names[0]}.")
        if recipe not in ("toxicity", "two_concepts") and written:
            raise ValueError(f"{recipe}: expected questions; got continuations for {', '.join(written)}.")
        metrics = {pairs.name: pairs.metric for pairs in self.concepts}
        metric = {"truthfulness": "mc1", "emotions": "token_accuracy"}.get(recipe)
        if metric and set(metrics.values()) != {metric}:
            raise ValueError(f"{recipe}: expected questions with the metric {metric}; got {metrics}.")
        others = [name for name in (self.aligned, *(self.proxy or ())) if name is not None]
        for side in (self.sources, self.targets):
            named(side)
        for name in (*self.sources, *self.targets, *others):
            check_model_name(split_revision(name)[0])
        corpora = {"the fit corpus": self.setup.sentences, "the neutral text": self.setup.neutral}
        check_inputs(self.concepts, corpora, tasks=self.tasks)


def _truthfulness(job: Job) -> RecipeResult:
    [pairs] = job.concepts
    refined_on = {"other prompts": pairs} | ({} if job.transductive is None else {"the questions": job.transductive})
    return truthfulness(job.sources[0], job.targets, refined_on, job.setup, rivals=job.rivals(), allow_overlap=True)


def _toxicity(job: Job) -> RecipeResult:
    [pairs] = job.concepts
    return toxicity(job.sources[0], job.targets, pairs, job.tasks[pairs.name], job.setup, rivals=job.rivals())


RECIPES: dict[str, Callable[[Job], RecipeResult]] = {
    "emotions": lambda job: emotions(job.sources[0], job.targets, job.concepts, job.setup),
    "truthfulness": _truthfulness,
    "alignment": lambda job: alignment(job.sources[0], job.sources[1], job.targets, job.concepts, job.setup),
    "families": lambda job: families(job.sources, job.targets, job.concepts, job.setup),
    "toxicity": _toxicity,
    "two_concepts": lambda job: two_concepts(job.sources[0], job.targets, job.concepts, job.setup, tasks=job.tasks),
    "number_of_pairs": lambda job: number_of_pairs(job.sources[0], job.targets, job.concepts[0], job.setup),
    "checkpoints": lambda job: checkpoints(job.sources[0], job.targets, job.concepts, job.setup),
    "sizes": lambda job: sizes(job.sources, job.targets, job.concepts, job.setup),
    "token_shifts": lambda job: token_shifts(job.sources[0], job.targets, job.concepts, job.setup),
}


def job_of(
    recipe: str,
    models: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    sentences: Path | None = None,
    neutral: Path | None = None,
    aligned: str | None = None,
    proxy: tuple[str, str] | None = None,
    sweep: bool = False,
    random_vectors: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    load: Callable[[str], HookedModel] = load_named,
    **files: Any,
) -> Job:
    """What a command line asks for, read and checked: the embedded job, and in its place whatever is given.

    With models of one's own, layers are at the paper's 0.75 of the depth (`sweep`: all pairs) and the arms are those that are
    asked for here. Concepts and corpora remain the embedded world's where no files are given.

    Args:
        only: concepts to keep of those that the files hold, or all.
        files: of `read_materials`.

    Raises:
        ValueError: anything that cannot work.
    """
    job = embedded(recipe)
    setup = replace(job.setup, batch_size=batch_size, seed=seed, load=load)
    if random_vectors is not None:
        setup = replace(setup, n_random=random_vectors)
    if models:
        sources, targets = sides(recipe, models)
        job = replace(job, sources=sources, targets=targets, aligned=None, proxy=None)
        setup = replace(setup, search=Search(), depth=Setup.depth, arms=Setup.arms)
    if sweep:
        setup = replace(setup, depth=None)
    if sentences is not None:
        corpus = read_sentences(sentences)
        held_out = max(2, len(corpus) // 10)
        setup = replace(setup, sentences=corpus)
        if neutral is None:
            setup = replace(setup, sentences=corpus[:-held_out], neutral=corpus[-held_out:])
    if neutral is not None:
        setup = replace(setup, neutral=read_sentences(neutral))
    if any(files.values()):
        materials = read_materials(**files, seed=seed)
        instruction = INSTRUCTION if materials.transductive is not None else ""
        job = replace(
            job,
            concepts=materials.concepts,
            tasks=materials.tasks,
            transductive=materials.transductive,
            instruction=instruction,
        )
    if missing := sorted(set(only) - {pairs.name for pairs in job.concepts}):
        raise ValueError(f"expected concepts among {', '.join(p.name for p in job.concepts)}; got {', '.join(missing)}.")
    if only:
        job = replace(job, concepts=tuple(pairs for pairs in job.concepts if pairs.name in only))
    job = replace(job, setup=setup, aligned=aligned or job.aligned, proxy=proxy or job.proxy)
    job.check(recipe)
    return job


def sides(recipe: str, models: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sources and targets among the models of a command line: SOURCE TARGET..., but BASE ALIGNED TARGET for `alignment`,
    SOURCE... TARGET for `families`, and for `sizes` every model into every model. ValueError for too few."""
    n = {"alignment": 3, "families": 3, "sizes": 1}.get(recipe, 2)
    form = {"alignment": "BASE ALIGNED TARGET...", "families": "SOURCE SOURCE... TARGET", "sizes": "MODEL..."}
    if len(models) < n:
        raise ValueError(f"{recipe}: expected models {form.get(recipe, 'SOURCE TARGET...')}; got {' '.join(models)}.")
    if recipe == "sizes":
        return tuple(models), tuple(models)
    cut = {"alignment": 2, "families": len(models) - 1}.get(recipe, 1)
    return tuple(models[:cut]), tuple(models[cut:])


# --- the embedded models ----------------------------------------------------------------------------------------------


def embedded(recipe: str) -> Job:
    """The recipe on the embedded models, cut down so that it takes seconds. ValueError for an unknown recipe."""
    if recipe not in RECIPES:
        raise ValueError(f"expected a recipe among {', '.join(RECIPES)}; got {recipe!r}.")
    data = demo_data()
    neutral = read_sentences(data / "neutral.txt")[UNRELATED : UNRELATED + NEUTRAL]

    def models(*names: str) -> tuple[str, ...]:
        return tuple(str(data / ("pair" if name in ("source", *TARGETS) else "family") / name) for name in names)

    def concepts(*names: str) -> tuple[ContrastPairs, ...]:
        return tuple(ContrastPairs.load(data / "concepts" / f"{name}.json") for name in names)

    def smaller(pairs: ContrastPairs, select: int, test: int) -> ContrastPairs:
        return replace(pairs, select=pairs.select[:select], test=pairs.test[:test], own=())

    generic = read_sentences(data / "generic.txt")
    setup = Setup(generic[:400], neutral, arms=("native", "shuffled_map", "random"), search=Search(keep=1))
    # Honesty acts in low layers, so all are looked at, and needs all of the corpus. What is carried into shallow models goes to
    # the middle: three quarters of three blocks is the last one, where a vector adds to a word's logit without any concept.
    everywhere, amid = replace(setup, sentences=generic, depth=None), replace(setup, depth=0.5)
    anger, [honesty], [kindness] = concepts("anger"), concepts("honesty"), concepts("kindness")
    honesty, hostility = smaller(honesty, 32, 100), Continuations.load(data / "tasks/hostility.json", max_new_tokens=8)
    hostility = replace(hostility, select=_of_a_length(hostility.select, 12), test=_of_a_length(hostility.test, 30))
    asked = [question.prompt for question in (*honesty.select, *honesty.test)]
    transductive = on_the_questions(honesty, asked, *WORLD_PERSONAS)
    job = Job(models("source"), models("target-llama"), anger, setup)
    aligned = {"aligned": models("target-llama-honest")[0], "proxy": models("source", "source-base")}
    changes: dict[str, dict[str, Any]] = {
        "emotions": {"concepts": concepts("anger", "fear")},
        "truthfulness": {
            "targets": models("target-llama", "target-gpt2"),
            "concepts": (honesty,),
            "transductive": transductive,
            "instruction": WORLD_PERSONAS[0].removesuffix("{prompt}"),
            "setup": everywhere,
            **aligned,
        },
        "alignment": {
            "sources": models("source-base", "source"),
            "targets": models("target-gpt2"),
            "concepts": (honesty,),
            "setup": everywhere,
        },
        "families": {"sources": models("source", "target-gpt2")},
        "toxicity": {"concepts": (kindness,), "tasks": {"kindness": hostility}, **aligned},
        "two_concepts": {
            "targets": models("target-gpt2"),
            "concepts": (honesty, kindness),
            "tasks": {"kindness": hostility},
            "setup": everywhere,
        },
        "checkpoints": {
            "targets": models("small-step0", "small-step300", "small-step450", "small-step600", "small"),
            "setup": amid,
        },
        "sizes": {
            "sources": models("tiny", "small", "source"),
            "targets": models("tiny", "small", "target-llama"),
            "setup": amid,
        },
        "token_shifts": {"concepts": (*anger, honesty)},
    }
    return replace(job, **changes.get(recipe, {}))


def _of_a_length(prompts: Sequence[str], n: int) -> tuple[str, ...]:
    """The first n of the commonest number of words: continuations of prompts of one length are written in one batch."""
    common, _ = Counter(len(prompt.split()) for prompt in prompts).most_common(1)[0]
    return tuple(prompt for prompt in prompts if len(prompt.split()) == common)[:n]
