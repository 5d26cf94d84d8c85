"""Pasts: the keys and values of tokens that were read, so that a pass can begin behind them.

A change at some token leaves everything before it as it was. Of a pass with that change only what comes from there on has to
run, on the keys and values that the model itself made of the tokens before:

    past = Past.empty(model, prompts=8)
    model(tokens, **past.options(tokens))                       # fills it
    rest = tokens[:, 7:].repeat(3, 1)
    model(rest, **past.first(7, times=3).options(rest))         # three runs of what follows the first seven tokens

A bridge keeps Hugging Face's cache, a HookedTransformer one of its own. The prompts of one past are of equal length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.models import HookedModel, is_bridge


@dataclass(frozen=True, eq=False)
class Past:
    """Keys and values of every layer, as the model's class keeps them."""

    model: HookedModel
    cache: Any

    @classmethod
    def empty(cls, model: HookedModel, prompts: int) -> "Past":
        """To be filled by a pass over as many prompts."""
        if is_bridge(model):
            from transformers import DynamicCache

            return cls(model, DynamicCache())
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return cls(model, TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device, prompts))

    def options(self, tokens: Int[Tensor, "prompt pos"]) -> dict[str, Any]:
        """Of a forward pass over these tokens that begins behind it. The pass appends what it reads."""
        if not is_bridge(self.model):
            return {"past_kv_cache": self.cache, "attention_mask": torch.ones_like(tokens)}
        read = tokens.new_ones(len(tokens), self.cache.get_seq_length() + tokens.shape[1])
        return {"past_key_values": self.cache, "use_cache": True, "attention_mask": read}

    def holds(self, positions: int) -> bool:
        """Whether it has this many tokens of every layer. An architecture that keeps something else has not."""
        layers = list(self._layers())
        return len(layers) == self.model.cfg.n_layers and all(
            x is not None and x.ndim == 4 and x.shape[self._pos] == positions for layer in layers for x in layer
        )

    def first(self, positions: int, times: int = 1) -> "Past":
        """A past of the first so many tokens, every prompt as many times: "(times prompt)". Leaves this one as it is."""

        def cut(x: Float[Tensor, "prompt ..."]) -> Tensor:
            return repeat(x.narrow(self._pos, 0, positions), "prompt ... -> (times prompt) ...", times=times)

        layers = [(cut(keys), cut(values)) for keys, values in self._layers()]
        shorter = self.empty(self.model, len(layers[0][0]))
        if is_bridge(self.model):
            for layer, (keys, values) in enumerate(layers):
                shorter.cache.update(keys, values, layer)
        else:
            for entry, (keys, values) in zip(shorter.cache.entries, layers, strict=True):
                entry.append(keys, values)
            read = torch.ones(len(layers[0][0]), positions, dtype=torch.long, device=layers[0][0].device)
            shorter.cache.append_attention_mask(read)
        return shorter

    @property
    def _pos(self) -> int:
        return 2 if is_bridge(self.model) else 1

    def _layers(self) -> Iterator[tuple[Tensor, Tensor]]:
        if is_bridge(self.model):
            return ((layer[0], layer[1]) for layer in self.cache)
        return ((entry.past_keys, entry.past_values) for entry in self.cache.entries)
