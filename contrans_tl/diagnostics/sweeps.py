"""Sweeps: a metric under every layer, strength and position of an injection - or under every head - as one tensor.

    found = sweep(target, moved, pairs.test, layers=range(6), strengths=(0.5, 1, 2, 4), positions=("all", "last"))
    found.scores                       layer x strength x positions x prompt
    found.effect, found.top(5)         change of the metric, mean over prompts

Each number is what a run with that one injection gives. The blocks below are run once for each batch of prompts, and so are the
tokens before the first one that is changed; many settings are rows of one batch, and the head is computed behind the last token
only. With `save=` every finished pass is kept in a file:
the same call, made again after ^C or a crash, goes on from there.

Heads are injected at their output, `attn.hook_z`, before W_O. A concept of the residual stream names no vector there (W_O has
no inverse, and what a head writes of a direction is not what it adds to it), so they are given: `head_vectors`.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl import artifacts
from contrans_tl.diagnostics.metrics import Asked, Prompts, ask
from contrans_tl.diagnostics.runs import Batch, batches, change, check_concept, chunks, keep, read_logits
from contrans_tl.diagnostics.scores import Diagnosis, Scores
from contrans_tl.diagnostics.scores import layers as layer_labels
from contrans_tl.models import Hook, HookedModel, check_layers, hook_name
from contrans_tl.pasts import Past
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector

Position = Literal["all", "last"] | int
"""Every token, the last one, or a number from the end: -1 is the last."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sweep(Diagnosis):
    """The metric of every prompt under every setting: `scores`, layer (or head) x strength x positions x prompt."""

    base: Float[Tensor, " prompt"]
    """The metric of the model as it is."""
    metric: str

    @property
    def effect(self) -> Scores:
        """Change of the metric by each setting, mean over prompts."""
        axes = {name: labels for name, labels in self.scores.axes.items() if name != "prompt"}
        return Scores((self.scores.values - self.base).mean(-1), axes, self.scores.unit)

    @property
    def error(self) -> Scores:
        """Standard error of `effect` over prompts; NaN for a single one."""
        gains = self.scores.values - self.base
        error = gains.std(-1) / gains.shape[-1] ** 0.5 if gains.shape[-1] > 1 else torch.full_like(gains[..., 0], torch.nan)
        return Scores(error, self.effect.axes, self.scores.unit)

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k settings that change the metric most, with that change."""
        return self.effect.top(k)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {**super().to_dict(), "base": self.base.tolist(), "metric": self.metric}


@dataclass(frozen=True)
class Setting:
    """One injection: where, how strong, and its index in the tensor."""

    place: int
    """Of the layers, or of the heads, that are swept."""
    strength: int
    position: int


def sweep(
    model: HookedModel,
    concept: ConceptVector,
    prompts: Prompts,
    *,
    metric: Any = "logit_difference",
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    head_vectors: Float[Tensor, "layer head d_head"] | None = None,
    strengths: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    positions: Sequence[Position] = ("all",),
    save: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
) -> Sweep:
    """The metric under each setting; see the top of this module.

    Args:
        prompts: texts, or Questions for the metrics that need an answer.
        metric: a name or a callable of `diagnostics.metrics`.
        layers: block outputs to inject at, one at a time; all that the concept has by default.
        heads: inject at these heads, (layer, head), one at a time, instead: then the concept only says whose space this is.
        head_vectors: of all heads of the model; needed with `heads`.
        strengths: factors of the vectors.
        positions: `all`, `last`, or one counted from the last token backwards: -1 is the last.
        save: file that finished settings are kept in; one of another question is refused.
        batch_size: rows, prompts times settings, in a pass.

    Raises:
        ValueError: what does not exist (layers, heads, positions), a concept of another model, vectors of the wrong shape,
            settings that occur twice, a file of another sweep, or what `ask` raises.
    """
    check_concept(model, concept)
    strengths, positions = [float(strength) for strength in strengths], list(positions)
    if heads is None:
        wanted = check_layers(list(concept.layers) if layers is None else list(layers), model.cfg.n_layers, concept.model.name)
        names = layer_labels(wanted)
        places: list[tuple[int, int | None]] = [(at, None) for at in wanted]
        vectors = torch.stack([concept.at(at) for at in wanted])
    else:
        given = _check_heads(model, heads, layers, head_vectors)
        names, places = tuple(f"L{at}H{head}" for at, head in heads), [*heads]
        vectors = torch.stack([given[at, head] for at, head in heads])
    if not strengths or not torch.tensor(strengths).isfinite().all():
        raise ValueError(f"expected finite strengths; got {strengths}.")
    asked = ask(model, prompts, metric)
    _check_positions(positions, asked)
    axes = {
        "layer" if heads is None else "head": names,
        "strength": tuple(f"x{strength:g}" for strength in strengths),
        "positions": tuple(map(str, positions)),
        "prompt": tuple(map(str, range(len(asked)))),
    }
    for name, labels in axes.items():
        if len(set(labels)) < len(labels):
            raise ValueError(f"expected each of {name} once; got {', '.join(labels)}.")
    grid = Scores(torch.zeros([len(labels) for labels in axes.values()]), axes, asked.metric.unit)
    kept = _Kept.open(save, grid, _question(model, concept, asked, vectors, axes))
    run = _Run(model, asked, places, vectors.float(), strengths, positions, batch_size)
    run.fill(kept)
    return Sweep(
        about=f"{concept.name} in {concept.model.name}, {asked.metric.name}, {len(asked)} prompts",
        scores=Scores(kept.values, axes, asked.metric.unit),
        notes=(f"the model as it is: {asked.metric.name} {float(kept.base.mean()):+.3g}; shown is the change",),
        base=kept.base,
        metric=asked.metric.name,
    )


def _check_heads(
    model: HookedModel, heads: Sequence[tuple[int, int]], layers: Sequence[int] | None, vectors: Tensor | None
) -> Float[Tensor, "layer head d_head"]:
    cfg = model.cfg
    if layers is not None:
        raise ValueError("expected layers= or heads=, not both: each injects at one place at a time.")
    outside = [place for place in heads if not (0 <= place[0] < cfg.n_layers and 0 <= place[1] < cfg.n_heads)]
    if outside or not heads:
        raise ValueError(
            f"expected heads of {cfg.model_name}, (layer, head) below ({cfg.n_layers}, {cfg.n_heads}); got {outside or 'none'}."
        )
    shape = (cfg.n_layers, cfg.n_heads, cfg.d_head)
    if vectors is None or tuple(vectors.shape) != shape:
        got = "none" if vectors is None else f"shape {tuple(vectors.shape)}"
        raise ValueError(
            f"expected head_vectors of shape {shape} (layer, head, d_head) with heads=; got {got}. A vector of the residual "
            "stream names none at a head's output: take the difference of means of attn.hook_z."
        )
    return vectors


def _check_positions(positions: Sequence[Position], asked: Asked) -> None:
    shortest = min(map(len, asked.sequences))
    for position in positions:
        if position in ("all", "last") or (type(position) is int and -shortest <= position < 0):
            continue
        raise ValueError(
            f"expected positions 'all', 'last' or from -{shortest} to -1, counted from the last token backwards (the shortest "
            f"prompt has {shortest} tokens); got {position!r}."
        )
    if not positions:
        raise ValueError("expected positions; got none.")


def _question(
    model: HookedModel, concept: ConceptVector, asked: Asked, vectors: Tensor, axes: dict[str, tuple[str, ...]]
) -> dict[str, Any]:
    """What a file has to agree with to be gone on with."""
    digest = hashlib.sha256(vectors.detach().float().cpu().numpy().tobytes())
    prompts = hashlib.sha256(repr(asked.sequences).encode())
    return {
        "model": concept.model.fingerprint + " " + concept.model.basis,
        "vectors": digest.hexdigest()[:16],
        "prompts": prompts.hexdigest()[:16],
        "metric": f"{asked.metric.name} {asked.fingerprint(model.cfg.d_vocab)}",
        "axes": {name: list(labels) for name, labels in axes.items()},
    }


@dataclass(eq=False)
class _Kept:
    """Numbers as they come, on disk if asked for."""

    path: Path | None
    question: dict[str, Any]
    values: Tensor
    done: Bool[Tensor, "..."]
    base: Float[Tensor, " prompt"]

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, grid: Scores, question: dict[str, Any]) -> "_Kept":
        values = grid.values
        fresh = cls(
            None if path is None else Path(path),
            question,
            values.clone(),
            torch.zeros_like(values, dtype=torch.bool),
            torch.zeros(values.shape[-1]),
        )
        if path is None or not Path(path).exists():
            return fresh
        tensors, about = artifacts.load(path, "sweep")
        if others := [name for name, value in question.items() if about["question"].get(name) != value]:
            raise ValueError(
                f"{str(path)!r} holds another sweep: its {', '.join(others)} differ from what is asked. Give another file, or "
                "delete this one."
            )
        return cls(fresh.path, question, tensors["values"], tensors["done"].bool(), tensors["base"])

    def put(self, settings: Sequence[Setting], prompts: Tensor, values: Float[Tensor, "setting prompt"]) -> None:
        for setting, row in zip(settings, values.cpu(), strict=True):
            at = (setting.place, setting.strength, setting.position)
            self.values[at][prompts] = row
            self.done[at][prompts] = True
        if self.path is not None:
            tensors = {"values": self.values, "done": self.done.to(torch.uint8), "base": self.base}
            artifacts.save(self.path, "sweep", tensors, {"question": self.question})


class _Run:
    """All settings of one batch of prompts after another."""

    def __init__(
        self,
        model: HookedModel,
        asked: Asked,
        places: Sequence[tuple[int, int | None]],
        vectors: Float[Tensor, "place d"],
        strengths: Sequence[float],
        positions: Sequence[Position],
        batch_size: int,
    ) -> None:
        self.model, self.asked, self.places, self.vectors = model, asked, places, vectors
        self.strengths, self.positions = torch.tensor(strengths), positions
        # Prompts of equal length share a past, behind which the tokens that a setting changes are run.
        self.partly = any(position != "all" for position in positions)
        self.work = batches(model, asked.sequences, batch_size, equal=self.partly)
        self.batch_size = batch_size
        self.settings = [
            Setting(place, strength, position)
            for place in range(len(places))
            for strength in range(len(strengths))
            for position in range(len(positions))
        ]

    def fill(self, kept: _Kept) -> None:
        """What is not there yet."""
        todo = [(batch, open_) for batch in self.work if (open_ := self._open(kept, batch))]
        passes = [(batch, some) for batch, open_ in todo for some in self._passes(batch, open_)]
        now: _Clean | None = None
        for batch, some in track(passes, "sweep", len(passes)):
            if now is None or batch is not now.batch:
                now = self._clean(batch)
                kept.base[batch.prompts] = self.asked.metric(now.logits, now.logits, batch.prompts).cpu()
            kept.put(some, batch.prompts, self._values(now, some))

    def _open(self, kept: _Kept, batch: Batch) -> list[Setting]:
        return [s for s in self.settings if not kept.done[s.place, s.strength, s.position][batch.prompts].all()]

    def _passes(self, batch: Batch, settings: Sequence[Setting]) -> list[Sequence[Setting]]:
        """Settings that leave the same alone, as many as a pass takes."""
        together: dict[tuple[int, int], list[Setting]] = {}
        for setting in settings:
            together.setdefault((self._resumed(setting), self._width(batch, setting)), []).append(setting)
        return [some for group in together.values() for some in chunks(group, self.batch_size // len(batch.tokens))]

    def _resumed(self, setting: Setting) -> int:
        """The last block that the setting does not touch; -1 where it touches all."""
        layer, head = self.places[setting.place]
        return layer if head is None else layer - 1

    def _width(self, batch: Batch, setting: Setting) -> int:
        """How many of the last tokens the setting can change."""
        back = _back(self.positions[setting.position])
        return batch.tokens.shape[1] if back is None else back

    def _clean(self, batch: Batch) -> "_Clean":
        below = sorted({at for at in map(self._resumed, self.settings) if at >= 0})
        past = Past.empty(self.model, len(batch.tokens)) if self.partly else None
        resid: dict[str, Tensor] = {}
        with torch.no_grad():
            logits = read_logits(self.model, batch, hooks=keep([hook_name(at) for at in below], resid), past=past)
        if past is not None and not past.holds(batch.tokens.shape[1]):
            past = None
        return _Clean(batch, resid, logits, past)

    def _values(self, clean: "_Clean", settings: Sequence[Setting]) -> Float[Tensor, "setting prompt"]:
        at, width = self._resumed(settings[0]), self._width(clean.batch, settings[0])
        before = clean.batch.tokens.shape[1] - width
        past = clean.past.first(before, len(settings)) if before and clean.past is not None else None
        batch = clean.batch if past is None else clean.batch.final(width)
        where = torch.stack([self._where(batch, self.positions[s.position]) for s in settings]).float()
        strengths = self.strengths[[s.strength for s in settings]]
        vectors = strengths[:, None] * self.vectors[[s.place for s in settings]]
        added = einsum(where, vectors.to(where.device), "setting prompt pos, setting d -> setting prompt pos d")
        layer, head = self.places[settings[0].place]
        resid = clean.resid[hook_name(at)][:, -batch.tokens.shape[1] :] if at >= 0 else None
        hooks: list[Hook] = []
        after: tuple[int, Tensor] | None = None
        if head is None:
            assert resid is not None
            after = (at, rearrange(resid + added.to(resid), "setting prompt pos d -> (setting prompt) pos d"))
        else:
            chosen = [self.places[s.place][1] for s in settings]

            def inject(z: Tensor) -> Tensor:
                z = rearrange(z, "(setting prompt) pos head d -> setting prompt pos head d", setting=len(settings)).clone()
                for setting, h in enumerate(chosen):
                    z[setting, :, :, h] += added[setting].to(z)
                return rearrange(z, "setting prompt pos head d -> (setting prompt) pos head d")

            hooks = [change(hook_name(layer, "z"), inject)]
            after = None if resid is None else (at, resid.repeat(len(settings), 1, 1))
        many = batch.times(len(settings))
        with torch.no_grad():
            logits = read_logits(self.model, many, hooks=hooks, after=after, past=past)
            values = self.asked.metric(logits, clean.logits.repeat(len(settings), 1), many.prompts)
        return rearrange(values, "(setting prompt) -> setting prompt", setting=len(settings))

    def _where(self, batch: Batch, position: Position) -> Int[Tensor, "prompt pos"]:
        if (back := _back(position)) is None:
            return torch.ones_like(batch.mask)
        return torch.zeros_like(batch.mask).scatter(1, (batch.last + 1 - back)[:, None], 1)


def _back(position: Position) -> int | None:
    """How many tokens from the end a position is: 1 is the last. None for all of them."""
    if position == "all":
        return None
    return 1 if position == "last" else -int(position)


@dataclass(frozen=True, eq=False)
class _Clean:
    """What the model makes of a batch as it is."""

    batch: Batch
    resid: dict[str, Tensor]
    logits: Float[Tensor, "prompt vocab"]
    past: Past | None
    """None where nothing is run in part: all positions are changed, or the architecture keeps no keys and values."""
