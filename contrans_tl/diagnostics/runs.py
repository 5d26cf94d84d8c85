"""Runs: prompts in batches, the logits behind their last tokens, and what a change at one place makes of them.

Of a forward pass only what is needed is computed: the language-model head at the last real tokens, and, behind a change at
block l, the blocks from there on. Many changes are rows of one batch. Places are counted from the last real token backwards
("-1" is the last), so that prompts of unequal length have them in common.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl.models import Hook, HookedModel, check_ready, identify
from contrans_tl.passes import head_once_at, resumed_after
from contrans_tl.pasts import Past
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import by_length, pad
from contrans_tl.transplantation import check_home
from contrans_tl.weights import device_of

Edit = Callable[[Tensor], Tensor]
"""What is at a hook point -> what is put there."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts, padded on the right."""

    prompts: Int[Tensor, " prompt"]
    """Which they are."""
    tokens: Int[Tensor, "prompt pos"]
    mask: Int[Tensor, "prompt pos"]

    @cached_property
    def last(self) -> Int[Tensor, " prompt"]:
        """Position of the last real token."""
        return self.mask.sum(1) - 1

    def final(self, width: int) -> "Batch":
        """The last so many tokens of prompts of equal length."""
        return Batch(self.prompts, self.tokens[:, -width:], self.mask[:, -width:])

    def times(self, settings: int) -> "Batch":
        """The same prompts under so many settings, one after another: "(setting prompt)"."""
        many = (
            repeat(x, "prompt ... -> (setting prompt) ...", setting=settings) for x in (self.prompts, self.tokens, self.mask)
        )
        return Batch(*many)

    def places(self, width: int) -> tuple[Int[Tensor, "prompt place"], Bool[Tensor, "prompt place"]]:
        """Positions of the last `width` places, the last token's last, and whether the prompt is long enough to have them."""
        where = self.last[:, None] + torch.arange(1 - width, 1, device=self.last.device)
        return where.clamp_min(0), where >= 0

    def aligned(self, x: Float[Tensor, "prompt pos ..."], width: int) -> Float[Tensor, "prompt place ..."]:
        """What stands at the last `width` places; 0 where a prompt is shorter."""
        where, real = self.places(width)
        rows = torch.arange(len(x), device=x.device)[:, None]
        return x[rows, where.to(x.device)] * real.to(x.device).view(*real.shape, *[1] * (x.ndim - 2))


def batches(model: HookedModel, sequences: Sequence[Sequence[int]], batch_size: int, *, equal: bool = False) -> list[Batch]:
    """Of prompts of similar length; of `equal` length if asked, so that there is no padding."""
    lengths = [len(ids) for ids in sequences]
    groups = by_length(lengths, batch_size)
    if equal:
        groups = [list(same) for group in groups for _, same in groupby(group, key=lengths.__getitem__)]
    return [Batch(torch.tensor(group), *pad([sequences[i] for i in group], device_of(model))) for group in groups]


def read_logits(
    model: HookedModel,
    batch: Batch,
    *,
    hooks: Sequence[Hook] = (),
    after: tuple[int, Tensor] | None = None,
    past: Past | None = None,
) -> Float[Tensor, "prompt vocab"]:
    """Behind the last real token of every prompt, in float32.

    Args:
        after: (layer, its output "prompt pos d_model"): run from there on only.
        past: what the batch follows, for prompts without padding; it is added to.
    """
    options = {"attention_mask": batch.mask} if past is None else past.options(batch.tokens)
    with ExitStack() as stack:
        stack.enter_context(head_once_at(model, batch.last))
        if after is not None:
            stack.enter_context(resumed_after(model, *after))
        stack.enter_context(model.hooks(fwd_hooks=list(hooks)))
        return model(batch.tokens, return_type="logits", **options)[:, 0].float()


def keep(names: Sequence[str], seen: dict[str, Tensor]) -> list[Hook]:
    """Hooks that put what passes these hook points into `seen`."""

    def look(x: Tensor, hook: Any, *, name: str) -> None:
        seen[name] = x.detach().clone()

    return [(name, partial(look, name=name)) for name in names]


def change(name: str, edit: Edit) -> Hook:
    """A hook that puts `edit` of what passes in its place."""
    return name, lambda x, hook: edit(x).to(x)


def check_concept(model: HookedModel, concept: ConceptVector) -> None:
    """ValueError for a model in training mode, or a concept of another model or basis."""
    check_ready(model)
    check_home(concept, identify(model))


def choose_layer(concept: ConceptVector, layer: int | None) -> int:
    """The layer asked for, or the only one that the concept has. ValueError for one it has not, or no choice among several."""
    if layer is None and len(concept.layers) > 1:
        raise ValueError(
            f"{concept.name!r} has vectors at layers {concept.layers}; choose one, as in layer={concept.layers[-1]}."
        )
    layer = concept.layers[0] if layer is None else layer
    concept.at(layer)
    return layer


def check_strength(strength: float) -> float:
    """ValueError unless it is a finite number other than 0."""
    if not (isinstance(strength, (int, float)) and strength != 0 and abs(strength) < float("inf")):
        raise ValueError(f"expected a finite strength other than 0; got {strength!r}.")
    return float(strength)


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of so many."""
    size = max(1, size)
    return (items[i : i + size] for i in range(0, len(items), size))


def shared_tokens(model: HookedModel, sequences: Sequence[Sequence[int]], width: int) -> tuple[str, ...]:
    """What stands at each of the last `width` places where it is the same token in all prompts, else nothing: for axes."""
    columns = [{ids[place] for ids in sequences if len(ids) >= -place} for place in range(-width, 0)]
    everywhere = min(map(len, sequences))
    same = [len(ids) == 1 and k >= width - everywhere for k, ids in enumerate(columns)]
    return tuple(model.tokenizer.decode([*ids]) if one else "" for ids, one in zip(columns, same, strict=True))


def place_labels(width: int) -> tuple[str, ...]:
    """Of the last `width` places: ..., "-2", "-1"."""
    return tuple(str(place) for place in range(-width, 0))
