"""Scores: a tensor whose axes have names and whose places have labels, and the report that every diagnostic gives back.

    scores = Scores(values, {"layer": layers(12), "head": heads(8)}, unit="logits")
    scores.at(layer="L3", head="H7"), scores.top(5)          [("L3H7", 2.1), ...]
    scores.mean("position").to_dataframe()

Layers are "L3", heads "H7", together "L3H7"; other labels stand beside them, "L3 attn".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.evaluation.intervals import Estimate

if TYPE_CHECKING:
    from pandas import DataFrame


def layers(of: int | Sequence[int]) -> tuple[str, ...]:
    """Labels of so many layers, or of these."""
    return tuple(f"L{layer}" for layer in (range(of) if isinstance(of, int) else of))


def heads(of: int | Sequence[int]) -> tuple[str, ...]:
    """Labels of so many heads, or of these."""
    return tuple(f"H{head}" for head in (range(of) if isinstance(of, int) else of))


@dataclass(frozen=True, eq=False)
class Scores:
    """A number for every place."""

    values: Float[Tensor, "..."]
    axes: Mapping[str, tuple[str, ...]]
    """Name -> labels, in the order of the tensor's axes."""
    unit: str = ""
    """Of the numbers, for axes of figures."""

    def __post_init__(self) -> None:
        shape = tuple(map(len, self.axes.values()))
        if shape != tuple(self.values.shape):
            raise ValueError(
                f"expected values of shape {shape}, as the axes {tuple(self.axes)} say; got {tuple(self.values.shape)}."
            )
        for name, labels in self.axes.items():
            if len(set(labels)) < len(labels):
                raise ValueError(f"expected a label for each place of the axis {name!r}; some are there twice.")

    def at(self, **labels: str | int) -> Any:
        """The number at a place or, with some axes left open, the scores of the others. ValueError for what is not there."""
        index: list[int | slice] = []
        for name in labels:
            if name not in self.axes:
                raise ValueError(f"expected axes among {', '.join(self.axes)}; got {name!r}.")
        for name, known in self.axes.items():
            wanted = labels.get(name)
            if wanted is None:
                index.append(slice(None))
            elif wanted in known:
                index.append(known.index(str(wanted)))
            elif isinstance(wanted, int) and 0 <= wanted < len(known):
                index.append(wanted)
            else:
                raise ValueError(
                    f"there is no {name} {wanted!r}; there are {', '.join(known[:12])}{', ...' * (len(known) > 12)}."
                )
        values = self.values[tuple(index)]
        open_ = {name: known for name, known in self.axes.items() if name not in labels}
        return Scores(values, open_, self.unit) if open_ else float(values)

    def mean(self, *axes: str) -> "Scores":
        """Over these axes."""
        return self._without(axes, self.values.mean([self._axis(name) for name in axes]))

    def sum(self, *axes: str) -> "Scores":
        """Over these axes."""
        return self._without(axes, self.values.sum([self._axis(name) for name in axes]))

    def top(self, k: int = 10, *, by: str = "magnitude") -> list[tuple[str, float]]:
        """The k places of the largest magnitude, or, `by="value"`, of the largest value, with their numbers. NaN is never among
        them."""
        if by not in ("magnitude", "value"):
            raise ValueError(f"expected by='magnitude' or by='value'; got {by!r}.")
        flat = self.values.flatten()
        order = (flat.abs() if by == "magnitude" else flat).nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        order = order[~flat[order].isnan()][:k]
        return [(self.label(int(i)), float(flat[i])) for i in order]

    def label(self, place: int) -> str:
        """Of a place, counted through the flattened values."""
        where = [int(i) for i in torch.unravel_index(torch.tensor(place), self.values.shape)]
        words = [labels[i] for labels, i in zip(self.axes.values(), where, strict=True)]
        text = " ".join(words)
        if "layer" in self.axes and "head" in self.axes:
            layer, head = (words[list(self.axes).index(axis)] for axis in ("layer", "head"))
            rest = [word for axis, word in zip(self.axes, words, strict=True) if axis not in ("layer", "head")]
            text = " ".join([layer + head, *rest])
        return text

    def to_dataframe(self) -> "DataFrame":
        """A row for each place: its labels, and its `value`."""
        from pandas import DataFrame, MultiIndex

        index = MultiIndex.from_product(list(self.axes.values()), names=list(self.axes))
        return DataFrame({"value": self.values.flatten().tolist()}, index=index).reset_index()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        axes = {name: list(labels) for name, labels in self.axes.items()}
        return {"axes": axes, "unit": self.unit, "values": self.values.tolist()}

    def _axis(self, name: str) -> int:
        if name not in self.axes:
            raise ValueError(f"expected axes among {', '.join(self.axes)}; got {name!r}.")
        return list(self.axes).index(name)

    def _without(self, axes: Sequence[str], values: Tensor) -> "Scores":
        return Scores(values, {name: labels for name, labels in self.axes.items() if name not in axes}, self.unit)


def signed(one: Estimate) -> str:
    """A number that may be above or below 0, with its interval."""
    return f"{one.value:+.3g} [{one.low:+.3g}, {one.high:+.3g}]"


def interval_table(scores: Scores, intervals: Sequence[Estimate]) -> "DataFrame":
    """The scores as a table with the 95% interval, `low` and `high`, of every place in order."""
    return scores.to_dataframe().assign(low=[one.low for one in intervals], high=[one.high for one in intervals])


@dataclass(frozen=True, eq=False, kw_only=True)
class Diagnosis:
    """What a diagnostic found. Each diagnostic has one of its own, with what else it measured."""

    about: str
    """What was looked at, in a line: the concept, the model, the layer, how many prompts."""
    scores: Scores
    notes: tuple[str, ...] = field(default=())
    """What a reader has to know, such as a completeness error or how rare a null is."""

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k places that matter most, with their scores."""
        return self.scores.top(k)

    def to_dataframe(self) -> "DataFrame":
        """The scores as a table in long form."""
        return self.scores.to_dataframe()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {"kind": type(self).__name__, "about": self.about, "scores": self.scores.to_dict(), "notes": list(self.notes)}

    def __str__(self) -> str:
        rows = [f"  {label:<12} {value:+.3g}" for label, value in self.top(8)]
        unit = f" ({self.scores.unit})" if self.scores.unit else ""
        return "\n".join([f"{type(self).__name__}: {self.about}{unit}", *rows, *(f"  {note}" for note in self.notes)])
