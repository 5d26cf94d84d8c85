"""A model folder as a target: what is in it and which model it is, found without loading it.

    target = ModelFolder.open("EleutherAI/pythia-160m")   # hub id, or a local folder
    target.model                                          # the ModelId that `identify(load_model(...))` gives
    target.parameter("gpt_neox.embed_in.weight")          # where it is stored

Weights are those that transformers would load: `model.safetensors`, or the shards of `model.safetensors.index.json` where there
is none. Names may lack the prefix of the language model (`h.0...` for `transformer.h.0...`), as GPT-2's do.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.export.architectures import INSTEAD, Architecture, architecture_of, split
from contrans_tl.export.weights import DTYPES, Stored, read_header
from contrans_tl.models import ModelId, check_model_name
from contrans_tl.weights import fingerprint, sampled

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_WEIGHTS = tuple(
    f".{ending}" for ending in "safetensors bin pt pth ckpt h5 msgpack gguf onnx onnx_data mlmodel tflite ot npz".split()
)
"""How names of weights end. None is copied but those that are steered: an engine might load them instead."""
HEADS = {"lm_head.weight": "embed_out.weight"}
"""GPT-NeoX's head: as transformers 5 calls it, and as files do."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder with config.json and safetensors of a model that can be exported."""

    path: Path
    name: str
    """Hub id, or the folder's own name."""
    revision: str | None
    """Commit of the hub repository, where it comes from there."""
    written: Mapping[str, Any]
    """config.json."""
    config: Any
    """The same, as transformers understands it."""
    architecture: Architecture
    shards: tuple[str, ...]
    """Files of the weights."""
    index: Mapping[str, Any] | None
    """What the index of several files says."""
    stored: Mapping[str, Stored]
    """Every tensor in them, by its name there."""

    @classmethod
    def open(cls, target: str | os.PathLike[str], revision: str | None = None) -> "ModelFolder":
        """Look into a folder, or fetch it from the hub; reads headers only.

        Raises:
            ValueError: no model folder, an architecture whose blocks have no bias at their end, weights that are missing,
                quantised, adapted or not in safetensors.
            OSError: a hub id that cannot be fetched.
        """
        path, name, commit = _fetch(os.fspath(target), revision)
        if (path / "adapter_config.json").exists():
            raise ValueError(
                f"{name} holds an adapter (adapter_config.json): merge it into its model, then export that. {INSTEAD}."
            )
        written = _read_json(path / "config.json")
        architecture = architecture_of(written)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path)
        shards, index = _weights(path, name)
        stored: dict[str, Stored] = {}
        for shard in shards:
            found = read_header(path / shard)
            if twice := sorted(set(found) & set(stored)):
                raise ValueError(f"{twice[0]} is both in {stored[twice[0]].file.name} and in {shard}: get the folder again.")
            stored |= found
        folder = cls(path, name, commit, written, config, architecture, shards, index, stored)
        folder._check_complete()
        return folder

    @property
    def n_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def model(self) -> ModelId:
        """Whose residual stream a concept must be of, to be added here: 512 entries of every weight are read."""
        return ModelId(self.name, self.revision, fingerprint(self._samples()), self.n_layers, self.d_model, "raw")

    @cached_property
    def _skeleton(self) -> Any:
        return skeleton(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The model's parameters, tied ones once."""
        return {name: tuple(weight.shape) for name, weight in self._skeleton.named_parameters()}

    def parameter(self, name: str) -> Stored | None:
        """Where a parameter is stored; None where it is not."""
        prefix = f"{self._skeleton.base_model_prefix}."
        names = name, name.removeprefix(prefix), HEADS.get(name, name)
        return next((self.stored[known] for known in names if known in self.stored), None)

    def name_beside(self, bias: str) -> tuple[str, Stored]:
        """How a bias that is not stored would be named, and the weight that it belongs to."""
        weight = self.parameter(f"{bias.removesuffix('.bias')}.weight")
        assert weight is not None
        return f"{weight.name.removesuffix('.weight')}.bias", weight

    def _check_complete(self) -> None:
        for name, shape in self.shapes.items():
            found = self.parameter(name)
            if found is None:
                raise ValueError(
                    f"expected the weights of {self.name} to have {name}; there is none in {', '.join(self.shards)}."
                )
            if found.dtype not in DTYPES:
                raise ValueError(f"{name} is stored as {found.dtype}, quantised: export what it was made from. {INSTEAD}.")
            if found.shape != shape:
                raise ValueError(f"expected {name} of shape {shape}, as config.json says; it is stored as {found.shape}.")

    def _samples(self) -> Iterator[tuple[tuple[int, ...], Float[Tensor, " sample"]]]:
        # Also a head beside an embedding that it is tied to: if the two differ, transformers does not tie them.
        for name, _ in self._skeleton.named_parameters(remove_duplicate=False):
            stored = self.parameter(name)
            if stored is None:
                continue
            yield stored.shape, stored.entries(sampled(prod(stored.shape)))
            whole = torch.empty(stored.shape, device="meta")
            for shape, part in split(self.config.model_type, name, whole, self.config.num_attention_heads):
                yield shape, stored.entries(_places(part))


def skeleton(config: Any) -> Any:
    """The language model of a configuration, without its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _places(part: Tensor) -> list[int]:
    """Where the sampled entries of a view lie in what it is a view of."""
    at = torch.unravel_index(torch.tensor(sampled(part.numel())), part.shape)
    return sum((i * stride for i, stride in zip(at, part.stride(), strict=True)), torch.tensor(part.storage_offset())).tolist()


def _fetch(target: str, revision: str | None) -> tuple[Path, str, str | None]:
    """The folder, what the model is called, and its commit."""
    check_model_name(target)
    path = Path(target)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"a revision goes with a hub id; {path.name} is a folder, exported as it is.")
        return path, path.resolve().name, None
    from huggingface_hub import hf_hub_download, snapshot_download

    # First what decides whether the rest is of use.
    commit = Path(hf_hub_download(target, "config.json", revision=revision)).parent.name
    architecture_of(_read_json(Path(hf_hub_download(target, "config.json", revision=commit))))
    unused = [f"*{ending}" for ending in OTHER_WEIGHTS if not ending.startswith(".safetensors")]
    return Path(snapshot_download(target, revision=commit, ignore_patterns=unused)), target, commit


def _weights(path: Path, name: str) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """The files that transformers would load, and the index that names several."""
    if (path / WEIGHTS).is_file():
        return (WEIGHTS,), None
    if not (path / INDEX).is_file():
        other = sorted(file.name for file in path.iterdir() if is_weights(file.name))
        found = f" (there is {', '.join(other[:3])}: save it again as safetensors, with save_pretrained)" if other else ""
        raise ValueError(f"expected {WEIGHTS} or {INDEX} in {name}; there is none{found}. {INSTEAD}.")
    index = _read_json(path / INDEX)
    shards = tuple(sorted(set(index.get("weight_map", {}).values())))
    for shard in shards:
        if Path(shard).name != shard or not (path / shard).is_file():
            raise ValueError(f"{INDEX} names {shard!r}, which is no file beside it: get the folder again.")
    if not shards:
        raise ValueError(f"{INDEX} names no weights: get the folder again.")
    return shards, index


def is_weights(name: str) -> bool:
    """Whether a file's name is one of weights, or of an index of some."""
    return name.removesuffix(".index.json").endswith(OTHER_WEIGHTS)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no JSON ({error}): get the folder again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected an object in {path.name}: get the folder again.")
    return content
