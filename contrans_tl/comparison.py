"""Comparison: two reports side by side, and which of their differences exceed their intervals.

    compared = compare(read_report("a"), read_report("b"))
    compared.summary                  "3 of 14 differ beyond their intervals ..."

For every target, concept and arm that both have: b - a of the metric the verdict is about. Where both asked the same prompts,
prompt by prompt (`evaluation.difference`), which needs far fewer of them; otherwise from the two intervals, by MOVER (Zou and
Donner, 2008): low = d - sqrt((b - low_b)^2 + (high_a - a)^2), high likewise. It takes over what the intervals know of groups,
several vectors and rates of 0 or 1, which resampling the prompts of both reports anew would not. Of 20 arms that do not differ,
one is expected to seem to, as intervals are of 95%.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import hypot
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from contrans_tl.evaluation.intervals import Estimate, difference

if TYPE_CHECKING:
    from rich.table import Table

MATTER = ("base", "transplanted", "native")
"""Arms that the table shows even where they do not differ."""
_MADE = ("task", "layer_source", "layer_target", "strength", "search", "held_out", "in_sample", "partial")
_ABOUT = ("models", "sizes", "seeds", "versions", "partial")


@dataclass(frozen=True)
class ArmDifference:
    """One arm of one concept in one target, in two reports."""

    target: str
    concept: str
    arm: str
    metric: str
    a: Estimate
    b: Estimate
    difference: Estimate
    """b - a; n is the number of prompts, of the shorter report where they are not the same."""
    how: Literal["paired", "unpaired"]

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return not self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side."""

    arms: tuple[ArmDifference, ...]
    made: dict[str, tuple[Any, Any]]
    """What differs in how they were made: what -> (in a, in b)."""
    only_a: tuple[str, ...]
    """What only the first has, as "anger into big: random"."""
    only_b: tuple[str, ...]
    names: tuple[str, str] = ("A", "B")

    @property
    def differing(self) -> tuple[ArmDifference, ...]:
        return tuple(one for one in self.arms if one.differs)

    @property
    def summary(self) -> str:
        """In one line."""
        n, paired = len(self.arms), sum(one.how == "paired" for one in self.arms)
        how = "paired by prompt" if paired == n else f"{paired} paired by prompt" if paired else "unpaired, of other prompts"
        verb = "differs" if len(self.differing) == 1 else "differ"
        return f"{len(self.differing)} of {n} {verb} beyond their intervals ({how}; by chance about {0.05 * n:.1f} would)."

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        arms = [asdict(one) | {"differs": one.differs} for one in self.arms]
        made = {what: list(values) for what, values in self.made.items()}
        only = {"only_a": list(self.only_a), "only_b": list(self.only_b)}
        return {"names": list(self.names), "summary": self.summary, "arms": arms, "made": made, **only}

    def tables(self, *, every: bool = False) -> list["Table"]:
        """For the terminal: the arms that matter or differ, or every one, and what differs in how the reports were made."""
        from rich.markup import escape
        from rich.table import Table

        arms = Table(title="b − a on the test prompts, 95% intervals", title_justify="left")
        for column in ("target", "concept", "arm", "metric", *map(escape, self.names), "difference", "prompts", ""):
            arms.add_column(column, justify="left" if column in ("target", "concept", "arm", "metric", "") else "right")
        for one in self.arms:
            if every or one.differs or one.arm in MATTER:
                gap = f"{one.difference.value:+.2f} [{one.difference.low:+.2f}, {one.difference.high:+.2f}]"
                row = (
                    one.target,
                    one.concept,
                    one.arm,
                    one.metric,
                    str(one.a),
                    str(one.b),
                    gap,
                    f"{one.difference.n} {one.how}",
                )
                arms.add_row(*map(escape, row), "differs" if one.differs else "", style="bold" if one.differs else None)
        if not self.made:
            return [arms]
        made = Table(title="what differs in how they were made", title_justify="left")
        for column in ("what", *map(escape, self.names)):
            made.add_column(column, overflow="fold")
        for what, values in self.made.items():
            made.add_row(*map(escape, (what, *map(str, values))))
        return [arms, made]


def compare(a: Mapping[str, Any], b: Mapping[str, Any], *, names: tuple[str, str] = ("A", "B"), seed: int = 0) -> Comparison:
    """Two reports, as `read_report` reads them or `Experiment.to_dict` gives them.

    Raises:
        ValueError: no target, concept and arm in common with one metric.
    """
    arms, only_a, only_b = [], list(_measured(a)), list(_measured(b))
    made = dict(_differences({key: a.get(key) for key in _ABOUT}, {key: b.get(key) for key in _ABOUT}))
    for target, concept in _shared(a["targets"], b["targets"]):
        one, other, where = a["targets"][target][concept], b["targets"][target][concept], f"{concept} into {target}"
        made |= _differences({key: one.get(key) for key in _MADE}, {key: other.get(key) for key in _MADE}, f"{where}: ")
        same = one["items_hash"] == other["items_hash"]
        if not same:
            made[f"{where}: hash of the test prompts"] = (one["items_hash"], other["items_hash"])
        if one["metric"] != other["metric"]:
            continue
        for arm in (arm for arm in one["items"] if arm in other["items"]):
            for only in (only_a, only_b):
                only.remove(f"{where}: {arm}")
            arms.append(_arm(target, concept, arm, one, other, paired=same, seed=seed))
    if not arms:
        raise ValueError(f"the reports have nothing in common: {_said(a)} in one, {_said(b)} in the other.")
    return Comparison(tuple(arms), made, tuple(only_a), tuple(only_b), names)


def unpaired(a: Estimate, b: Estimate) -> Estimate:
    """b - a of two independent estimates, its interval from theirs (the module's formula)."""
    gap = b.value - a.value
    low, high = hypot(b.value - b.low, a.high - a.value), hypot(b.high - b.value, a.value - a.low)
    return Estimate(gap, gap - low, gap + high, min(a.n, b.n))


def _arm(
    target: str, concept: str, arm: str, one: Mapping[str, Any], other: Mapping[str, Any], *, paired: bool, seed: int
) -> ArmDifference:
    metric = one["metric"]
    a, b = (Estimate(**report["arms"][arm][metric]) for report in (one, other))
    if paired:
        values, rival = np.array(other["items"][arm], float), np.array(one["items"][arm], float)
        gap = difference(values, rival[None], groups=one.get("groups") or None, seed=seed)
    else:
        gap = unpaired(a, b)
    return ArmDifference(target, concept, arm, metric, a, b, gap, "paired" if paired else "unpaired")


def _shared(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return ((target, concept) for target, row in a.items() for concept in row if concept in b.get(target, {}))


def _measured(report: Mapping[str, Any]) -> Iterator[str]:
    for target, row in report["targets"].items():
        yield from (f"{concept} into {target}: {arm}" for concept, one in row.items() for arm in one["items"])


def _said(report: Mapping[str, Any]) -> str:
    ways = [f"{name} ({one['metric']}) into {target}" for target, row in report["targets"].items() for name, one in row.items()]
    return ", ".join(ways[:4] + ["..."] * (len(ways) > 4)) or "nothing"


def _differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The leaves of two nested dictionaries that are not equal, named by their keys."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys((*a, *b)):
            inner = f"{name}{key}" if not name or name.endswith(": ") else f"{name}.{key}"
            yield from _differences(a.get(key), b.get(key), inner)
    elif a != b:
        yield name, (a, b)
