"""Passes: parts of a forward pass, where the two model classes of TransformerLens differ in how to ask for them.

run_blocks(model, tokens, mask, hooks, last_layer)      up to a block, without the head
with resumed_after(model, layer, resid): ...            from a block on
with head_once_at(model, positions): ...                the head where it is looked at
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl.models import Hook, HookedModel, hook_name, is_bridge


def run_blocks(
    model: HookedModel,
    tokens: Int[Tensor, "prompt pos"],
    mask: Int[Tensor, "prompt pos"],
    hooks: Sequence[Hook],
    last_layer: int,
) -> None:
    """Forward through blocks 0..last_layer with hooks, and no further: the language-model head is never computed.

    A HookedTransformer skips the head with stop_at_layer = n_layers, a bridge does not; there the same exception that
    implements its stop_at_layer is raised at the last block's output.
    """
    hooks = list(hooks)
    options: dict[str, Any] = {"return_type": None, "attention_mask": mask}
    if last_layer == model.cfg.n_layers - 1 and is_bridge(model):
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        def stop(resid: Tensor, hook: Any) -> None:
            raise StopAtLayerException(resid)

        hooks.append((hook_name(last_layer), stop))
    else:
        options["stop_at_layer"] = last_layer + 1
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks, **options)


@contextmanager
def resumed_after(model: HookedModel, layer: int, resid: Float[Tensor, "prompt pos d_model"]) -> Iterator[None]:
    """While open, a forward pass runs as if block `layer` had put out `resid`: blocks 0..layer are passed over.

    Hooks on those blocks do not fire. (`start_at_layer` is no help here: a bridge runs the blocks below all the same and
    cannot start behind the last one.)
    """
    blocks = list(model.blocks)[: layer + 1]

    def hand_on(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden

    def resume(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return resid

    try:
        for block in blocks:
            # Not block.forward = ...: a bridge hands attributes on to the Hugging Face module that it wraps.
            block.__dict__["forward"] = resume if block is blocks[-1] else hand_on
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


@contextmanager
def head_only_at(model: HookedModel, where: Bool[Tensor, "prompt pos"]) -> Iterator[None]:
    """While open, a forward pass over as many prompts and positions computes the language-model head at these places only, and
    logits are zero elsewhere.

    Of a small model the head is the larger part: in GPT-2 it costs as much as five blocks. A pass of another shape is left
    alone.
    """
    head = model.unembed
    everywhere = head.forward

    def there(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if hidden.shape[:-1] != where.shape:
            return everywhere(hidden, *args, **kwargs)
        places = where.to(hidden.device)
        found = everywhere(hidden[places][None], *args, **kwargs)[0]
        logits = found.new_zeros(*where.shape, found.shape[-1])
        logits[places] = found
        return logits

    try:
        head.__dict__["forward"] = there  # as in `resumed_after`
        yield
    finally:
        head.__dict__.pop("forward", None)


@contextmanager
def head_once_at(model: HookedModel, positions: Int[Tensor, " prompt"]) -> Iterator[None]:
    """While open, a forward pass over as many prompts gives logits "prompt 1 vocab": those at one position of each, and no
    others. Unlike `head_only_at` it makes no room for the rest, which is most of the memory of a pass with a large vocabulary.
    """
    head = model.unembed
    everywhere = head.forward

    def there(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = torch.arange(len(positions), device=hidden.device)
        return everywhere(hidden[rows, positions.to(hidden.device)][:, None], *args, **kwargs)

    try:
        head.__dict__["forward"] = there  # as in `resumed_after`
        yield
    finally:
        head.__dict__.pop("forward", None)
