"""Heads as a place: concept vectors of attention heads, and maps between the heads of two models.

    z = what a head gathers before W_O, `blocks.{l}.attn.hook_z`, at the last real token

    vectors = refine_heads(source, pairs)                             of every head, eq. 1 of the paper on z
    maps = fit_head_maps(source, target, sentences, target_heads=[(3, 0), (4, 2)])
    moved = reformulate_heads(vectors, maps)
    with transplant(target, moved, heads=[(3, 0)], strength=4.0): ...

A head's z is a row of d_head numbers as the residual stream is one of d_model: maps between heads are maps between layers
(`LayerMaps`), a head standing for a layer. What one head of the target gathers, no one head of the source does: by default all
source heads together, side by side, are mapped to each target head. One by one (`pooled=False`) a head is mapped to a head, and
R2 tells which of the source's comes nearest. Inference-time intervention (Li et al., 2306.03341) adds such vectors to the heads
that `diagnostics.probe_heads` finds.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from contrans_tl import artifacts
from contrans_tl.activations import NO_WORD_ENDS, Activations, Rows, check_texts, hash_texts, locate, read_rows, row_index
from contrans_tl.data import ContrastPairs
from contrans_tl.models import HookedModel, ModelId, check_heads, check_ready, identify
from contrans_tl.refinement import ConceptVector, mean_difference
from contrans_tl.reformulation import LayerMaps, Weighting
from contrans_tl.tokens import check_alignment, prepends_bos

Head = tuple[int, int]
"""(layer, head), both counted from 0."""


@dataclass(frozen=True, eq=False)
class HeadVectors:
    """A concept as one direction for each of some attention heads of one model, refined there or carried there."""

    vectors: Float[Tensor, "place d_head"]
    heads: tuple[Head, ...]
    """(layer, head) of every vector."""
    name: str
    model: ModelId
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.vectors) or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"expected one vector for each of different heads; got {len(self.vectors)} for {self.heads}.")
        if not bool(torch.isfinite(self.vectors).all()):
            raise ValueError(f"the vectors of {self.name!r} hold NaN or infinity; the activations behind them must have too.")

    def __repr__(self) -> str:
        norms = self.vectors.norm(dim=-1)
        span = f"{len(self.heads)} heads of layers {min(self.heads)[0]}..{max(self.heads)[0]}"
        return f"HeadVectors({self.name!r}, {span}, norm {norms.min():.3g}..{norms.max():.3g}, in {self.model.name!r})"

    def at(self, layer: int, head: int) -> Float[Tensor, " d_head"]:
        """The vector of one head. ValueError if the concept has none there."""
        if (layer, head) not in self.heads:
            known = ", ".join(map(str, self.heads[:8])) + ", ..." * (len(self.heads) > 8)
            raise ValueError(f"the concept {self.name!r} has vectors at heads {known}; there is none at {(layer, head)}.")
        return self.vectors[self.heads.index((layer, head))]

    def only(self, *heads: Head) -> "HeadVectors":
        """The same concept at these heads only."""
        return replace(self, vectors=torch.stack([self.at(*head) for head in heads]), heads=tuple(heads))

    def __mul__(self, factor: float) -> "HeadVectors":
        about = {"factor": factor, "of": self.provenance}
        return replace(self, vectors=self.vectors * factor, name=f"{factor:g} * {self.name}", provenance=about)

    __rmul__ = __mul__

    def __neg__(self) -> "HeadVectors":
        return -1.0 * self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it as safetensors with its provenance in the header."""
        about = {"name": self.name, "heads": self.heads, "model": self.model.to_dict(), "provenance": self.provenance}
        return artifacts.save(path, "head vectors", {"vectors": self.vectors}, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadVectors":
        """Read what `save` wrote. ValueError for a truncated, foreign or newer file."""
        tensors, about = artifacts.load(path, "head vectors")
        heads = tuple((layer, head) for layer, head in about["heads"])
        return cls(tensors["vectors"], heads, about["name"], ModelId(**about["model"]), about["provenance"])


def refine_heads(
    model: HookedModel,
    pairs: ContrastPairs,
    *,
    heads: Sequence[Head] | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> HeadVectors:
    """The concept's vector at every head, or at these: the mean difference of z at the last real token.

    Raises:
        ValueError: a head the model does not have, or as `collect`.
    """
    prompts = [*pairs.positive, *pairs.negative]
    heads = heads_of(model, heads)
    rows = collect_heads(model, prompts, heads=heads, prepend_bos=prepend_bos, batch_size=batch_size)
    positive, negative = rows.values.double().tensor_split([len(pairs.positive)])
    about = {"method": "mean", "positive": len(positive), "negative": len(negative), "prompts_hash": hash_texts(prompts)}
    vectors = mean_difference(positive, negative).float()
    return HeadVectors(vectors, heads, pairs.name, identify(model), about | {"prepend_bos": rows.prepend_bos})


def heads_of(model: HookedModel, heads: Sequence[Head] | None) -> tuple[Head, ...]:
    """These heads, or all; ValueError for one the model does not have."""
    return check_heads(heads, model.cfg.n_layers, model.cfg.n_heads, str(model.cfg.model_name))


def collect_heads(
    model: HookedModel,
    texts: Sequence[str],
    *,
    heads: Sequence[Head] | None = None,
    rows: Rows = "last",
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> Activations:
    """z of these heads, or all, at the last real token of every text or at the end of every word: "row place d_head".

    As activations with a head for a layer, number layer * n_heads + head, of a space of its own: no residual vector fits it.

    Raises:
        ValueError: a head the model does not have, or as `collect`.
    """
    texts = check_texts(texts, rows)
    check_ready(model)
    heads = heads_of(model, heads)
    encodings, places = locate(model, texts, rows, prepend_bos)
    if not any(places):
        raise ValueError(NO_WORD_ENDS)
    sentence, end = row_index(places)
    layers, n_heads = sorted({layer for layer, _ in heads}), model.cfg.n_heads
    found = rearrange(read_rows(model, encodings, places, layers, batch_size, "z"), "row layer head d -> row (layer head) d")
    kept = [layers.index(layer) * n_heads + head for layer, head in heads]
    return Activations(
        values=found[:, kept],
        layers=tuple(layer * n_heads + head for layer, head in heads),
        sentence=sentence,
        end=end,
        model=_space(identify(model), n_heads, model.cfg.d_head),
        rows=rows,
        prepend_bos=prepends_bos(model, prepend_bos),
        texts_hash=hash_texts(texts),
    )


def _space(model: ModelId, n_heads: int, d_head: int) -> ModelId:
    return replace(model, fingerprint=f"{model.fingerprint}:z", n_layers=model.n_layers * n_heads, d_model=d_head)


@dataclass(frozen=True, eq=False)
class HeadMaps:
    """The affine maps to each of some target heads, from some source heads together or from each of them."""

    maps: LayerMaps
    """With a head, number layer * n_heads + head, for a layer; pooled source heads are one layer."""
    source: ModelId
    target: ModelId
    source_heads: tuple[Head, ...]
    target_heads: tuple[Head, ...]
    pooled: bool

    @property
    def r2(self) -> Float[Tensor, "source_place target_place"]:
        """Held-out R2 of every pair of heads; of pooled source heads one row."""
        return self.maps.r2

    def best(self) -> dict[Head, Head]:
        """For every target head the source head that predicts it best, held out. ValueError for pooled ones."""
        if self.pooled:
            raise ValueError("these maps start from all source heads together: fit them with pooled=False to pair heads.")
        best = self.r2.nan_to_num(-torch.inf).argmax(0).tolist()
        return {head: self.source_heads[s] for head, s in zip(self.target_heads, best, strict=True)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write rows and chosen ridges as safetensors."""
        tensors, about = self.maps._written()
        about["heads"] = {
            "source": self.source.to_dict(),
            "target": self.target.to_dict(),
            "source_heads": self.source_heads,
            "target_heads": self.target_heads,
            "pooled": self.pooled,
        }
        return artifacts.save(path, "head maps", tensors, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "HeadMaps":
        """Read what `save` wrote. ValueError for a truncated, foreign or newer file."""
        tensors, about = artifacts.load(path, "head maps")
        places = about["heads"]
        source, target = (ModelId(**places[side]) for side in ("source", "target"))
        source_heads, target_heads = (
            tuple((layer, head) for layer, head in places[f"{side}_heads"]) for side in ("source", "target")
        )
        return cls(LayerMaps._of(tensors, about), source, target, source_heads, target_heads, places["pooled"])


def fit_head_maps(
    source: HookedModel,
    target: HookedModel,
    sentences: Sequence[str],
    *,
    source_heads: Sequence[Head] | None = None,
    target_heads: Sequence[Head] | None = None,
    pooled: bool = True,
    rows: Rows = "words",
    ridge: float | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
) -> HeadMaps:
    """Ridge maps between heads, fitted as those between layers are (`fit_maps`): on z at the end of every word of the same
    sentences in both models. All heads of a large model are wide rows, and one by one many pairs: choose heads.

    Args:
        source_heads: (layer, head); all by default.
        target_heads: likewise.
        pooled: map all source heads together to each target head; else each to each.

    Raises:
        ValueError: a head that a model does not have, or as `fit_maps`.
    """
    sentences = check_texts(sentences, rows)
    chosen = heads_of(source, source_heads), heads_of(target, target_heads)
    if rows == "words":
        check_alignment(source, target, sentences)
    options: dict[str, Any] = {"rows": rows, "prepend_bos": prepend_bos, "batch_size": batch_size}
    x, y = (collect_heads(model, sentences, heads=of, **options) for model, of in zip((source, target), chosen, strict=True))
    # Kept are rows of any norm: what a head gathers is near 0 wherever it attends to the first token, so that ten times the
    # median norm is no sign of a sink here.
    maps = LayerMaps.fit(_side_by_side(x) if pooled else x, y, ridge=ridge, sinks="keep")
    return HeadMaps(maps, identify(source), identify(target), *chosen, pooled)


def _side_by_side(rows: Activations) -> Activations:
    """All heads as one place."""
    values = rearrange(rows.values, "row place d -> row 1 (place d)")
    which = hash_texts([str(rows.layers)])
    space = replace(rows.model, fingerprint=f"{rows.model.fingerprint}:{which}", n_layers=1, d_model=values.shape[-1])
    return replace(rows, values=values, layers=(0,), model=space)


def reformulate_heads(
    vectors: HeadVectors,
    maps: HeadMaps,
    *,
    heads: Mapping[Head, Head] | None = None,
    weighting: Weighting = "concept",
) -> HeadVectors:
    """The concept at heads of the target: W v, never the bias.

    Args:
        heads: of maps between single heads, {target head: source head}; None gives every target head of the maps the source
            head that predicts it best. Pooled maps carry to all their target heads.
        weighting: as in `reformulate`.

    Raises:
        ValueError: vectors of another model, or a head that the maps or the vectors do not have.
    """
    if not vectors.model.same_space(maps.source):
        raise ValueError(f"the concept {vectors.name!r} lives in {vectors.model}; these maps start in {maps.source}.")
    if weighting not in get_args(Weighting):
        raise ValueError(f"expected weighting 'concept' or 'uniform'; got {weighting!r}.")
    if maps.pooled and heads is not None:
        raise ValueError("these maps start from all source heads together: leave out heads=, or fit them with pooled=False.")
    pairing = {} if maps.pooled else dict(maps.best() if heads is None else heads)
    for t, s in pairing.items():
        if s not in maps.source_heads or t not in maps.target_heads:
            raise ValueError(f"expected {{target head: source head}} of the maps; got {t}: {s}, which they do not have.")
    # (source heads, their place in the maps, target heads)
    routes: list[tuple[tuple[Head, ...], int, list[Head]]] = [(maps.source_heads, 0, list(maps.target_heads))]
    if not maps.pooled:
        number = dict(zip(maps.source_heads, maps.maps.source.layers, strict=True))
        of = {s: [t for t in maps.target_heads if pairing.get(t) == s] for s in sorted(set(pairing.values()))}
        routes = [((s,), number[s], targets) for s, targets in of.items()]
    carried: dict[Head, Tensor] = {}
    found: list[dict[str, Any]] = []
    for sources, place, targets in routes:
        only = maps.maps.only([place], [maps.maps.target.layers[maps.target_heads.index(t)] for t in targets])
        v = torch.cat([vectors.at(*s) for s in sources])[None]
        one = ConceptVector(v, (place,), vectors.name, maps.maps.source.model)
        used = only.reweighted(one) if weighting == "concept" else only
        carried |= dict(zip(targets, used.carry(v)[0], strict=True))
        found.append({"from": sources, "to": targets, "coverage": float(only.coverage(one))})
    about = {
        "carried_from": vectors.model.to_dict(),
        "heads": found,
        "weighting": weighting,
        "texts_hash": maps.maps.source.texts_hash,
        "refined": vectors.provenance,
    }
    return HeadVectors(torch.stack(list(carried.values())), tuple(carried), vectors.name, maps.target, about)
