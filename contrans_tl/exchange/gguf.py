"""GGUF: control vectors as llama.cpp loads them and as repeng saves them (extra `gguf`).

    write_gguf(moved, "happiness.gguf", strength=4.0)
    llama-cli -m target.gguf --control-vector happiness.gguf

A file holds float32 tensors `direction.N` of d_model numbers each, `general.architecture = controlvector`, a
`controlvector.model_hint` and their number as `controlvector.layer_count`. Of this llama.cpp reads the tensors alone
(`common_control_vector_load_one`), repeng the tensors and the hint (`ControlVector.import_gguf`).

**Which layer N is.** Both add `direction.N` to the output of block N counted from 0, at every position: llama.cpp in
`llm_graph_context::build_cvec(cur, il)`, repeng in `ControlModule.forward`. So N is our layer. llama.cpp has no vector for
block 0 and refuses the whole file of one, so a concept with a vector there is refused here. All directions of a file are added;
the paper adds one, `concept.only(18)`.

What a file of theirs was *read from* is another matter, and cannot be told from the file. repeng takes its differences at
`hidden_states[N + 1]`, the output of block N too - but after the final norm for the last block, where no transplant writes.
llama.cpp's generator names the output of block l `direction.{l + 1}`, and so adds it one block after it was read.
`read_gguf` goes by where a vector is added, and warns of one at the last layer in a file that is not our own.
"""

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contrans_tl.artifacts import write_atomically
from contrans_tl.exchange.rows import about, check_raw, home, incoming, origin, outgoing
from contrans_tl.models import HookedModel, ModelId
from contrans_tl.refinement import ConceptVector

_ARCHITECTURE = "controlvector"
_HINT = f"{_ARCHITECTURE}.model_hint"
_COUNT = f"{_ARCHITECTURE}.layer_count"
_ABOUT = "contrans_tl.concept"
_TENSOR = "direction."


def write_gguf(
    concept: ConceptVector, path: str | os.PathLike[str], *, strength: float = 1.0, model_hint: str | None = None
) -> Path:
    """Write the concept as a control vector.

    Args:
        strength: multiplies the vectors; llama.cpp's `--control-vector-scaled` multiplies again.
        model_hint: the architecture, such as "llama"; neither tool refuses another one. None writes the model's name.

    Raises:
        ValueError: a vector at layer 0, a basis other than raw, a strength that is not finite.
        ImportError: without the extra `gguf`.
    """
    gguf = _package()
    check_raw(concept.model, "llama.cpp")
    if 0 in concept.layers:
        rest = ", ".join(map(str, sorted(set(concept.layers) - {0})))
        remedy = f"leave it out: concept.only({rest})" if rest else "refine or reformulate it at a later layer"
        raise ValueError(f"a control vector has no place for layer 0, where {concept.name!r} has a vector; {remedy}.")
    rows, told = outgoing(concept, strength), about(concept, strength)
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "vector.gguf", _ARCHITECTURE)
        writer.add_string(_HINT, told["model"]["name"] if model_hint is None else model_hint)
        writer.add_uint32(_COUNT, len(rows))
        writer.add_string("general.name", told["name"])
        writer.add_string(_ABOUT, json.dumps(told))
        for layer, row in sorted(rows.items()):
            writer.add_tensor(f"{_TENSOR}{layer}", row.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return write_atomically(path, (Path(folder) / "vector.gguf").read_bytes())


def read_gguf(
    path: str | os.PathLike[str], model: HookedModel | ModelId | None = None, *, name: str | None = None
) -> ConceptVector:
    """The concept of a control vector file.

    Args:
        model: the one it steers; not needed for a file of ours, and checked against what it says.
        name: of the concept; None takes the file's.

    Raises:
        ValueError: not a control vector, tensors that llama.cpp would refuse (direction.0 of a repeng file is read), vectors of
            another model, no model given where the file has none.
        ImportError: without the extra `gguf`.

    Warns of a vector at the last layer of a file that is not ours (see above).
    """
    path = Path(path)
    fields, tensors = _read(path)
    if fields.get("general.architecture") != _ARCHITECTURE:
        raise ValueError(
            f"expected a control vector; {path.name!r} is a GGUF file of architecture {fields.get('general.architecture')!r}."
        )
    told = None
    if _ABOUT in fields:
        try:
            told = json.loads(fields[_ABOUT])
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name!r} has a damaged {_ABOUT} ({error}); write it again.") from error
    here = home(model, told, path.name)
    check_raw(here, "llama.cpp")
    rows = {_layer(tensor, path.name): row for tensor, row in tensors.items()}
    if told is None and here.n_layers - 1 in rows:
        warn_of_last(path.name, here)
    name = name or (told or {}).get("name") or fields.get("general.name") or path.stem
    return incoming(rows, here, name, origin("gguf", told))


def warn_of_last(name: str, model: ModelId) -> None:
    """Warn that the last layer's vector may be one of another space."""
    last = model.n_layers - 1
    warnings.warn(
        f"{name!r} has a vector at the last layer, {last}. If repeng trained it, that one was read behind the final norm and "
        "is of another space than the stream it is added to: leave it out with concept.only(...).",
        stacklevel=3,
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Text fields and tensors of a GGUF file."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
        text = gguf.GGUFValueType.STRING
        fields = {key: field.contents() for key, field in reader.fields.items() if field.types[:1] == [text]}
        kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        arrays = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path.name!r} is truncated or not a GGUF file ({error}).") from error
    for tensor, kind in kinds.items():
        if kind != gguf.GGMLQuantizationType.F32 or arrays[tensor].ndim != 1:
            raise ValueError(f"expected float32 vectors; {tensor} of {path.name!r} is {kind.name}, {arrays[tensor].ndim}-d.")
    return fields, {tensor: torch.from_numpy(array) for tensor, array in arrays.items()}


def _layer(tensor: str, file: str) -> int:
    number = tensor.removeprefix(_TENSOR)
    if number == tensor or not number.isdecimal():
        raise ValueError(f"expected tensors {_TENSOR}N; {file!r} has {tensor!r}.")
    return int(number)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("control vectors need gguf: pip install 'contrans-tl[gguf]'") from error
    return gguf
