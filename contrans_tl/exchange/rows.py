"""Rows: what all formats share - one float32 vector a layer on the way out, a `ConceptVector` of them on the way in.

Where a format has room for a text, `about` goes into it as JSON: name, model, strength and provenance of the concept, without
paths of this machine.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from contrans_tl.models import HookedModel, ModelId, check_layers, identify
from contrans_tl.redaction import redacted
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import check_home


def outgoing(concept: ConceptVector, strength: float) -> dict[int, Float32[Tensor, " d_model"]]:
    """The vector of every layer, strength included. ValueError for a strength that is not finite or too large for them."""
    if not math.isfinite(strength):
        raise ValueError(f"expected a finite strength; got {strength}.")
    rows = strength * concept.vectors.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{strength:g} times {concept.name!r} is more than float32 holds.")
    return dict(zip(concept.layers, rows.clone().unbind(), strict=True))


def incoming(rows: Mapping[int, Tensor], model: ModelId, name: str, provenance: dict[str, Any]) -> ConceptVector:
    """The concept of these vectors, by layer. ValueError for layers or a width that the model does not have."""
    if not rows:
        raise ValueError(f"expected vectors of {model.name}; {name!r} has none.")
    layers = check_layers(sorted(rows), model.n_layers, model.name)
    for layer, row in rows.items():
        if row.shape != (model.d_model,):
            raise ValueError(
                f"expected vectors of d_model = {model.d_model}, the width of {model.name}; got shape {tuple(row.shape)} at "
                f"layer {layer} of {name!r}."
            )
        if not row.is_floating_point():
            raise ValueError(f"expected floating-point numbers; layer {layer} of {name!r} holds {row.dtype}.")
    vectors = torch.stack([rows[layer].detach().to("cpu", torch.float32) for layer in layers])
    return ConceptVector(vectors, layers, name, model, provenance)


def check_raw(model: ModelId, engine: str) -> None:
    """ValueError for a basis that the engine does not run, and whose vectors it neither takes nor gives."""
    if model.basis != "raw":
        raise ValueError(
            f"{engine} runs weights as they are published; these vectors would be of {model.name} in the {model.basis} basis. "
            "Refine or reformulate in the model that load_model gives."
        )


def about(concept: ConceptVector, strength: float) -> dict[str, Any]:
    """What there is to say of the vectors. ValueError for an access token among it."""
    told = {"name": concept.name, "model": concept.model.to_dict(), "strength": strength, "provenance": concept.provenance}
    return redacted(told)


def home(model: HookedModel | ModelId | None, told: Mapping[str, Any] | None, file: str) -> ModelId:
    """Whose vectors a file holds: as the caller says, or else the file. ValueError if neither does, or they disagree."""
    here = model if model is None or isinstance(model, ModelId) else identify(model)
    if told is None:
        if here is None:
            raise ValueError(f"{file!r} does not say whose vectors it holds; name the model, loaded or its ModelId, as model=.")
        return here
    try:
        there, name = ModelId(**told["model"]), str(told["name"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file!r} says too little about its model ({error}); was it edited? Write it again.") from error
    if here is None:
        return there
    check_home(ConceptVector(torch.zeros(0, there.d_model), (), name, there), here)
    return here


def origin(format: str, told: Mapping[str, Any] | None) -> dict[str, Any]:
    """The provenance of what was read."""
    if told is None:
        return {"read_from": format}
    return {"read_from": format, "factor": told.get("strength"), "of": told.get("provenance")}
