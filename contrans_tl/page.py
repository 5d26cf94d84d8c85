"""Page: an experiment as one self-contained HTML page, for a reader who has not read the paper.

What was asked, the verdicts, then everything they rest on. All text that comes from data is escaped: a prompt or a concept's
name is never markup. Figures need matplotlib; without it the page says so, and its tables hold the same numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from contrans_tl.evaluation import ARMS, NULLS, Estimate, TransferReport, frontier
from contrans_tl.markup import figure, opening, table, td, td_text

if TYPE_CHECKING:
    from contrans_tl.experiment import Experiment, Transfer

METRICS = {
    "token_accuracy": "share of prompts that the model, free to write any word, continues with the concept's answer",
    "logit_accuracy": "share of prompts where the concept's answer is the likeliest of the options",
    "mc1": "share of questions where the answer the concept stands for is likelier than every wrong one",
    "mc1_normalised": "the same by likelihood a character, so that long answers are not at a disadvantage",
    "mc2": "share of the probability of all offered answers that falls on the right ones",
    "score": "mean of what the scorer gives the continuations",
    "rate": "share of continuations that the scorer puts at its threshold or above",
    "loss_increase": "what the arm adds to the loss on neutral text, nats a token",
    "kl": "how far the arm's next-token predictions on neutral text are from the model's own, nats a token",
}
"""What each number is, in plain words."""
_MOST = 12
"""Rows of a long table, such as the layer pairs of two deep models, that the page shows; report.json has all."""
_WAYS = {"higher": "↑", "lower": "↓"}


def render(experiment: "Experiment") -> str:
    """The report as one HTML page, figures inside."""
    reports = [(target, report) for target, row in experiment.reports.items() for report in row.values()]
    parts = [
        opening(f"contrans report: {_listed(experiment.reports)}"),
        "<h1>Concepts carried between language models</h1>",
        *_banners(experiment, reports),
        *_verdicts(reports),
        *_asked(experiment, reports),
    ]
    for target, row in experiment.reports.items():
        parts.append(f"<h2>Into {escape(target)}</h2>")
        parts += _overview(target, row)
        parts += _acting(target, experiment.transfers[target])
        for report in row.values():
            parts += _concept(report)
    parts += _made(experiment)
    return "\n".join(parts) + "\n"


def _banners(experiment: "Experiment", reports: Sequence[tuple[str, TransferReport]]) -> list[str]:
    """What a reader must know before any number."""
    about, banners = experiment.about, []
    cut = [_name(report) for _, report in reports if report.partial]
    if about.get("partial") or cut:
        unreached = about.get("missing") or []
        said = "".join(
            f" {what}: {escape(', '.join(names))}." for what, names in (("Cut short", cut), ("Not reached", unreached)) if names
        )
        banners.append(f"<strong>Partial.</strong> The run was interrupted; what had been measured by then follows.{said}")
    if seen := [f"{_name(report)} ({_count(_leaked(report), 'prompt')})" for _, report in reports if report.in_sample]:
        banners.append(
            "<strong>In-sample.</strong> Prompts that are reported on had been seen when the concept, the map or the strength "
            f"was made, so the numbers may measure memory: {escape(', '.join(seen))}."
        )
    failed = [f"{_name(report)}: {arm}" for _, report in reports for arm in report.failures]
    if failed := [*failed, *(about.get("failures") or {})]:
        banners.append(f"<strong>Not all could be measured.</strong> {escape('; '.join(failed))}. The reasons stand below.")
    return [f'<p class="banner" role="note">{banner}</p>' for banner in banners]


def _verdicts(reports: Sequence[tuple[str, TransferReport]]) -> list[str]:
    if not reports:
        return ["<h2>Verdict</h2><p>Nothing was measured.</p>"]
    arrived = sum(report.transferred for _, report in reports)
    heads = ["concept", "target", "verdict", "metric", "base", "transplanted", "native", "transfer rate"]
    heads += ["gain over nearest null", "cost (KL)", "layers, strength"]
    rows = []
    for target, report in reports:
        nearest = min(
            (arm for arm in NULLS if arm in report.differences), key=lambda arm: report.differences[arm].low, default=None
        )
        cells = [
            td_text(report.concept),
            td_text(target),
            td_text(_badge(report), safe=True),
            td(f"{escape(_words(report.metric))} {_WAYS[report.wanted]}"),
            *(td(_cell(_of(report, arm, report.metric))) for arm in ("base", "transplanted", "native")),
            td(_cell(report.transfer_rate)),
            td(
                ""
                if nearest is None
                else f"{_cell(report.differences[nearest], signed=True)}<small>{escape(_words(nearest))}</small>"
            ),
            td(_cell(_of(report, "transplanted", "kl"))),
            td(f"{report.layer_source} → {report.layer_target}, × {report.strength:.3g}"),
        ]
        rows.append(f"<tr>{''.join(cells)}")
    said = [f"<li>{escape(report.verdict)}" for _, report in reports]
    return [
        "<h2>Verdict</h2>",
        f"<p><strong>{arrived} of {_count(len(reports), 'transfer')} stood out from the base and every null control.</strong>",
        f"<ul>{''.join(said)}</ul>",
        table(
            heads,
            rows,
            left=3,
            caption="Test split, 95% intervals in small print. Arrows: which way the concept should move the number.",
        ),
    ]


def _asked(experiment: "Experiment", reports: Sequence[tuple[str, TransferReport]]) -> list[str]:
    about = experiment.about
    models = {role: f"{m['name']} ({m['n_layers']} layers of width {m['d_model']})" for role, m in about["models"].items()}
    source = models.pop("source", "the source")
    sizes, metrics = about["sizes"], list(dict.fromkeys(report.metric for _, report in reports))
    asked = {
        "Question": "Can a concept be taken out of one language model, the source, and work in another one, the target?",
        "Source": source,
        "Targets": "; ".join(models.values()),
        "Concepts": ", ".join(dict.fromkeys(report.concept for _, report in reports)) or ", ".join(experiment.concepts),
        "Concept": "a direction among the source's internal activations: the mean difference between prompts that show it and "
        "prompts that do not",
        "Map": f"an affine map from the source's activations to the target's, fitted on {sizes['fit_rows']} tokens of "
        f"{sizes['fit_sentences']} sentences that both read",
        "Transplant": "the mapped direction, times a strength, is added to the target's activations while it runs; no "
        "weight of the target changes",
        "Measured by": "; ".join(
            f"{_words(metric)}: {METRICS.get(metric, 'as the task defines it')}; should become "
            + " or ".join(dict.fromkeys(report.wanted for _, report in reports if report.metric == metric))
            for metric in metrics
        ),
        "Arms": "the same prompts are put to the base, which is the target as it is, to the transplanted target, to "
        "ceilings and alternatives, and to null controls, in which something is added as well that cannot carry the concept",
        "It arrived if": "the transplanted target is apart from the base and from every null control, in the direction wanted, "
        "each by the 95% interval of the difference prompt by prompt, and lies further beyond vectors drawn at random than the "
        "best of as many settings of one of them would in 1 of 20 times",
        "Chosen on other prompts": "layers and strength were chosen on the select split, all numbers are of the test split",
    }
    items = "".join(f"<dt>{escape(term)}<dd>{escape(meaning)}" for term, meaning in asked.items())
    return ["<h2>What was asked</h2>", f"<dl>{items}</dl>", _arms_legend(reports)]


def _arms_legend(reports: Sequence[tuple[str, TransferReport]]) -> str:
    arms = dict.fromkeys(arm for _, report in reports for arm in (*report.arms, *report.failures, *report.missing))
    meanings = {arm: ARMS[arm] + ("; a null control" if arm in NULLS else "") for arm in ARMS if arm in arms}
    items = "".join(f"<dt>{escape(_words(arm))}<dd>{escape(meaning)}" for arm, meaning in meanings.items())
    return f"<details><summary>What each arm is</summary><dl>{items}</dl></details>" if items else ""


def _overview(target: str, row: Mapping[str, TransferReport]) -> list[str]:
    from contrans_tl import plots

    measured = {name: report for name, report in row.items() if report.arms}
    if not measured:
        return ["<p>No arm was measured."]
    concepts = _listed(measured)
    arms, gaps = (
        figure(
            lambda: plots.arms_figure(measured),
            f"Every arm in {target}, with intervals, for {concepts}. {_told(measured)}",
        ),
        figure(
            lambda: plots.differences_figure(measured),
            f"Paired differences, transplanted less every other arm, in {target} for {concepts}.",
            "An arm that is drawn hollow, its interval reaching 0, is not told apart from the transplanted one. Of an arm of "
            "several vectors, such as random, the nearest one counts.",
        ),
    )
    return [arms, gaps] if arms != gaps else [arms]


def _acting(target: str, row: Mapping[str, "Transfer"]) -> list[str]:
    """Where the transplants act: layers and heads."""
    from contrans_tl import plots
    from contrans_tl.diagnostics import Attribution, Survival

    survivals = {c: found for c, t in row.items() if isinstance(found := t.diagnoses.get("survival"), Survival)}
    attributions = {c: found for c, t in row.items() if isinstance(found := t.diagnoses.get("attribution"), Attribution)}
    untold = "".join(f"<li>{escape(c)}, {what}: {escape(why)}" for c, t in row.items() for what, why in t.undiagnosed.items())
    lacking = [f"<h4>Where they act: not told</h4><ul>{untold}</ul>"] if untold else []
    if not survivals:
        return lacking
    said = "; ".join(
        f"{concept} at layer {row[concept].report.layer_target}, × {row[concept].report.strength:.3g}" for concept in survivals
    )
    return [
        "<h4>Where they act</h4>",
        figure(
            lambda: plots.acting_figure(survivals, attributions),
            f"Layers and heads that carried concepts act on in {target}: {said}.",
            f"Left: of each injected concept ({said}) the change of the stream that is left after each later layer, beside the "
            "target's own vector of that layer; dotted, the highest of vectors drawn at random. Right: the share of its effect "
            "on the test questions that gradients attribute to each head's change; `contrans diagnose` measures it.",
        ),
        *lacking,
    ]


def _told(row: Mapping[str, TransferReport]) -> str:
    """The figure's main numbers in words, for those who do not see it."""
    said = []
    for name, report in row.items():
        numbers = ", ".join(
            f"{arm} {estimate.value:.2f}"
            for arm in ("base", "transplanted", "native")
            if (estimate := _of(report, arm, report.metric)) is not None
        )
        said.append(f"{name}: {numbers}" if numbers else f"{name}: not measured")
    return "; ".join(said) + "."


def _concept(report: TransferReport) -> list[str]:
    from contrans_tl import plots

    notes = []
    if report.partial:
        notes.append(f"<strong>Partial:</strong> interrupted before {escape(_listed(report.missing))}.")
    if report.in_sample:
        notes.append(f"<strong>In-sample:</strong> {_count(_leaked(report), 'prompt')} had been seen, listed below.")
    parts = [
        f"<h3>{escape(_name(report))} {_badge(report)}</h3>",
        *(f'<p class="banner" role="note">{note}</p>' for note in notes),
        f"<p>{escape(report.verdict)}<br><small>Foreseen before anything was transplanted: {escape(report.foreseen)}</small>",
        *_failures(report),
        _arms_table(report),
        "<h4>How layers and strength were chosen</h4>",
        _multiplicity(report),
        figure(
            lambda: plots.sweep_figure(report),
            f"Effect on the select split against strength, loss and KL of {_name(report)}. Chosen: layers "
            f"{report.layer_source} to {report.layer_target}, strength {report.strength:.3g}.",
        )
        if report.sweep
        else "",
        _sweep_table(report),
        *_steerability(report),
        "<h4>What was held out</h4>",
        _held_out(report),
        *_samples(report),
    ]
    return [part for part in parts if part]


def _failures(report: TransferReport) -> list[str]:
    if not report.failures:
        return []
    items = "".join(f"<li>{escape(_words(arm))}: {escape(why)}" for arm, why in report.failures.items())
    return [f"<h4>What could not be measured</h4><ul>{items}</ul>"]


def _arms_table(report: TransferReport) -> str:
    if not report.arms:
        return ""
    headline = report.metric
    more = list(dict.fromkeys(m for values in report.arms.values() for m in values if m != headline))
    heads = ["arm", f"{_words(headline)} {_WAYS[report.wanted]}", "", "transplanted − arm", *map(_words, more)]
    every = [values[headline] for values in report.arms.values() if headline in values]
    scale = (min([0.0, *(one.low for one in every)]), max([1.0 if headline != "score" else 0.0, *(one.high for one in every)]))
    rows = []
    for arm, values in report.arms.items():
        geometry, gap = report.geometry.get(arm, {}), report.differences.get(arm)
        cells = [
            td_text(_words(arm)),
            td(_cell(values.get(headline))),
            f"<td>{_strip(values[headline], scale) if headline in values else ''}",
            td(_cell(gap, signed=True)),
            *(td(_cell(values.get(metric))) for metric in more),
            *(td(f"{geometry[key]:.2f}" if key in geometry else "") for key in ("cosine_to_native", "norm")),
        ]
        rows.append(f'<tr class="{_kind(arm)}">{"".join(cells)}')
    n = max((one.n for one in every), default=0)
    span = f"{scale[0]:.3g} to {scale[1]:.3g}"
    caption = f"Every arm on {_count(n, 'test prompt')}, null controls on a grey ground; strips span {span}."
    said = "".join(f"<dt>{escape(_words(m))}<dd>{escape(_meaning(m))}" for m in (headline, *more))
    legend = (
        f"<details><summary>What each number is</summary><dl>{said}<dt>transplanted − arm<dd>how much more the transplanted "
        "arm does in the direction wanted, on the same prompts; of an arm of several vectors, the nearest"
        "<dt>cosine to native, norm<dd>of the vector that was added, before the strength</dl></details>"
    )
    return table([*heads, "cosine to native", "norm"], rows, caption) + legend


def _meaning(metric: str) -> str:
    own = metric.startswith("own_")
    said = METRICS.get(metric.removeprefix("own_"), "as the task defines it")
    return f"on prompts of the concept itself, which need no help: {said}" if own else said


def _strip(estimate: Estimate, scale: tuple[float, float]) -> str:
    """The interval as a small drawing, without matplotlib."""
    low, high, value = (
        5 + 90 * (x - scale[0]) / ((scale[1] - scale[0]) or 1) for x in (estimate.low, estimate.high, estimate.value)
    )
    return (
        '<svg width="100" height="12" aria-hidden="true"><path d="M5 6H95" stroke="#ddd"/>'
        f'<path d="M{low:.1f} 6H{max(high, low + 0.5):.1f}" stroke="#111" stroke-width="2"/>'
        f'<circle cx="{value:.1f}" cy="6" r="3"/></svg>'
    )


def _multiplicity(report: TransferReport) -> str:
    """How much was chosen, by what rule."""
    search = report.search
    if not search:
        return ""
    settings = ", ".join(f"{x:g}" for x in search["strengths"])
    kind = "loss" if search["budget_on"] == "loss" else "next-token KL"
    unit = {
        "raw": "multiples of the carried vector",
        "native": "multiples of the norm of the target's own vector",
        "resid": "multiples of the mean norm of the target's activations",
        "kl": "nats of KL that the strength may cost",
    }.get(search["unit"], search["unit"])
    dose = " and ".join(
        f"{report.dose[key]:.2f} {said}"
        for key, said in (("native", "norms of the native vector"), ("resid", "mean norms of the residual stream there"))
        if key in report.dose
    )
    unseen = " As the choice saw none of the test prompts, the intervals need no correction for it."
    exceeded = " <strong>No setting was within the budget; the least costly was taken.</strong>"
    return (
        f"<p>{_count(search['layer_pairs'], 'pair')} of layers were tried at the middle strength, and the best at strengths "
        f"{escape(settings)} ({escape(unit)}): {_count(search['settings'], 'setting')} in all, on the select split. Taken was "
        f"the largest effect that raises {kind} on neutral text by at most {search['budget']:g} nats a token, at target layers "
        f"below {search['max_depth']:g} of the depth.{'' if search['within_budget'] else exceeded} That is layer "
        f"{report.layer_source} to {report.layer_target}, strength {report.strength:.3g}"
        f"{f', a dose of {dose}' if dose else ''}. Between these layers the map explains {report.r2:.2f} of the variance of "
        f"held-out activations (R²).{'' if report.in_sample else unseen}{_chance(report)}"
    )


def _chance(report: TransferReport) -> str:
    """What the best of as many settings of a random vector reaches."""
    leads = "; ".join(
        f"{_words(arm)} ({_count(lead.vectors, 'vector')}): {lead.deviations:.1f} standard deviations, chance {lead.chance:.2g}"
        for arm, lead in report.leads.items()
    )
    said = (
        " Layers and strength were not chosen for the vectors drawn at random. How far beyond their mean the transplanted one "
        "lies, and the chance that the best of as many settings of a vector like them lies as far (Student's t, Bonferroni): "
    )
    return f"{said}{leads}." if leads else ""


def _sweep_table(report: TransferReport) -> str:
    points = [point for point in report.sweep if "effect" in point]
    sign = 1 if report.wanted == "higher" else -1
    tried = sorted((point for point in report.sweep if "screened" in point), key=lambda point: -sign * point["screened"])
    if not report.sweep:
        return ""
    fronts = {cost: frontier(points, wanted=report.wanted, cost=cost) for cost in ("loss_increase", "kl")}
    here = (report.layer_source, report.layer_target, report.strength)
    rows = []
    for point in points:
        marks = [f"frontier of {'loss' if cost == 'loss_increase' else 'KL'}" for cost, best in fronts.items() if point in best]
        chosen = (point["layer_source"], point["layer_target"], point["strength"]) == here
        cells = [
            td(f"{point['layer_source']} → {point['layer_target']}"),
            td(f"{point['setting']:g}"),
            td(f"{point['strength']:.3g}"),
            td(f"{point['effect']:.3f}"),
            td(f"{point['loss_increase']:+.3f}"),
            td(f"{point['kl']:.3f}"),
            td_text(", ".join([*(["chosen"] if chosen else []), *marks])),
        ]
        rows.append(f'<tr class="{"moved" if chosen else ""}">{"".join(cells)}')
    heads = ("layers", "setting", "strength", f"{_words(report.metric)}", "loss increase", "KL", "")
    swept = table(heads, rows, "Every setting measured on the whole select split; the frontier is what no other setting beats.")
    screened = table(
        ("layers", "strength", _words(report.metric)),
        [
            f"<tr><td>{p['layer_source']} → {p['layer_target']}<td>{p['strength']:.3g}<td>{p['screened']:.3f}"
            for p in tried[:_MOST]
        ],
        f"Layer pairs at the middle strength, the best first{f' ({_MOST} of {len(tried)})' if len(tried) > _MOST else ''}.",
    )
    return f"<details><summary>The whole sweep</summary>{swept}{screened if tried else ''}</details>"


def _steerability(report: TransferReport) -> list[str]:
    from contrans_tl import plots

    if not report.steerability:
        return []
    rows = [
        f"<tr>{td_text(_words(arm))}{td(_cell(one.slope))}{td(_cell(one.anti_steerable))}{td(_cell(one.spearman))}"
        for arm, one in report.steerability.items()
    ]
    moved = report.steerability.get("transplanted")
    told = ""
    if moved is not None:
        told = f" Transplanted: slope {moved.slope.value:.2f}, {moved.anti_steerable.value:.0%} of prompts the other way."
    return [
        "<h4>Steerability</h4>",
        "<p>How far each prompt leans the concept's way (its propensity: for questions, the log-probability of the answer less "
        "that of the best wrong one) when the strength grows. A prompt with a negative slope goes the other way: it is "
        "anti-steerable. Spearman is the rank correlation of propensity with strength, mean over prompts.",
        figure(lambda: plots.steerability_figure(report), f"Propensity against strength of {_name(report)}.{told}"),
        table(("arm", "slope", "anti-steerable share", "Spearman"), rows, "Over the test prompts."),
    ]


def _held_out(report: TransferReport) -> str:
    counts = {"test_prompts": 0, "select_prompts": 0, "neutral_texts_test": 0, "neutral_texts_select": 0, "refine_prompts": 0}
    counts |= report.held_out
    seen = [place.removeprefix("texts of ") for place in counts if place.startswith("texts of ")]
    known = ", ".join(f"{place} ({counts[f'texts of {place}']} texts)" for place in seen)
    said = {
        "Reported on": f"{counts['test_prompts']} test prompts and {counts['neutral_texts_test']} neutral texts",
        "Chosen on": f"{counts['select_prompts']} select prompts and {counts['neutral_texts_select']} neutral texts",
        "Refined from": f"{counts['refine_prompts']} prompts",
        "Kept apart from": f"the refine prompts, the select split and {known or 'no corpus: none was given to compare with'}. "
        "A prompt counts as seen if it occurs there in any case or spacing, as a part or as a whole",
    }
    items = "".join(f"<dt>{term}<dd>{escape(meaning)}" for term, meaning in said.items())
    rows = [
        f"<tr>{td_text(leak.prompt)}{td_text(leak.how)}{td_text(leak.place)}{td_text(leak.text)}"
        for leak in report.leaks[:_MOST]
    ]
    more = f" ({_MOST} of {len(report.leaks)})" if len(report.leaks) > _MOST else ""
    leaks = table(("prompt", "how", "where", "text"), rows, f"Prompts that had been seen{more}.") if rows else ""
    return f"<dl>{items}</dl>{leaks}"


def _samples(report: TransferReport) -> list[str]:
    """The first prompts and, where arms write, what they write behind them."""
    if not report.prompts:
        return []
    if not report.texts:
        prompts = "".join(f'<div class="prompt">{escape(prompt)}</div>' for prompt in report.prompts)
        return [f"<details><summary>The first {_count(len(report.prompts), 'test prompt')}</summary>{prompts}</details>"]
    blocks = []
    for i, prompt in enumerate(report.prompts):
        rows = [
            f'<tr class="{_kind(arm)}">{td_text(_words(arm))}{td_text(texts[i])}'
            for arm, texts in report.texts.items()
            if i < len(texts)
        ]
        blocks.append(f'<div class="prompt">{escape(prompt)}</div>{table(("arm", "continuation"), rows, "", left=2)}')
    return [f"<details><summary>First prompts and what each arm writes behind them</summary>{''.join(blocks)}</details>"]


def _made(experiment: "Experiment") -> list[str]:
    about = experiment.about
    models = [
        f"<tr>{td_text(role)}{td_text(m['name'])}{td_text(str(m['n_layers']))}{td_text(str(m['d_model']))}"
        f"{td_text(m.get('revision') or '')}{td_text(m['fingerprint'])}{td_text(m['basis'])}"
        for role, m in about["models"].items()
    ]
    said = {
        "Command": f"<pre>{escape(about['command'])}</pre>" if about.get("command") else "none: called as a library",
        "Versions": escape(", ".join(f"{name} {version}" for name, version in about["versions"].items())),
        "Seeds": escape(", ".join(f"{name} {seed}" for name, seed in about["seeds"].items())),
        "Sizes": escape(", ".join(f"{_words(name)} {size}" for name, size in about["sizes"].items())),
        "Seconds": f'<span id="seconds">{about["seconds"]}</span>',
    }
    items = "".join(f"<dt>{term}<dd>{meaning}" for term, meaning in said.items())
    heads = ("role", "model", "layers", "width", "revision", "weights", "basis")
    failures = "".join(f"<li>{escape(what)}: {escape(why)}" for what, why in (about.get("failures") or {}).items())
    return [
        "<h2>How it was made</h2>",
        f"<h4>What failed as a whole</h4><ul>{failures}</ul>" if failures else "",
        f"<dl>{items}</dl>",
        table(heads, models, "Models, with hashes of their weights.", left=len(heads)),
        "<p><small>All numbers, prompt by prompt, are in report.json beside this page; <code>contrans compare</code> lays two "
        "of them side by side.</small>",
    ]


def _cell(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return '<span class="low">–</span>'
    form = "+.2f" if signed else ".2f"
    return f'{estimate.value:{form}}<span class="low">{estimate.low:{form}} to {estimate.high:{form}}</span>'


def _kind(arm: str) -> str:
    return "moved" if arm == "transplanted" else "null" if arm in NULLS else ""


def _badge(report: TransferReport) -> str:
    said, kind = _outcome(report)
    return f'<span class="badge {kind}">{said}</span>'


def _outcome(report: TransferReport) -> tuple[str, str]:
    """The verdict in a word or two."""
    if not {"base", "transplanted"} <= set(report.arms):
        return "not measured", "open"
    if report.transferred:
        return "arrived" + (", in-sample" if report.in_sample else ""), "open" if report.in_sample else "yes"
    return ("not beyond controls", "no") if report.rivals or report.by_chance else ("undecided", "open")


def _of(report: TransferReport, arm: str, metric: str) -> Estimate | None:
    return report.arms.get(arm, {}).get(metric)


def _name(report: TransferReport) -> str:
    return f"{report.concept} into {report.target}"


def _leaked(report: TransferReport) -> int:
    return len({leak.prompt for leak in report.leaks})


def _words(name: str) -> str:
    return {"kl": "KL"}.get(name, name.replace("_", " "))


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_words(name) for name in names)
