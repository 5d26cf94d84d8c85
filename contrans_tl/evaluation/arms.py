"""Arms: what a transplanted concept is measured beside, at the same layer and strength.

Nulls have to stay at the base if it is the concept that acts; the others are ceilings, alternatives and diagnostics. Each arm
is made when it is asked for: `ARMS` says what each is, `arms_of` which ones can be made from what was given.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from contrans_tl.evaluation.selection import Choice
from contrans_tl.evaluation.subjects import ProxyTuned, SteeredAt, Subject, same_tokens
from contrans_tl.models import HookedModel
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import UNWEIGHTED, LayerMaps

ARMS = {
    "base": "the target as it is",
    "transplanted": "the concept through the maps",
    "zero": "the same with strength 0: has to equal the base",
    "uniform": "the concept through maps that count all rows alike",
    "native": "the target's own vector, refined from the same pairs: the ceiling",
    "source_own": "the source, steered by its own vector",
    "instruction": "the target, told to in words before every prompt",
    "aligned": "another model of the target's size that was aligned by training",
    "proxy_tuning": "the target's logits + a small aligned model's - the same small model's before alignment",
    "shuffled_map": "the concept through maps fitted on shuffled pairs of rows, at the transplanted vector's norm",
    "random": "random vectors of the target's space, at the transplanted vector's norm",
    "random_source": "random source vectors through the same maps, at the transplanted vector's norm",
    "other_concept": "another concept, carried like the transplanted one",
    "sign_flipped": "the transplanted vector, subtracted",
    "neutral_corpus": "the concept through maps of a corpus that never shows it, at the transplanted vector's norm",
    "random_weighting": "the concept through maps weighted for random directions: what weighting does by itself",
    "paper": "the concept through the paper's map: last tokens, minimum norm, no bias",
}
DRAWN = ("random", "random_source")
"""Null arms of vectors drawn at random: what the best of many settings reaches by chance is told from them."""
NULLS = ("shuffled_map", "random", "random_source", "other_concept", "sign_flipped", "neutral_corpus")


@dataclass(frozen=True, eq=False)
class Rivals:
    """What arms are made from, beyond target, pairs and maps; what is left out has no arm."""

    other: ConceptVector | None = None
    """Another concept of the source, for `other_concept`."""
    maps: Mapping[str, LayerMaps] = field(default_factory=dict)
    """Further maps, such as the paper's or a neutral corpus's: each is an arm of its name. What a `paper` or `identity` map
    carries is injected as it comes, all others' vectors with the norm of the transplanted one."""
    source: HookedModel | None = None
    instruction: str = ""
    """Put before every prompt, as it stands: end it with a space or a newline."""
    aligned: HookedModel | None = None
    proxy: tuple[HookedModel, HookedModel] | None = None
    """A small model after and before alignment, both reading the target's tokens."""
    n_random: int = 12
    """Vectors of `random`, and of `random_source`. Of 24, a vector no better than they are is the best once in 25 times."""

    def __post_init__(self) -> None:
        if self.n_random < 1:
            raise ValueError(f"expected at least one random vector; got {self.n_random}.")


@dataclass(frozen=True, eq=False)
class Arm:
    """Who is asked, and with which vectors of the target's space."""

    subjects: tuple[Subject, ...]
    reference: Subject | None
    """What its effect on neutral text is measured against; None where such an effect means nothing: an instruction
    stands before the prompts only, and losses in other tokens do not compare."""
    vectors: tuple[ConceptVector, ...] = ()


def arms_of(
    at: SteeredAt,
    choice: Choice,
    concept: ConceptVector,
    native: ConceptVector,
    maps: LayerMaps,
    rivals: Rivals,
    *,
    weighted: bool = True,
    seed: int = 0,
) -> dict[str, Callable[[], Arm]]:
    """Name -> what makes the arm, for every arm that can be made.

    Args:
        concept: at the chosen source layer only.
        native: at the chosen target layer only.
        maps: between the chosen layers only, unweighted.
        weighted: whether the concept is carried through concept-weighted maps.
    """
    target, (s, t) = at.model, (choice.layer_source, choice.layer_target)
    used = maps.reweighted(concept) if weighted else maps
    moved = through(used, concept)

    def steered(vectors: Sequence[ConceptVector], strength: float = choice.strength) -> Arm:
        return Arm(tuple(at.subject(vector, strength) for vector in vectors), at.base, tuple(vectors))

    def like_ours(maps: LayerMaps, concept: ConceptVector = concept) -> ConceptVector:
        return through(maps.reweighted(concept) if weighted else maps, concept)

    def by_other_maps(maps: LayerMaps) -> ConceptVector:
        maps = maps.only([s], [t])
        return through(maps, concept) if maps.method in UNWEIGHTED else like_ours(maps).matched_to(moved)

    def random_sources() -> list[ConceptVector]:
        draws = random_like(concept, rivals.n_random, seed=seed)
        carried = used.carry_several(torch.cat([draw.vectors for draw in draws]))
        return [
            replace(moved, vectors=v[None], name=draw.name).matched_to(moved) for v, draw in zip(carried, draws, strict=True)
        ]

    made: dict[str, Callable[[], Arm]] = {
        "base": lambda: Arm((at.base,), at.base),
        "transplanted": lambda: steered([moved]),
        "zero": lambda: steered([moved], 0.0),
        "native": lambda: steered([native]),
        "shuffled_map": lambda: steered([like_ours(maps.shuffled(seed=seed)).matched_to(moved)]),
        "random": lambda: steered(random_like(moved, rivals.n_random, seed=seed)),
        "random_source": lambda: steered(random_sources()),
        "sign_flipped": lambda: steered([-moved]),
    }
    if weighted:
        made["uniform"] = lambda: steered([through(maps, concept)])
        made["random_weighting"] = lambda: steered(
            [through(maps.reweighted(v), concept) for v in random_like(concept, 2, seed=seed + 1)]
        )
    if (other := rivals.other) is not None:
        made["other_concept"] = lambda: steered([like_ours(maps, other.only(s))])
    for name, more in rivals.maps.items():
        made[name] = lambda more=more: steered([by_other_maps(more)])  # type: ignore[misc]
    if (source := rivals.source) is not None:
        own = SteeredAt(source, s)
        made["source_own"] = lambda: Arm((own.subject(concept, choice.strength),), own.base)
    if rivals.instruction:
        made["instruction"] = lambda: Arm((Subject(target, rivals.instruction),), None)
    if (aligned := rivals.aligned) is not None:
        made["aligned"] = lambda: Arm((Subject(aligned),), at.base if same_tokens(aligned, target) else None)
    if rivals.proxy is not None:
        expert, novice = rivals.proxy
        tuned = ProxyTuned(target, expert=expert, novice=novice)  # now, so that another vocabulary is refused at once
        made["proxy_tuning"] = lambda: Arm((tuned,), at.base)
    order = [*ARMS, *made]
    return {name: made[name] for name in sorted(made, key=order.index)}


def through(maps: LayerMaps, concept: ConceptVector) -> ConceptVector:
    """The concept through maps between two layers, as they are weighted."""
    [(pair, moved)] = carried(maps, concept).items()
    return moved


def carried(maps: LayerMaps, concept: ConceptVector) -> dict[tuple[int, int], ConceptVector]:
    """The concept through these maps as they are weighted, at every (source layer, target layer)."""
    grid = maps.carry(concept.only(*maps.source.layers).vectors)
    return {
        (s, t): ConceptVector(grid[i, j][None], (t,), concept.name, maps.target.model)
        for i, s in enumerate(maps.source.layers)
        for j, t in enumerate(maps.target.layers)
    }


def random_like(concept: ConceptVector, n: int, *, seed: int) -> list[ConceptVector]:
    """Random directions with the concept's norm at every layer."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(n, *concept.vectors.shape, generator=generator)
    return [replace(concept, vectors=draw, name=f"random {i}").matched_to(concept) for i, draw in enumerate(draws)]
