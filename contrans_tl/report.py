"""Report: an experiment as report.json, as one self-contained report.html, and as a table for the terminal.

    write_report(experiment, "out")
    read_report("out")                # the dictionary again, as `compare` needs it

Two runs with the same seed differ in `seconds` only, which stands in one place of either file.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contrans_tl.artifacts import write_atomically, write_json
from contrans_tl.data import read_text
from contrans_tl.evaluation import NULLS
from contrans_tl.page import render

if TYPE_CHECKING:
    from rich.table import Table

    from contrans_tl.experiment import Experiment


def write_report(experiment: "Experiment", folder: str | Path) -> None:
    """Write report.json and report.html into the folder, each at once or not at all."""
    folder = Path(folder)
    content = experiment.to_dict()
    write_json(folder / "report.json", content)
    write_atomically(folder / "report.html", render(experiment).encode())


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a report.json holds; of the file or of the folder it lies in.

    Raises:
        ValueError: no such file, one that is no report, or one of another format.
    """
    from contrans_tl.experiment import FORMAT, KIND

    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected a report.json; this is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("targets"), dict) or content.get("kind", KIND) != KIND:
        raise ValueError(f"{path}: expected a report.json of contrans run, evaluate or demo; this is something else.")
    if content.get("format") != FORMAT:
        said = f"has format {content['format']}" if "format" in content else "is of a version that wrote no format number"
        raise ValueError(f"{path} {said}; this version reads format {FORMAT}. Run it again.")
    return content


def tables(experiment: "Experiment") -> list["Table"]:
    """For each target a table for the terminal: the transplanted arm, what it is compared with, and what it costs."""
    from rich.markup import escape as plainly
    from rich.table import Table

    shown = ("base", "transplanted", "uniform", "paper", "native")
    made = []
    for target, reports in experiment.reports.items():
        table = Table(title=f"into {plainly(target)} (test split)", title_justify="left")
        for column in ("concept", "layers", "strength", "presence", *shown, "best null", "loss increase", "KL"):
            table.add_column(column, justify="left" if column == "concept" else "right", no_wrap=True)
        for name, report in reports.items():
            best = max if report.wanted == "higher" else min
            nulls = [one.value for arm in NULLS if (one := report.arms.get(arm, {}).get(report.metric)) is not None]
            costs = [report.arms.get("transplanted", {}).get(cost) for cost in ("loss_increase", "kl")]
            table.add_row(
                plainly(name),
                f"{report.layer_source} → {report.layer_target}",
                f"{report.strength:.3g}",
                f"{report.presence:.2f}",
                *("-" if (one := report.arms.get(arm, {}).get(report.metric)) is None else f"{one.value:.2f}" for arm in shown),
                f"{best(nulls):.2f}" if nulls else "-",
                *("-" if one is None else f"{one.value:+.2f}" for one in costs),
            )
        made.append(table)
    return made
