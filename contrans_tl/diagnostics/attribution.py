"""Attribution: what a concept added at one place would do to a metric, read off gradients, beside what it does.

    a(l, p)    = grad_{h[l, p]} metric . s v^l                     residual after block l, position p
    a(l, h, p) = grad_{z[l, h, p]} metric . (z^+ - z)[l, h, p]     head outputs; z^+ under the transplant of s v at `layer`

Attribution patching (Nanda 2023; Syed et al., arXiv 2310.10348) with the concept for a difference: the first order of adding
s v^l there, or of putting one head's output under the transplant into the model as it is. One backward pass gives all layers,
positions and heads. Gradients are those of the model as it is; where the metric bends within s they mislead (KL has none at all
there), and `steps` > 1 takes their mean along the strength instead: integrated gradients (Sundararajan et al., arXiv
1703.01365) from 0 to s, by Gauss-Legendre quadrature, for each layer along its own transplant at all positions, for the heads
along the one at `layer` (as EAP-IG has it, arXiv 2403.17806). Then the positions of a layer sum to the effect of its
transplant. It takes `steps` passes a layer.

    found = attribute(target, moved, pairs.test, metric="logit_difference", layer=3, strength=2.0)
    found.top(5), found.heads.top(5), found.rank_correlation

Beside the attributions of the foremost places stands what truly comes of them, measured one by one. Known to fail (AtP*, arXiv
2403.00745): saturated attention, and effects that cancel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Float
from torch import Tensor

from contrans_tl.diagnostics.metrics import Asked, Prompts, ask
from contrans_tl.diagnostics.runs import (
    Batch,
    batches,
    change,
    check_concept,
    check_strength,
    choose_layer,
    chunks,
    keep,
    place_labels,
    read_logits,
    shared_tokens,
)
from contrans_tl.diagnostics.scores import Diagnosis, Scores, heads, layers
from contrans_tl.evaluation.steerability import ranks
from contrans_tl.models import Hook, HookedModel, hook_name
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector
from contrans_tl.weights import check_differentiable

Kind = Literal["layer", "position", "head"]
"""What an effect is divided among: layers, positions, heads."""


@dataclass(frozen=True)
class Checked:
    """One place, what it was attributed, and what truly came of it."""

    kind: Kind
    """`layer`: the vector added after a block at all positions; `position`: at one; `head`: one head's output exchanged."""
    place: str
    attributed: float
    true: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Attribution(Diagnosis):
    """Effects by gradient, means over prompts, in units of the metric: `scores` after each block at each position. A prompt
    that is too short for a position counts with 0 there."""

    heads: Scores
    """Of each head's output, over all positions. 0 up to the layer of the transplant, where it changes nothing."""
    heads_by_position: Scores
    checked: tuple[Checked, ...]
    base: float
    """The metric of the model as it is, mean over prompts."""
    transplanted: float
    """The same under the transplant."""
    layer: int
    """Of the transplant."""
    strength: float
    steps: int
    metric: str
    tokens: tuple[str, ...]
    """At each position, the token that all prompts have in common there, or nothing."""

    @property
    def layers(self) -> Scores:
        """Of the vector added after each block at all positions."""
        return self.scores.sum("position")

    @property
    def effect(self) -> float:
        """What the transplant truly does to the metric."""
        return self.transplanted - self.base

    @property
    def rank_correlation(self) -> dict[Kind, float]:
        """Spearman's, of attributed with true effects over the places of each kind that were measured; NaN below three."""
        kinds: tuple[Kind, ...] = ("layer", "position", "head")
        return {kind: rank_correlation(*self._pairs(kind)) for kind in kinds}

    def _pairs(self, kind: Kind) -> tuple[list[float], list[float]]:
        of_kind = [one for one in self.checked if one.kind == kind]
        return [one.attributed for one in of_kind], [one.true for one in of_kind]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        plain = {name: getattr(self, name) for name in ("base", "transplanted", "layer", "strength", "steps", "metric")}
        return {
            **super().to_dict(),
            **plain,
            "heads": self.heads.to_dict(),
            "checked": [vars(one) for one in self.checked],
            "rank_correlation": self.rank_correlation,
        }

    def __str__(self) -> str:
        lines = [super().__str__(), *(f"  {label:<12} {value:+.3g}" for label, value in self.heads.top(5))]
        for kind, rho in self.rank_correlation.items():
            count = len(self._pairs(kind)[0])
            lines.append(f"  rank correlation with the true effect, {count} of kind {kind!r}: {rho:+.2f}")
        return "\n".join(lines)


def attribute(
    model: HookedModel,
    concept: ConceptVector,
    prompts: Prompts,
    *,
    metric: Any = "logit_difference",
    layer: int | None = None,
    strength: float = 1.0,
    vectors: Literal["own", "one"] = "own",
    steps: int = 1,
    check: int = 12,
    batch_size: int = 32,
) -> Attribution:
    """What the concept would do to the metric at every layer, position and head; see the top of this module.

    Args:
        prompts: texts, or Questions for the metrics that need an answer.
        metric: a name or a callable of `diagnostics.metrics`; it has to have a gradient.
        layer: of the transplant whose effect on the heads is attributed; not needed for a concept at one layer.
        strength: s; scores are effects at this strength, not slopes.
        vectors: `own` adds at each layer that the concept has its vector of that layer; `one` that of `layer` at all layers.
        steps: 1: the gradient of the model as it is, one backward pass for all. More: integrated along the strength.
        check: foremost positions, and heads, whose true effect is measured. All layers' are, unless it is 0.
        batch_size: rows in a pass.

    Raises:
        ValueError: a concept of another model, a layer it has not, a strength of 0, a metric that has no gradient or the
            wrong shape, a quantised model that hands none on, or what `ask` raises.
    """
    check_concept(model, concept)
    layer, strength = choose_layer(concept, layer), check_strength(strength)
    if vectors not in ("own", "one"):
        raise ValueError(f"expected vectors='own' or vectors='one'; got {vectors!r}.")
    if steps < 1 or check < 0:
        raise ValueError(f"expected steps of 1 or more and check of 0 or more; got {steps} and {check}.")
    check_differentiable(model)
    asked = ask(model, prompts, metric)
    _check_differentiable(asked, model.cfg.d_vocab)
    where = range(model.cfg.n_layers) if vectors == "one" else sorted(concept.layers)
    added = {at: strength * concept.at(layer if vectors == "one" else at).float() for at in where}
    width = max(map(len, asked.sequences))
    gradients = _Gradients(model, asked, added, layer, width, steps, batch_size)
    work = batches(model, asked.sequences, batch_size)
    for batch in track(work, "attribution", len(work)):
        gradients.add(batch)
    axes = {"layer": layers(list(added)), "position": place_labels(width)}
    unit = asked.metric.unit
    scores = Scores(gradients.resid / len(asked), axes, unit)
    by_position = Scores(
        gradients.heads / len(asked),
        {"layer": layers(model.cfg.n_layers), "head": heads(model.cfg.n_heads), "position": place_labels(width)},
        unit,
    )
    over_positions = by_position.sum("position")
    checked = _checked(model, asked, work, added, layer, scores, over_positions, check, batch_size) if check else ()
    base, transplanted = float(gradients.base / len(asked)), float(gradients.transplanted / len(asked))
    summed = float(scores.at(layer=f"L{layer}").values.sum())
    how = "the gradient at strength 0" if steps == 1 else f"gradients integrated over {steps} strengths"
    return Attribution(
        about=f"{concept.name} in {concept.model.name}, {asked.metric.name}, {how}, × {strength:g}, {len(asked)} prompts",
        scores=scores,
        notes=(f"true effect of the transplant at L{layer} {transplanted - base:+.3g}; its positions sum to {summed:+.3g}",),
        heads=over_positions,
        heads_by_position=by_position,
        checked=checked,
        base=base,
        transplanted=transplanted,
        layer=layer,
        strength=strength,
        steps=steps,
        metric=asked.metric.name,
        tokens=shared_tokens(model, asked.sequences, width),
    )


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, those of equal values shared. NaN for fewer than three, or where all are equal."""
    if len(x) < 3:
        return float("nan")
    a, b = (ranks(np.asarray(values, float)) for values in (x, y))
    return float("nan") if min(a.std(), b.std()) == 0 else float(np.corrcoef(a, b)[0, 1])


def _check_differentiable(asked: Asked, d_vocab: int) -> None:
    logits = torch.randn(1, d_vocab, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.enable_grad():
        values = asked.metric(logits, logits.detach(), torch.zeros(1, dtype=torch.long))
    if not values.requires_grad:
        raise ValueError(
            f"the metric {asked.metric.name!r} has no gradient with respect to the logits (is it an accuracy, an "
            "argmax, detached?): use a smooth one, such as a difference of logits. `sweep` and `patch` take any."
        )


@dataclass(eq=False)
class _Gradients:
    """Attributions, summed over the prompts of one batch after another."""

    model: HookedModel
    asked: Asked
    added: Mapping[int, Float[Tensor, " d_model"]]
    layer: int
    width: int
    steps: int
    batch_size: int

    def __post_init__(self) -> None:
        cfg = self.model.cfg
        self.resid = torch.zeros(len(self.added), self.width)
        self.heads = torch.zeros(cfg.n_layers, cfg.n_heads, self.width)
        self.base = self.transplanted = torch.zeros(())
        self.resid_sites = {at: hook_name(at) for at in self.added}
        self.z_sites = {at: hook_name(at, "z") for at in range(self.layer + 1, cfg.n_layers)}

    def add(self, batch: Batch) -> None:
        at_once = self.steps == 1
        sites = [*self.resid_sites.values(), hook_name(self.layer), *self.z_sites.values()]
        seen: dict[str, Tensor] = {}
        if at_once:
            with torch.enable_grad():
                logits = read_logits(self.model, batch, hooks=_watch(dict.fromkeys(sites), seen))
                values = self.asked.metric(logits, logits.detach(), batch.prompts)
                gradients = dict(zip(seen, torch.autograd.grad(values.sum(), list(seen.values())), strict=True))
            logits, values = logits.detach(), values.detach()
        else:
            with torch.no_grad():
                logits = read_logits(self.model, batch, hooks=keep(list(dict.fromkeys(sites)), seen))
                values = self.asked.metric(logits, logits, batch.prompts)
        clean = {name: x.detach() for name, x in seen.items()}
        moved, transplanted = self._transplanted(batch, clean[hook_name(self.layer)], logits)
        self.base = self.base + values.sum().cpu()
        self.transplanted = self.transplanted + transplanted
        deltas = {at: moved[name].float() - clean[name].float() for at, name in self.z_sites.items()}
        if at_once:
            for at, name in self.resid_sites.items():
                self._count_resid(batch, at, gradients[name])
            for at, name in self.z_sites.items():
                self._count_head(batch, at, gradients[name], deltas[at])
            return
        for at in self.added:
            for weight, alphas in _quadrature(self.steps, self.batch_size // len(batch.tokens)):
                self._along(batch, at, clean[hook_name(at)], logits, weight, alphas, deltas)

    def _transplanted(self, batch: Batch, resid: Tensor, base: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        moved: dict[str, Tensor] = {}
        with torch.no_grad():
            after = (self.layer, resid + self._vector(self.layer).to(resid))
            logits = read_logits(self.model, batch, hooks=keep(list(self.z_sites.values()), moved), after=after)
            return moved, self.asked.metric(logits, base, batch.prompts).sum().cpu()

    def _along(
        self, batch: Batch, at: int, resid: Tensor, base: Tensor, weight: Tensor, alphas: Tensor, deltas: Mapping[int, Tensor]
    ) -> None:
        """Gradients at some strengths on the way to the transplant at this layer."""
        many = batch.times(len(alphas))
        path = einsum(alphas.to(resid), self._vector(at).to(resid), "step, d_model -> step d_model")
        rows = rearrange(resid + path[:, None, None], "step prompt pos d_model -> (step prompt) pos d_model")
        leaf = rows.detach().requires_grad_()
        seen: dict[str, Tensor] = {}
        with torch.enable_grad():
            watched = list(self.z_sites.values()) if at == self.layer else []
            logits = read_logits(self.model, many, hooks=_watch(dict.fromkeys(watched), seen), after=(at, leaf))
            weights = repeat(weight.to(logits), "step -> (step prompt)", prompt=len(batch.tokens))
            values = self.asked.metric(logits, base.repeat(len(alphas), 1), many.prompts) * weights
            gradients = torch.autograd.grad(values.sum(), [leaf, *seen.values()])
        # The weights of the quadrature are in the gradients: their sum over steps is the mean along the path.
        first, *rest = (reduce(g.float(), "(step prompt) ... -> prompt ...", "sum", step=len(alphas)) for g in gradients)
        self._count_resid(batch, at, first)
        for z_at, gradient in zip(self.z_sites if watched else (), rest, strict=True):
            self._count_head(batch, z_at, gradient, deltas[z_at])

    def _count_resid(self, batch: Batch, at: int, gradient: Tensor) -> None:
        along = einsum(gradient.float(), self._vector(at).to(gradient.device), "prompt pos d_model, d_model -> prompt pos")
        self.resid[list(self.added).index(at)] += batch.aligned(along, self.width).sum(0).cpu()

    def _count_head(self, batch: Batch, at: int, gradient: Tensor, delta: Tensor) -> None:
        along = einsum(gradient.float(), delta, "prompt pos head d_head, prompt pos head d_head -> prompt pos head")
        self.heads[at] += reduce(batch.aligned(along, self.width), "prompt place head -> head place", "sum").cpu()

    def _vector(self, at: int) -> Float[Tensor, " d_model"]:
        return self.added[at]


def _watch(names: Mapping[str, None], seen: dict[str, Tensor]) -> list[Hook]:
    """Hooks that keep what passes these hook points as part of the graph, to be differentiated by."""

    def look(x: Tensor, hook: Any, *, name: str) -> Tensor:
        # Parameters of a loaded model ask for no gradient: the first of the points is where the graph begins. It is handed on,
        # as what a bridge shows at attn.hook_z is a view of its own that would otherwise lead nowhere.
        seen[name] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[name]

    return [(name, partial(look, name=name)) for name in names]


def _quadrature(steps: int, at_once: int) -> list[tuple[Tensor, Tensor]]:
    """(weights, places) of Gauss and Legendre's rule on 0..1, some at a time."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    pairs = torch.tensor(np.stack([weights / 2, (places + 1) / 2]), dtype=torch.float32)
    return [(part[0], part[1]) for part in pairs.split(max(1, at_once), dim=1)]


def _checked(
    model: HookedModel,
    asked: Asked,
    work: Sequence[Batch],
    added: Mapping[int, Float[Tensor, " d_model"]],
    layer: int,
    scores: Scores,
    over_positions: Scores,
    check: int,
    batch_size: int,
) -> tuple[Checked, ...]:
    """Every layer, the foremost positions and the foremost heads, each changed alone."""
    width = scores.values.shape[1]
    order = scores.values.abs().flatten().argsort(descending=True, stable=True)[:check].tolist()
    at_layers = list(added)
    places: list[tuple[int, int | None]] = [(at, None) for at in at_layers]
    places += [(at_layers[i // width], i % width) for i in order]
    n_heads = over_positions.values.shape[1]
    later = over_positions.values[layer + 1 :].abs().flatten().argsort(descending=True, stable=True)[:check].tolist()
    head_places = [(layer + 1 + i // n_heads, i % n_heads) for i in later]
    true: dict[Any, float] = dict.fromkeys([*places, *(("head", *place) for place in head_places)], 0.0)
    for batch in track(work, "true effects", len(work)):
        run = _Changes(model, asked, batch, layer, added, width, batch_size)
        for key, effect in [*run.of_places(places), *run.of_heads(head_places)]:
            true[key] += effect / len(asked)
    found = []
    for at, place in places:
        row = scores.at(layer=f"L{at}")
        if place is None:
            found.append(Checked("layer", f"L{at}", float(row.values.sum()), true[at, None]))
        else:
            label = f"L{at} {scores.axes['position'][place]}"
            found.append(Checked("position", label, float(row.values[place]), true[at, place]))
    for at, head in head_places:
        found.append(Checked("head", f"L{at}H{head}", float(over_positions.values[at, head]), true["head", at, head]))
    return tuple(found)


class _Changes:
    """What comes of changes to one batch, one at a time, several in a pass."""

    def __init__(
        self,
        model: HookedModel,
        asked: Asked,
        batch: Batch,
        layer: int,
        added: Mapping[int, Float[Tensor, " d_model"]],
        width: int,
        batch_size: int,
    ) -> None:
        self.model, self.asked, self.batch, self.added = model, asked, batch, added
        self.settings = max(1, batch_size // len(batch.tokens))
        self.where, self.real = batch.places(width)
        z_sites = [hook_name(at, "z") for at in range(layer + 1, model.cfg.n_layers)]
        self.clean: dict[str, Tensor] = {}
        self.moved: dict[str, Tensor] = {}
        with torch.no_grad():
            names = [hook_name(at) for at in range(model.cfg.n_layers)]
            self.logits = read_logits(model, batch, hooks=keep(names, self.clean))
            self.base = asked.metric(self.logits, self.logits, batch.prompts)
            resid = self.clean[hook_name(layer)]
            read_logits(model, batch, hooks=keep(z_sites, self.moved), after=(layer, resid + added[layer].to(resid)))

    def of_places(self, places: Sequence[tuple[int, int | None]]) -> list[tuple[Any, float]]:
        """The vector added after a block, at one position or at all."""
        effects: list[tuple[Any, float]] = []
        for at in self.added:
            resid, here = self.clean[hook_name(at)], [place for place in places if place[0] == at]
            for some in chunks(here, self.settings):
                where = torch.stack([self._at(place) for _, place in some]).to(resid)
                change = einsum(where, self.added[at].to(resid), "setting prompt pos, d_model -> setting prompt pos d_model")
                rows = rearrange(resid + change, "setting prompt pos d_model -> (setting prompt) pos d_model")
                effects += zip(some, self._effects(len(some), (at, rows), []), strict=True)
        return effects

    def of_heads(self, places: Sequence[tuple[int, int]]) -> list[tuple[Any, float]]:
        """One head's output as it is under the transplant."""
        effects: list[tuple[Any, float]] = []
        for at in sorted({at for at, _ in places}):
            for some in chunks([place for place in places if place[0] == at], self.settings):
                moved, below = self.moved[hook_name(at, "z")], self.clean[hook_name(at - 1)]
                chosen = [head for _, head in some]

                def exchange(z: Tensor, moved: Tensor = moved, chosen: list[int] = chosen) -> Tensor:
                    z = rearrange(z, "(setting prompt) ... -> setting prompt ...", setting=len(chosen)).clone()
                    for setting, head in enumerate(chosen):
                        z[setting, :, :, head] = moved[:, :, head]
                    return rearrange(z, "setting prompt ... -> (setting prompt) ...")

                rows = repeat(below, "prompt ... -> (setting prompt) ...", setting=len(some))
                found = self._effects(len(some), (at - 1, rows), [change(hook_name(at, "z"), exchange)])
                effects += [(("head", *place), effect) for place, effect in zip(some, found, strict=True)]
        return effects

    def _at(self, place: int | None) -> Tensor:
        if place is None:
            return torch.ones_like(self.batch.mask)
        alone = torch.zeros_like(self.batch.mask)
        return alone.scatter(1, self.where[:, place, None], self.real[:, place, None].to(alone))

    def _effects(self, settings: int, after: tuple[int, Tensor], hooks: Sequence[Hook]) -> list[float]:
        many = self.batch.times(settings)
        with torch.no_grad():
            logits = read_logits(self.model, many, hooks=hooks, after=after)
            values = self.asked.metric(logits, self.logits.repeat(settings, 1), many.prompts)
        gains = rearrange(values, "(setting prompt) -> setting prompt", setting=settings) - self.base
        return [float(gain) for gain in gains.sum(1).cpu()]
