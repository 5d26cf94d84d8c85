"""Learning: how much a map gains from more rows, and where it must not be fitted.

    curve = learning_curve(maps, (9, 18), concept=concept, native=native)
    print(curve)

Sentences are drawn at random and added one after the other; at every size the map between the two layers is fitted on the
first n rows, its ridge chosen anew, and scored on a fifth of the sentences that no size has seen. Minimum-norm least squares
(`paper`) fails where the rows are about as many as the dimensions of the source, n = d: it interpolates noise with singular
values near zero. With fewer rows or more of them it is better again (double descent); ridge has no such place.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from contrans_tl.progress import track
from contrans_tl.quality import check_vectors, plain_values
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import LayerMaps, Method
from contrans_tl.solvers import TINY

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 3 / 2, 2, 4, 8, 16, 32, 64)
"""Sizes tried where none are given, as multiples of the source's dimensions: dense about n = d."""


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Held-out R2 and the carried vector against the number of rows."""

    source: str
    target: str
    layers: tuple[int, int]
    d_source: int
    methods: tuple[Method, ...]
    sizes: tuple[int, ...]
    """Rows."""
    rows: int
    """All there are; what `cosine` compares with was fitted on them."""
    r2: Float[Tensor, "method size draw"]
    cosine: Float[Tensor, "method size draw"] | None
    """Of the carried concept with the one that the same method carries by all rows."""
    cosine_to_native: Float[Tensor, "method size draw"] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; tensors as lists."""
        return plain_values(self)

    def __str__(self) -> str:
        curves = {"R2": self.r2, "cosine": self.cosine, "to native": self.cosine_to_native}
        shown = {name: curve for name, curve in curves.items() if curve is not None}
        lines = [
            f"{self.source} L{self.layers[0]} -> {self.target} L{self.layers[1]}: means of {self.r2.shape[-1]} draws; "
            f"n = d at {self.d_source} rows",
            "         " + "".join(f"{method:>{10 * len(shown)}}" for method in self.methods),
            "     rows" + "".join(f"{name:>10}" for _ in self.methods for name in shown),
        ]
        for k, size in enumerate(self.sizes):
            means = (curve[i, k].mean() for i in range(len(self.methods)) for curve in shown.values())
            lines.append(f"  {size:>7}" + "".join(f"{mean:>10.3f}" for mean in means))
        return "\n".join(lines)


def learning_curve(
    maps: LayerMaps,
    layers: tuple[int, int],
    *,
    methods: Sequence[Method] = ("ridge", "paper"),
    sizes: Sequence[int] | None = None,
    concept: ConceptVector | None = None,
    native: ConceptVector | None = None,
    draws: int = 3,
    seed: int = 0,
) -> LearningCurve:
    """Fit the map between two layers on more and more of the maps' rows.

    Args:
        maps: whose rows are used; their method and weights are not.
        sizes: numbers of rows; by default multiples of the source's dimensions, n = d among them, and all there are.
        concept: in the source; adds the curves of the carried vector, `native`, in the target, its cosine to that.
        draws: random orders of the sentences, each with its own held-out fifth.

    Raises:
        ValueError: a layer the maps do not have, fewer than five sentences, a size of fewer rows than two sentences
            have or of more than are not held out, or a concept of another model.
    """
    s, t = layers
    one = maps.only([s], [t])
    sentence, d = one.source.sentence, one.source.values.shape[-1]
    if len(sentence.unique()) < 5:
        raise ValueError(f"expected maps of at least five sentences, to hold a fifth out; got {len(sentence.unique())}.")
    check_vectors(one, concept, native)
    generator = torch.Generator().manual_seed(seed)
    drawn = [_draw(sentence, generator) for _ in range(draws)]
    most = min(len(fitted) for fitted, _ in drawn)
    least = 1 + max(int((sentence[fitted] == sentence[fitted[0]]).sum()) for fitted, _ in drawn)  # two sentences
    chosen = sorted({*(int(share * d) for share in SHARES), most} if sizes is None else set(sizes))
    if sizes is None:
        chosen = [size for size in chosen if least <= size and (1.25 * size < most or size == most)]
    elif not chosen or not least <= chosen[0] <= chosen[-1] <= most:
        raise ValueError(
            f"expected sizes between {least} rows, of two sentences, and {most}, of a random four fifths of them; got {sizes}."
        )

    def carried(fitted: LayerMaps) -> Float[Tensor, " d_target"]:
        assert concept is not None
        return fitted.carry(concept.only(s).vectors)[0, 0].double().cpu()

    def fit(method: Method, rows: Int[Tensor, " kept"]) -> LayerMaps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the paper's solver is at its worst near n = d is what is shown here
            return LayerMaps.fit(one.source.take(rows), one.target.take(rows), method=method)

    shape = (len(methods), len(chosen), draws)
    r2, cosine, to_native = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    whole = [carried(fit(method, torch.arange(len(sentence)))) if concept else None for method in methods]
    steps = [(i, k, j) for i in range(shape[0]) for k in range(shape[1]) for j in range(shape[2])]
    for i, k, j in track(steps, "learning curve", len(steps)):
        rows, held_out = drawn[j]
        fitted = fit(methods[i], rows[: chosen[k]])
        y = one.target.at(t)[held_out].double()
        error = (y - fitted[s, t].point(one.source.at(s)[held_out].float()).double()).square().sum()
        r2[i, k, j] = 1 - error / (y - y.mean(0)).square().sum().clamp_min(TINY)
        if (reference := whole[i]) is not None:
            moved = carried(fitted)
            cosine[i, k, j] = cosine_similarity(moved, reference, dim=0)
            if native is not None:
                to_native[i, k, j] = cosine_similarity(moved, native.at(t).double().cpu(), dim=0)
    return LearningCurve(
        source=one.source.model.name,
        target=one.target.model.name,
        layers=(s, t),
        d_source=d,
        methods=tuple(methods),
        sizes=tuple(chosen),
        rows=len(sentence),
        r2=r2.float(),
        cosine=None if concept is None else cosine.float(),
        cosine_to_native=None if native is None else to_native.float(),
    )


def _draw(sentence: Int[Tensor, " row"], generator: torch.Generator) -> tuple[Int[Tensor, " fitted"], Int[Tensor, " held_out"]]:
    """The rows in a random order of their sentences, and those of a fifth of the sentences."""
    _, member = sentence.unique(return_inverse=True)
    order = torch.randperm(int(member.max()) + 1, generator=generator)
    place = order.argsort()[member]
    rows = place.argsort(stable=True)
    out = place[rows] < len(order) // 5
    return rows[~out], rows[out]
