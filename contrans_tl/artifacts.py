"""Artifacts: the one format things are saved in - safetensors, with everything that is not a tensor as JSON in the header.

Files are written beside their name and renamed, so that a run killed at any moment leaves the old file or the new one. Nothing
is ever pickled. What is loaded must be of the kind that was asked for and of a format this version knows.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

FORMAT = 1
_KEY = "contrans_tl"


def save(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write tensors and header under this kind; the path written."""
    about = {"format": FORMAT, "kind": kind, "versions": versions(), **header}
    # Copies, as safetensors refuses tensors that share memory: two views of one, or one model as source and target.
    copies = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    return write_atomically(path, to_bytes(copies, {_KEY: json.dumps(about)}))


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of this kind.

    Raises:
        ValueError: no such file, a truncated or foreign one, another kind of artifact, or a newer format.
    """
    tensors, about = _read(path, kind)
    if about["kind"] != kind:
        raise ValueError(f"expected a file of kind {kind!r}; {str(path)!r} is of kind {about['kind']!r}.")
    return tensors, about


def header_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a file of any kind, `kind` and `format` in it; its tensors are not read.

    Raises:
        ValueError: no such file, a truncated or foreign one, or a newer format.
    """
    return _read(path, "contrans_tl", tensors=False)[1]


def _read(path: str | os.PathLike[str], kind: str, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a {kind} file; there is no file {str(path)!r}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata[_KEY]) if _KEY in metadata else None
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is truncated or not a safetensors file ({error}); save it again.") from error
    if not isinstance(about, dict) or not {"format", "kind"} <= set(about):
        raise ValueError(f"{str(path)!r} was not written by contrans_tl: its header says nothing about model and layers.")
    if about["format"] > FORMAT:
        raise ValueError(f"{str(path)!r} has format {about['format']}; this version reads up to {FORMAT}. Update contrans_tl.")
    return found, about


def write_json(path: str | os.PathLike[str], content: Any) -> Path:
    """Write plain values as JSON. A number that is not finite becomes null: JSON has no NaN, and other readers refuse it."""
    return write_atomically(path, (json.dumps(_finite(content), indent=1, allow_nan=False) + "\n").encode())


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_atomically(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write the bytes beside the path, then rename: never a half-written file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def versions() -> dict[str, str]:
    """Versions of what decides about numbers."""
    return {name: version(name) for name in ("contrans-tl", "transformer-lens", "transformers", "torch")}
