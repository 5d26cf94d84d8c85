"""Exchange: concepts in the formats of other tools, and out of them.

    write_exchange(moved, "happiness.gguf", "gguf", strength=4.0)          # llama.cpp: --control-vector happiness.gguf
    concept = read_exchange("vectors.npy", model=identify(target), layers=[18])

    gguf              control vectors of llama.cpp and repeng               `write_gguf`, `read_gguf` (extra `gguf`)
    repeng            the same in memory                                    `to_repeng`, `from_repeng`
    steering-vectors  in memory                                             `to_steering_vector`, `from_steering_vector`
    npy, npz, safetensors, pt   plain arrays, one row or key a layer        `write_npy`, ..., `read_arrays`
    spec              a transplant as JSON, and what a RemoteBridge takes   `to_spec`, `from_spec`, `to_interventions`
    the paper's files, maps included                                        `read_arrays`, `read_map`, `read_maps`, `carry`

In all of them layer l is what it is here: the output of block l, counted from 0. Vectors leave as float32, multiplied by the
strength, and come back bit by bit. What a format can hold beside them goes along - name, model, strength, provenance, never a
path of this machine - and is checked when it is read; for a format that holds none of it, say `model=`.

Nothing is unpickled: arrays are read with `allow_pickle=False`, torch's files with `weights_only=True`.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from contrans_tl.exchange.arrays import read_arrays as read_arrays
from contrans_tl.exchange.arrays import write_npy as write_npy
from contrans_tl.exchange.arrays import write_npz as write_npz
from contrans_tl.exchange.arrays import write_safetensors as write_safetensors
from contrans_tl.exchange.gguf import read_gguf as read_gguf
from contrans_tl.exchange.gguf import write_gguf as write_gguf
from contrans_tl.exchange.paper import carry as carry
from contrans_tl.exchange.paper import read_map as read_map
from contrans_tl.exchange.paper import read_maps as read_maps
from contrans_tl.exchange.repeng import from_repeng as from_repeng
from contrans_tl.exchange.repeng import to_repeng as to_repeng
from contrans_tl.exchange.spec import from_spec as from_spec
from contrans_tl.exchange.spec import read_spec as read_spec
from contrans_tl.exchange.spec import to_interventions as to_interventions
from contrans_tl.exchange.spec import to_spec as to_spec
from contrans_tl.exchange.spec import write_spec as write_spec
from contrans_tl.exchange.steering_vectors import from_steering_vector as from_steering_vector
from contrans_tl.exchange.steering_vectors import to_steering_vector as to_steering_vector
from contrans_tl.models import HookedModel, ModelId
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import Positions

Format = Literal["gguf", "npy", "npz", "safetensors", "pt", "spec"]
_SUFFIXES: dict[str, Format] = {
    ".gguf": "gguf",
    ".npy": "npy",
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".pt": "pt",
    ".pth": "pt",
    ".json": "spec",
}
_WRITERS = {"gguf": write_gguf, "npy": write_npy, "npz": write_npz, "safetensors": write_safetensors}


def write_exchange(
    concept: ConceptVector,
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    strength: float = 1.0,
    positions: Positions = "all",
) -> Path:
    """Write a concept for another tool; the path written.

    Args:
        format: None goes by the path's suffix. `pt` is read only: torch's own files are pickles.
        strength: multiplies the vectors; in units of the vector as refined.
        positions: which tokens are steered, which only a `spec` can say.

    Raises:
        ValueError: an unknown format, positions for one that steers all tokens, or what the format cannot hold.
        ImportError: `gguf` without its extra.
    """
    kind = _format(path, format)
    if kind == "pt":
        raise ValueError("torch's .pt files are pickles, and are read only; write safetensors or npz.")
    if kind == "spec":
        return write_spec(concept, path, strength=strength, positions=positions)
    if positions != "all":
        raise ValueError(f"a {kind} file does not say which tokens to steer; write a spec for positions={positions!r}.")
    return _WRITERS[kind](concept, path, strength=strength)


def read_exchange(
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    model: HookedModel | ModelId | None = None,
    layers: Sequence[int] | None = None,
    name: str | None = None,
) -> ConceptVector:
    """Read a concept that another tool, or `write_exchange`, wrote.

    Args:
        format: None goes by the path's suffix.
        model: whose residual stream the vectors are of; not needed where the file says so, checked against it where it does.
        layers: which layers to read. An array without zero rows in between (see `read_arrays`) needs them.
        name: of the concept; None takes the file's, or its file name.

    Raises:
        ValueError: no such file, one of another format or that does not fit the model, no model given where the file has none.
        ImportError: `gguf` without its extra.
    """
    kind = _format(path, format)
    if not Path(path).is_file():
        raise ValueError(f"expected a {kind} file; there is no file {str(path)!r}.")
    if kind != "gguf" and kind != "spec":
        return read_arrays(path, model, format=kind, layers=layers, name=name)
    found = (read_gguf if kind == "gguf" else read_spec)(path, model, name=name)
    return found if layers is None else found.only(*layers)


def _format(path: str | os.PathLike[str], format: str | None) -> Format:
    known = get_args(Format)
    found = _SUFFIXES.get(Path(path).suffix.lower()) if format is None else format
    if found not in known:
        what = f"format {format!r}" if format is not None else f"{str(path)!r}, whose suffix tells none"
        raise ValueError(f"expected a format among {', '.join(known)}; got {what}.")
    return cast(Format, found)
