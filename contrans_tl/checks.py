"""Checks: whether a model's hook points, and its key-value cache, are what their names say. `load_model` makes both.

self_check(model)       ValueError with the first identity that fails; two forwards of eight tokens
caches_right(model)     two generations of two tokens
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.models import HookedModel, Site, hook_name
from contrans_tl.passes import run_blocks
from contrans_tl.weights import device_of, precision_of


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
