"""Exact export: an ordinary Hugging Face folder of the steered model, its weights streamed and never loaded.

    written = export_folder(moved, "EleutherAI/pythia-410m", "pythia-anger", strength=2.0)
    written.biases                                        # ("gpt_neox.layers.18.mlp.dense_4h_to_h.bias",)

Everything is checked before the first byte is copied: that the concept lives in this very model (by the fingerprint of its
weights, from samples on disk), that the architecture has the bias, that the disk has room. The folder is put together beside
its name and renamed when it is whole.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.artifacts import write_json
from contrans_tl.export.architectures import INSTEAD, exported_config
from contrans_tl.export.card import ABOUT, CARD, about, steered_card
from contrans_tl.export.target import INDEX, ModelFolder, is_weights, skeleton
from contrans_tl.export.weights import copy_weights, read_header
from contrans_tl.heads import HeadVectors
from contrans_tl.models import check_layers
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector
from contrans_tl.transplantation import Concept, Positions, check_home, injections

CONFIG = "config.json"
_PROBES = ("The letter made me feel 3,141.59", "  naïve\tcafé\n\n日本語 🙂 <s></s>", "def f(x):\n    return x  # don't")


@dataclass(frozen=True)
class ExportedFolder:
    """A folder that was written."""

    folder: Path
    strength: float
    layers: tuple[int, ...]
    biases: tuple[str, ...]
    """Names of the parameters that hold strength * v."""
    left_out: tuple[str, ...]
    """Files of the target that were not copied: weights that are not steered, and what is hidden."""

    def __str__(self) -> str:
        lines = [f"{self.folder}: strength {self.strength:g} in {', '.join(self.biases)}"]
        return "\n".join(lines + ([f"left out: {', '.join(self.left_out)}"] if self.left_out else []))


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the steered folder has that the target's has not."""

    config: dict[str, Any] | None
    """Another config.json, where one is needed."""
    biases: tuple[str, ...]
    changed: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By file."""


def export_folder(
    concept: Concept,
    target: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
    revision: str | None = None,
) -> ExportedFolder:
    """Write the target with `transplant(target, concept, strength=, layers=)` in its weights: no hook is needed to serve it.

    The vectors become biases of the blocks' last linear maps, in the dtype of the weights (a float32 sum, rounded once). All
    other numbers are the target's own, byte for byte; where biases must be switched on, the others are zero. Tokenizer,
    generation settings and all other files come along; `contrans.json` and a section of the model card say what was done.

    Args:
        concept: refined in this model or reformulated into it, raw basis.
        target: local folder or hub id.
        out: folder to write; must not exist, or be empty.
        strength: as of `transplant`.
        layers: as of `transplant`; not needed for a concept at one layer.
        positions: only "all": a bias knows no positions.
        revision: branch, tag or commit of a hub id.

    Raises:
        ValueError: vectors of heads, other positions, a strength that is not finite, layers that concept or model do not have,
            a concept of another model or basis, an architecture without such a bias, quantised or incomplete weights, a folder
            that is there already, too little disk.
        OSError: a hub id that cannot be fetched, a disk that cannot be written. Nothing is left under the name of `out`.
    """
    vector = _residual(concept, positions)
    steps = injections(vector, strength=strength, layers=layers, positions=positions)
    folder = _free(Path(out))
    source = ModelFolder.open(target, revision)
    if source.path.resolve() in (folder, *folder.parents):
        raise ValueError(f"expected --out outside of the target's own folder; got {os.fspath(out)!r}.")
    check_layers([step.layer for step in steps], source.n_layers, source.name)
    check_home(vector, source.model)
    vectors: dict[int, Tensor] = {}
    for step in steps:
        vectors[step.layer] = vectors.get(step.layer, 0) + step.vector.float()
    plan = _plan(source, vectors)
    content = about(vector, source, strength=strength, vectors=vectors, biases=plan.biases)
    files, left_out = _others(source)
    _check_room(source, plan, files, folder)

    with _whole(folder) as written:
        for file in files:
            (written / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / file, written / file)
        _write_config(source, plan, written)
        hashes = _write_weights(source, plan, written)
        _check_written(source, plan, written)
        write_json(written / ABOUT, content | {"sha256": hashes})
        _write_card(source, plan, written, content)
    return ExportedFolder(Path(out), strength, tuple(vectors), plan.biases, left_out)


def _residual(concept: Concept, positions: Positions) -> ConceptVector:
    """The concept, if it can be a bias. ValueError for one of heads, for some positions, or of another basis than weights'."""
    if isinstance(concept, HeadVectors):
        raise ValueError(
            f"{concept.name!r} is added to single heads, before W_O; the blocks' last linear map has no place for that. "
            "Use transplant(..., heads=...), which writes with hooks, or refine the concept in the residual stream."
        )
    if positions != "all" and positions in get_args(Positions):
        raise ValueError(
            f"a bias is added at all positions, not only at {positions!r}: use transplant(..., positions={positions!r})."
        )
    if concept.model.basis != "raw":
        raise ValueError(
            f"{concept.name!r} lives in the {concept.model.basis} basis of {concept.model.name}, weights on disk are raw: "
            "refine or reformulate it again with the model as load_model gives it."
        )
    return concept


def _free(out: Path) -> Path:
    """The folder to write, with all links followed. ValueError for one that holds something."""
    folder = out.resolve()
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"expected --out to be a new folder or an empty one; {os.fspath(out)!r} holds files.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected --out to be a folder; {os.fspath(out)!r} is a file.")
    return folder


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when all is written, and is gone if that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        os.replace(temporary, folder)
    except OSError as error:
        raise ValueError(f"the steered model is complete in {temporary}, but could not be renamed ({error}).") from error


def _plan(source: ModelFolder, vectors: Mapping[int, Float[Tensor, " d_model"]]) -> _Plan:
    """What to change and to add. Which parameters a configuration has, transformers itself tells."""
    biases = {source.architecture.bias(layer): x for layer, x in vectors.items()}
    config = exported_config(source.architecture, source.written, source.config)
    after = source.shapes
    if config is not None:
        from transformers import CONFIG_MAPPING

        model = skeleton(CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)))
        after = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    missing = {**source.shapes, **biases}.keys() - after.keys()
    if missing or not all(name.endswith(".bias") for name in after.keys() - source.shapes.keys()):
        what = ", ".join(sorted(missing)) or "biases alone"
        raise ValueError(f"no configuration of {source.name} has {what}. {INSTEAD}.")
    plan = _Plan(config, tuple(biases))
    for name, shape in after.items():
        stored = source.parameter(name)
        if stored is not None and name in biases:
            plan.changed[stored.name] = stored.rounded(stored.values() + biases[name])
            _check_finite(name, plan.changed[stored.name])
        elif stored is None:
            beside, weight = source.name_beside(name)
            x = weight.rounded(biases.get(name, torch.zeros(shape)))
            plan.added.setdefault(weight.file.name, {})[beside] = x
            _check_finite(name, x)
    return plan


def _check_finite(name: str, x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} would not fit into {str(x.dtype).removeprefix('torch.')}: export at a lower strength.")


def _others(source: ModelFolder) -> tuple[list[Path], tuple[str, ...]]:
    """Files to copy as they are, and those of the target that are left out."""
    copied: list[Path] = []
    left_out: list[str] = []
    made = {*source.shards, CONFIG, INDEX, CARD, ABOUT}
    for file in sorted(_walk(source.path)):
        name = file.as_posix()
        if name in made:
            if name == INDEX and source.index is None:
                left_out.append(name)  # the single file takes precedence
        elif is_weights(file.name) or (file.name.startswith(".") and name != ".gitattributes"):
            left_out.append(name)
        else:
            copied.append(file)
    return copied, tuple(left_out)


def _walk(path: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((Path(here) / file).relative_to(path) for file in files)


def _check_room(source: ModelFolder, plan: _Plan, files: list[Path], folder: Path) -> None:
    grown = [x.numel() * x.element_size() + 200 for added in plan.added.values() for x in added.values()]
    kept = [(source.path / file).stat().st_size for file in (*files, *map(Path, source.shards))]
    needed, free = sum(kept) + sum(grown) + 2**20, _free_bytes(folder)
    if needed > free:
        raise ValueError(f"{source.name} takes {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free where --out is.")


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(parent for parent in folder.parents if parent.is_dir())).free


def _write_config(source: ModelFolder, plan: _Plan, folder: Path) -> None:
    if plan.config is None:
        shutil.copyfile(source.path / CONFIG, folder / CONFIG)
        return
    (folder / CONFIG).write_text(json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if plan.config["model_type"] != source.config.model_type:
        _check_tokenizer(source.path, folder)


def _check_tokenizer(before: Path, after: Path) -> None:
    """What a tokenizer is depends on the model type as well: refuse, before the weights are copied, if it became another."""
    from transformers import AutoTokenizer

    def tokens(path: Path) -> Any:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError):
            return None  # a folder without one
        return [tokenizer(text).input_ids for text in _PROBES], tokenizer.all_special_ids, tokenizer.chat_template

    if tokens(before) != tokens(after):
        raise ValueError(f"as the tokenizer of a Llama, that of {before.name} gives other tokens. {INSTEAD}.")


def _write_card(source: ModelFolder, plan: _Plan, folder: Path, content: Mapping[str, Any]) -> None:
    card = source.path / CARD
    text = card.read_bytes().decode("utf-8", "surrogateescape") if card.is_file() else ""
    text = steered_card(text, content, hub_id=source.name if source.revision else None, switched=bool(plan.added))
    (folder / CARD).write_bytes(text.encode("utf-8", "surrogateescape"))


def _write_weights(source: ModelFolder, plan: _Plan, folder: Path) -> dict[str, str]:
    """Copy every file with its changes, and the index; their sha256."""
    hashes = {}
    for shard in track(source.shards, "writing weights", len(source.shards)):
        changed = {name: x for name, x in plan.changed.items() if source.stored[name].file.name == shard}
        hashes[shard] = copy_weights(source.path / shard, folder / shard, changed=changed, added=plan.added.get(shard, {}))
    if source.index is not None:
        new = {name: shard for shard, added in plan.added.items() for name in added}
        sizes = [x.numel() for added in plan.added.values() for x in added.values()]
        summary = dict(source.index.get("metadata", {}))
        summary["total_size"] = sum(stored.size for shard in source.shards for stored in read_header(folder / shard).values())
        if "total_parameters" in summary:
            summary["total_parameters"] += sum(sizes)
        index = {**source.index, "metadata": summary, "weight_map": {**source.index["weight_map"], **new}}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    return hashes


def _check_written(source: ModelFolder, plan: _Plan, folder: Path) -> None:
    for shard in source.shards:
        expected = plan.changed | plan.added.get(shard, {})
        for name, stored in read_header(folder / shard).items():
            if name in expected and not torch.equal(stored.values(), expected[name].float()):
                raise OSError(f"{name} in {shard} does not read as it was written: the disk or the copy failed.")
