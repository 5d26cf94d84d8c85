"""Anatomy: the parts of a block as matrices and norms, whatever the architecture and the model class call them.

attention_weights(model, layer), output_weights(model, layer)       of every head, what it reads and writes by
frozen_norm(attention_norm(model, layer), d_model, like)            a norm as the linear map that it is at a given scale
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.models import HookedModel
from contrans_tl.weights import check_readable, materialised


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm of the stream with its scale held: x / scale -> gain * (x less its mean, for LayerNorm) / scale + bias."""

    gain: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centres: bool
    """Whether it subtracts the mean over d_model."""

    def push(self, change: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What a change of the input, divided by the scale, is in the output."""
        return self.gain * (change - change.mean(-1, keepdim=True) if self.centres else change)

    def pull(self, read: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What reads from the input, divided by the scale, what `read` reads from the output, less the bias."""
        read = self.gain * read
        return read - read.mean(-1, keepdim=True) if self.centres else read


def frozen_norm(norm: Any, d_model: int, like: Tensor) -> FrozenNorm:
    """What a norm does, found by asking it: the classes differ in what they call a weight (Gemma's is less 1, a folded one has
    none) and in whether they subtract the mean."""
    probe = torch.ones(d_model).to(like)
    probe[1::2] = -1
    if d_model % 2:  # of mean zero and without a zero, so that every entry of the gain can be divided out
        probe[-3:] = torch.tensor([1.0, 1.0, -2.0]).to(like)
    probe = 64 * probe  # beside which the norm's epsilon is nothing
    with torch.no_grad():
        up, down, shifted = (norm(x[None, None])[0, 0].float() for x in (probe, -probe, probe + 64))
    rms = probe.float().pow(2).mean().sqrt()
    gain = (up - down) / 2 * rms / probe.float()
    centres = bool((shifted - up).norm() < 0.01 * up.norm())
    return FrozenNorm(gain, (up + down) / 2, centres)


def attention_norm(model: HookedModel, layer: int) -> Any:
    """The norm through which a layer's attention sees the stream. ValueError for an architecture without one."""
    norm = getattr(model.blocks[layer], "ln1", None)
    if norm is None or f"blocks.{layer}.ln1.hook_scale" not in model.hook_dict:
        raise ValueError(
            f"{model.cfg.model_name}: no norm between the stream and the attention of layer {layer}; what its heads read is "
            "not told for this architecture."
        )
    return norm


def norm_scale_site(layer: int) -> str:
    """Hook point of that norm's scale, "prompt pos 1"."""
    return f"blocks.{layer}.ln1.hook_scale"


def attention_weights(model: HookedModel, layer: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """W_Q, W_K, W_V as "q", "k", "v": "head d_model d_head", and the biases there are: "head d_head". Keys and values that
    several heads share stand there once, as `hook_k` and `hook_v` show them. ValueError if they are quantised."""
    attention = model.blocks[layer].attn
    check_readable(model, attention)
    weights, biases = {}, {}
    with materialised(attention):
        for name in "qkv":
            weight, bias = getattr(attention, f"W_{name.upper()}"), getattr(attention, f"b_{name.upper()}", None)
            shared = 1 if name == "q" else len(weight) // key_heads(model)
            # A HookedTransformer repeats shared weights for every head.
            weights[name] = weight[::shared].detach()
            if bias is not None:
                biases[name] = bias[::shared].detach()
    return weights, biases


def key_heads(model: HookedModel) -> int:
    """How many heads have keys and values of their own: fewer than `n_heads` in grouped-query attention. Head h uses those of
    number h // (n_heads / key_heads)."""
    return int(getattr(model.cfg, "n_key_value_heads", None) or model.cfg.n_heads)


def output_weights(model: HookedModel, layer: int) -> tuple[Float[Tensor, "head d_head d_model"], Tensor | None]:
    """W_O of every head of a layer, and the attention's output bias " d_model" or None. ValueError if they are
    quantised."""
    attention = model.blocks[layer].attn
    check_readable(model, attention)
    with materialised(attention):
        weight, bias = attention.W_O, getattr(attention, "b_O", None)
    if weight.ndim == 2:
        weight = weight.view(model.cfg.n_heads, -1, weight.shape[-1])
    return weight, bias


def post_norm_site(model: HookedModel, layer: int) -> str | None:
    """Hook point with the scale "prompt pos 1" of a norm between attention and stream (Gemma 2), where there is one."""
    name = f"blocks.{layer}.ln1_post.hook_scale"
    return name if name in model.hook_dict else None


def position_site(model: HookedModel) -> str | None:
    """Hook point of learned position embeddings, "prompt pos d_model", of models that add some to the tokens'."""
    if "embed.hook_in" in model.hook_dict:  # a bridge; there hook_pos_embed may stand for the rotary angles
        return "pos_embed.hook_out" if "pos_embed.hook_out" in model.hook_dict else None
    return "hook_pos_embed" if getattr(model.cfg, "positional_embedding_type", None) == "standard" else None


def embedding_site(model: HookedModel) -> str:
    """Hook point that shows, before block 0, which token stands where: the ids on a bridge, else their embeddings."""
    return "embed.hook_in" if "embed.hook_in" in model.hook_dict else "hook_embed"


def attention_site(model: HookedModel) -> str | None:
    """Hook point of block 0 that shows how many positions attend to how many, and so what a key-value cache holds."""
    name = "blocks.0.attn.hook_pattern"
    return name if name in model.hook_dict else None


def is_padding(model: HookedModel, embedded: Tensor) -> Tensor:
    """At `embedding_site`, where the padding token stands: "prompt pos", bool."""
    pad = None if model.tokenizer is None else model.tokenizer.pad_token_id
    if embedded.ndim == 2:
        return torch.zeros_like(embedded, dtype=torch.bool) if pad is None else embedded == pad
    if pad is None:
        return torch.zeros(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
    return (embedded == model.W_E[pad].to(embedded)).all(-1)
