"""Loading: a hub id or a folder -> a TransformerBridge; also of models that one device does not hold - spread over several, in
part on disk, or quantised.

    load_model("EleutherAI/pythia-160m")
    load_model("meta-llama/Llama-3.1-70B", device_map="auto", dtype=torch.bfloat16)
    load_model("meta-llama/Llama-3.1-70B", quantization_config=bitsandbytes("4bit", torch.bfloat16))

What TransformerLens can place itself it is asked to; quantised weights Hugging Face reads, and TransformerLens wraps. What
the installed version cannot run is refused before anything is read:

- weights on disk need TransformerLens 4;
- GPUs and main memory at once are refused by TransformerLens: all GPUs, or CPU and disk;
- a model whose queries, keys and values are one matrix (GPT-2, GPT-NeoX) cannot be quantised by bitsandbytes: TransformerLens
  splits that matrix.

Quantised models are run, and what is read from their weights as matrices is refused (`weights.check_readable`). LLM.int8 takes
the columns it leaves in half precision from the whole batch: what a text gives depends a little on the texts beside it.
"""

import inspect
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from contrans_tl.checks import caches_right, self_check
from contrans_tl.models import HookedModel, check_model_name
from contrans_tl.weights import device_of, offloads, packed, quantization_of

DeviceMap = str | Mapping[str, str | int | torch.device]
"""As accelerate takes it: "auto", "balanced", or a device for each module."""


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


def bitsandbytes(bits: str, dtype: torch.dtype) -> Any:
    """A `quantization_config` for "8bit", LLM.int8 (arXiv 2208.07339), or "4bit", QLoRA's NF4 with quantised scales (arXiv
    2305.14314) that computes in `dtype`. ValueError for other bits; ImportError without bitsandbytes."""
    if bits not in ("8bit", "4bit"):
        raise ValueError(f"expected quantisation to 8bit or 4bit; got {bits!r}.")
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes as _  # noqa: F401
    except ImportError as error:
        raise ImportError("quantised weights need bitsandbytes: pip install 'contrans-tl[quantised]'.") from error
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def boot(
    name: str,
    *,
    tokenizer: Any,
    device: str | torch.device | None,
    dtype: torch.dtype,
    revision: str | None,
    device_map: DeviceMap | None,
    max_memory: Mapping[str | int, str | int] | None,
    offload_folder: str | os.PathLike[str] | None,
    quantization_config: Any,
) -> Any:
    """A TransformerBridge of a hub id or a folder, placed as asked; see `load_model`."""
    from transformer_lens.model_bridge import TransformerBridge

    placing: dict[str, Any] = {
        "device_map": dict(device_map) if isinstance(device_map, Mapping) else device_map,
        "max_memory": None if max_memory is None else dict(max_memory),
        "offload_folder": None if offload_folder is None else os.fspath(offload_folder),
    }
    placing = {option: value for option, value in placing.items() if value is not None}
    if device is not None and device_map is not None:
        raise ValueError(f"expected device= or device_map=; got both, {device!r} and {device_map!r}.")
    if device_map is None and placing:
        raise ValueError(f"{' and '.join(placing)} say how device_map= places a model: pass that too, as in device_map='auto'.")
    on_disk = isinstance(device_map, Mapping) and "disk" in map(str, device_map.values())
    if on_disk or offload_folder is not None:
        _check_offload(name)
    if quantization_config is None and not _is_quantised(name, revision):
        if isinstance(device_map, str) and torch.cuda.is_available():
            check_fits(name, dtype, revision, placing.get("max_memory"))
        placing = placing or {"device": device}
        return TransformerBridge.boot_transformers(name, dtype=dtype, tokenizer=tokenizer, revision=revision, **placing)

    from transformer_lens.utilities import get_device
    from transformers import AutoModelForCausalLM

    if quantization_config is not None:
        placing["quantization_config"] = quantization_config
    hf_model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        attn_implementation="eager",  # the only one that TransformerLens can hook
        **{"device_map": {"": device or get_device()}, **placing},
    )
    if not packed(hf_model):
        raise ValueError(
            f"{name}: {quantization_of(hf_model) or 'this quantization_config'} quantised nothing, as the layers of this "
            "architecture are of a kind that it passes over. Load it without quantization_config."
        )
    return wrap(name, hf_model, tokenizer=tokenizer, dtype=dtype, revision=revision)


def wrap(name: str, hf_model: Any, **options: Any) -> Any:
    """A TransformerBridge of a Hugging Face model in memory, left where it is. ValueError for one that TransformerLens cannot
    take apart."""
    from transformer_lens.model_bridge import TransformerBridge

    if offloads(hf_model):
        _check_offload(name)
    try:
        return TransformerBridge.boot_transformers(name, hf_model=hf_model, device=device_of(hf_model), **options)
    except (NotImplementedError, RuntimeError) as error:
        if (how := quantization_of(hf_model)) is None:
            raise
        raise ValueError(
            f"transformer-lens {version('transformer-lens')} cannot take {name} apart while it is quantised ({how}): {error} "
            "Load it in torch.bfloat16, with device_map= if it is large."
        ) from error


def check_fits(name: str, dtype: torch.dtype, revision: str | None, max_memory: Mapping[str | int, str | int] | None) -> None:
    """ValueError, from the configuration alone, where accelerate would put a model on GPUs and in main memory at once: of a
    large model TransformerLens says so only when it has been read."""
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name, revision=revision), dtype=dtype)
    empty.tie_weights()
    places = infer_auto_device_map(
        empty,
        max_memory=None if max_memory is None else dict(max_memory),
        no_split_module_classes=list(getattr(empty, "_no_split_modules", None) or ()),
        dtype=dtype,
    )
    devices = {str(device) for device in places.values()}
    if devices & {"cpu", "disk"} and devices - {"cpu", "disk"}:
        size = sum(weight.numel() for weight in empty.parameters()) * dtype.itemsize
        raise ValueError(
            f"{name} takes {size / 1e9:.3g} GB in {dtype}, more than the GPUs have room for, and TransformerLens runs no model "
            "on GPUs and in main memory at once. Load it quantised (loading.bitsandbytes), on more GPUs, or on the CPU with "
            'device_map={"": "cpu"}.'
        )


def _check_offload(name: str) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    if "offload_folder" not in inspect.signature(TransformerBridge.boot_transformers).parameters:
        raise ValueError(
            f"{name}: transformer-lens {version('transformer-lens')} cannot run weights that lie elsewhere between passes, on "
            "disk or in main memory. Install transformer-lens 4, or load the model quantised."
        )


def _is_quantised(name: str, revision: str | None) -> bool:
    """Whether the checkpoint itself is quantised. What cannot be read here says why when it is loaded."""
    from transformers import AutoConfig

    try:
        return getattr(AutoConfig.from_pretrained(name, revision=revision), "quantization_config", None) is not None
    except (OSError, ValueError, KeyError):
        return False
