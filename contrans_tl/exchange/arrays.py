"""Arrays: one row or one key a layer, in numpy's, safetensors' and torch's files.

    write_npy(moved, "happiness.npy")                            # [n_layers, d_model], zero where the concept has no vector
    read_arrays("happiness.npy", identify(target))               # the rows that are not zero
    read_arrays("three.npy", identify(target), layers=[3, 4, 5]) # three rows, or the rows 3, 4 and 5 of n_layers

What they hold and how it is read:

    npy           an array "layer d_model" of all layers of the model, or of the `layers` named; of one layer also " d_model".
                  The paper's vectors are such files: float32, all layers (refined ones, `get_hidden.py`) or all rows but one
                  zero (converted ones, `convert_vector.py`). Its rows are block outputs counted from 0, as ours.
    npz           {"layer.3": vector}, or a single array as above
    safetensors   the same, and in ours `about` as JSON in the header; as `save` of a concept is, but with a key a layer
    pt, pth       the same, or a tensor alone, or a list of tensors; read only

A key is a layer's number, alone or as in `layer.3`, `layers.3`, `blocks.3.hook_resid_post`, `blocks.3.hook_out`. Other than
ours these files do not say whose vectors they hold, in what basis or from what site: whoever reads them says the model, and so
vouches that they are block outputs of it.
"""

import io
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contrans_tl import artifacts
from contrans_tl.exchange.rows import about, home, incoming, origin, outgoing
from contrans_tl.models import HookedModel, ModelId, check_layers
from contrans_tl.refinement import ConceptVector

ArrayFormat = Literal["npy", "npz", "safetensors", "pt"]
Told = dict[str, Any] | None
"""What a file says of its vectors."""
_KIND = "layer vectors"
_KEY = re.compile(r"(?:layers?\.|blocks\.)?(\d+)(?:\.hook_(?:resid_post|out))?")


def write_npy(concept: ConceptVector, path: str | os.PathLike[str], *, strength: float = 1.0) -> Path:
    """Write the array "layer d_model" of all layers of the model, zero where the concept has no vector."""
    every = torch.zeros(concept.model.n_layers, concept.model.d_model)
    for layer, row in outgoing(concept, strength).items():
        every[layer] = row
    content = io.BytesIO()
    np.save(content, every.numpy(), allow_pickle=False)
    return artifacts.write_atomically(path, content.getvalue())


def write_npz(concept: ConceptVector, path: str | os.PathLike[str], *, strength: float = 1.0) -> Path:
    """Write {"layer.l": " d_model"} of the concept's layers."""
    content = io.BytesIO()
    named: dict[str, Any] = {f"layer.{layer}": row.numpy() for layer, row in outgoing(concept, strength).items()}
    np.savez(content, **named)
    return artifacts.write_atomically(path, content.getvalue())


def write_safetensors(concept: ConceptVector, path: str | os.PathLike[str], *, strength: float = 1.0) -> Path:
    """Write {"layer.l": " d_model"} of the concept's layers, and what there is to say of them in the header."""
    rows = {f"layer.{layer}": row for layer, row in outgoing(concept, strength).items()}
    return artifacts.save(path, _KIND, rows, about(concept, strength))


def read_arrays(
    path: str | os.PathLike[str],
    model: HookedModel | ModelId | None = None,
    *,
    format: ArrayFormat | None = None,
    layers: Sequence[int] | None = None,
    name: str | None = None,
) -> ConceptVector:
    """The concept of an .npy, .npz, .safetensors, .pt or .pth file.

    Args:
        format: None goes by the path's suffix.
        model: whose vectors they are; not needed for a safetensors file of ours, and checked against what it says.
        layers: of an array, in increasing order: what its rows are, or which of them to read if it has one for every layer. Of
            named vectors, which to read. None reads all named ones, and all rows that are not zero.
        name: of the concept; None takes the file's, or its file name.

    Raises:
        ValueError: no such file or a truncated one, Python objects in it, no model given where the file has none, rows that
            are not as many as layers, keys that name no layer, another width than the model's.
    """
    path = Path(path)
    kind, content, told = _load(path, format)
    here = home(model, told, path.name)
    if isinstance(content, Mapping):
        rows = _named(content, layers, path.name)
    else:
        rows = _numbered(content, here, layers, path.name)
    return incoming(rows, here, name or (told or {}).get("name") or path.stem, origin(kind, told))


def load_arrays(path: str | os.PathLike[str]) -> Tensor | Mapping[Any, Tensor]:
    """The tensor, or the tensors by key, of any of these files. ValueError as in `read_arrays`."""
    return _load(Path(path), None)[1]


def _load(path: Path, format: ArrayFormat | None) -> tuple[str, Tensor | Mapping[Any, Tensor], Told]:
    kind = format or path.suffix.lower().lstrip(".").replace("pth", "pt")
    if kind not in _READERS:
        raise ValueError(f"expected a file .{', .'.join(_READERS)} or .pth; got {path.name!r}.")
    if not path.is_file():
        raise ValueError(f"expected a file of vectors; there is no file {str(path)!r}.")
    content, told = _READERS[kind](path)
    if not isinstance(content, Mapping):
        return kind, content, told
    if strays := [key for key, value in content.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"expected tensors by layer; {path.name!r} has {type(content[strays[0]]).__name__} {strays[0]!r}.")
    only = list(content.values())
    return kind, only[0] if len(only) == 1 and only[0].ndim == 2 else content, told


def _named(content: Mapping[Any, Tensor], layers: Sequence[int] | None, file: str) -> dict[int, Tensor]:
    """Vectors by layer, from keys."""
    rows: dict[int, Tensor] = {}
    for key, value in content.items():
        if (match := _KEY.fullmatch(str(key))) is None:
            raise ValueError(f"expected vectors under keys such as 'layer.3'; {file!r} has {key!r}.")
        if int(match[1]) in rows:
            raise ValueError(f"{file!r} names layer {int(match[1])} twice.")
        rows[int(match[1])] = value
    if missing := sorted(set(layers or ()) - set(rows)):
        raise ValueError(f"{file!r} has vectors at layers {sorted(rows)}; there is none at {missing}.")
    return rows if layers is None else {layer: rows[layer] for layer in layers}


def _numbered(array: Tensor, model: ModelId, layers: Sequence[int] | None, file: str) -> dict[int, Tensor]:
    """Vectors by layer, from rows."""
    if layers is not None:
        check_layers(layers, model.n_layers, model.name)
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"expected layers in increasing order, as the rows are; got {list(layers)}.")
    if array.ndim == 1 and layers is not None and len(layers) == 1:
        array = array[None]
    if array.ndim != 2:
        raise ValueError(f'expected an array "layer d_model"; {file!r} has shape {tuple(array.shape)}.')
    if len(array) == model.n_layers:
        chosen = layers if layers is not None else [layer for layer, row in enumerate(array) if bool((row != 0).any())]
        return {layer: array[layer] for layer in chosen}
    if layers is None or len(array) != len(layers):
        wanted = f"{model.n_layers}, one for each layer of {model.name}" + (f", or {len(layers)}" if layers is not None else "")
        hint = "say layers=, as many as it has rows"
        if len(array) == model.n_layers + 1:
            hint = "if these are hidden_states, the first row is the embeddings and the last is behind the final norm"
        raise ValueError(f"expected rows: {wanted}; {file!r} has {len(array)} ({hint}).")
    return dict(zip(layers, array, strict=True))


def _read_numpy(path: Path) -> tuple[Any, Told]:
    try:
        found = np.load(path, allow_pickle=False)
        arrays = found if isinstance(found, np.ndarray) else {key: found[key] for key in found.files}
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name!r} is truncated, no numpy file, or holds Python objects ({error}).") from error
    if isinstance(arrays, np.ndarray):
        return _tensor(arrays, path.name), None
    return {key: _tensor(array, path.name) for key, array in arrays.items()}, None


def _tensor(array: np.ndarray | bytes, file: str) -> Tensor:
    # Of a zip numpy hands on what is no array as bytes.
    if isinstance(array, bytes) or array.dtype.kind != "f":
        what = "bytes" if isinstance(array, bytes) else array.dtype
        raise ValueError(f"expected arrays of floating-point numbers; {file!r} holds {what}.")
    return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))


def _read_safetensors(path: Path) -> tuple[Any, Told]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        told = json.loads(metadata["contrans_tl"]) if "contrans_tl" in metadata else None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name!r} is truncated or not a safetensors file ({error}).") from error
    if told is not None and told.get("kind") != _KIND:
        raise ValueError(f"{path.name!r} is a {told.get('kind')} as contrans_tl saves it: load it with its own `load`.")
    return tensors, told


def _read_torch(path: Path) -> tuple[Any, Told]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path.name!r} is truncated, no file of torch's, or holds more than tensors, which is not unpickled."
        ) from error
    if isinstance(found, (list, tuple)) and found and all(isinstance(row, Tensor) and row.ndim == 1 for row in found):
        if len({len(row) for row in found}) > 1:
            raise ValueError(f"expected vectors of one width; {path.name!r} has several.")
        found = torch.stack(list(found))
    if not isinstance(found, (Tensor, Mapping)):
        raise ValueError(f"expected a tensor, or tensors by layer; {path.name!r} holds a {type(found).__name__}.")
    return found, None


_READERS = {"npy": _read_numpy, "npz": _read_numpy, "safetensors": _read_safetensors, "pt": _read_torch}
