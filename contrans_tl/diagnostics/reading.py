"""Reading: which heads behind the layer of an injection take notice of it, and through what.

A head of layer m sees the stream x through its norm and three matrices, q = W_Q^T LN(x) + b_Q, likewise k and v. A vector v
that was added to the stream further down still stands in it, s v, beside whatever others make of it.

`readers` tells how much s v moves q, k and v, to first order, with the norm's scale sigma held as it is at every real token,

    |d q| = s |W_Q^T (g * P v)| / sigma          g: the norm's gain; P v: v less its mean, for LayerNorm

and whether that is more than for directions drawn at random, as long as v. `pattern_changes` tells how far the transplant
moves what each head attends to: KL(clean || transplanted) in nats.

    readers(model, concept, prompts, layer=4).top(5)                            [("L6H3 q", 9.1), ...] deviations of the null
    pattern_changes(model, concept, prompts, layer=4, strength=2.0).top(5)

The null of `readers` is isotropic. Streams are not: a head that reads the directions in which all texts vary reads most
concepts, too, so what is beyond the null is read, but need not be read for this concept's sake. A vector added to the keys of
all positions alike changes no attention, however strongly the keys read it: the softmax does not see it. What reading it does
to the model's output is asked by `paths.patch_paths`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl.activations import check_texts
from contrans_tl.anatomy import attention_norm, attention_weights, frozen_norm, norm_scale_site
from contrans_tl.diagnostics.runs import Batch, batches, check_concept, check_strength, choose_layer, keep
from contrans_tl.diagnostics.scores import Diagnosis, Scores, heads, interval_table, layers
from contrans_tl.evaluation.intervals import Estimate, mean_differences
from contrans_tl.models import HookedModel, Site, hook_name
from contrans_tl.passes import resumed_after, run_blocks
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import encode

if TYPE_CHECKING:
    from pandas import DataFrame

Places = Literal["all", "last"]
"""Positions the vector stands at: all of a prompt, or its last real token."""
FORMULA = 1e-4
"""How far q, k and v by the formula may be from those of the model, relative to the largest: 100 times what float32 leaves. Of
weights of lower precision, 8 of its units."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Readers(Diagnosis):
    """How much more of the vector every head reads than of a direction drawn at random: `scores` over "by" (q, k, v), "layer",
    "head", in standard deviations of the null."""

    layer: int
    strength: float
    size: Scores
    """|d q|, |d k|, |d v| themselves: means over real tokens of all prompts."""
    p: Scores
    """Of every place for itself, how many of the vectors - the drawn ones and this one - it reads as strongly."""
    family: Scores
    """Likewise with the largest deviation of all places (max T): one random direction in twenty has any place at 0.05."""
    draws: int

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The k places that read it most, in deviations of the null."""
        return self.scores.top(k, by="value")

    def to_dataframe(self) -> "DataFrame":
        """A row for each place: its deviations (`value`), size, p and family-wise p."""
        more = {name: getattr(self, name).values.flatten().tolist() for name in ("size", "p", "family")}
        return self.scores.to_dataframe().assign(**more)

    def to_dict(self) -> dict[str, Any]:
        more = {name: getattr(self, name).values.tolist() for name in ("size", "p", "family")}
        return {**super().to_dict(), "layer": self.layer, "strength": self.strength, "draws": self.draws, **more}


@dataclass(frozen=True, eq=False, kw_only=True)
class PatternChanges(Diagnosis):
    """How far every head's attention moves: `scores` over "layer", "head", mean KL(clean || transplanted) over prompts and
    query positions, in nats."""

    layer: int
    strength: float
    positions: str
    intervals: tuple[Estimate, ...]
    """95%, over prompts, in the order of the flattened scores."""
    random: Scores
    """The same for directions drawn at random, as long as the vector: the mean over them."""

    @property
    def ratio(self) -> Scores:
        """How many times as far as under a random direction."""
        tiny = torch.finfo(torch.float32).tiny
        return Scores(self.scores.values / self.random.values.clamp_min(tiny), self.scores.axes, "times a random direction's")

    def to_dataframe(self) -> "DataFrame":
        """A row for each head: its KL (`value`) with its interval, and that of random directions."""
        return interval_table(self.scores, self.intervals).assign(random=self.random.values.flatten().tolist())

    def to_dict(self) -> dict[str, Any]:
        more = self.to_dataframe()[["low", "high", "random"]].to_dict("list")
        settings = {"layer": self.layer, "strength": self.strength, "positions": self.positions}
        return {**super().to_dict(), **settings, **more}


def readers(
    model: HookedModel,
    concept: ConceptVector,
    prompts: Sequence[str],
    *,
    layer: int | None = None,
    strength: float = 1.0,
    draws: int = 500,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Readers:
    """How much strength * concept, added after block `layer`, moves q, k and v of every head behind, to first order, and of how
    many random directions that could be said.

    One pass over the prompts, for the scales of the norms; the rest is weights. Heads that share keys and values share scores.

    Raises:
        ValueError: a concept of another model or without this layer, no layer behind it, or an architecture whose q, k and v
            are not W^T LN(x) + b of the stream x.
    """
    layer, above = behind(model, concept, layer, strength)
    sequences = [encoding.ids for encoding in encode(model, check_texts(prompts, "last"), prepend_bos=prepend_bos)]
    if draws < 20:
        raise ValueError(f"expected at least 20 draws, below which no p can be 0.05; got {draws}.")
    check_formula(model, sequences[0], above)
    vector = strength * concept.at(layer)
    shrinking = _inverse_scales(model, batches(model, sequences, batch_size), above)
    drawn = torch.randn(draws, len(vector), generator=torch.Generator().manual_seed(seed))
    vectors = torch.cat([vector[None], vector.norm() * drawn / drawn.norm(dim=-1, keepdim=True)])
    sizes = torch.stack([s * _reads(model, m, vectors) for s, m in zip(shrinking, above, strict=True)], dim=2)
    size, null = sizes[0], sizes[1:]
    deviations = (size - null.mean(0)) / null.std(0)
    p, family = _chances(sizes)
    axes = {"by": ("q", "k", "v"), "layer": layers(above), "head": heads(model.cfg.n_heads)}
    beyond, expected = int((p <= 0.05).sum()), 0.05 * p.numel()
    return Readers(
        about=f"{concept.name} in {concept.model.name} at layer {layer}, {len(sequences)} prompts",
        scores=Scores(deviations.float(), axes, f"sd of {draws} random directions"),
        notes=(
            f"{beyond} of {p.numel()} places read it more than 95% of random directions; {expected:.0f} would by chance",
            f"{int((family <= 0.05).sum())} read it more than any place reads 95% of random directions (family-wise 5%)",
        ),
        layer=layer,
        strength=strength,
        size=Scores(size.float(), axes, "norm of the change"),
        p=Scores(p.float(), axes, "p"),
        family=Scores(family.float(), axes, "family-wise p"),
        draws=draws,
    )


def pattern_changes(
    model: HookedModel,
    concept: ConceptVector,
    prompts: Sequence[str],
    *,
    layer: int | None = None,
    strength: float = 1.0,
    positions: Places = "all",
    draws: int = 4,
    prepend_bos: bool | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> PatternChanges:
    """How far strength * concept after block `layer` moves the attention of every head behind, beside `draws` random directions
    of the same length.

    Clean and changed prompts are rows of one pass, so that no attention pattern is kept.

    Raises:
        ValueError: as `readers`, or unknown positions.
    """
    layer, above = behind(model, concept, layer, strength, positions)
    sequences = [encoding.ids for encoding in encode(model, check_texts(prompts, "last"), prepend_bos=prepend_bos)]
    if draws < 1:
        raise ValueError(f"expected at least one draw; got {draws}.")
    vector = strength * concept.at(layer)
    drawn = torch.randn(draws, len(vector), generator=torch.Generator().manual_seed(seed))
    vectors = torch.cat([0 * vector[None], vector[None], vector.norm() * drawn / drawn.norm(dim=-1, keepdim=True)])
    kl = torch.zeros(len(vectors) - 1, len(sequences), len(above), model.cfg.n_heads)
    for batch in batches(model, sequences, batch_size):
        found: dict[str, Tensor] = {}
        after = _under(model, batch, layer, vectors, positions)
        names = [hook_name(m, "pattern") for m in above]
        hooks = [(name, partial(_diverge, name=name, mask=batch.mask, found=found)) for name in names]
        many = batch.times(len(vectors))
        with resumed_after(model, layer, after):
            run_blocks(model, many.tokens, many.mask, hooks, above[-1])
        kl[:, batch.prompts] = torch.stack([found[name] for name in names], dim=2)
    by_prompt = rearrange(kl[0], "prompt layer head -> prompt (layer head)").double().numpy()
    axes = {"layer": layers(above), "head": heads(model.cfg.n_heads)}
    return PatternChanges(
        about=f"{concept.name} in {concept.model.name}, {strength:g} at layer {layer}, {len(sequences)} prompts",
        scores=Scores(kl[0].mean(0), axes, "KL in nats"),
        notes=(f"random directions of the same length move a head by {float(kl[1:].mean()):.3g} nats on average",),
        layer=layer,
        strength=strength,
        positions=positions,
        intervals=tuple(mean_differences(by_prompt, 0 * by_prompt, seed=seed)),
        random=Scores(reduce(kl[1:], "draw prompt layer head -> layer head", "mean"), axes, "KL in nats"),
    )


def behind(
    model: HookedModel, concept: ConceptVector, layer: int | None, strength: float, positions: str = "all"
) -> tuple[int, range]:
    """The layer of the injection and the layers behind it. ValueError, before any pass, for what cannot be injected there or
    has no head behind."""
    check_concept(model, concept)
    check_strength(strength)
    layer = choose_layer(concept, layer)
    n_layers = model.cfg.n_layers
    if not 0 <= layer < n_layers - 1:
        raise ValueError(f"expected a layer of 0 to {n_layers - 2}, which heads of a later layer can read; got {layer}.")
    if positions not in get_args(Places):
        raise ValueError(f"expected positions {' or '.join(map(repr, get_args(Places)))}; got {positions!r}.")
    return layer, range(layer + 1, n_layers)


def standing(batch: Batch, positions: Places) -> Bool[Tensor, "prompt pos"]:
    """Where the vector is added."""
    if positions == "all":
        return torch.ones_like(batch.mask, dtype=torch.bool)
    return torch.arange(batch.mask.shape[1], device=batch.mask.device) == batch.last[:, None]


def projected(model: HookedModel, layer: int, resid: Float[Tensor, "prompt pos d_model"]) -> dict[str, Tensor]:
    """ "q", "k", "v" of a layer whose input is `resid`: "prompt pos head d_head", heads as at the hook points, before any
    rotation."""
    weights, biases = attention_weights(model, layer)
    with torch.no_grad():
        normed = attention_norm(model, layer)(resid)
    found = {}
    for name, weight in weights.items():
        x = einsum(normed, weight.to(normed), "prompt pos d_model, head d_model d_head -> prompt pos head d_head")
        found[name] = x + biases[name].to(x) if name in biases else x
    return found


def check_formula(model: HookedModel, ids: Sequence[int], above: Sequence[int]) -> None:
    """ValueError, after one prompt, for an architecture whose q, k and v are not those of `projected`: one with a norm of its
    own on queries, say, or whose attention sees something else than its layer's input."""
    kinds: tuple[Site, ...] = ("q", "k", "v", "resid_pre")
    sites = {(m, str(site)): hook_name(m, site) for m in above for site in kinds}
    if missing := [site for site in sites.values() if site not in model.hook_dict]:
        raise ValueError(f"{model.cfg.model_name}: no hook point {missing[0]}; what its heads read is not told.")
    seen: dict[str, Tensor] = {}
    (prompt,) = batches(model, [ids], 1)
    run_blocks(model, prompt.tokens, prompt.mask, keep(list(sites.values()), seen), above[-1])
    allowed = max(FORMULA, 8 * torch.finfo(seen[sites[above[0], "resid_pre"]].dtype).eps)
    for m in above:
        for name, x in projected(model, m, seen[sites[m, "resid_pre"]]).items():
            there = seen[sites[m, name]]
            same = x.shape == there.shape
            if not same or not (x - there).abs().max() <= allowed * there.abs().max():
                raise ValueError(
                    f"{model.cfg.model_name}: {name} of layer {m} is not W^T LN(x) + b of the layer's input; what the heads of "
                    "this architecture read is not told."
                )


def _inverse_scales(model: HookedModel, prompts: Sequence[Batch], above: Sequence[int]) -> list[float]:
    """Of every layer, the mean of 1 / scale of its first norm over all real tokens."""
    sums, tokens = torch.zeros(len(above)).double(), 0
    for batch in prompts:
        # Kept and not summed in the hook: a HookedTransformer norms for q, k and v apart, and its hook fires three times.
        kept: dict[str, Tensor] = {}
        run_blocks(model, batch.tokens, batch.mask, keep([norm_scale_site(m) for m in above], kept), above[-1])
        scales = torch.stack([kept[norm_scale_site(m)][..., 0].double().cpu() for m in above])
        real = batch.mask.bool().cpu()
        tokens += int(real.sum())
        sums += (1 / scales[:, real]).sum(1)
    return (sums / tokens).tolist()


def _reads(model: HookedModel, layer: int, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector by head"]:
    """|W^T (g * P v)| for q, k and v of every head; shared keys and values count for each head that uses them."""
    (weights, _), n_heads, found = attention_weights(model, layer), model.cfg.n_heads, []
    norm = frozen_norm(attention_norm(model, layer), vectors.shape[1], weights["q"])
    pushed = norm.push(vectors.to(norm.gain))
    for weight in weights.values():
        size = einsum(pushed, weight.float(), "vector d_model, head d_model d_head -> vector head d_head").norm(dim=-1)
        found.append(repeat(size, "vector head -> vector (head shared)", shared=n_heads // size.shape[1]))
    return torch.stack(found, 1).double().cpu()


def _chances(sizes: Float[Tensor, "vector by layer head"]) -> tuple[Tensor, Tensor]:
    """p of every place, alone and family-wise, of the first vector among all. As the first was drawn by chance too, if there is
    nothing, all ranks are equally likely: the test is exact."""
    deviations = (sizes - sizes.mean(0)) / sizes.std(0)
    largest = reduce(deviations, "vector by layer head -> vector 1 1 1", "max")
    return (sizes >= sizes[0]).double().mean(0), (largest >= deviations[0]).double().mean(0)


def _under(
    model: HookedModel, batch: Batch, layer: int, vectors: Float[Tensor, "setting d_model"], positions: Places
) -> Float[Tensor, "row pos d_model"]:
    """The stream after the block with each of the vectors added: rows are "(setting prompt)"."""
    seen: dict[str, Tensor] = {}
    run_blocks(model, batch.tokens, batch.mask, keep([hook_name(layer)], seen), layer)
    resid = seen[hook_name(layer)]
    where = standing(batch, positions).to(resid)
    added = einsum(vectors.to(resid), where, "setting d_model, prompt pos -> setting prompt pos d_model")
    return rearrange(resid + added, "setting prompt pos d_model -> (setting prompt) pos d_model")


def _diverge(
    pattern: Float[Tensor, "row head query key"],
    hook: Any,
    *,
    name: str,
    mask: Int[Tensor, "prompt pos"],
    found: dict[str, Tensor],
) -> None:
    """KL(clean || changed) of every setting but the first, which is the clean one: mean over real queries but the first token,
    which has nothing to choose from."""
    patterns = rearrange(pattern.float(), "(setting prompt) head query key -> setting prompt head query key", prompt=len(mask))
    tiny = torch.finfo(torch.float32).tiny
    clean, changed = patterns[:1], patterns[1:].clamp_min(tiny)
    kl = (clean * (clean.clamp_min(tiny).log() - changed.log())).sum(-1)
    real = mask[:, None, 1:].bool().to(kl.device)
    found[name] = (torch.where(real, kl[..., 1:], 0.0).sum(-1) / real.sum(-1).clamp_min(1)).cpu()
