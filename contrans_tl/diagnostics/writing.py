"""Writers: which parts of a model put a concept into its stream.

Every block adds to the stream, so that the projection of the residual x after block L, at the last real token, on the unit
vector u = v / |v| is exactly a sum:

    <x, u> = <tokens, u> + <positions, u> + sum_{l <= L} ( sum_h z_lh (W_O_lh u) + <b_O_l, u> + <MLP_l, u> )

(direct feature attribution; Elhage et al., transformer-circuits.pub/2021/framework). z_lh is what head h gathers, its value
bias included; the output bias of an MLP is counted with the MLP. Each part is taken of the positive prompts less the negative
ones: biases then drop out, and so does whatever all prompts share. Where a norm stands between the attention and the stream
(Gemma 2) each head is divided by that norm's scale, held as it was: the parts still sum to the whole.

    found = writers(model, concept, held_out_pairs, layer=6)
    found.top(5), found.heads, found.completeness

A concept that was refined on the same pairs is what these pairs differ by: its whole is positive by construction and its
intervals are narrower than they should be. Take other pairs.

It says who writes, not why: a head may copy what an earlier one wrote.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from contrans_tl.activations import check_texts
from contrans_tl.anatomy import frozen_norm, output_weights, position_site, post_norm_site
from contrans_tl.data import ContrastPairs
from contrans_tl.diagnostics.runs import check_concept
from contrans_tl.diagnostics.scores import Diagnosis, Scores, heads, interval_table, layers, signed
from contrans_tl.evaluation.intervals import Estimate, mean_differences
from contrans_tl.models import Hook, HookedModel, hook_name
from contrans_tl.passes import run_blocks
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import by_length, encode, pad
from contrans_tl.weights import device_of, precision_of

if TYPE_CHECKING:
    from pandas import DataFrame

INCOMPLETE = 1e-4
"""How far the parts may be from the whole, relative to the largest of them: 100 times what float32 leaves. Of weights of lower
precision, 8 of its units, as in `checks.self_check`."""
SHUFFLES = 2000


@dataclass(frozen=True, eq=False, kw_only=True)
class Writers(Diagnosis):
    """How much every part adds to the concept's projection: `scores` over the axis "part", positives less negatives."""

    layer: int
    """The residual after this block is taken apart."""
    positive: Float[Tensor, "positive part"]
    """Of every positive prompt, what every part adds."""
    negative: Float[Tensor, "negative part"]
    whole: Estimate
    """The projection itself, positives less negatives."""
    intervals: tuple[Estimate, ...]
    """95%, over prompts, of every part; pairs are drawn together where there are as many positive as negative prompts."""
    chance: Float[Tensor, " part"]
    """How often the largest of all parts would be as far from 0 as this one if sides were handed out by chance: with it below
    0.05, one list in twenty names any part where there is nothing."""
    completeness: float
    """The largest difference between the parts' sum and the whole in any prompt, relative to the largest of them."""

    @property
    def heads(self) -> Scores:
        """Of the attention heads only, "layer head"."""
        parts = self.scores.axes["part"]
        n_heads = sum(part.startswith("L0H") for part in parts)
        slots = [parts.index(f"L{layer}H{head}") for layer in range(self.layer + 1) for head in range(n_heads)]
        values = self.scores.values[slots].view(self.layer + 1, n_heads)
        return Scores(values, {"layer": layers(self.layer + 1), "head": heads(n_heads)}, self.scores.unit)

    def side(self, side: str) -> Scores:
        """Means over the positive or the negative prompts alone."""
        if side not in ("positive", "negative"):
            raise ValueError(f"expected the side 'positive' or 'negative'; got {side!r}.")
        return Scores(getattr(self, side).mean(0), self.scores.axes, self.scores.unit)

    def __str__(self) -> str:
        interval = dict(zip(self.scores.axes["part"], self.intervals, strict=True))
        rows = [f"  {part:<10} {signed(interval[part])}" for part, _ in self.top(8)]
        return "\n".join([f"Writers: {self.about} ({self.scores.unit})", *rows, *(f"  {note}" for note in self.notes)])

    def to_dataframe(self) -> "DataFrame":
        """A row for each part: its value with its interval and chance, and the means of both sides."""
        return interval_table(self.scores, self.intervals).assign(
            chance=self.chance.tolist(),
            positive=self.positive.mean(0).tolist(),
            negative=self.negative.mean(0).tolist(),
        )

    def to_dict(self) -> dict[str, Any]:
        more = self.to_dataframe()[["low", "high", "chance", "positive", "negative"]].to_dict("list")
        whole = {"value": self.whole.value, "low": self.whole.low, "high": self.whole.high}
        return {**super().to_dict(), "layer": self.layer, "whole": whole, "completeness": self.completeness, **more}


def writers(
    model: HookedModel,
    concept: ConceptVector,
    pairs: ContrastPairs,
    *,
    layer: int,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Writers:
    """Take the concept's projection after block `layer` apart into what embedding, heads, MLPs and biases add to it.

    One pass over the prompts through blocks 0..layer, of which a number a part and prompt is kept.

    Raises:
        ValueError: a concept of another model or without this layer, or an architecture of which the parts do not sum to the
            whole.
    """
    check_concept(model, concept)
    direction = concept.at(layer).double()
    if not direction.norm() > 0:
        raise ValueError(f"{concept.name!r} is zero at layer {layer}: there is nothing to project on.")
    prompts = check_texts([*pairs.positive, *pairs.negative], "last")
    parts = _Parts(model, direction / direction.norm(), layer, len(prompts))
    parts.collect([encoding.ids for encoding in encode(model, prompts, prepend_bos=prepend_bos)], batch_size)
    completeness = parts.completeness()
    positive, negative = parts.values.tensor_split([len(pairs.positive)])
    (whole,) = mean_differences(*(x.numpy() for x in parts.whole[:, None].tensor_split([len(positive)])), seed=seed)
    intervals = mean_differences(positive.numpy(), negative.numpy(), seed=seed)
    chance = chances(positive, negative, seed)
    found = int((chance <= 0.05).sum())
    return Writers(
        about=f"{concept.name} in {concept.model.name} after layer {layer}, {len(positive)} prompts less {len(negative)}",
        scores=Scores((positive.mean(0) - negative.mean(0)).float(), {"part": parts.labels}, "projection on the unit vector"),
        notes=(
            f"whole {signed(whole)}; the parts sum to it, off by {completeness:.0e} of the largest at most",
            f"{found} of {len(parts.labels)} parts differ between the sides more than the largest of all would by chance (5%)",
        ),
        layer=layer,
        positive=positive.float(),
        negative=negative.float(),
        whole=whole,
        intervals=tuple(intervals),
        chance=chance.float(),
        completeness=completeness,
    )


def chances(
    positive: Float[Tensor, "positive part"], negative: Float[Tensor, "negative part"], seed: int = 0
) -> Float[Tensor, " part"]:
    """Of every part, how often the largest |t| of all parts is as large when the sides are handed out by chance: within pairs
    where there are as many positive as negative prompts, else among all prompts. An exact test (Westfall and Young, max T)."""
    paired = len(positive) == len(negative)
    generator = torch.Generator().manual_seed(seed)
    if paired:
        rows, n = positive - negative, len(positive)
        signs = torch.randint(2, (SHUFFLES, n), generator=generator).to(rows) * 2 - 1
        drawn = torch.cat([torch.ones(1, n).to(rows), signs]) / n  # the sides as they are come first
        error = ((rows.pow(2).mean(0) - (drawn @ rows).pow(2)).clamp_min(0) / max(n - 1, 1)).sqrt()
    else:
        rows, n = torch.cat([positive, negative]), len(positive) + len(negative)
        rows = rows - rows.mean(0)
        sides = torch.cat([torch.full((len(positive),), 1 / len(positive)), torch.full((len(negative),), -1 / len(negative))])
        order = torch.cat([torch.arange(n)[None], torch.rand(SHUFFLES, n, generator=generator).argsort(1)])
        drawn = sides.to(rows)[order]
        error = rows.std(0).expand(len(drawn), -1)
    t = (drawn @ rows).abs() / error.clamp_min(1e-12 * rows.abs().max().clamp_min(1e-300))
    largest = t.amax(1)
    return (largest[:, None] >= t[0] * (1 - 1e-9)).double().mean(0)


class _Parts:
    """What every part adds to the projection, and the projection, collected batch by batch."""

    def __init__(self, model: HookedModel, direction: Float[Tensor, " d_model"], layer: int, prompts: int) -> None:
        self.model, self.direction, self.layer = model, direction.cpu(), layer
        self.hooks: list[Hook] = []
        self._slots: dict[str, int] = {}
        self._embedding()
        for block in range(layer + 1):
            self._attention(block)
            if (mlp := hook_name(block, "mlp_out")) in model.hook_dict:
                self.hooks.append((mlp, partial(self._add, slot=self._slot(f"L{block} MLP"))))
        self.hooks.append((hook_name(layer), self._whole))
        self.values = torch.zeros(prompts, len(self._slots), dtype=torch.float64)
        self.whole = torch.zeros(prompts, dtype=torch.float64)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def collect(self, sequences: Sequence[tuple[int, ...]], batch_size: int) -> None:
        device = device_of(self.model)
        for batch in by_length([len(ids) for ids in sequences], batch_size):
            tokens, mask = pad([sequences[i] for i in batch], device)
            self._rows, self._last = torch.tensor(batch), mask.sum(1) - 1
            run_blocks(self.model, tokens, mask, self.hooks, self.layer)

    def completeness(self) -> float:
        """How far the sums are from the whole. ValueError where they miss it."""
        largest = torch.maximum(self.values.abs().amax(1), self.whole.abs()).max()
        error = float((self.values.sum(1) - self.whole).abs().max() / largest)
        allowed = max(INCOMPLETE, 8 * torch.finfo(precision_of(self.model)).eps)
        if not error <= allowed:
            raise ValueError(
                f"{self.model.cfg.model_name}: the parts miss the projection by {error:.1e} of the largest (allowed "
                f"{allowed:.1e}). This architecture adds something else to its stream, or scales what heads and MLPs add; "
                "its writers cannot be told apart."
            )
        return error

    def _slot(self, label: str) -> int:
        return self._slots.setdefault(label, len(self._slots))

    def _embedding(self) -> None:
        tokens = self._slot("tokens")
        self.hooks.append((hook_name(0, "resid_pre"), partial(self._add, slot=tokens)))
        if site := position_site(self.model):
            positions = self._slot("positions")
            self.hooks.append((site, partial(self._move, slot=positions, out_of=tokens)))

    def _attention(self, block: int) -> None:
        weight, bias = output_weights(self.model, block)
        read = self.direction.to(weight.device, torch.float32)
        if scale := post_norm_site(self.model, block):
            read = frozen_norm(self.model.blocks[block].ln1_post, len(read), weight).pull(read)
        reads = einsum(weight.detach().float(), read, "head d_head d_model, d_model -> head d_head")
        slots = [self._slot(f"L{block}H{head}") for head in range(len(weight))]
        constant = None if bias is None or not bias.any() else bias.detach().float() @ read
        if constant is not None:
            slots.append(self._slot(f"L{block} bias"))
        self.hooks.append((hook_name(block, "z"), partial(self._heads, slots=slots, reads=reads, constant=constant)))
        if scale:
            self.hooks.append((scale, partial(self._rescale, slots=slots)))

    def _at_last(self, x: Float[Tensor, "prompt pos ..."]) -> Tensor:
        return x.expand(len(self._last), *x.shape[1:])[torch.arange(len(self._last)), self._last.to(x.device)].float()

    def _project(self, x: Tensor) -> Float[Tensor, " prompt"]:
        return self._at_last(x).double() @ self.direction.to(x.device)

    def _whole(self, x: Tensor, hook: Any) -> None:
        self.whole[self._rows] = self._project(x).cpu()

    def _add(self, x: Tensor, hook: Any, *, slot: int) -> None:
        self.values[self._rows, slot] += self._project(x).cpu()

    def _move(self, x: Tensor, hook: Any, *, slot: int, out_of: int) -> None:
        found = self._project(x).cpu()
        self.values[self._rows, slot] += found
        self.values[self._rows, out_of] -= found

    def _heads(self, z: Tensor, hook: Any, *, slots: list[int], reads: Tensor, constant: Tensor | None) -> None:
        found = einsum(self._at_last(z), reads, "prompt head d_head, head d_head -> prompt head")
        if constant is not None:
            found = torch.cat([found, constant.expand(len(found), 1)], 1)
        self.values[self._rows[:, None], torch.tensor(slots)] = found.double().cpu()

    def _rescale(self, scale: Tensor, hook: Any, *, slots: list[int]) -> None:
        self.values[self._rows[:, None], torch.tensor(slots)] /= self._at_last(scale).double().cpu()
