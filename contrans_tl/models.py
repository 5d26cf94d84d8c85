"""Models: everything that differs between the two model classes of TransformerLens lives here.

The library is written against the hook points of HookedTransformer - `blocks.{l}.hook_resid_pre`, `hook_resid_post`,
`hook_attn_out`, `hook_mlp_out`, `attn.hook_z` - which TransformerBridge (TransformerLens 4) exposes under the same names.
Every other module sees a model only through the `HookedModel` protocol.

    model = load_model("EleutherAI/pythia-160m")      # hub id or local folder -> TransformerBridge, eval mode, raw basis
    identify(model)                                   # ModelId: whose residual stream a vector or a map belongs to

Not offered: `hook_resid_mid` as a place to write. On a bridge it is an alias of the MLP's input, so a write there never
reaches the skip connection; write at `resid_post` instead.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrans_tl.loading import DeviceMap, boot, wrap
from contrans_tl.weights import (
    check_readable,
    device_of,
    embedding_rows,
    fingerprint_of,
    materialised,
    precision_of,
    quantization_of,
)

Basis = Literal["raw", "centred"]
"""As the weights are, or with the mean over d_model subtracted from all that writes to the stream."""
Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern"]
"""A place in a block; `hook_name` makes a hook point of it."""
Hook = tuple[str, Callable[..., Any]]
"""Name of a hook point, and what is called there."""

_SITES = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
}


@runtime_checkable
class HookedModel(Protocol):
    """What the library asks of a model: a TransformerBridge (3.9, 4.x) and a HookedTransformer (3.9) both have it."""

    @property
    def cfg(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def hook_dict(self) -> Any: ...
    @property
    def W_E(self) -> Any: ...
    @property
    def blocks(self) -> Any: ...
    @property
    def unembed(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def parameters(self, *args: Any, **kwargs: Any) -> Any: ...
    def to_tokens(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...
    def hooks(self, *args: Any, **kwargs: Any) -> Any: ...
    def generate(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class ModelId:
    """Which residual stream a vector, a map or a row of activations belongs to."""

    name: str
    revision: str | None
    """Commit of the hub repository, where there is one."""
    fingerprint: str
    """Hash over samples of every weight, rounded to bfloat16 so that loading in float32 or bfloat16 gives the same, on one
    device or several. A quantised model has one of its own."""
    n_layers: int
    d_model: int
    basis: Basis
    """`centred` when TransformerLens has subtracted the mean over d_model from all that writes to the stream."""
    quantization: str | None = None
    """How its weights are quantised."""

    def __str__(self) -> str:
        quantised = "" if self.quantization is None else f", quantised: {self.quantization}"
        return f"{self.name} ({self.n_layers} layers x {self.d_model}, {self.basis} basis, {self.fingerprint[:8]}{quantised})"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def same_space(self, other: "ModelId") -> bool:
        """Whether residual vectors of the two are vectors of one space: the same weights in the same basis."""
        return (self.fingerprint, self.basis) == (other.fingerprint, other.basis)


def hook_name(layer: int, site: Site = "resid_post") -> str:
    """Name of a hook point. Layer l means block l, counted from 0; its output is `resid_post`."""
    if site not in _SITES:
        raise ValueError(
            f"expected a site among {', '.join(_SITES)}; got {site!r}. (resid_mid is left out on purpose: on a bridge a "
            "write there does not reach the skip connection; use resid_post, or attn_out of the same layer.)"
        )
    return f"blocks.{layer}.{_SITES[site]}"


def layer_of(name: str) -> int:
    """The layer of a hook point of a block."""
    return int(name.split(".")[1])


def check_layers(layers: Sequence[int] | None, n_layers: int, of: str) -> tuple[int, ...]:
    """The layers asked for, or all of them; ValueError for one the model does not have."""
    if layers is None:
        return tuple(range(n_layers))
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    if outside or not layers:
        raise ValueError(f"expected layers of {of} between 0 and {n_layers - 1}; got {list(layers)}.")
    return tuple(layers)


def check_heads(heads: Sequence[tuple[int, int]] | None, n_layers: int, n_heads: int, of: str) -> tuple[tuple[int, int], ...]:
    """The heads asked for as (layer, head), or all of them; ValueError for one the model does not have."""
    if heads is None:
        return tuple((layer, head) for layer in range(n_layers) for head in range(n_heads))
    heads = tuple((int(layer), int(head)) for layer, head in heads)
    outside = [place for place in heads if not (0 <= place[0] < n_layers and 0 <= place[1] < n_heads)]
    if outside or not heads or len(set(heads)) < len(heads):
        raise ValueError(
            f"expected different heads (layer, head) of {of}, layers 0 to {n_layers - 1} and heads 0 to {n_heads - 1}; "
            f"got {list(outside or heads)}."
        )
    return heads


def load_model(
    model: str | os.PathLike[str] | Any,
    *,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    quantization_config: Any = None,
) -> HookedModel:
    """A TransformerBridge in eval mode, raw basis, without gradients, that has passed `self_check`.

    Args:
        model: hub id, local folder (config, weights, tokenizer), or a Hugging Face model in memory, also a quantised one. A
            model in memory is wrapped in place, as TransformerLens does: save or export it before, and never wrap it twice. It
            keeps its dtype and, unless a device is told, its place.
        tokenizer: with a model in memory, its tokenizer (one that was saved to disk and loaded again).
        device: where to put it; the default is TransformerLens's (the accelerator if there is one).
        dtype: of the weights. Float32 is exact; pass torch.bfloat16 for large models.
        revision: branch, tag or commit on the hub.
        device_map: instead of a device, how accelerate spreads it: "auto", "balanced", or {module: device}, where a device may
            be "disk" (see `loading` for what TransformerLens can run).
        max_memory: with a device map, bytes to fill of each device, as in {0: "70GiB", "cpu": "100GiB"}.
        offload_folder: with a device map, where weights "on disk" go that cannot be read from the checkpoint in place.
        quantization_config: of transformers, as `loading.bitsandbytes("4bit", dtype)` or a `TorchAoConfig`. A quantised model
            is another model: its fingerprint is its own.

    Raises:
        ValueError: a folder that is no model folder, a model in memory without tokenizer or wrapped before, a placement that
            the installed TransformerLens cannot run, or a model whose hook points fail `self_check`.

    Warns where the installed TransformerLens and transformers disagree about key-value caches (`caches_right`).
    """
    placing: dict[str, Any] = {
        "device_map": device_map,
        "max_memory": max_memory,
        "offload_folder": offload_folder,
        "quantization_config": quantization_config,
    }
    if isinstance(model, (str, os.PathLike)):
        check_model_name(name := os.fspath(model))
        bridge = boot(name, tokenizer=tokenizer, device=device, dtype=dtype, revision=revision, **placing)
    else:
        if any("_original_component" in key for key, _ in model.named_modules()):
            raise ValueError("this Hugging Face model is wrapped by a TransformerBridge already: pass that bridge instead.")
        if tokenizer is None:
            raise ValueError("expected tokenizer= beside a Hugging Face model in memory; got none.")
        if told := [option for option, value in placing.items() if value is not None]:
            raise ValueError(f"a model in memory is placed and quantised already: pass {told[0]}= to its from_pretrained.")
        if device is not None and device_of(model) != torch.device(device):
            model.to(device)
        label = getattr(model.config, "_name_or_path", "") or type(model).__name__
        bridge = wrap(label, model, tokenizer=tokenizer, dtype=dtype)
    bridge.eval().requires_grad_(False)
    bridge.cfg.device = str(device_of(bridge))  # of an offloaded model, TransformerLens takes the placeholder's
    self_check(bridge)
    if not caches_right(bridge):
        warnings.warn(
            f"transformer-lens {version('transformer-lens')} and transformers {version('transformers')} do not fit together: "
            "what this model generates with a key-value cache is not what it generates without. Single passes are right; "
            "install another transformers (5.23 fits), or pass use_past_kv_cache=False to generate.",
            stacklevel=2,
        )
    return bridge


def check_model_name(name: str) -> None:
    """ValueError, before anything heavy is imported, for a path that is no model folder."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"expected a model folder with config.json; {name!r} has none.")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"expected a hub id or a model folder; there is no folder {name!r}.")


def identify(model: HookedModel) -> ModelId:
    """The `ModelId` of a model. ValueError for a remote bridge, whose hooks can look but not change anything."""
    if _is_remote(model):
        raise ValueError(
            "this is a RemoteBridge: it drops what hooks return, so nothing can be transplanted through it. "
            "Load the model locally with load_model."
        )
    name = str(model.cfg.model_name)
    config = getattr(getattr(model, "original_model", None), "config", None)
    return ModelId(
        name=Path(name).name if Path(name).is_dir() else name,
        revision=getattr(config, "_commit_hash", None),
        fingerprint=fingerprint_of(model),
        n_layers=model.cfg.n_layers,
        d_model=model.cfg.d_model,
        basis=_basis(model),
        quantization=quantization_of(model),
    )


def check_ready(model: HookedModel) -> None:
    """ValueError unless a forward pass is deterministic: dropout makes activations that no second run gives."""
    if getattr(model, "training", False):
        raise ValueError("expected a model in eval mode; this one is in training mode. Call model.eval() first.")


def is_bridge(model: HookedModel) -> bool:
    from transformer_lens.model_bridge import TransformerBridge

    return isinstance(model, TransformerBridge)


def _is_remote(model: HookedModel) -> bool:
    try:
        from transformer_lens.model_bridge.remote_bridge import RemoteBridge
    except ImportError:  # 3.9 has none
        return False
    return isinstance(model, RemoteBridge)


def _basis(model: HookedModel) -> Basis:
    # TransformerLens centres all that writes to the stream or nothing, so the embedding tells; the class and the flags
    # (normalization_type, compatibility_mode) do not agree between 3.9 and 4.x on how to say it.
    rows = embedding_rows(model)
    # The largest of 256 row means of a raw embedding is about 3 / sqrt(d_model) of its spread; of a centred one, rounding.
    rounding = max(1e-5, torch.finfo(rows.dtype).eps)
    return "centred" if bool(rows.float().mean(-1).abs().max() < rounding * rows.float().std()) else "raw"


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


def self_check(model: HookedModel, rtol: float | None = None) -> None:
    """Refuse a model whose hook points are not what their names say. Two forwards of eight tokens.

    Checked at every layer: resid_pre + attn_out + mlp_out = resid_post (where the architecture has all four; several
    architectures have had attention outputs that are not the additive contribution), resid_post of l = resid_pre of l+1,
    and a write at resid_post of l is seen at resid_pre of l+1. `rtol` is relative to the largest entry; its default is 8
    units of the weights' precision (measured on five architectures in float32, float16 and bfloat16: at most 1).

    Raises:
        ValueError: with the first layer and the identity that fails.
    """
    cfg = model.cfg
    rtol = 8 * torch.finfo(precision_of(model)).eps if rtol is None else rtol
    tokens = torch.arange(1, 9, device=device_of(model))[None] % cfg.d_vocab
    sites: list[Site] = ["resid_pre", "attn_out", "mlp_out", "resid_post"]
    names = [hook_name(layer, site) for layer in range(cfg.n_layers) for site in sites]
    missing = [name for name in names if "resid" in name and name not in model.hook_dict]
    if missing:
        raise ValueError(f"{cfg.model_name}: no hook point {missing[0]}; this architecture is not supported.")

    def forward(writes: float) -> dict[str, Float[Tensor, "pos d_model"]]:
        seen = {}

        def look(x: Tensor, hook: Any, *, name: str) -> Tensor | None:
            x = x + writes * x.norm(dim=-1, keepdim=True) if writes and name.endswith("resid_post") else x
            seen[name] = x[0].detach().float()
            return x if writes else None

        hooks = [(name, partial(look, name=name)) for name in names if name in model.hook_dict]
        run_blocks(model, tokens, torch.ones_like(tokens), hooks, cfg.n_layers - 1)
        return seen

    def expect(left: Tensor, right: Tensor, terms: list[Tensor], identity: str) -> None:
        # Relative to the largest term: where huge entries cancel, what they leave is known to their rounding only.
        error = float((left - right).abs().max() / torch.stack(terms).abs().max())
        if not error <= rtol:
            raise ValueError(
                f"{cfg.model_name}: expected {identity}, off by {error:.1e} of the largest entry (allowed {rtol:.1e}). The "
                "hook points of this architecture are not what their names say; it is not supported."
            )

    for writes in (0.0, 0.1):
        seen = forward(writes)
        if absent := [name for name in names if "resid" in name and name not in seen]:
            raise ValueError(f"{cfg.model_name}: hook point {absent[0]} exists but never fires; not supported.")
        for layer in range(cfg.n_layers):
            pre, post = (seen[hook_name(layer, site)] for site in ("resid_pre", "resid_post"))
            attn, mlp = (seen.get(hook_name(layer, site)) for site in ("attn_out", "mlp_out"))
            if not writes and attn is not None and mlp is not None:
                identity = f"resid_pre + attn_out + mlp_out = resid_post at layer {layer}"
                expect(pre + attn + mlp, post, [pre, attn, mlp, post], identity)
            if layer + 1 < cfg.n_layers:
                following = seen[hook_name(layer + 1, "resid_pre")]
                verb = "a write at resid_post" if writes else "resid_post"
                expect(following, post, [post], f"{verb} of layer {layer} to be resid_pre of layer {layer + 1}")


def caches_right(model: HookedModel) -> bool:
    """Whether a token generated from a key-value cache sees what came before it. Two generations of two tokens.

    TransformerLens 4.3 hands its cache on under a name that transformers 5.24 gave up: the second token is then read alone,
    and nothing raises.
    """
    tokens = torch.arange(1, 9, device=device_of(model))[None] % model.cfg.d_vocab
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}

    def last_residual(cached: bool) -> Float[Tensor, " d_model"]:
        seen: list[Tensor] = []

        def look(resid: Tensor, hook: Any) -> None:
            seen.append(resid[0, -1].detach().float())

        with model.hooks(fwd_hooks=[(hook_name(model.cfg.n_layers - 1), look)]):
            model.generate(tokens, max_new_tokens=2, use_past_kv_cache=cached, **options)
        return seen[-1]

    without = last_residual(False)
    # Rounding is far below 5%, also in bfloat16 (8 bits); a token that sees nothing of its text is off by its own size.
    return bool((last_residual(True) - without).norm() < 0.05 * without.norm())
