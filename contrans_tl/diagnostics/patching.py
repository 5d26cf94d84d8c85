"""Patching: which layers and heads carry what a transplant does to a metric.

Two runs over the same tokens, one with the concept added after block `layer`, one without. An activation of the one is put into
the other, and

    denoise    transplanted into plain      share = (metric - plain) / (transplanted - plain)        what it brings alone
    noise      plain into transplanted      share = (transplanted - metric) / (transplanted - plain)  what is lost without it

0: it carries nothing, 1: all of the effect. The two differ where paths back each other up (noising shows less) or need each
other (denoising shows less). Shares of parallel parts need not sum to 1.

    found = patch(target, moved, pairs.test, layer=3, strength=2.0)
    found.top(5)                    heads
    found.by_layer, found.by_position

The patching is TransformerLens's own (`transformer_lens.patching`). It sees a view of the model that begins behind the block of
the transplant, keeps only what is patched, computes the head behind the last token only, and stands prompts of unequal length
with their last tokens together: "-1" is the last token, and a prompt that has no token at a place adds nothing there. Places
that are the same in both runs - all up to the transplant - are left out of the passes; their share is 0.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.diagnostics.metrics import Asked, Prompts, ask
from contrans_tl.diagnostics.runs import (
    Batch,
    batches,
    check_concept,
    check_strength,
    choose_layer,
    keep,
    place_labels,
    read_logits,
    shared_tokens,
)
from contrans_tl.diagnostics.scores import Diagnosis, Scores, heads, layers
from contrans_tl.models import Hook, HookedModel, Site, hook_name, layer_of
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector

Direction = Literal["denoise", "noise"]
"""Injected activations into the clean run, or clean ones into the injected run."""
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")
"""Patched whole and by position; heads are patched at `z`, over all positions."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Patching(Diagnosis):
    """Shares of the effect: `scores` of each head over all positions, layer x head."""

    by_layer: Scores
    """Of what enters a layer, of its attention and of its MLP, over all positions: layer x site."""
    by_position: Scores
    """The same at each position alone, if asked for, else 0: site x layer x position."""
    direction: Direction
    layer: int
    strength: float
    plain: float
    """The metric without the transplant, mean over prompts."""
    transplanted: float
    metric: str
    tokens: tuple[str, ...]
    """At each position, the token that all prompts have in common there, or nothing."""

    @property
    def effect(self) -> float:
        """What the shares are shares of, in units of the metric."""
        return self.transplanted - self.plain

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        names = ("direction", "layer", "strength", "plain", "transplanted", "metric")
        grids = {"by_layer": self.by_layer.to_dict(), "by_position": self.by_position.to_dict()}
        return {**super().to_dict(), **{name: getattr(self, name) for name in names}, **grids}

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"  {label:<12} {value:+.3g}" for label, value in self.by_layer.top(5))])


def patch(
    model: HookedModel,
    concept: ConceptVector,
    prompts: Prompts,
    *,
    metric: Any = "logit_difference",
    direction: Direction = "denoise",
    layer: int | None = None,
    strength: float = 1.0,
    by_position: bool = False,
    batch_size: int = 32,
) -> Patching:
    """Share of the transplant's effect on the metric that each layer and head carries; see the top of this module.

    Args:
        prompts: texts, or Questions for the metrics that need an answer.
        metric: a name or a callable of `diagnostics.metrics`; shares are of its mean over prompts.
        layer: of the transplant; not needed for a concept at one layer.
        by_position: also one position at a time, which takes as many more passes as there are positions.

    Raises:
        ValueError: a concept of another model, a layer it has not, a transplant without effect on the metric, or what `ask`
            raises.
    """
    check_concept(model, concept)
    layer, strength = choose_layer(concept, layer), check_strength(strength)
    if direction not in ("denoise", "noise"):
        raise ValueError(f"expected direction='denoise' or direction='noise'; got {direction!r}.")
    asked = ask(model, prompts, metric)
    width, cfg = max(map(len, asked.sequences)), model.cfg
    sites = [site for site in SITES if hook_name(0, site) in model.hook_dict]
    metrics = torch.zeros(2)
    whole = torch.zeros(cfg.n_layers, len(sites))
    placed = torch.zeros(len(sites), cfg.n_layers, width)
    per_head = torch.zeros(cfg.n_layers, cfg.n_heads)
    later = range(layer + 1, cfg.n_layers)
    for batch in track(work := batches(model, asked.sequences, batch_size), "patching", len(work)):
        view = _View.of(model, asked, batch, layer, strength * concept.at(layer), direction, width, sites)
        share = len(batch.tokens) / len(asked)
        metrics += share * torch.tensor([view.plain, view.transplanted])
        for k, site in enumerate(sites):
            whole[later, k] += share * view.changes("every", site, [(at,) for at in later])
            if by_position:
                places = [(at, place) for at in later for place in range(width)]
                placed[k, later] += share * view.changes("position", site, places).view(len(later), width)
        places = [(at, head) for at in later for head in range(cfg.n_heads)]
        per_head[later] += share * view.changes("head", "z", places).view(len(later), cfg.n_heads)
    plain, transplanted = metrics.tolist()
    effect = transplanted - plain
    if abs(effect) <= 1e-5 * max(abs(plain), abs(transplanted), 1e-6):
        raise ValueError(
            f"the transplant at layer {layer}, strength {strength:g}, leaves the metric {asked.metric.name!r} as it is "
            f"({plain:.4g}): there is no effect to share out. Choose another layer, strength or metric."
        )
    # What a denoising patch adds, and what a noising one takes away, in the direction of the effect.
    sign = 1.0 if direction == "denoise" else -1.0
    unit = "share of the effect"
    by_layer = Scores(sign * whole / effect, {"layer": layers(cfg.n_layers), "site": tuple(sites)}, unit)
    axes = {"site": tuple(sites), "layer": layers(cfg.n_layers), "position": place_labels(width)}
    return Patching(
        about=f"{concept.name} at L{layer} × {strength:g} in {concept.model.name}, {asked.metric.name}, {direction}",
        scores=Scores(sign * per_head / effect, {"layer": layers(cfg.n_layers), "head": heads(cfg.n_heads)}, unit),
        notes=(f"the effect: {plain:+.3g} to {transplanted:+.3g}, mean of {len(asked)} prompts",),
        by_layer=by_layer,
        by_position=Scores(sign * placed / effect, axes, unit),
        direction=direction,
        layer=layer,
        strength=strength,
        plain=plain,
        transplanted=transplanted,
        metric=asked.metric.name,
        tokens=shared_tokens(model, asked.sequences, width),
    )


@dataclass(eq=False)
class _View:
    """One batch of a model, as `transformer_lens.patching` runs it: the blocks behind the transplant, from the residual that is
    patched into."""

    model: HookedModel
    asked: Asked
    batch: Batch
    resid: Mapping[str, Float[Tensor, "prompt pos d_model"]]
    """Outputs of the blocks from `layer` on, in the run that is patched into: what is below a patch is not run again."""
    others: Mapping[str, Float[Tensor, "prompt place ..."]]
    """What is patched in, last tokens together."""
    width: int
    base: Float[Tensor, "prompt vocab"]
    plain: float
    transplanted: float
    unpatched: float
    """The metric of the run that is patched into."""
    training: bool = False
    """As TransformerLens asks."""

    @classmethod
    def of(
        cls,
        model: HookedModel,
        asked: Asked,
        batch: Batch,
        layer: int,
        vector: Float[Tensor, " d_model"],
        direction: Direction,
        width: int,
        sites: Sequence[Site],
    ) -> "_View":
        later = range(layer + 1, model.cfg.n_layers)
        kept: tuple[Site, ...] = (*sites, "z", "resid_post")
        names = [hook_name(at, site) for at in later for site in kept]
        plain: dict[str, Tensor] = {}
        moved: dict[str, Tensor] = {}
        with torch.no_grad():
            base = read_logits(model, batch, hooks=keep([hook_name(layer), *names], plain))
            at = hook_name(layer)
            moved[at] = plain[at] + vector.to(plain[at])
            logits = read_logits(model, batch, hooks=keep(names, moved), after=(layer, moved[at]))
            before, after = (float(asked.metric(some, base, batch.prompts).mean()) for some in (base, logits))
        into, others = (plain, moved) if direction == "denoise" else (moved, plain)
        posts = [hook_name(at) for at in range(layer, model.cfg.n_layers)]
        aligned = {name: batch.aligned(x, width) for name, x in others.items() if name not in posts}
        resid = {name: into[name] for name in posts}
        unpatched = before if direction == "denoise" else after
        return cls(model, asked, batch, resid, aligned, width, base, before, after, unpatched)

    @property
    def cfg(self) -> Any:
        return self.model.cfg

    def changes(self, which: str, site: Site, places: Sequence[tuple[int, ...]]) -> Float[Tensor, " place"]:
        """What the metric changes by, mean over the batch, for each patch: of a layer, a layer and position, or a layer and
        head."""
        if not places:
            return torch.zeros(0)
        import pandas
        from transformer_lens import patching

        functions: Mapping[str, Callable[..., Any]] = {
            "resid_pre": patching.get_act_patch_resid_pre,
            "attn_out": patching.get_act_patch_attn_out,
            "mlp_out": patching.get_act_patch_mlp_out,
            "z": patching.get_act_patch_attn_head_out_all_pos,
        }
        options: dict[str, Any] = {"patch_setter": _whole} if which == "every" else {}
        with _our_progress(patching), torch.no_grad():
            values = functions[site](
                self,
                self.batch.tokens.new_zeros(len(self.batch.tokens), self.width),
                self.others,
                self._metric,
                index_axis_names=None,
                index_df=pandas.DataFrame(places, columns=["layer", "place"][: len(places[0])]),
                **options,
            )
        return values.cpu() - self.unpatched

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Sequence[Hook] = (), **options: Any) -> Float[Tensor, "prompt vocab"]:
        """Logits behind the last tokens."""
        hooks = [(name, self._on_aligned(hook)) for name, hook in fwd_hooks]
        below = min(layer_of(name) for name, _ in fwd_hooks) - 1
        return read_logits(self.model, self.batch, hooks=hooks, after=(below, self.resid[hook_name(below)]))

    def _on_aligned(self, hook: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The same hook on what stands at the last places, last tokens together."""
        where, real = self.batch.places(self.width)
        rows = torch.arange(len(where), device=where.device)[:, None].expand_as(where)

        def on_aligned(x: Tensor, hook_: Any = None, **named: Any) -> Tensor:
            at, there = where.to(x.device), real.to(x.device)
            changed, x = hook(self.batch.aligned(x, self.width), hook=named.get("hook", hook_)), x.clone()
            x[rows.to(x.device)[there], at[there]] = changed[there].to(x)
            return x

        return on_aligned

    def _metric(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, ""]:
        return self.asked.metric(logits, self.base, self.batch.prompts).mean()


def _whole(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """A patch setter of TransformerLens: everything, at all positions."""
    return clean.to(corrupted)


@contextmanager
def _our_progress(patching: Any) -> Iterator[None]:
    """TransformerLens draws a bar for each grid, also where nobody looks; the library's own stands over all of them."""
    theirs = patching.tqdm
    patching.tqdm = lambda items, *args, **options: items
    try:
        yield
    finally:
        patching.tqdm = theirs
