"""Cards: what a shared concept or map is, in words - the README.md beside it, Markdown with YAML front matter.

    card("concept vector", about, sizes, "user/anger", scores=scores)

A card says where the thing lives (models, revisions, basis, layers and how they are counted), how it was made, what was
measured of it, how to use it, what it is for and not for, and what is not known. It is made from the header of the file alone:
what the header does not say, the card calls unknown. After Mitchell et al., Model Cards for Model Reporting (1810.03993).

Names and texts come from data. They stand in code spans or, as JSON or Python literals, in code blocks, with every character
escaped that Markdown, HTML or YAML could take for its own.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from contrans_tl.evaluation import NULLS
from contrans_tl.models import ModelId
from contrans_tl.verdict import Verdict

_ARMS = {
    "base": "nothing added",
    "transplanted": "this concept",
    "native": "the target's own vector",
    "paper": "the paper's map",
}
_STREAM = (
    "Layer l is the output of block l, `blocks.{l}.hook_resid_post` in TransformerLens, counted from 0 "
    "(`hidden_states[l + 1]` in transformers, save that a norm follows the last one there)."
)
_HEADS = (
    "A place is (layer, head), both counted from 0: what the head gathers before W_O, `blocks.{l}.attn.hook_z` in "
    "TransformerLens."
)
_WEIGHTINGS = {"concept": ", each row weighted by what it says of the concept", "uniform": ", all rows weighted alike"}
_ROWS = {"words": "at the end of every word", "last": "at the last token of every sentence"}
_TAGS = {
    "concept vector": ["steering-vector"],
    "head vectors": ["steering-vector", "attention-heads"],
    "layer maps": ["affine-map"],
    "head maps": ["affine-map", "attention-heads"],
}


def card(
    kind: str,
    about: Mapping[str, Any],
    sizes: Mapping[str, int],
    where: str,
    *,
    scores: Sequence[Mapping[str, Any]] = (),
    examples: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The text of README.md.

    Args:
        kind: `concept vector`, `head vectors`, `layer maps` or `head maps`.
        about: header of the file; what must not be told is out of it already (`redaction`).
        sizes: of maps, how many `rows` and `sentences` they were fitted on, and how many rows are `weighted`.
        where: what `pull` is told: a hub repository, or a folder as in "./anger".
        scores: what was measured (`sharing.scores_of`); none: the card says "Not evaluated".
        examples: side -> prompts that are printed; nothing prints none.
    """
    models = models_of(kind, about)
    parts = [
        _front_matter(kind, models),
        f"# {_title(kind, about, models)}\n\n{_summary(kind)}",
        f"## Where it lives\n\n{_home(kind, about, models)}",
        f"## How it was made\n\n{_made(kind, about, sizes)}",
        f"## Scores\n\n{_scores(scores)}",
        f"## How to use\n\n{_usage(kind, about, models, where, scores)}",
        f"## Intended use and misuse\n\n{_use_and_misuse(kind)}",
        f"## Limitations\n\n{_limitations(kind, about, scores)}",
    ]
    if examples:
        parts.insert(4, f"## Examples of the prompts\n\n{_examples(examples)}")
    versions = ", ".join(f"{_code(name)} {_code(number)}" for name, number in about.get("versions", {}).items())
    return "\n\n".join([*parts, f"Made with {versions}. `contrans.json` lists the files with their SHA-256."]) + "\n"


def models_of(kind: str, about: Mapping[str, Any]) -> dict[str, ModelId]:
    """The models a header names: `model` and, of a carried concept, `source`; of maps `source` and `target`."""
    if kind == "head maps":
        found = {side: about["heads"][side] for side in ("source", "target")}
    elif kind == "layer maps":
        found = {side: about[side]["model"] for side in ("source", "target")}
    else:
        origins = [step["carried_from"] for step in steps_of(about["provenance"]) if _is_carried(step)]
        found = {"model": about["model"]} | ({"source": origins[0]} if origins else {})
    return {role: ModelId(**model) for role, model in found.items()}


def steps_of(provenance: Any) -> Iterable[Mapping[str, Any]]:
    """The steps that led to a concept, the last one first: carried, refined, multiplied, summed."""
    if isinstance(provenance, Mapping):
        yield provenance
        for earlier in ("refined", "of", "sum"):
            yield from steps_of(provenance.get(earlier))
    elif isinstance(provenance, (list, tuple)):
        for one in provenance:
            yield from steps_of(one)


def _is_carried(step: Mapping[str, Any]) -> bool:
    origin = step.get("carried_from")
    if not isinstance(origin, Mapping):
        return False
    try:
        ModelId(**origin)
    except TypeError:
        return False
    return True


def on_the_hub(model: ModelId) -> bool:
    """Whether the model is one that others find on the hub: its name is an id there, and its commit is known."""
    return model.revision is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.name, re.ASCII) is not None


# --- the parts ----------------------------------------------------------------------------------------------------------


def _front_matter(kind: str, models: Mapping[str, ModelId]) -> str:
    from huggingface_hub import ModelCardData

    known = list(dict.fromkeys(model.name for model in models.values() if on_the_hub(model)))
    tags = ["contrans", "transformer-lens", "interpretability", *_TAGS[kind]]
    data = ModelCardData(library_name="contrans_tl", tags=tags, base_model=known or None)
    return f"---\n{data.to_yaml()}\n---"


def _title(kind: str, about: Mapping[str, Any], models: Mapping[str, ModelId]) -> str:
    if "maps" in kind:
        what = "Maps between heads" if kind == "head maps" else "Maps"
        return f"{what} from {_code(models['source'].name)} to {_code(models['target'].name)}"
    at = " at its attention heads" if kind == "head vectors" else ""
    return f"{_code(about['name'])}, a concept in {_code(models['model'].name)}{at}"


def _summary(kind: str) -> str:
    if "maps" in kind:
        between = "the attention heads" if kind == "head maps" else "the residual streams"
        return f"Affine maps between {between} of two language models, along which a concept of the one goes over to the other."
    place = "what attention heads gather" if kind == "head vectors" else "the residual stream"
    return f"Vectors that steer a language model: added to {place} while it runs, they bring the concept about."


def _home(kind: str, about: Mapping[str, Any], models: Mapping[str, ModelId]) -> str:
    rows = [
        "| | model | revision | basis | layers | d_model | fingerprint of the weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    roles = {"model": "lives in", "source": "carried from" if "maps" not in kind else "source", "target": "target"}
    for role, model in models.items():
        revision = "unknown" if model.revision is None else _cell(model.revision)
        rows.append(
            f"| {roles[role]} | {_cell(model.name)} | {revision} | {_cell(model.basis)} | {model.n_layers} | {model.d_model} "
            f"| {_cell(model.fingerprint)} |"
        )
    if kind == "concept vector":
        places = f"One vector at each of the layers {_code(_listed(about['layers']))}. {_STREAM}"
    elif kind == "head vectors":
        places = f"One vector at each of the heads {_code(_listed(about['heads']))}. {_HEADS}"
    elif kind == "layer maps":
        source, target = (_code(_listed(about[side]["layers"])) for side in ("source", "target"))
        places = f"From each of the source layers {source} to each of the target layers {target}. {_STREAM}"
    else:
        source, target = (_code(_listed(about["heads"][f"{side}_heads"])) for side in ("source", "target"))
        how = "From all of the source heads together" if about["heads"]["pooled"] else "From each of the source heads"
        places = f"{how}, {source}, to each of the target heads {target}. {_HEADS}"
    said = [f"{places} With any other model or basis it is refused."]
    if not all(map(on_the_hub, models.values())):
        said.append(
            "A model without a revision came from a folder: only its fingerprint tells whether another one is the same."
        )
    return "\n\n".join(["\n".join(rows), *said])


def _made(kind: str, about: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    if "maps" not in kind:
        return "\n\n".join(filter(None, map(_step, steps_of(about["provenance"])))) or "How it was made is not recorded."
    ridges = about.get("ridges")
    ridge = f" Ridge {_numbers(ridges)} of the mean eigenvalue, by source layer." if ridges else ""
    limits = [f"rank {_number(rank)}" for rank in [about.get("fixed_rank")] if rank is not None]
    limits += ["each row weighted by what it says of a concept"] if sizes["weighted"] else []
    limits += ["source dimensions scaled to equal variance"] if about.get("standardise") else []
    return (
        f"Fitted by {_code(about['method'])}{''.join(f', {limit}' for limit in limits)}, on {sizes['rows']} rows of "
        f"{sizes['sentences']} sentences, {_ROWS.get(about['rows'], '')} in both models; corpus {_code(about['texts_hash'])} "
        f"(a hash of its texts).{ridge}"
    )


def _step(step: Mapping[str, Any]) -> str:
    """A step of a concept's making, in a sentence; empty for one that is not known."""
    read = f"Read from {_code(step['read_from'])}. " if "read_from" in step else ""
    return (read + _done(step)).strip()


def _done(step: Mapping[str, Any]) -> str:
    if _is_carried(step):
        return _carried(step)
    if "sum" in step:
        return "It is the sum of the concepts that the following steps made."
    if isinstance(step.get("factor"), (int, float)):
        return f"It was multiplied by {_number(step['factor'])}."
    if {"method", "positive", "negative"} <= set(step):
        pairs = f", hash {_code(step['prompts_hash'])}" if "prompts_hash" in step else ""
        bos = f", {'after' if step['prepend_bos'] else 'without'} a token that begins the text" if "prepend_bos" in step else ""
        return (
            f"Refined by {_code(step['method'])} from {_number(step['positive'])} prompts with the concept and "
            f"{_number(step['negative'])} without it{pairs}, at the last token of each{bos}."
        )
    return ""


def _carried(step: Mapping[str, Any]) -> str:
    said = f"Carried from {_code(step['carried_from']['name'])}"
    if "layers" in step:
        said += f", layers {_code(', '.join(f'{s} to {t}' for s, t in step['layers']))}"
    if "method" in step:
        said += f", through maps fitted by {_code(step['method'])}"
    said += _WEIGHTINGS.get(str(step.get("weighting")), "")
    if "ridge" in step:
        said += f", ridge {_numbers(step['ridge'])} of the mean eigenvalue"
    if "n_rows" in step:
        said += f", on {_number(step['n_rows'])} rows {_ROWS.get(str(step.get('rows')), '')}"
    effective = f" They count as {_numbers(step['effective_rows'])} rows of equal weight." if "effective_rows" in step else ""
    corpus = f", corpus {_code(step['texts_hash'])} (a hash of its texts)" if "texts_hash" in step else ""
    return f"{said}{corpus}.{effective}"


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    if not scores:
        return "Not evaluated: nothing was measured of what it does."
    return "\n\n".join(map(_score, scores))


def _score(score: Mapping[str, Any]) -> str:
    metric = score["metric"]
    rows = [f"| arm | {_cell(metric)}, {_plain(score['wanted'])} is wanted | loss increase | KL |", "| --- | --- | --- | --- |"]
    for arm, measured in score["arms"].items():
        said = f"{_ARMS[arm]} ({_cell(arm)})" if arm in _ARMS else _cell(arm)
        rows.append(f"| {said} | " + " | ".join(_estimate(measured.get(m)) for m in (metric, "loss_increase", "kl")) + " |")
    into = (
        f"{_code(score['concept'])} into {_code(score['target'])}, layer {_number(score['layer_source'])} to "
        f"{_number(score['layer_target'])}, strength {_number(score['strength'])}"
    )
    verdict = score["verdict"].removeprefix(f"{score['concept']} into {score['target']}: ")
    warned = "".join(
        f" **{text}**"
        for key, text in (("in_sample", "In-sample: prompts it reports on had been seen before."), ("partial", "Partial."))
        if score[key]
    )
    return (
        f"### {into}\n\n{_plain(verdict)}{warned}\n\n"
        + "\n".join(rows)
        + "\n\nMeans with 95% intervals on held-out prompts; loss and KL in nats a token, on neutral text, beside the "
        f"unsteered model. Null controls are {', '.join(f'`{arm}`' for arm in NULLS)}: a concept that arrived is apart from "
        "each that was run. `scores.json` has the numbers, the paired differences too."
    )


def _usage(
    kind: str,
    about: Mapping[str, Any],
    models: Mapping[str, ModelId],
    where: str,
    scores: Sequence[Mapping[str, Any]],
) -> str:
    if "maps" in kind:
        lines = _steered_through_maps(kind, about, models, where)
    elif kind == "head vectors":
        lines = _steered(models["model"], where, f"heads=[{_pair(about['heads'][0])}]", 1.0)
    else:
        layer, strength = int(about["layers"][len(about["layers"]) // 2]), 1.0
        if scores and "source" in models:  # a carried concept: what was measured is what is shown
            layer, strength = int(scores[0]["layer_target"]), float(scores[0]["strength"])
        lines = _steered(models["model"], where, f"layers=[{layer}]", strength)
    found = "" if scores else "\n\nWhich place and strength to take was not looked for: try several, and measure."
    return "```python\n" + "\n".join(lines) + f"\n```{found}"


def _steered(model: ModelId, where: str, place: str, strength: float) -> list[str]:
    return [
        "from contrans_tl import load_model, pull, transplant",
        "",
        f"concept = pull({_literal(where)})",
        *_load("model", model),
        *_generate("model", "concept", place, strength),
    ]


def _steered_through_maps(kind: str, about: Mapping[str, Any], models: Mapping[str, ModelId], where: str) -> list[str]:
    if kind == "head maps":
        refine, carry, place = "refine_heads", "reformulate_heads", f"heads=[{_pair(about['heads']['target_heads'][0])}]"
    else:
        layers = about["target"]["layers"]
        refine, carry, place = "refine", "reformulate", f"layers=[{int(layers[len(layers) // 2])}]"
    return [
        f"from contrans_tl import ContrastPairs, load_model, pull, {refine}, {carry}, transplant",
        "",
        f"maps = pull({_literal(where)})",
        *_load("source", models["source"]),
        *_load("target", models["target"]),
        'pairs = ContrastPairs("joy", ("I am so happy", "What a joy this is"), ("I am at home", "What a day this is"))',
        f"moved = {carry}({refine}(source, pairs), maps)",
        *_generate("target", "moved", place, 1.0),
    ]


def _load(variable: str, model: ModelId) -> list[str]:
    if on_the_hub(model):
        lines = [f"{variable} = load_model({_literal(model.name)}, revision={_literal(str(model.revision))})"]
    else:
        lines = [f"{variable} = load_model({_literal(f'./{model.name}')})  # the folder of that model, wherever you have it"]
    return lines + [f"{variable}.enable_compatibility_mode()  # the centred basis"] * (model.basis == "centred")


def _generate(model: str, vectors: str, place: str, strength: float) -> list[str]:
    return [
        f"with transplant({model}, {vectors}, {place}, strength={float(f'{strength:.4g}')}):",
        f'    print({model}.generate("The letter made me feel", max_new_tokens=20, do_sample=False))',
    ]


def _use_and_misuse(kind: str) -> str:
    subject = (
        "Maps carry whatever direction they are given, wanted or not, and"
        if "maps" in kind
        else "The vector acts both ways, and"
    )
    return (
        "For research on how language models represent concepts, and for steering experiments whose effect is measured beside "
        "controls. It is not a safety measure and not a measure of people or texts.\n\n"
        f"{subject} steering can be reversed: added with a negative strength, a vector that makes a model more honest makes it "
        "less honest, and one that takes away hostility brings it about. Whoever has the file has both. Do not use it to "
        "deceive or harm people or to take away what keeps a model from doing so; and before a steered model is let near "
        "anybody, measure what else has changed in it."
    )


def _limitations(kind: str, about: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    if "maps" in kind:
        ask = ": ask `maps.verdict(concept)` first" if kind == "layer maps" else ""
        return (
            f"Whether a concept arrives depends on whether the corpus shows it{ask}.\n\n"
            "The file holds activations of the corpus, a row for every place the maps were fitted on, and no text. Activations "
            "can tell something of the text they come from: do not publish those of a text that must stay private."
        )
    carried = [step for step in steps_of(about["provenance"]) if _is_carried(step)]
    foreseen = [said for step in carried for said in _covered(step)]
    if not carried:
        keys = ("layer_source", "layer_target", "coverage", "presence")
        foreseen = [_foreseen(*(score[key] for key in keys)) for score in scores]
    return "\n\n".join(
        [
            *(
                foreseen
                or ["How well a corpus shows this concept, and so whether maps would carry it, this file does not tell."]
            ),
            "It was found on the prompts counted above, and means what sets their two sides apart, in the language and form "
            "they have. In other contexts it may do something else, or nothing.",
        ]
    )


def _covered(step: Mapping[str, Any]) -> list[str]:
    """How well the corpus showed a concept where it was carried from."""
    if "presence" in step and "layers" in step:
        ways = zip(step["layers"], step["coverage"], step["presence"], strict=True)
        return [_foreseen(s, t, coverage, presence) for (s, t), coverage, presence in ways]
    if "heads" in step:
        shares = _numbers([way["coverage"] for way in step["heads"]])
        return [f"The fit corpus covered {shares} of the concept at the heads it was carried from."]
    return []


def _foreseen(s: int, t: int, coverage: float, presence: float) -> str:
    outlook = Verdict("", s, presence, coverage, effective_rows=0.0, rows=0, d_source=0).outlook
    return (
        f"Layer {_number(s)} to {_number(t)}: the fit corpus showed the concept with coverage {_number(coverage)} and presence "
        f"{_number(presence)}; foreseen from that: {outlook}. It is a forecast from the source alone, with thresholds set on "
        "small models, and no measurement."
    )


def _examples(examples: Mapping[str, Sequence[str]]) -> str:
    return f"The first of each side, as JSON:\n\n```json\n{_json(examples)}\n```"


# --- text from data -------------------------------------------------------------------------------------------------------


def _code(text: Any) -> str:
    """A code span, which holds text as it is; backticks and line breaks are all that could end it."""
    flat = _visible(" ".join(str(text).split()))
    if not flat:
        return "(empty)"
    fence = "`" * (1 + max(map(len, re.findall("`+", flat)), default=0))
    space = " " if "`" in flat else ""
    return f"{fence}{space}{flat}{space}{fence}"


def _cell(text: Any) -> str:
    """A code span within a table."""
    return _code(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Running text in which nothing is markup."""
    flat = _visible(" ".join(str(text).split())).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|~])", r"\\\1", flat)


def _visible(text: str) -> str:
    """Without characters that are not seen, or turn the direction of reading: they could make a text look like another."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def _literal(text: str) -> str:
    """A Python literal in plain ASCII, without what could end a code block or begin a tag."""
    quoted = json.dumps(text) if text.isascii() else ascii(text)
    return quoted.replace("`", "\\x60").replace("<", "\\x3c").replace(">", "\\x3e")


def _json(value: Any) -> str:
    """JSON, a value a line, that no code block or tag can be ended or begun in."""
    lines = json.dumps(value, indent=1, ensure_ascii=False).split("\n")
    return "\n".join("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in _untagged(line)) for line in lines)


def _untagged(text: str) -> str:
    return re.sub(r"[<>&`]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _pair(head: Sequence[Any]) -> str:
    layer, number = head
    return f"({int(layer)}, {int(number)})"


def _listed(values: Sequence[Any]) -> str:
    """Consecutive numbers as a span, others one by one."""
    if len(values) > 2 and all(isinstance(v, int) for v in values) and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(_pair(v) if isinstance(v, (list, tuple)) else str(v) for v in values)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _code(value)
    return str(value) if isinstance(value, int) else f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def _numbers(values: Any) -> str:
    """A number, or the span of several."""
    if not isinstance(values, (list, tuple)):
        return _number(values)
    if not values or not all(isinstance(v, (int, float)) for v in values):
        return _code(values)
    low, high = _number(min(values)), _number(max(values))
    return low if low == high else f"{low} to {high}"


def _estimate(found: Mapping[str, Any] | None) -> str:
    parts = [found.get(key) for key in ("value", "low", "high")] if found else [None]
    if not all(isinstance(part, (int, float)) and math.isfinite(part) for part in parts):
        return "-"
    value, low, high = (f"{part:.2f}" for part in parts)
    return f"{value} [{low}, {high}]"
