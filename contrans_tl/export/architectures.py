"""Where an architecture has the bias that a transplant can be: that of the last linear map of a block.

    h^l <- h^l + strength * v^l    is    W_out a + b^l <- W_out a + (b^l + strength * v^l)

as long as what that map puts out goes into the stream as it is. So it must be the last thing in the block: no norm behind it
(Gemma 2, OLMo 2, the post-norm OPT-350m), no factor (Granite), no router that weighs it (mixtures of experts).

Llama has that bias behind a switch of its configuration, `mlp_bias`. Mistral and Qwen2 have no such switch, but without a
sliding window they compute what a Llama computes, and are written as one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor

INSTEAD = "Use transplant(...), which writes with hooks, or another --format of `contrans export`: those hold the vector alone"
"""What else can be done where a model has no such bias."""


@dataclass(frozen=True)
class Architecture:
    """One kind of model that can be exported."""

    name: str
    """Its class in transformers, as in `architectures` of config.json."""
    block: str
    """Of module names: the block of layer {layer}."""
    last: str
    """The block's last linear map."""
    switch: Mapping[str, Any] = field(default_factory=dict)
    """What must be said in the configuration for it to have a bias."""
    is_llama: bool = False
    """Written as a Llama: same computation, but no switch of its own."""

    def bias(self, layer: int) -> str:
        """Name of the parameter that takes the vector of a layer."""
        return f"{self.block.format(layer=layer)}.{self.last}.bias"


_LLAMA: dict[str, Any] = {"block": "model.layers.{layer}", "last": "mlp.down_proj"}
_AS_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": True}
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", **_LLAMA, switch={"mlp_bias": True}),
    "mistral": Architecture("MistralForCausalLM", **_LLAMA, switch={**_AS_LLAMA, "attention_bias": False}, is_llama=True),
    "qwen2": Architecture("Qwen2ForCausalLM", **_LLAMA, switch={**_AS_LLAMA, "attention_bias": True}, is_llama=True),
    "gpt2": Architecture("GPT2LMHeadModel", "transformer.h.{layer}", "mlp.c_proj"),
    "gpt_neox": Architecture("GPTNeoXForCausalLM", "gpt_neox.layers.{layer}", "mlp.dense_4h_to_h"),
    "opt": Architecture("OPTForCausalLM", "model.decoder.layers.{layer}", "fc2", switch={"enable_bias": True}),
}
"""By `model_type`."""
_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What a Llama's configuration shares with Mistral's and Qwen2's; the defaults differ."""


def architecture_of(written: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. ValueError, with the reason and what else can be done, for one without such a bias."""
    kind, names = written.get("model_type"), written.get("architectures")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"what a {kind} block adds to the stream does not end in a bias that config.json can switch on, or in none that is "
            f"known here (expected {known}). {INSTEAD}."
        )
    found = ARCHITECTURES[kind]
    if names and list(names) != [found.name]:
        raise ValueError(f"expected a language model, {found.name}; config.json says {', '.join(names)}. {INSTEAD}.")
    if "auto_map" in written:
        raise ValueError(f"config.json asks for code of its own (auto_map): what that computes is not known here. {INSTEAD}.")
    if "quantization_config" in written or "compression_config" in written:
        raise ValueError(
            f"these weights are quantised; a bias is added to weights as they were trained. Export those. {INSTEAD}."
        )
    if kind == "opt" and not written.get("do_layer_norm_before", True):
        raise ValueError(f"this OPT normalises after its blocks (do_layer_norm_before=false), bias and all. {INSTEAD}.")
    return found


def exported_config(architecture: Architecture, written: Mapping[str, Any], config: Any) -> dict[str, Any] | None:
    """The config.json of the steered model; None where it is the target's own.

    Args:
        written: the target's config.json.
        config: the same as transformers understands it, with the defaults that the file leaves out.

    Raises:
        ValueError: an architecture that is a Llama but for the sliding window that this model has.
    """
    if not architecture.is_llama:
        changes = {key: value for key, value in architecture.switch.items() if getattr(config, key) != value}
        if not written.get("architectures"):  # which transformers does without, and other engines do not
            changes["architectures"] = [architecture.name]
        return {**written, **changes} if changes else None
    window = getattr(config, "sliding_window", None)
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if window is not None or kinds:
        raise ValueError(
            f"{architecture.name} has no bias to switch on, and with a sliding window ({window} tokens) it is no Llama by "
            f"another name. {INSTEAD}."
        )
    own = {key: value for key, value in written.items() if key not in _WINDOW}
    given = {key: getattr(config, key) for key in _SAME if hasattr(config, key)}
    if {"rope_theta", "rope_scaling", "rope_parameters"} & set(own):
        given.pop("rope_parameters", None)  # as the file says it, old or new
    as_llama = {**given, **own, **architecture.switch}
    _check_same(architecture, config, as_llama)
    return as_llama


def _check_same(architecture: Architecture, config: Any, as_llama: Mapping[str, Any]) -> None:
    from transformers import LlamaConfig

    llama = LlamaConfig.from_dict(dict(as_llama))
    for key in _SAME:
        # Qwen2 leaves its head_dim to be worked out.
        default = config.hidden_size // config.num_attention_heads if key == "head_dim" else None
        here, there = getattr(config, key, default), getattr(llama, key)
        if here != there:
            raise ValueError(f"as a Llama this {architecture.name} would have {key} {there}, not {here}. {INSTEAD}.")


def split(kind: str, name: str, weight: Tensor, heads: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The parts for queries, keys and values of a parameter that holds all three; a bridge of TransformerLens lists them too.

    Args:
        kind: `model_type`.
        weight: as it is stored, "d_in 3*d_out" in GPT-2 and "3*d_out d_in" in GPT-NeoX; biases without d_in.

    Yields:
        The shape that the bridge gives a part, "d_out d_in", and its entries in that order as a view of the weight.
    """
    if kind == "gpt2" and ".attn.c_attn." in name:
        for part in rearrange(weight, "... (part d_out) -> part d_out ...", part=3):
            yield tuple(part.shape), part
    if kind == "gpt_neox" and ".attention.query_key_value." in name:
        for part in rearrange(weight, "(head part d_head) ... -> part head d_head ...", part=3, head=heads):
            yield tuple(part.flatten(0, 1).shape), part
