"""repeng: its `ControlVector(model_type, directions)` in memory, both ways.

    vector = to_repeng(moved.only(18), strength=4.0)
    control = ControlModel(hf_model, [18]); control.set_control(vector)

`directions[l]` is added to the output of block l, counted from 0, by repeng's `ControlModule`: our layers, layer 0 included.
What repeng trains it reads at `hidden_states[l + 1]`, which for the last block is behind the final norm and in another space;
`from_repeng` warns of such a vector. Reading needs no repeng: anything with `directions` will do.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from contrans_tl.exchange.gguf import warn_of_last
from contrans_tl.exchange.rows import about, check_raw, home, incoming, outgoing
from contrans_tl.models import HookedModel, ModelId
from contrans_tl.refinement import ConceptVector

if TYPE_CHECKING:
    from repeng import ControlVector


def to_repeng(concept: ConceptVector, *, strength: float = 1.0, model_type: str | None = None) -> "ControlVector":
    """The concept as repeng's control vector.

    Args:
        strength: multiplies the vectors; `set_control`'s coefficient multiplies again.
        model_type: that of the Hugging Face config, by which repeng tells whether two vectors may be added. None takes the
            model's name.

    Raises:
        ValueError: a basis other than raw, a strength that is not finite.
        ImportError: without repeng, or with one that this environment cannot import.
    """
    check_raw(concept.model, "repeng")
    rows = outgoing(concept, strength)
    try:
        from repeng import ControlVector
    except (ImportError, AttributeError) as error:  # 0.4.0 names numpy's float_, which numpy 2 has not
        raise ImportError(f"this needs repeng, which does not import here ({error}): pip install repeng") from error
    hint = model_type or about(concept, strength)["model"]["name"]
    return ControlVector(hint, {layer: row.numpy() for layer, row in rows.items()})


def from_repeng(vector: Any, model: HookedModel | ModelId, *, name: str = "control vector") -> ConceptVector:
    """The concept of a control vector of repeng's.

    Args:
        vector: has `directions`, {layer: array of d_model numbers}, and may have `model_type`.

    Raises:
        ValueError: a model in another basis than raw, layers or a width that it does not have (directions among the features of
            an autoencoder have another).

    Warns of a vector at the last layer, see above.
    """
    here = home(model, None, name)
    check_raw(here, "repeng")
    # Copies: what repeng reads from a file is a view of it, which torch will not have.
    rows = {int(layer): torch.from_numpy(np.array(row)) for layer, row in vector.directions.items()}
    if here.n_layers - 1 in rows:
        warn_of_last(name, here)
    return incoming(rows, here, name, {"read_from": "repeng", "model_type": getattr(vector, "model_type", None)})
