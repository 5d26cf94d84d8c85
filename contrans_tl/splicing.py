"""Splicing: does the target read on from mapped activations of the source as from its own?

    print(splice(source, target, maps, held_out_texts, layers=[(9, 18)]))

Both models read the same text. At the positions replaced, the target's residual after block t is overwritten, and its blocks
above t run on; arms differ in what is written:

    clean       the target's own residual: nothing changes
    spliced     W x + b of the source's residual after block s, at the token that ends at the same character
    shuffled    the same by maps fitted on shuffled pairs of rows: what a map knows that knows no pairing
    mean        the mean of the target's rows that the maps were fitted on

*Positions replaced*: where tokens of both models end at the same character. With one tokenizer that is every token but those
amid a character, else the ends of most words. The beginning-of-sequence token stays clean, and so do all positions between
and the last token, behind which there is nothing to predict. *Scored* is the next token after every replaced position, in
every arm alike:

    CE recovered = (CE_mean - CE_arm) / (CE_mean - CE_clean)     1: as good as clean, 0: as bad as the mean
    KL           = sum p_clean log(p_clean / p_arm)              nats

The texts must not be those that the maps were fitted on. Maps are fitted at the ends of words, and within words they carry
what they have not seen: this is part of the test.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.evaluation import Estimate, estimate, plain
from contrans_tl.models import HookedModel, check_ready, hook_name, identify
from contrans_tl.passes import resumed_after, run_blocks
from contrans_tl.progress import track
from contrans_tl.quality import plain_values
from contrans_tl.reformulation import LayerMaps
from contrans_tl.tokens import Encoding, by_length, encode, pad
from contrans_tl.weights import device_of

ARMS = ("clean", "spliced", "shuffled", "mean")


@dataclass(frozen=True)
class Splice:
    """One pair of layers, spliced. Estimates are over texts, in nats a token scored; intervals are of the arm."""

    layers: tuple[int, int]
    loss: dict[str, Estimate]
    """Cross-entropy of every arm."""
    increase: dict[str, Estimate]
    """Cross-entropy of an arm above that of the clean run, text by text."""
    kl: dict[str, Estimate]
    """KL of the clean run's next-token distribution from the arm's."""
    recovered: dict[str, Estimate]
    """CE recovered, see the module; NaN where mean ablation costs the target nothing, its interval reaching down to 0."""


@dataclass(frozen=True)
class SpliceReport:
    """How a target reads on from the source's activations, beside what no pairing and no activations at all would do."""

    source: str
    target: str
    texts: int
    tokens: int
    """Tokens scored."""
    replaced: float
    """Share of the target's tokens, the beginning-of-sequence token left out, whose residual was replaced."""
    splices: tuple[Splice, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return plain_values(self)

    def __str__(self) -> str:
        lines = [
            f"{self.source} into {self.target}: {self.texts} texts, {self.tokens} tokens scored, {self.replaced:.0%} of the "
            "tokens replaced; nats a token",
            f"  {'layers':<10}{'CE recovered':<20}{'shuffled map':<22}{'CE clean':>9}{'spliced':>9}{'shuffled':>9}{'mean':>9}"
            f"{'KL spliced':>12}{'mean':>7}",
        ]
        for one in self.splices:
            s, t = one.layers
            losses = "".join(f"{one.loss[arm].value:>9.3f}" for arm in ARMS)
            lines.append(
                f"  {f'{s} -> {t}':<10}{str(one.recovered['spliced']):<20}{str(one.recovered['shuffled']):<22}{losses}"
                f"{one.kl['spliced'].value:>12.3f}{one.kl['mean'].value:>7.2f}"
            )
        return "\n".join(lines)


def splice(
    source: HookedModel,
    target: HookedModel,
    maps: LayerMaps,
    texts: Sequence[str],
    *,
    layers: Sequence[tuple[int, int]],
    batch_size: int = 16,
    seed: int = 0,
) -> SpliceReport:
    """Replace the target's residual at layer t by the source's, mapped from layer s, for every (s, t).

    Args:
        texts: not among the sentences that the maps were fitted on; cut to the context.
        batch_size: of texts. The logits of a batch are held twice.
        seed: of the shuffled pairs.

    Raises:
        ValueError: models that the maps are not between, a layer they do not have, no layers, fewer than two texts, or
            than two in which both models have a token that ends at the same character and is followed by another.
    """
    layers = [(s, t) for s, t in layers]
    if not layers:
        raise ValueError("expected at least one pair of layers, [(source layer, target layer), ...]; got none.")
    if isinstance(texts, str) or len(texts) < 2:
        raise ValueError(f"expected a list of at least two texts; got {texts!r}.")
    for model, side in ((source, maps.source), (target, maps.target)):
        check_ready(model)
        if not identify(model).same_space(side.model):
            raise ValueError(f"these maps are between {maps.source.model} and {maps.target.model}; got {identify(model)}.")
    chosen = maps.only(sorted({s for s, _ in layers}), sorted({t for _, t in layers}))
    reads = [
        encode(model, texts, prepend_bos=side.prepend_bos, truncate=True)
        for model, side in ((source, maps.source), (target, maps.target))
    ]
    places = [same_ends(*pair) for pair in zip(*reads, strict=True)]
    used = [i for i, place in enumerate(places) if place]
    if len(used) < 2:
        raise ValueError(
            f"expected at least two texts in which tokens of both models end at the same character, with another token to "
            f"follow; got {len(used)} of {len(texts)}."
        )
    shuffled = chosen.shuffled(seed=seed)
    through = {pair: {"spliced": chosen[pair].point, "shuffled": shuffled[pair].point} for pair in layers}
    means = {t: chosen.target.at(t).double().mean(0).float() for _, t in layers}
    sums = {pair: {arm: torch.zeros(2, len(texts)).double() for arm in ARMS} for pair in layers}  # loss and KL of every text
    batches = by_length([len(reads[1][i].ids) for i in used], batch_size)
    for batch in track(batches, f"splicing into {target.cfg.model_name}", len(batches)):
        members = [used[k] for k in batch]
        text = torch.tensor([k for k, i in enumerate(members) for _ in places[i]])
        there, here = (torch.tensor([p[side] for i in members for p in places[i].items()]) for side in (0, 1))
        read = pad([reads[0][i].ids for i in members], device_of(source))
        reading = pad([reads[1][i].ids for i in members], device_of(target))
        x = {
            s: resid[text, there].to(chosen.source.values) for s, resid in _streams(source, *read, chosen.source.layers).items()
        }
        own = _streams(target, *reading, chosen.target.layers)
        following = reading[0].cpu()[text, here + 1][:, None]

        clean = _next_logprobs(target, *reading, text, here)
        for s, t in layers:
            rows = {name: point(x[s]) for name, point in through[s, t].items()} | {"mean": means[t]}
            for name in ARMS:
                logprobs = clean
                if name in rows:
                    resid = own[t].clone()
                    resid[text, here] = rows[name].to(resid)
                    with resumed_after(target, t, resid):
                        logprobs = _next_logprobs(target, *reading, text, here)
                loss, kl = -logprobs.gather(-1, following)[:, 0], (clean.exp() * (clean - logprobs)).sum(-1)
                sums[s, t][name].index_add_(1, torch.tensor(members)[text], torch.stack([loss, kl]).double())

    counts = np.array([float(len(places[i])) for i in used])
    return SpliceReport(
        source=maps.source.model.name,
        target=maps.target.model.name,
        texts=len(used),
        tokens=int(counts.sum()),
        replaced=float(counts.sum() / sum(len(reads[1][i].ids) - reads[1][i].ends.count(0) for i in used)),
        splices=tuple(_summary(pair, {arm: sums[pair][arm][:, used].numpy() for arm in ARMS}, counts) for pair in layers),
    )


def same_ends(source: Encoding, target: Encoding) -> dict[int, int]:
    """{position of the source: position of the target} of tokens that end at the same character, but for the last token of
    the target, behind which there is nothing to predict, and for tokens before the text begins."""
    at = [{end: position for position, end in enumerate(side.ends) if end > 0} for side in (source, target)]
    shared = {position: at[1][end] for end, position in at[0].items() if end in at[1]}
    return {s: t for s, t in shared.items() if t + 1 < len(target.ids)}


def _streams(
    model: HookedModel, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"], layers: Sequence[int]
) -> dict[int, Float[Tensor, "prompt pos d_model"]]:
    """The residual stream after these blocks."""
    seen: dict[int, Tensor] = {}

    def keep(resid: Tensor, hook: Any, *, layer: int) -> None:
        seen[layer] = resid.detach().clone()

    run_blocks(model, tokens, mask, [(hook_name(layer), partial(keep, layer=layer)) for layer in layers], max(layers))
    return seen


def _next_logprobs(
    model: HookedModel,
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "prompt pos"],
    prompt: Int[Tensor, " row"],
    position: Int[Tensor, " row"],
) -> Float[Tensor, "row vocab"]:
    """Of the token after each of these positions, on the CPU."""
    return plain(model)(tokens, mask)[prompt, position].log_softmax(-1).cpu()


def _summary(
    layers: tuple[int, int],
    sums: dict[str, Float[np.ndarray, "two text"]],
    counts: Float[np.ndarray, " text"],
) -> Splice:
    loss, kl = ({arm: sums[arm][part] for arm in ARMS} for part in (0, 1))

    def per_token(values: Float[np.ndarray, " text"]) -> Estimate:
        return estimate(values[None], counts=counts)

    lost = loss["mean"] - loss["clean"]

    def share(values: Float[np.ndarray, " text"]) -> Estimate:
        if per_token(lost).low <= 0:
            return Estimate(np.nan, np.nan, np.nan, len(values))
        return estimate(values[None], counts=lost)

    return Splice(
        layers=layers,
        loss={arm: per_token(loss[arm]) for arm in ARMS},
        increase={arm: per_token(loss[arm] - loss["clean"]) for arm in ARMS[1:]},
        kl={arm: per_token(kl[arm]) for arm in ARMS[1:]},
        recovered={arm: share(loss["mean"] - loss[arm]) for arm in ARMS[1:]},
    )
