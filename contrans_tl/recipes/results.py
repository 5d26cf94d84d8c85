"""Results: what a recipe found, as the table of the paper that it repeats."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from contrans_tl.artifacts import versions, write_json
from contrans_tl.evaluation import NULLS, Estimate, TransferReport


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    labels: dict[str, str]
    """Column -> what was run."""
    values: dict[str, Estimate]
    """Column -> what was measured, on the test split."""
    verdict: str = ""
    """What the controls allow to say, where a transfer is claimed."""
    transferred: bool | None = None
    """The same in short; None where nothing is claimed."""


@dataclass(frozen=True, eq=False)
class RecipeResult:
    """One of the paper's experiments, run on some models."""

    recipe: str
    source: str
    """The table or figure of the paper."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """What was run, and where it departs from the paper."""
    reports: dict[str, TransferReport] = field(default_factory=dict)
    """The evaluations behind the rows, with all their arms, sweeps and intervals."""

    def row(self, **labels: str) -> Row:
        """The one row with these labels. ValueError for none or several."""
        found = [row for row in self.rows if labels.items() <= row.labels.items()]
        if len(found) != 1:
            raise ValueError(f"expected one row with {labels}; there are {len(found)}.")
        return found[0]

    @property
    def in_sample(self) -> bool:
        """Whether any of it was measured on prompts that had been seen."""
        return any(report.in_sample for report in self.reports.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to recipe.json."""
        reports = {name: report.to_dict() for name, report in self.reports.items()}
        return {
            "recipe": self.recipe,
            "source": self.source,
            "in_sample": self.in_sample,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
            "reports": reports,
        }

    def __str__(self) -> str:
        labels = list(dict.fromkeys(column for row in self.rows for column in row.labels))
        values = list(dict.fromkeys(column for row in self.rows for column in row.values))
        claimed = any(row.transferred is not None for row in self.rows)
        said = {True: "yes", False: "no", None: ""}
        table = [[*labels, *values, *(["transfer"] if claimed else [])]]
        for row in self.rows:
            measured = [str(row.values[column]) if column in row.values else "" for column in values]
            claim = [said[row.transferred]] if claimed else []
            table.append([*(row.labels.get(column, "") for column in labels), *measured, *claim])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        verdicts = dict.fromkeys(f"- {row.verdict}" for row in self.rows if row.verdict)
        return "\n".join([f"{self.recipe} ({self.source})", *lines, *verdicts, *(f"Note: {note}" for note in self.notes)])


def save_recipe(result: RecipeResult, folder: str | os.PathLike[str]) -> Path:
    """Write recipe.json: the table, the evaluations behind it, and versions; the path written."""
    content = result.to_dict() | {"versions": versions()}
    return write_json(Path(folder) / "recipe.json", content)


def transfer_row(labels: Mapping[str, str], report: TransferReport, *, more: Mapping[str, Estimate] | None = None) -> Row:
    """A row for one transfer: base, transplanted, native, the null that comes nearest to having the effect, and the cost."""
    shown: dict[str, Estimate] = {
        arm: report.arms[arm][report.metric] for arm in ("base", "transplanted", "native") if arm in report.arms
    }
    nulls = [report.arms[arm][report.metric] for arm in NULLS if arm in report.arms]
    if nulls:
        nearest = max if report.wanted == "higher" else min
        shown["nearest null"] = nearest(nulls, key=lambda estimate: estimate.value)
    cost = {"loss increase": report.arms["transplanted"]["loss_increase"]}
    where = {"layers": f"{report.layer_source}->{report.layer_target}", "strength": f"{report.strength:g}"}
    return Row({**labels, **where}, shown | dict(more or {}) | cost, report.verdict, report.transferred)


def arm_rows(labels: Mapping[str, str], report: TransferReport, metrics: Sequence[str]) -> list[Row]:
    """A row for every arm of one transfer, as the paper's tables of methods have it."""
    rows = []
    for arm, measured in report.arms.items():
        values = {metric: measured[metric] for metric in (*metrics, "loss_increase") if metric in measured}
        claim = (report.verdict, report.transferred) if arm == "transplanted" else ("", None)
        rows.append(Row({**labels, "arm": arm}, values, *claim))
    return rows
