"""Report: an experiment as report.json, as one self-contained report.html, and as a table for the terminal.

All text that comes from data is escaped: a prompt or a concept's name is never markup.
"""

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contrans_tl.artifacts import write_atomically
from contrans_tl.evaluation import NULLS, Estimate, TransferReport

if TYPE_CHECKING:
    from rich.table import Table

    from contrans_tl.experiment import Experiment

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; margin: .8rem 0; font-size: 13px; } caption { text-align: left; font-weight: 600; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.moved { background: #eaf3fa; font-weight: 600; }
small, .low { color: #666; font-weight: 400; } img { max-width: 100%; } code { font-size: 12px; }
"""


def write_report(experiment: "Experiment", folder: str | Path) -> None:
    """Write report.json and report.html into the folder, each at once or not at all."""
    folder = Path(folder)
    content = experiment.to_dict()
    write_atomically(folder / "report.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / "report.html", render(experiment).encode())


def render(experiment: "Experiment") -> str:
    """The report as one HTML page, figures inside."""
    about = experiment.about
    models = "; ".join(
        f"{escape(role)}: {escape(model['name'])}, {model['n_layers']} layers of {model['d_model']}"
        for role, model in about["models"].items()
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>contrans report</title>",
        f"<style>{_CSS}</style><h1>Concepts carried between language models</h1>",
        f"<p>{models}. {about['sizes']['fit_rows']} rows of {about['sizes']['fit_sentences']} sentences; "
        f"loss budget {about['sizes']['loss_budget']:g} nats; {about['seconds']} s.</p>",
        "<p>Layers and strength were chosen on the select split; everything below is the test split, with 95% bootstrap "
        "intervals. The controls run at the layer and strength of the transplanted arm; <code>shuffled map</code>, "
        "<code>random</code>, <code>random source</code> and <code>neutral corpus</code> have its norm as well. An interval "
        "without width means that every question came out alike.</p>",
    ]
    for target, reports in experiment.reports.items():
        parts += [f"<h2>{escape(target)}</h2>", *_figures(reports)]
        for report in reports.values():
            parts.append(_table(report))
    parts.append(f"<p><small>{escape(json.dumps(about['versions']))} seeds {escape(json.dumps(about['seeds']))}</small></p>")
    return "\n".join(parts) + "\n"


def _figures(reports: Mapping[str, TransferReport]) -> list[str]:
    from contrans_tl import plots

    try:
        figures = [plots.arms_figure(reports), plots.cost_figure(reports)]
    except ImportError as error:
        return [f"<p class=low>No figures: {escape(str(error))}</p>"]
    return [_image(figure) for figure in figures]


def _image(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(report: TransferReport) -> str:
    metrics = list(dict.fromkeys(metric for values in report.arms.values() for metric in values))
    head = "".join(f"<th>{escape(metric.replace('_', ' '))}" for metric in [*metrics, "cosine to native", "norm"])
    rows = []
    for arm, values in report.arms.items():
        geometry = report.geometry.get(arm, {})
        cells = [_cell(values[metric]) if metric in values else "" for metric in metrics]
        cells += [f"{geometry[key]:.2f}" if key in geometry else "" for key in ("cosine_to_native", "norm")]
        mark = " class=moved" if arm == "transplanted" else ""
        rows.append(f"<tr{mark}><td>{escape(arm.replace('_', ' '))}" + "".join(f"<td>{cell}" for cell in cells))
    n = report.arms["base"][report.metric].n
    caption = (
        f"{escape(report.concept)}: layer {report.layer_source} to {report.layer_target}, strength {report.strength:g}; "
        f"held-out R2 {report.r2:.2f}; {n} questions"
    )
    return (
        f"<table><caption>{caption}</caption><tr><th>arm{head}</tr>{''.join(rows)}</table>"
        f"<p><small>Foreseen: {escape(report.foreseen)}<br>Found: {escape(report.verdict)}</small></p>"
    )


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} <span class=low>{estimate.low:.2f}–{estimate.high:.2f}</span>"


def tables(experiment: "Experiment") -> list["Table"]:
    """For each target a table for the terminal: the transplanted arm, what it is compared with, and what it costs."""
    from rich.table import Table

    shown = ("base", "transplanted", "uniform", "paper", "native")
    made = []
    for target, reports in experiment.reports.items():
        table = Table(title=f"into {target} (test split)", title_justify="left")
        for column in ("concept", "layers", "strength", "presence", *shown, "highest null", "loss increase"):
            table.add_column(column, justify="left" if column == "concept" else "right", no_wrap=True)
        for name, report in reports.items():
            nulls = {arm: report.arms[arm][report.metric].value for arm in NULLS if arm in report.arms}
            values = [f"{report.arms[arm][report.metric].value:.2f}" if arm in report.arms else "-" for arm in shown]
            table.add_row(
                name,
                f"{report.layer_source} → {report.layer_target}",
                f"{report.strength:g}",
                f"{report.presence:.2f}",
                *values,
                f"{max(nulls.values()):.2f}",
                f"{report.arms['transplanted']['loss_increase'].value:+.2f}",
            )
        made.append(table)
    return made
