"""llama.cpp itself, through the shared library of a wheel: its control vector loader, and logits with and without a vector.

Called by symbol, with what x86-64 Linux lays out in memory: parameter structs are handed on as they are given, larger than they
are and unread; a std::vector is three pointers; a std::string, in the wheel's C++ ABI, one pointer past its length, capacity
and count of owners.
"""

import ctypes
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

_LOADER = "_Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE"


class _Parameters(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint64 * 128)]


class _Batch(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint64 * 7)]


class _Info(ctypes.Structure):
    _fields_ = [("strength", ctypes.c_float), ("name", ctypes.c_void_p)]


class _Vector(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("room", ctypes.c_void_p)]


class _Loaded(ctypes.Structure):
    _fields_ = [("width", ctypes.c_int), ("data", _Vector)]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@_LOG
def _silent(level: int, text: bytes, user: Any) -> None:
    """In place of what llama.cpp prints of every load."""


class LlamaCpp:
    """One model, in llama.cpp."""

    def __init__(self, library: Path, model: Path) -> None:
        self._call = call = ctypes.CDLL(str(library))
        pointer, i32 = ctypes.c_void_p, ctypes.c_int32
        for name, result, arguments in (
            ("llama_log_set", None, [_LOG, pointer]),
            ("llama_model_default_params", _Parameters, []),
            ("llama_context_default_params", _Parameters, []),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, _Parameters]),
            ("llama_init_from_model", pointer, [pointer, _Parameters]),
            ("llama_batch_get_one", _Batch, [pointer, i32]),
            ("llama_decode", i32, [pointer, _Batch]),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, i32]),
            ("llama_set_adapter_cvec", i32, [pointer, pointer, ctypes.c_size_t, i32, i32, i32]),
            ("llama_model_n_layer", i32, [pointer]),
            ("llama_model_n_embd", i32, [pointer]),
            ("llama_model_get_vocab", pointer, [pointer]),
            ("llama_vocab_n_tokens", i32, [pointer]),
            ("llama_free", None, [pointer]),
            (_LOADER, None, [pointer, pointer]),
        ):
            function = getattr(call, name)
            function.restype, function.argtypes = result, arguments
        call.llama_log_set(_silent, None)
        call.llama_backend_init()
        self._model = call.llama_model_load_from_file(str(model).encode(), call.llama_model_default_params())
        assert self._model, f"llama.cpp does not load {model}"

    def load_control_vector(self, path: Path) -> tuple[int, Tensor]:
        """As `--control-vector` loads a file: width, and the numbers of layers 1, 2, ... in a row; -1 if it refuses it."""
        name = str(path).encode()
        text = ctypes.create_string_buffer(struct.pack("qqq", len(name), len(name), 9) + name)
        info = _Info(1.0, ctypes.addressof(text) + 24)
        begin, end = ctypes.addressof(info), ctypes.addressof(info) + ctypes.sizeof(info)
        loaded = _Loaded()
        getattr(self._call, _LOADER)(ctypes.byref(loaded), ctypes.byref(_Vector(begin, end, end)))
        size = ((loaded.data.end or 0) - (loaded.data.begin or 0)) // 4
        numbers = (ctypes.c_float * size).from_address(loaded.data.begin) if size else []
        return loaded.width, torch.tensor(list(numbers))

    def logits(self, ids: Sequence[int], control_vector: Tensor | None = None) -> Tensor:
        """Of the last token, " d_vocab", with a loaded control vector or without."""
        call, model = self._call, self._model
        context = call.llama_init_from_model(model, call.llama_context_default_params())
        if control_vector is not None:
            data = control_vector.numpy()
            width, layers = call.llama_model_n_embd(model), call.llama_model_n_layer(model)
            assert call.llama_set_adapter_cvec(context, data.ctypes.data, data.size, width, 1, layers) == 0
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        assert call.llama_decode(context, call.llama_batch_get_one(tokens, len(ids))) == 0
        size = call.llama_vocab_n_tokens(call.llama_model_get_vocab(model))
        found = torch.tensor(call.llama_get_logits_ith(context, -1)[:size])
        call.llama_free(context)
        return found


def write_model(hf: Any, path: Path) -> Path:
    """A Hugging Face Llama as GGUF, in float32 and without a vocabulary."""
    config = hf.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, weight in hf.state_dict().items():
        rows = weight.float().numpy()
        for part, count in (("q_proj", heads), ("k_proj", key_heads)):
            if part in key:  # llama.cpp rotates neighbouring numbers of a head, Hugging Face those half a head apart
                halves = rows.reshape(count, 2, -1, rows.shape[-1])
                rows = halves.swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
