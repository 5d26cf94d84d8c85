"""steering-vectors: its `SteeringVector(layer_activations, layer_type)` in memory, both ways.

    with to_steering_vector(moved.only(18)).apply(hf_model, multiplier=4.0): ...

A vector of layer type `decoder_block` is added to, and was read from, the output of block l counted from 0: our layers, and a
negative one counts from the end. The other types (attention, MLP, norms) are outputs of other modules and are refused. Reading
needs no steering-vectors: anything with `layer_activations` and `layer_type` will do.
"""

from typing import TYPE_CHECKING, Any

import torch

from contrans_tl.exchange.rows import check_raw, home, incoming, outgoing
from contrans_tl.models import HookedModel, ModelId
from contrans_tl.refinement import ConceptVector

if TYPE_CHECKING:
    from steering_vectors import SteeringVector

_BLOCK = "decoder_block"


def to_steering_vector(concept: ConceptVector, *, strength: float = 1.0) -> "SteeringVector":
    """The concept as a steering vector. The strength multiplies the vectors; `apply`'s multiplier multiplies again.

    Raises:
        ValueError: a basis other than raw, a strength that is not finite.
        ImportError: without steering-vectors.
    """
    check_raw(concept.model, "steering-vectors")
    rows = outgoing(concept, strength)
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise ImportError(
            f"this needs steering-vectors, which does not import here ({error}): pip install steering-vectors"
        ) from error
    return SteeringVector(layer_activations=rows, layer_type=_BLOCK)


def from_steering_vector(vector: Any, model: HookedModel | ModelId, *, name: str = "steering vector") -> ConceptVector:
    """The concept of a steering vector.

    Args:
        vector: has `layer_activations`, {layer: tensor of d_model numbers}, and `layer_type`.

    Raises:
        ValueError: a layer type other than `decoder_block`, a model in another basis than raw, layers or a width that it does
            not have.
    """
    here = home(model, None, name)
    check_raw(here, "steering-vectors")
    if vector.layer_type != _BLOCK:
        raise ValueError(
            f"expected layer_type {_BLOCK!r}, the residual stream; {name!r} was read from {vector.layer_type!r}. Train it with "
            f"layer_type={_BLOCK!r}."
        )
    rows = {}
    for layer, row in vector.layer_activations.items():
        counted = int(layer) + here.n_layers if int(layer) < 0 else int(layer)
        if counted in rows:
            raise ValueError(f"{name!r} names layer {counted} of {here.name} twice, from either end.")
        rows[counted] = torch.as_tensor(row)
    return incoming(rows, here, name, {"read_from": "steering-vectors"})
