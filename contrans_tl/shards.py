"""Shards: activations of a corpus that memory does not hold, kept on disk.

    x = store(source, texts, "activations", rows="words")       # the source runs, and can be freed
    y = store(target, texts, "activations", rows="words")       # then the target runs
    fit_streamed(x, y, (9, 18))                                 # one pair of layers on all rows
    LayerMaps.fit(x.sample(4000), y.sample(4000))               # every pair of layers on some of them

A shard is a safetensors file with the rows of some consecutive texts, one tensor a layer, and SHA-256 checksums. Shards are
written one after the other, each beside its name and then renamed: a run killed at any moment has lost at most the one it was
at, and `store` called again collects only what is missing. It reads every shard that is there and redoes, with a warning,
those that are damaged or were made of other tokens. Rows are kept in the model's own precision where that loses nothing, as
bfloat16 rows of a bfloat16 model, in float32 otherwise.

Memory holds one shard at a time, beside the texts and 16 bytes a row that say which text and character it comes from. Under
torchrun (`processes.joined`) every process collects its share of the shards, into a folder that all of them see.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from contrans_tl import artifacts
from contrans_tl.activations import (
    NO_WORD_ENDS,
    Activations,
    Rows,
    check_texts,
    hash_texts,
    locate,
    read_rows,
    row_index,
    shared_rows,
)
from contrans_tl.models import HookedModel, ModelId, check_layers, check_ready, identify
from contrans_tl.processes import rank, share, summed
from contrans_tl.progress import track
from contrans_tl.tokens import Encoding, prepends_bos
from contrans_tl.weights import precision_of

TEXTS_PER_SHARD = 128
"""Of sentences of 15 words, with all 32 layers of width 4096, a shard is a gigabyte in float32 (0.5 MiB a row) and takes three
times that while it is written. Batches are of texts of similar length within a shard, so smaller ones pad more: on the embedded
pair's source, shards of 64 texts took 1.5 times as long as all 800 in memory, of 128 and of 800 texts 1.2 times."""
INDEX = "index.safetensors"


@dataclass(frozen=True, eq=False)
class StoredActivations:
    """Rows of the residual stream of one model, on disk. `Activations` whose values are read when they are asked for."""

    folder: Path
    layers: tuple[int, ...]
    sentence: Int[Tensor, " row"]
    """Which text a row comes from; in ascending order."""
    end: Int[Tensor, " row"]
    """Character of that text at which the row's token ends; -1 for the last token."""
    model: ModelId
    rows: Rows
    prepend_bos: bool
    texts_hash: str
    n_texts: int
    texts_per_shard: int
    sizes: Int[Tensor, " shard"]
    """Rows of each shard."""
    checksums: UInt8[Tensor, "shard layer 32"]

    def __len__(self) -> int:
        return len(self.sentence)

    def __repr__(self) -> str:
        return (
            f"StoredActivations({self.model.name!r}, {len(self)} rows x {len(self.layers)} layers x {self.model.d_model} "
            f"of {self.n_texts} texts, in {str(self.folder)!r})"
        )

    @property
    def n_shards(self) -> int:
        return len(self.sizes)

    def shard(self, number: int, layers: Sequence[int] | None = None) -> Activations:
        """The rows of one shard, in float32; with `layers`, nothing else is read.

        Raises:
            ValueError: a layer that was not stored, or a shard that is missing or damaged.
        """
        layers = self._check_layers(layers)
        path = _shard_path(self.folder, number)
        rows = slice(int(self.sizes[:number].sum()), int(self.sizes[: number + 1].sum()))
        values = torch.empty(int(self.sizes[number]), len(layers), self.model.d_model)
        try:
            with safe_open(path, framework="pt") as file:
                for slot, layer in enumerate(layers):
                    x = file.get_tensor(_layer_name(layer))
                    if bytes(self.checksums[number, self.layers.index(layer)].tolist()).hex() != _checksum(x):
                        raise ValueError(f"layer {layer} is not what was written")
                    values[:, slot] = x
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"the shard {str(path)!r} is missing or damaged ({error}); store again: it alone is redone."
            ) from error
        return Activations(
            values=values,
            layers=layers,
            sentence=self.sentence[rows],
            end=self.end[rows],
            model=self.model,
            rows=self.rows,
            prepend_bos=self.prepend_bos,
            texts_hash=self.texts_hash,
        )

    def read(self, layers: Sequence[int] | None = None) -> Activations:
        """All rows, in memory. ValueError as of `shard`."""
        return self._gather(torch.ones(self.n_texts, dtype=torch.bool), layers)

    def sample(self, n_rows: int, *, seed: int = 0, layers: Sequence[int] | None = None) -> Activations:
        """At most `n_rows` rows, in memory: those of whole texts, drawn in an order that the seed and the number of texts alone
        decide. Of two models' samples the smaller one's texts are in both, and `pair` finds them.

        Raises:
            ValueError: not even the first text drawn fits, or as `shard`.
        """
        order = torch.randperm(self.n_texts, generator=torch.Generator().manual_seed(seed))
        upto = self.sentence.bincount(minlength=self.n_texts)[order].cumsum(0)
        drawn = torch.zeros(self.n_texts, dtype=torch.bool)
        drawn[order[upto <= n_rows]] = True
        if not bool(drawn[self.sentence].any()):
            raise ValueError(f"expected n_rows of at least a text's, {int(upto[upto > 0][0])}; got {n_rows}.")
        return self._gather(drawn, layers)

    def _gather(self, of_texts: Shaped[Tensor, " text"], layers: Sequence[int] | None) -> Activations:
        layers, kept = self._check_layers(layers), of_texts[self.sentence]
        values = torch.empty(int(kept.sum()), len(layers), self.model.d_model)
        done = 0
        for number, of_shard in enumerate(kept.split(self.sizes.tolist())):
            if n := int(of_shard.sum()):
                values[done : done + n] = self.shard(number, layers).values[of_shard]
                done += n
        return Activations(
            values, layers, self.sentence[kept], self.end[kept], self.model, self.rows, self.prepend_bos, self.texts_hash
        )

    def _check_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        if layers is None:
            return self.layers
        if absent := [layer for layer in layers if layer not in self.layers]:
            raise ValueError(f"expected stored layers {self.layers}; got {absent[0]}.")
        return tuple(layers)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "StoredActivations":
        """What `store` left in a folder, without the model: `StoredActivations.folder` of an earlier run, all of it collected.

        Raises:
            ValueError: no such folder, an unfinished one, or a damaged index.
        """
        tensors, about = artifacts.load(Path(folder) / INDEX, "activation index")
        if _checksums(tensors) != about["sha256"]:
            raise ValueError(f"{str(Path(folder) / INDEX)!r} is damaged; store again: it is made anew from the shards.")
        known = ("rows", "prepend_bos", "texts_hash", "n_texts", "texts_per_shard")
        fields: dict[str, Any] = {**{name: about[name] for name in known}, **tensors}
        return cls(folder=Path(folder), layers=tuple(about["layers"]), model=ModelId(**about["model"]), **fields)


def store(
    model: HookedModel,
    texts: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    rows: Rows = "last",
    layers: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    texts_per_shard: int = TEXTS_PER_SHARD,
) -> StoredActivations:
    """`collect` to disk: the same rows, in shards. They go to a subfolder of `folder` that stands for the model, its basis and
    precision, the layers, the kind of rows and the texts; what it holds already is checked and not collected again.

    Warns of every shard that is damaged or was made of other tokens, and redoes it.

    Raises:
        ValueError: as `collect`, before the model runs.
    """
    texts = check_texts(texts, rows)
    check_ready(model)
    if min(batch_size, texts_per_shard) < 1:
        raise ValueError(f"expected batch_size and texts_per_shard of at least 1; got {batch_size} and {texts_per_shard}.")
    shards = _Shards.below(
        Path(folder),
        identify(model),
        precision_of(model),
        layers=check_layers(layers, model.cfg.n_layers, str(model.cfg.model_name)),
        rows=rows,
        prepend_bos=prepends_bos(model, prepend_bos),
        texts_hash=hash_texts(texts),
        n_texts=len(texts),
        texts_per_shard=texts_per_shard,
    )

    def located(number: int) -> tuple[list[Encoding], list[dict[int, int]]]:
        first = number * texts_per_shard
        return locate(model, texts[first : first + texts_per_shard], rows, prepend_bos)

    # Every text is read before the model runs: a text that cannot be collected is not found after hours.
    found, intact = 0, torch.zeros(shards.n_shards, dtype=torch.long)
    entries: dict[int, _Entry] = {}
    checked = share(shards.n_shards)
    for number in track(checked, f"reading {len(texts)} texts", len(checked)):
        encodings, places = located(number)
        found += sum(map(len, places))
        if entry := shards.intact(number, encodings, places):
            entries[number], intact[number] = entry, 1
    if not int(summed(torch.tensor(found))):
        raise ValueError(NO_WORD_ENDS)

    missing = (summed(intact) == 0).nonzero()[:, 0].tolist()
    mine = [missing[i] for i in share(len(missing))]
    for number in track(mine, f"activations of {model.cfg.model_name}", len(mine)):
        encodings, places = located(number)
        values = read_rows(model, encodings, places, shards.about["layers"], batch_size)
        entries[number] = shards.write(number, encodings, places, values)
    return shards.index(entries)


def paired_shards(
    source: StoredActivations, target: StoredActivations, layers: tuple[int, int], numbers: Iterable[int] | None = None
) -> Iterator[tuple[Activations, Activations]]:
    """`pair`, shard by shard, of one source and one target layer; of these shards, or of all.

    Raises:
        ValueError: different texts, kinds of rows or shards, or a shard that is missing or damaged.
    """
    kind = (source.texts_hash, source.rows, source.texts_per_shard)
    if kind != (target.texts_hash, target.rows, target.texts_per_shard):
        raise ValueError(
            "expected activations of the same texts at the same kind of rows in shards of the same size; store both alike."
        )
    s, t = source._check_layers(layers[:1]), target._check_layers(layers[1:])

    def paired(number: int) -> tuple[Activations, Activations]:
        x, y = source.shard(number, s), target.shard(number, t)
        kept = shared_rows(x, y)
        return x.take(kept[:, 0]), y.take(kept[:, 1])

    return map(paired, range(source.n_shards) if numbers is None else numbers)  # the errors above come before the first shard


@dataclass(frozen=True, eq=False)
class _Entry:
    """What the index says of one shard."""

    sentence: Int[Tensor, " row"]
    end: Int[Tensor, " row"]
    checksums: UInt8[Tensor, "layer 32"]


@dataclass(frozen=True, eq=False)
class _Shards:
    """What a store consists of, while it is filled."""

    folder: Path
    model: ModelId
    dtype: torch.dtype
    about: dict[str, Any]
    """The fields of `StoredActivations` that are known before the model has run."""

    @classmethod
    def below(cls, folder: Path, model: ModelId, dtype: torch.dtype, **about: Any) -> "_Shards":
        """In the subfolder that stands for all this."""
        key = json.dumps({**about, "dtype": str(dtype)}, sort_keys=True)
        name = f"{model.fingerprint}-{model.basis}-{about['rows']}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        return cls(folder / name, model, dtype, about)

    @property
    def n_shards(self) -> int:
        return math.ceil(self.about["n_texts"] / self.about["texts_per_shard"])

    def intact(self, number: int, encodings: Sequence[Encoding], places: Sequence[dict[int, int]]) -> _Entry | None:
        """A shard that is there, whole, and of these tokens; None, with a warning if it is there, otherwise."""
        path = _shard_path(self.folder, number)
        if not path.exists():
            return None
        expected = self._index_of(number, places)
        try:
            tensors, about = artifacts.load(path, "activation shard")
            checksums = _checksums(tensors)
            if about.get("sha256") != checksums or about.get("of") != [self.folder.name, number]:
                raise ValueError("it does not hold what was written")
            if about.get("tokens") != _hash_tokens(encodings) or any(
                not torch.equal(tensors[k], expected[k]) for k in expected
            ):
                raise ValueError("its texts are other tokens or words now")
        except ValueError as error:
            warnings.warn(f"the shard {str(path)!r} is collected again: {error}.", stacklevel=3)
            return None
        return self._entry(expected, checksums)

    def write(
        self,
        number: int,
        encodings: Sequence[Encoding],
        places: Sequence[dict[int, int]],
        values: Float[Tensor, "row layer d_model"],
    ) -> _Entry:
        index = self._index_of(number, places)
        tensors = {_layer_name(layer): _compact(values[:, i], self.dtype) for i, layer in enumerate(self.about["layers"])}
        tensors |= index
        checksums = _checksums(tensors)
        about = {"of": [self.folder.name, number], "tokens": _hash_tokens(encodings), "sha256": checksums}
        artifacts.save(_shard_path(self.folder, number), "activation shard", tensors, about)
        return self._entry(index, checksums)

    def _index_of(self, number: int, places: Sequence[dict[int, int]]) -> dict[str, Int[Tensor, " row"]]:
        sentence, end = row_index(places, number * self.about["texts_per_shard"])
        return {"sentence": sentence, "end": end}

    def _entry(self, index: Mapping[str, Tensor], checksums: Mapping[str, str]) -> _Entry:
        of_layers = [_as_tensor(checksums[_layer_name(layer)]) for layer in self.about["layers"]]
        return _Entry(index["sentence"], index["end"], torch.stack(of_layers))

    def index(self, entries: Mapping[int, _Entry]) -> StoredActivations:
        """From the entries of every process, its own in each. Returns when all shards of all processes are written."""
        sizes = torch.zeros(self.n_shards, dtype=torch.long)
        checksums = torch.zeros(self.n_shards, len(self.about["layers"]), 32, dtype=torch.uint8)
        for number, entry in entries.items():
            sizes[number], checksums[number] = len(entry.sentence), entry.checksums
        sizes, checksums = summed(sizes), summed(checksums)
        first_row = [0, *sizes.cumsum(0).tolist()]
        sentence, end = torch.zeros(2, first_row[-1], dtype=torch.long)
        for number, entry in entries.items():
            rows = slice(first_row[number], first_row[number + 1])
            sentence[rows], end[rows] = entry.sentence, entry.end
        tensors = {"sizes": sizes, "checksums": checksums, "sentence": summed(sentence), "end": summed(end)}
        if rank() == 0:
            about = {**self.about, "model": self.model.to_dict(), "sha256": _checksums(tensors)}
            artifacts.save(self.folder / INDEX, "activation index", tensors, about)
        summed(torch.zeros(1))  # nobody goes on before the index is there
        fields: dict[str, Any] = {**self.about, **tensors}
        return StoredActivations(folder=self.folder, model=self.model, **fields)


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:06d}.safetensors"


def _layer_name(layer: int) -> str:
    return f"layer.{layer}"


def _compact(values: Float[Tensor, "row d_model"], dtype: torch.dtype) -> Float[Tensor, "row d_model"]:
    """In the model's dtype if it is smaller than float32 and holds the same numbers."""
    if dtype.itemsize >= values.dtype.itemsize:
        return values
    small = values.to(dtype)
    return small if torch.equal(small.to(values), values) else values


def _hash_tokens(encodings: Sequence[Encoding]) -> str:
    return hashlib.sha256(json.dumps([encoding.ids for encoding in encodings]).encode()).hexdigest()


def _checksum(x: Shaped[Tensor, "*shape"]) -> str:
    """SHA-256 of the tensor, its shape and dtype included."""
    digest = hashlib.sha256(f"{x.dtype}{tuple(x.shape)}".encode())
    digest.update(x.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _checksum(x) for name, x in tensors.items()}


def _as_tensor(checksum: str) -> UInt8[Tensor, "32"]:
    return torch.tensor(list(bytes.fromhex(checksum)), dtype=torch.uint8)
