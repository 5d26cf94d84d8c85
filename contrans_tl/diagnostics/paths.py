"""Paths: what becomes of a metric if a concept's vector enters one head only.

Activation patching changes the stream, and so what all heads behind it see. Here strength * v is added to what one head sees -
through its query, its key, its value, or all three - while every other head and MLP sees the clean stream (path patching,
Goldowsky-Dill et al., arXiv 2304.05969; v itself stands for the sender). Exactly: with x the clean input of the head's layer,

    q = W_Q^T LN(x + strength * v) + b_Q, k and v likewise

the norm computed anew; what the head then puts out is all that differs, and everything behind it follows from that.

    found = patch_paths(model, concept, prompts, metric=lambda logits: logits[:, yes] - logits[:, no], layer=4, strength=2.0)
    found.top(5), found.whole                                         [("L6H3 qkv", 1.2), ...], the transplant's own effect

The effects of all heads do not add up to the transplant's: heads read what other heads made of the vector, MLPs read it, and
the unembedding does. Where heads share keys and values (grouped queries), still only the one head uses the changed ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from contrans_tl.diagnostics.metrics import Metric, Prompts, Ready, ask
from contrans_tl.diagnostics.reading import Places, behind, check_formula, projected, standing
from contrans_tl.diagnostics.runs import Batch, batches, chunks, keep, read_logits
from contrans_tl.diagnostics.scores import Diagnosis, Scores, heads, interval_table, layers, signed
from contrans_tl.evaluation.intervals import Estimate, mean_differences
from contrans_tl.models import Hook, HookedModel, Site, hook_name
from contrans_tl.refinement import ConceptVector

if TYPE_CHECKING:
    from pandas import DataFrame

By = Literal["q", "k", "v", "qkv"]
"""The input of a head that the vector enters by."""
Head = tuple[int, int]
"""Layer and head, counted from 0."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PathEffects(Diagnosis):
    """What the vector does to the metric through one head alone: `scores` over "by" (q, k, v, qkv: all three), "layer",
    "head", patched less clean, mean over prompts; NaN for heads that were not asked for."""

    layer: int
    strength: float
    positions: str
    metric: str
    intervals: tuple[Estimate, ...]
    """95%, over prompts, in the order of the flattened scores; NaN where they are."""
    whole: Estimate
    """What the transplant itself does to the metric."""

    def to_dataframe(self) -> "DataFrame":
        """A row for each place: its effect (`value`) with its interval."""
        return interval_table(self.scores, self.intervals)

    def to_dict(self) -> dict[str, Any]:
        more = self.to_dataframe()[["low", "high"]].to_dict("list")
        settings = {"layer": self.layer, "strength": self.strength, "positions": self.positions, "metric": self.metric}
        whole = {"value": self.whole.value, "low": self.whole.low, "high": self.whole.high}
        return {**super().to_dict(), **settings, "whole": whole, **more}


def patch_paths(
    model: HookedModel,
    concept: ConceptVector,
    prompts: Prompts,
    *,
    metric: Ready | Metric | Callable[[Any], Any] = "logit_difference",
    layer: int | None = None,
    strength: float = 1.0,
    positions: Places = "all",
    at: Sequence[Head] | None = None,
    by: Sequence[By] = get_args(By),
    batch_size: int = 8,
    rows: int = 64,
    seed: int = 0,
) -> PathEffects:
    """The effect of strength * concept, added after block `layer`, through every head behind, one at a time.

    Costs a pass over the prompts for each head and each of `by`, from the head's layer on, `rows` rows at a time: choose heads
    with `at`, such as those that `readers` names.

    Args:
        prompts: texts, or Questions for the ready metrics (see `metrics`).
        at: heads as (layer, head); all behind the layer by default.

    Raises:
        ValueError: a concept of another model or without this layer, heads that are not behind it, a metric of the wrong
            shape, or an architecture whose q, k and v are not W^T LN(x) + b of the stream x.
    """
    layer, above = behind(model, concept, layer, strength, positions)
    places = check_places(model, above, at, by)
    asked = ask(model, prompts, metric)
    vector, slots = strength * concept.at(layer), {place: slot for slot, place in enumerate(places)}
    effects, whole = torch.zeros(len(asked), len(places)), torch.zeros(len(asked))
    check_formula(model, asked.sequences[0], above)
    for batch in batches(model, asked.sequences, batch_size):
        clean = _Clean(model, batch, vector, positions, sorted({m for (m, _), _ in places}))
        base = asked.metric(clean.logits, clean.logits, batch.prompts).cpu()
        whole[batch.prompts] = asked.metric(clean.transplanted(layer), clean.logits, batch.prompts).cpu() - base
        for m in clean.layers:
            here = [((of, head), through) for (of, head), through in places if of == m]
            for some in chunks(here, rows // len(batch.prompts)):
                many = batch.times(len(some))
                logits = clean.patched(m, [(head, through) for (_, head), through in some], many)
                before = repeat(clean.logits, "prompt vocab -> (setting prompt) vocab", setting=len(some))
                values = rearrange(asked.metric(logits, before, many.prompts), "(s p) -> p s", s=len(some)).cpu()
                effects[batch.prompts[:, None], torch.tensor([slots[place] for place in some])] = values - base[:, None]
    intervals = mean_differences(effects.double().numpy(), 0 * effects.double().numpy(), seed=seed)
    (of_all,) = mean_differences(whole[:, None].double().numpy(), 0 * whole[:, None].double().numpy(), seed=seed)
    return _report(model, concept, asked.metric, places, intervals, of_all, layer, above, strength, positions)


def check_places(
    model: HookedModel, above: Sequence[int], at: Sequence[Head] | None, by: Sequence[By]
) -> list[tuple[Head, By]]:
    """Every head with every way in. ValueError for a head that is not behind the layer, or an unknown way in."""
    n_heads = model.cfg.n_heads
    at = [(m, head) for m in above for head in range(n_heads)] if at is None else list(at)
    outside = [place for place in at if place[0] not in above or not 0 <= place[1] < n_heads]
    if outside or not at:
        raise ValueError(
            f"expected heads (layer, head) of layers {above[0]} to {above[-1]}, behind the injection, 0 to {n_heads - 1}; "
            f"got {outside or 'none'}."
        )
    if not by or any(one not in get_args(By) for one in by):
        raise ValueError(f"expected by= some of {', '.join(get_args(By))}; got {list(by)}.")
    return [(head, one) for head in dict.fromkeys(at) for one in dict.fromkeys(by)]


class _Clean:
    """The clean run of some prompts: what the layers asked for saw and put out, so that one head can be changed in it."""

    def __init__(self, model: HookedModel, batch: Batch, vector: Tensor, positions: Places, layers: Sequence[int]) -> None:
        self.model, self.batch, self.vector, self.positions, self.layers = model, batch, vector, positions, layers
        self._seen: dict[str, Tensor] = {}
        kinds: tuple[Site, ...] = ("resid_pre", "z")
        sites = [hook_name(m, site) for m in layers for site in kinds]
        with torch.no_grad():
            self.logits = read_logits(model, batch, hooks=keep(sites, self._seen))

    def transplanted(self, layer: int) -> Float[Tensor, "prompt vocab"]:
        """Logits with the vector added after the block, for all to see."""
        with torch.no_grad():
            return read_logits(self.model, self.batch, hooks=[(hook_name(layer), lambda resid, hook: self._with_vector(resid))])

    def patched(self, layer: int, settings: Sequence[tuple[int, By]], many: Batch) -> Float[Tensor, "row vocab"]:
        """Logits of "(setting prompt)" rows, in each of which one head of the layer sees the vector through one way."""
        resid = self._seen[hook_name(layer, "resid_pre")]
        changed = projected(self.model, layer, self._with_vector(resid))
        hooks: list[Hook] = []
        names: tuple[Site, ...] = ("q", "k", "v")
        for name in names:
            # Of all heads, as all but one put out what they do in the clean run: so shared keys need no thought.
            at = [setting for setting, (_, by) in enumerate(settings) if name in by]
            hooks.append((hook_name(layer, name), partial(_put, at=at, new=changed[name])))
        only = [head for head, _ in settings]
        hooks.append((hook_name(layer, "z"), partial(_only, heads=only, clean=self._seen[hook_name(layer, "z")])))
        below = repeat(resid, "prompt pos d_model -> (setting prompt) pos d_model", setting=len(settings))
        with torch.no_grad():
            return read_logits(self.model, many, hooks=hooks, after=(layer - 1, below))

    def _with_vector(self, resid: Tensor) -> Tensor:
        where = standing(self.batch, self.positions).to(resid)
        return resid + where[..., None] * self.vector.to(resid)


def _put(
    x: Float[Tensor, "row pos head d_head"], hook: Any, *, at: Sequence[int], new: Float[Tensor, "prompt pos head d_head"]
) -> Tensor:
    """In some settings the layer's q, k or v are others."""
    x = rearrange(x.clone(), "(setting prompt) pos head d_head -> setting prompt pos head d_head", prompt=len(new))
    x[list(at)] = new.to(x)
    return rearrange(x, "setting prompt pos head d_head -> (setting prompt) pos head d_head")


def _only(
    z: Float[Tensor, "row pos head d_head"], hook: Any, *, heads: Sequence[int], clean: Float[Tensor, "prompt pos head d_head"]
) -> Tensor:
    """In each setting all heads but one put out what they do in the clean run: those that share its keys and values, too."""
    kept = repeat(clean, "prompt pos head d_head -> setting prompt pos head d_head", setting=len(heads)).clone()
    z = rearrange(z, "(setting prompt) pos head d_head -> setting prompt pos head d_head", setting=len(heads))
    for setting, head in enumerate(heads):
        kept[setting, :, :, head] = z[setting, :, :, head]
    return rearrange(kept, "setting prompt pos head d_head -> (setting prompt) pos head d_head").to(z)


def _report(
    model: HookedModel,
    concept: ConceptVector,
    metric: Metric,
    places: Sequence[tuple[Head, By]],
    found: Sequence[Estimate],
    whole: Estimate,
    layer: int,
    above: Sequence[int],
    strength: float,
    positions: Places,
) -> PathEffects:
    """On the grid of all heads behind the layer."""
    ways, n_heads = tuple(dict.fromkeys(by for _, by in places)), model.cfg.n_heads
    nothing = Estimate(float("nan"), float("nan"), float("nan"), whole.n)
    grid = dict.fromkeys([(by, m, head) for by in ways for m in above for head in range(n_heads)], nothing)
    grid |= {(by, *head): one for (head, by), one in zip(places, found, strict=True)}
    values = torch.tensor([one.value for one in grid.values()]).view(len(ways), len(above), n_heads)
    axes = {"by": ways, "layer": layers(above), "head": heads(n_heads)}
    apart = sum(one.low > 0 or one.high < 0 for one in found)
    return PathEffects(
        about=f"{concept.name} in {concept.model.name}, {strength:g} at layer {layer}, {whole.n} prompts: {metric.name}",
        scores=Scores(values, axes, f"change of the metric{f' in {metric.unit}' if metric.unit else ''}"),
        notes=(
            f"the transplant itself: {signed(whole)}",
            f"{apart} of {len(found)} intervals exclude 0",
        ),
        layer=layer,
        strength=strength,
        positions=positions,
        metric=metric.name,
        intervals=tuple(grid.values()),
        whole=whole,
    )
