"""Models: what the library asks of one, whose residual stream it is, and what its hook points are called.

The library is written against the hook points of HookedTransformer - `blocks.{l}.hook_resid_pre`, `hook_resid_post`,
`hook_attn_out`, `hook_mlp_out`, `attn.hook_z` - which TransformerBridge (TransformerLens 4) exposes under the same names.
Every other module sees a model only through the `HookedModel` protocol.

    identify(model)              # ModelId: whose residual stream a vector or a map belongs to
    hook_name(9, "resid_post")   # the output of block 9

Where the two classes differ is kept to a few modules: this one, `passes`, `pasts`, `anatomy` and `loading`.

Not offered: `hook_resid_mid` as a place to write. On a bridge it is an alias of the MLP's input, so a write there never
reaches the skip connection; write at `resid_post` instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from contrans_tl.weights import (
    embedding_rows,
    fingerprint_of,
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
