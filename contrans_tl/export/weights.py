"""Weights on disk, never in memory: a safetensors file is 8 bytes, a JSON header and raw numbers.

    stored = read_header(path)                            # what is in a file: names, shapes, places
    stored["lm_head.weight"].entries(range(0, 512))       # these entries, read one by one
    copy_weights(path, copy, changed={...}, added={...})  # the same file with a few tensors changed and a few more

A copy streams through one small buffer. What is not changed keeps its name, dtype, order and bytes, and a file's own metadata
stay; what is added comes behind everything else. Format: https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of weights that are plain numbers; what is quantised is stored as others."""
BUFFER = 2**22
"""Bytes that a copy holds at a time."""


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    file: Path
    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes begin, counted from the beginning of the file."""
    size: int
    """In bytes."""

    def entries(self, places: Sequence[int]) -> Float[Tensor, " place"]:
        """The entries at these places of the flattened tensor, read one by one: a mapped file would count as memory."""
        width = DTYPES[self.dtype].itemsize
        with self.file.open("rb", buffering=0) as file:
            found = bytearray()
            for place in places:
                file.seek(self.start + width * place)
                found += file.read(width)
        return torch.frombuffer(found, dtype=DTYPES[self.dtype]).float()

    def values(self) -> Float[Tensor, "..."]:
        """All of it, as float32; for what is small."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            content = bytearray(file.read(self.size))
        return torch.frombuffer(content, dtype=DTYPES[self.dtype]).float().reshape(self.shape)

    def rounded(self, values: Float[Tensor, "..."]) -> Tensor:
        """Other values as this tensor's file would hold them."""
        return values.to(DTYPES[self.dtype])


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name, in its order. ValueError for one that is truncated or no safetensors file."""
    header, beginning = _header(path)
    return {
        name: Stored(path, name, about["dtype"], tuple(about["shape"]), beginning + start, end - start)
        for name, about in header.items()
        if name != "__metadata__"
        for start, end in [about["data_offsets"]]
    }


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and where the numbers begin. Checked by safetensors itself: sizes, overlaps, gaps, the end of the file."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path.name} is truncated or no safetensors file ({error}); get it again.") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def copy_weights(path: Path, copy: Path, *, changed: Mapping[str, Tensor], added: Mapping[str, Tensor]) -> str:
    """Write a file's copy with some tensors changed, in dtype and shape as they were, and others added; its sha256.

    With nothing to change or add it is the same, byte for byte.
    """
    header, beginning = _header(path)
    stored, end = read_header(path), path.stat().st_size
    tail = end - beginning
    for name, x in added.items():
        size = x.numel() * x.element_size()
        dtype = next(key for key, dtype in DTYPES.items() if dtype == x.dtype)
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [tail, tail + size]}
        tail += size
    with path.open("rb", buffering=0) as source, copy.open("wb", buffering=0) as file:
        out = _Hashed(file)
        if added:
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            text += b" " * (-len(text) % 8)
            out.write(len(text).to_bytes(8, "little") + text)
            source.seek(beginning)
        for name in sorted(changed, key=lambda name: stored[name].start):
            out.copy(source, stored[name].start - source.tell())
            out.write(_to_bytes(changed[name]))
            source.seek(stored[name].size, os.SEEK_CUR)
        out.copy(source, end - source.tell())
        for x in added.values():
            out.write(_to_bytes(x))
    return out.digest.hexdigest()


class _Hashed:
    """A file that is written and hashed in one go."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.buffer = memoryview(bytearray(BUFFER))

    def write(self, content: bytes | memoryview) -> None:
        self.digest.update(content)
        rest = memoryview(content)
        while rest:
            rest = rest[self.file.write(rest) :]

    def copy(self, source: Any, size: int) -> None:
        while size:
            got = source.readinto(self.buffer[: min(size, BUFFER)])
            if not got:
                raise OSError(f"{source.name} became shorter while it was copied.")
            self.write(self.buffer[:got])
            size -= got


def _to_bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
