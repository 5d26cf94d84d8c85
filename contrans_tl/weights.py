"""Weights: where the numbers of a model lie, and how to read a few of them.

    device_of(model)               where its tokens go
    precision_of(model)            dtype of its residual stream
    quantization_of(model)         "bitsandbytes 4-bit", "torchao", ... or None
    fingerprint_of(model)          hash over samples of every weight
    with materialised(module): ... its weights are there, also those that are kept elsewhere between passes

A weight may be a placeholder on the meta device while accelerate keeps its numbers on disk or in main memory (`device_map`,
`offload_folder`); it may be packed integers with scales beside them (bitsandbytes), or a tensor of tensors (torchao). An
offloaded weight is the same weight, so a model has the same fingerprint wherever it lies. A quantised weight is another one.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

SAMPLES = 512
"""Entries of a weight, at least, that its share of a fingerprint is taken from."""
_ROWS = 256
"""Of the embedding, to see its basis by."""
_OFFLOADED: "WeakKeyDictionary[Any, dict[str, Any]]" = WeakKeyDictionary()
"""What has been read of offloaded weights, by the hook that brings them: once, as each may be a file of gigabytes."""


def device_of(model: Any) -> torch.device:
    """Where its tokens go: the device of the first weight, or the one that it is brought to when it is needed."""
    _, _, weight, hook = next(_weights(model))
    return weight.device if hook is None else torch.device(hook.execution_device)


def offloads(model: Any) -> bool:
    """Whether some of its weights lie elsewhere between passes."""
    return any(hook is not None for *_, hook in _weights(model))


def precision_of(model: Any) -> torch.dtype:
    """Dtype of the residual stream: that of the first weight that is not packed."""
    return next(weight.dtype for weight in model.parameters() if weight.is_floating_point() and weight.dtype.itemsize > 1)


def quantization_of(model: Any) -> str | None:
    """How its weights are quantised, None if they are not. Of a model of Hugging Face, or one of TransformerLens."""
    root = _root(model)
    config = getattr(getattr(root, "config", None), "quantization_config", None)
    if config is None:
        return "bitsandbytes 4-bit" if getattr(getattr(model, "cfg", None), "load_in_4bit", False) else None
    about = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(about.get("quant_method"), "value", about.get("quant_method")))
    bits = [name for name, asked in (("4-bit", "load_in_4bit"), ("8-bit", "load_in_8bit")) if about.get(asked)]
    return " ".join([method, *bits])


def sampled(entries: int) -> range:
    """Which entries of a weight of so many, flattened, its fingerprint looks at."""
    return range(0, entries, max(1, entries // SAMPLES))


def fingerprint(weights: Iterable[tuple[Sequence[int], Shaped[Tensor, " sample"]]]) -> str:
    """Sixteen hexadecimal digits over weights, each given as its shape and its `sampled` entries, rounded to bfloat16; in any
    order, and however often one is listed."""
    # 3.9 and 4.x differ in whether a tied or split weight is listed twice, and a bias of zeros at all: hence a set, and
    # nothing constant in it.
    digests = set()
    for shape, samples in weights:
        values = samples.to(torch.bfloat16).view(torch.int16).cpu().numpy()
        if (values == values[0]).all():
            continue
        digests.add(hashlib.sha256(f"{tuple(shape)}".encode() + values.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:16]


def fingerprint_of(model: Any) -> str:
    """Of all its weights, wherever they lie: loading in float32 or bfloat16, on one device or several, gives the same. A
    quantised weight counts as what it is stored as."""
    return fingerprint(_samples(model))


def embedding_rows(model: Any) -> Float[Tensor, "row d_model"]:
    """The first rows of the token embedding."""
    weight = model.W_E
    if weight.device.type != "meta":
        return weight[:_ROWS].detach()
    for _, name, found, hook in _weights(model):
        if found is weight and hook is not None:
            return _once(hook, f"{name}, rows", lambda: hook.weights_map[name][:_ROWS].clone())  # noqa: B023  # called at once
    raise ValueError("the token embedding is on the meta device, and nothing says where its numbers are: load it with weights.")


@contextmanager
def materialised(*modules: Any) -> Iterator[None]:
    """While open, the weights of these modules and their parts can be read, also those that lie elsewhere between passes."""
    with ExitStack() as stack:
        for module in modules:
            for part in module.modules():
                if hook := _offloading(part):
                    hook.pre_forward(part)
                    stack.callback(hook.post_forward, part, None)
        yield


def check_readable(model: Any, module: Any) -> None:
    """ValueError for a module with packed weights: they can be run, but not read as matrices."""
    if packed(module):
        raise ValueError(
            f"{model.cfg.model_name} is quantised ({quantization_of(model)}), and this is read from its weights, which are "
            "packed. Load it without quantization_config for this, in torch.bfloat16 or with a device_map if it is large."
        )


def packed(module: Any) -> bool:
    """Whether any of its weights is kept as something else than a matrix of numbers: integers with scales, or a tensor of
    tensors."""
    weights = any(weight.dtype.itemsize == 1 or hasattr(weight, "__tensor_flatten__") for weight in module.parameters())
    return weights or bool(_packed_buffers(module))


def check_differentiable(model: Any) -> None:
    """ValueError for a quantised model whose layers hand no gradient on: what kernels do is told by running one of them. Where
    none is handed on, nothing fails: what goes past those layers would be taken for the whole."""
    for module in _root(model).modules():
        if isinstance(module, torch.nn.Linear) and packed(module):
            x = torch.ones(1, 2, module.in_features, dtype=precision_of(model), device=device_of(module), requires_grad=True)
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch says of a kernel without gradient
                (gradient,) = torch.autograd.grad(module(x).sum(), [x], allow_unused=True)
            if gradient is None or not gradient.any():
                raise ValueError(
                    f"{model.cfg.model_name} is quantised ({quantization_of(model)}), and on {x.device.type} its layers hand "
                    "no gradient on. Load it without quantization_config for this."
                )
            return


def _root(model: Any) -> Any:
    return getattr(model, "original_model", model)


def _offloading(module: Any) -> Any:
    """The hook of accelerate that brings this module's weights before a pass, if one does."""
    hooks = [getattr(module, "_hf_hook", None)]
    while hooks:
        hook = hooks.pop()
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            return hook
        hooks += getattr(hook, "hooks", ())  # of a SequentialHook
    return None


def _weights(model: Any) -> Iterator[tuple[Any, str, Tensor, Any]]:
    """Every weight, with the module it is of, its name there, and the hook that brings it if it lies elsewhere."""
    for module in _root(model).modules():
        for name, weight in module.named_parameters(recurse=False):
            yield module, name, weight, _offloading(module) if weight.device.type == "meta" else None


def _once(hook: Any, key: str, read: Callable[[], Any]) -> Any:
    known = _OFFLOADED.setdefault(hook, {})
    if key not in known:
        known[key] = read()
    return known[key]


def _packed_buffers(module: Any) -> list[Tensor]:
    """What GPTQ and AWQ keep."""
    return [x for x in module.buffers() if x.ndim > 1 and x.dtype in (torch.int32, torch.int8, torch.uint8)]


def _stored(module: Any, weight: Tensor) -> list[Shaped[Tensor, "..."]]:
    """The plain tensors that a weight consists of."""
    if hasattr(weight, "__tensor_flatten__"):
        return [part for name in weight.__tensor_flatten__()[0] for part in _stored(module, getattr(weight, name))]
    if (state := getattr(weight, "quant_state", None)) is not None:
        return [_scales(state)]
    if weight.dtype == torch.int8:  # before the first pass bitsandbytes keeps the scales at the weight, then at the module
        scales = getattr(weight, "SCB", None)
        scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
        return [weight, *([] if scales is None else [scales])]
    return [weight]


def _scales(state: Any) -> Float[Tensor, "row block"]:
    """Of a 4-bit weight of bitsandbytes: the largest entry of each block, which stays what it is while the codes are packed
    anew for the device that runs them."""
    if getattr(state, "packing_format_for_cpu", False):
        return state.absmax.T.contiguous()
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.reshape(state.shape[0], -1)


def _samples(model: Any) -> Iterator[tuple[Sequence[int], Tensor]]:
    for module, name, weight, hook in _weights(model):
        if hook is not None:
            yield _once(hook, name, partial(_sample_of_offloaded, hook, name))
        else:
            yield from map(_sample, _stored(module, weight))
    if quantization_of(model) is not None:
        yield from map(_sample, _packed_buffers(_root(model)))


def _sample(x: Tensor) -> tuple[Sequence[int], Tensor]:
    flat = x.detach().flatten()
    return tuple(x.shape), flat[:: sampled(len(flat)).step]


def _sample_of_offloaded(hook: Any, name: str) -> tuple[Sequence[int], Tensor]:
    shape, entries = _sample(hook.weights_map[name])
    return shape, entries.clone()  # and not the whole weight that they are a view of
