"""Setup: what all recipes need beside models and concepts - corpora, controls, and how layers and strength are chosen."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from contrans_tl.data import ContrastPairs
from contrans_tl.evaluation import Rivals, ScoringFailed, Search, Task
from contrans_tl.experiment import Transfer, run_experiment
from contrans_tl.loading import load_model
from contrans_tl.models import HookedModel

ModelOrName = HookedModel | str | os.PathLike[str]
"""A model, or a name for `load_named`."""
Models = Sequence[ModelOrName] | Mapping[str, ModelOrName]
"""Models, or names to load them by (`name@revision` for a checkpoint on the hub); a mapping says what the table calls them."""


def load_named(name: str, **options: Any) -> HookedModel:
    """`load_model` of a name, or of name@revision."""
    name, revision = split_revision(name)
    return load_model(name, revision=revision, **options)


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub id and the revision behind its @; a folder is never split."""
    hub_id, at, revision = name.partition("@")
    return (name, None) if not at or Path(name).exists() else (hub_id, revision)


@dataclass(frozen=True, eq=False)
class Setup:
    """Corpora, controls, search; `carry` runs `run_experiment` with them."""

    sentences: Sequence[str]
    """The fit corpus."""
    neutral: Sequence[str]
    """Texts that no map is fitted on, for the cost of a transplant."""
    arms: tuple[str, ...] = ("native", "shuffled_map", "random", "sign_flipped")
    """Beside base and transplanted; a recipe adds those that belong to its table."""
    n_random: int = 20
    """Vectors of the random arm. With fewer than 20, one no better than random may be the best of them more than once in 20
    times: the table says how many there were."""
    search: Search = Search()
    depth: float | None = 0.75
    """The paper's one layer of each model; None looks at all pairs of layers."""
    batch_size: int = 32
    seed: int = 0
    load: Callable[[str], HookedModel] = load_named
    """How a model is opened by name; say `functools.partial(load_named, dtype=torch.bfloat16)` for large ones."""

    def open(self, model: ModelOrName) -> HookedModel:
        """The model, loaded if it is a name."""
        return self.load(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else model

    def opened(self, models: Models) -> Iterator[tuple[str, HookedModel]]:
        """Name and model, one at a time: one that was loaded by name is let go when the next is asked for."""
        for label, model in named(models).items():
            yield label, self.open(model)

    def carry(
        self,
        source: HookedModel,
        target: HookedModel,
        concepts: Sequence[ContrastPairs],
        *,
        tasks: Mapping[str, Task] | None = None,
        rivals: Rivals = Rivals(),  # noqa: B008 - frozen
        strengths: tuple[float, ...] | None = None,
        allow_overlap: bool = False,
    ) -> dict[str, Transfer]:
        """Concept -> what `run_experiment` found. ScoringFailed where a concept could not be evaluated.

        Args:
            rivals: what it holds is an arm as well.
            strengths: to choose among, in place of the search's own.
        """
        more = {"instruction": rivals.instruction, "aligned": rivals.aligned, "proxy_tuning": rivals.proxy}
        experiment = run_experiment(
            source,
            {"target": target},
            concepts,
            self.sentences,
            self.neutral,
            tasks=tasks,
            arms=(*self.arms, *(arm for arm, given in more.items() if given)),
            rivals=replace(rivals, n_random=self.n_random),
            search=self.search if strengths is None else replace(self.search, strengths=strengths),
            depth=self.depth,
            diagnosed=False,
            allow_overlap=allow_overlap,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        if failures := experiment.about["failures"]:
            raise ScoringFailed("; ".join(f"{name}: {why}" for name, why in failures.items()))
        return experiment.transfers["target"]

    @property
    def note(self) -> str:
        """What was run, for the table."""
        nulls = [arm for arm in self.arms if arm != "native"]
        layers = "all pairs of layers looked at" if self.depth is None else f"layers at {self.depth:g} of the depth"
        budget = f"{self.search.budget:g} nats of {self.search.budget_on}"
        return f"nulls {', '.join(nulls)} ({self.n_random} random vectors); {layers}; budget {budget} a token on neutral text."


def named(models: Models) -> dict[str, ModelOrName]:
    """What the table calls each model -> the model. ValueError for none, or for one name twice."""
    if isinstance(models, Mapping):
        found = list(models.items())
    else:
        found = [(label_of(model), model) for model in models]
    if not found or len(dict(found)) < len(found):
        raise ValueError(f"expected models of different names; got {', '.join(name for name, _ in found) or 'none'}.")
    return dict(found)


def label_of(model: ModelOrName) -> str:
    """The folder's or the hub's own name of a model."""
    name = os.fspath(model) if isinstance(model, (str, os.PathLike)) else str(model.cfg.model_name)
    return Path(name).name
