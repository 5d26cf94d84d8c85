"""Spec: a transplant as plain data - site, op, value, positions - for JSON, and for engines that take no Python hooks.

    spec = to_spec(moved, strength=4.0, positions="generated")            # a dict that json.dumps takes
    with target.hooks(fwd_hooks=injection_hooks(target, from_spec(spec))): ...

    {"format": 1, "kind": "transplant", "concept": {"name": ..., "model": {...}, "strength": 4.0, "provenance": {...}},
     "injections": [{"site": "blocks.18.hook_resid_post", "op": "add", "value": [...], "positions": "generated"}]}

`value` is what is added, strength included; its float32 numbers come back bit by bit. `site` is a hook point of
TransformerLens, the output of a block. `positions` are those of `Injection`.

A RemoteBridge (TransformerLens 4: vLLM, Inspect) discards what hooks return; what it changes, it changes by such data:

    remote.run_with_cache(tokens, intervene=to_interventions(moved, strength=4.0))

    {"blocks.18.hook_out": {"op": "add", "value": [...]}}

These are its drivers' own words (`sources/vllm/intervention_specs.py`, `sources/inspect/intervention.py`): one edit a hook
point, `hook_out` for a block's output, and any other key refused. They run one pass over one prompt - the vLLM driver takes no
`max_new_tokens` but 1 - so there `prompt` is `all`, `last` is a `pos` counted from 0, for which vLLM is booted with
`enable_position_interventions=True`, and `generated` is nothing. The third-party vllm-lens provider rescales what it adds
unless told `norm_match=False`, a key that the others refuse; it is not served.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from contrans_tl.artifacts import write_atomically
from contrans_tl.exchange.rows import about, check_raw, home, incoming, origin, outgoing
from contrans_tl.models import HookedModel, ModelId, hook_name, layer_of
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import Injection, Positions, injections

FORMAT = 1
_KIND = "transplant"


def to_spec(
    concept: ConceptVector,
    *,
    strength: float = 1.0,
    positions: Positions = "all",
    layers: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The transplant as plain values.

    Raises:
        ValueError: as `injections`: several layers and no choice among them, a strength that is not finite, unknown positions.
    """
    steps = injections(concept, strength=strength, layers=layers, positions=positions)
    rows = outgoing(concept, strength)
    return {
        "format": FORMAT,
        "kind": _KIND,
        "concept": about(concept, strength),
        "injections": [
            {"site": hook_name(step.layer), "op": "add", "value": rows[step.layer].tolist(), "positions": step.positions}
            for step in steps
        ],
    }


def from_spec(spec: Mapping[str, Any]) -> list[Injection]:
    """The injections of a spec, for `injection_hooks`. ValueError for anything that is not one."""
    try:
        if spec["kind"] != _KIND or spec["format"] > FORMAT:
            raise ValueError(
                f"expected a {_KIND} of format {FORMAT} at most; got {spec['kind']!r} of format {spec['format']!r}."
            )
        return [_injection(step) for step in spec["injections"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"expected a {_KIND} with kind, format and injections ({type(error).__name__}: {error}).") from error


def _injection(step: Mapping[str, Any]) -> Injection:
    site, op, positions = str(step["site"]), step["op"], step["positions"]
    layer = site.split(".")[1] if site.count(".") == 2 else ""
    if not layer.isdecimal() or site != hook_name(int(layer)):
        raise ValueError(f"expected a site {hook_name(0)}, or of another layer; got {site!r}.")
    if op != "add" or positions not in get_args(Positions):
        raise ValueError(f"expected op 'add' at positions {', '.join(get_args(Positions))}; got {op!r} at {positions!r}.")
    try:
        value = torch.tensor(step["value"], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"expected a list of numbers to add at {site}; {error}.") from error
    if value.ndim != 1 or not bool(torch.isfinite(value).all()):
        raise ValueError(f"expected a list of finite numbers to add at {site}; got shape {tuple(value.shape)}.")
    return Injection(layer_of(site), value, positions)


def write_spec(
    concept: ConceptVector, path: str | os.PathLike[str], *, strength: float = 1.0, positions: Positions = "all"
) -> Path:
    """Write `to_spec` as JSON."""
    spec = to_spec(concept, strength=strength, positions=positions)
    return write_atomically(path, (json.dumps(spec, allow_nan=False) + "\n").encode())


def read_spec(
    path: str | os.PathLike[str], model: HookedModel | ModelId | None = None, *, name: str | None = None
) -> ConceptVector:
    """The concept that a spec adds, strength included; positions stay in its provenance.

    Raises:
        ValueError: no JSON, no spec, two injections at one layer, vectors of another model than the one given.
    """
    path = Path(path)
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name!r} is truncated or not JSON ({error}).") from error
    steps = from_spec(spec)
    told = spec.get("concept")
    here = home(model, told, path.name)
    rows = {step.layer: step.vector for step in steps}
    if len(rows) < len(steps):
        raise ValueError(f"{path.name!r} adds at one layer more than once; use from_spec.")
    provenance = origin("spec", told) | {"positions": [step.positions for step in steps]}
    return incoming(rows, here, name or (told or {}).get("name") or path.stem, provenance)


def to_interventions(
    concepts: ConceptVector | Sequence[ConceptVector],
    *,
    strength: float | Sequence[float] = 1.0,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
    prompt_length: int | None = None,
) -> dict[str, dict[str, Any]]:
    """What a RemoteBridge takes as `intervene`: {hook point: {"op": "add", "value": [d_model numbers]}}.

    Args:
        concepts: of the model that runs remotely; where several meet they add up.
        prompt_length: tokens of the prompt, for `positions="last"`.

    Raises:
        ValueError: a basis other than raw, `generated` positions, `last` without a length, or what `injections` raises.
    """
    concepts = [concepts] if isinstance(concepts, ConceptVector) else list(concepts)
    for concept in concepts:
        check_raw(concept.model, "a RemoteBridge")
    if positions == "generated":
        raise ValueError("a RemoteBridge runs one pass over a prompt and generates nothing; positions='generated' is nothing.")
    if positions == "last" and (prompt_length is None or prompt_length < 1):
        raise ValueError(f"expected prompt_length=, the tokens of the prompt, with positions='last'; got {prompt_length}.")
    edits: dict[str, torch.Tensor] = {}
    for step in injections(concepts, strength=strength, layers=layers, positions=positions):
        site = f"blocks.{step.layer}.hook_out"
        edits[site] = step.vector.float().cpu() + edits.get(site, 0.0)
    where = {"pos": prompt_length - 1} if positions == "last" and prompt_length is not None else {}
    return {site: {"op": "add", "value": value.tolist(), **where} for site, value in edits.items()}
