"""Planted models: built by hand, so that it is known which head writes a concept and which head reads it.

Two shapes, GPT-2's (LayerNorm, learned positions) and Llama's (RMSNorm, rotary, two query heads to a key-value head), of
`N_LAYERS` layers, `N_HEADS` heads, d_model `D_MODEL`; real Hugging Face folders with the tokenizer of conftest, opened by
`load_model`. Everything that is not listed here is seeded noise of spread `NOISE`, so that there is a null.

    words      " quick" and " lazy", a token each, are the concept's words: their embedding holds `word`. All tokens but bos
               hold `token`, the bos holds `sink` (both models begin every prompt with it).
    writer     `WRITER`, layer 1 head 2: attends to the concept's words, if there are any, and writes `direction` (about 3 times
               its unit vector) to the stream. No other head and no MLP does.
    reader     `READER`, layer 3 head 1, reads `direction`, and moves the metric, in one of three ways, `by`:
               "v" its value reads it: it attends to all positions alike and writes what it finds of it to `answer`;
               "q" its query reads it: with it, the head attends to the bos, whose value it writes to `answer`;
               "k" its key reads it: without it the head attends to the bos, with it to the positions that have it, and writes
                   the value of `token` to `answer`. (A change of the keys at *all* positions alike changes no attention: for
                   this one inject at some positions only.)
               In the Llama shape head 0 of that layer has the same keys and values, but next to nothing of them is written.
    metric     logit of " letter" minus logit of " river" at the last real token: the unembedding reads `answer`.

All directions are of unit length, orthogonal to one another and to the vector of ones, so that LayerNorm's mean does not touch
them; a constant part of norm sqrt(d_model) in every token keeps the norms' scale between 1 and 1.5.

    case = planted(folder, "gpt2", by="v")
    case.model, case.pairs, case.direction, case.writer, case.reader, case.concept(), case.metric(logits)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from conftest import N_CTX, VOCAB, save_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from contrans_tl import ConceptVector, ContrastPairs, identify, load_model

D_MODEL, N_LAYERS, N_HEADS, D_HEAD = 32, 4, 4, 8
WRITER, READER = (1, 2), (3, 1)
NOISE = 0.02
SIZE = 3.0
"""About how much of `direction` the writer writes."""
WORDS, UP, DOWN = (" quick", " lazy"), " letter", " river"
PAIRS = ContrastPairs(
    "planted",
    (
        "the quick dog",
        "a lazy river over the dog",
        "brown dog over a quick river",
        "the lazy letter",
        "a quick brown dog",
        "the river over a lazy dog",
        "a letter over the quick river",
        "quick lazy dog over the river",
    ),
    (
        "the brown dog",
        "a brown river over the dog",
        "brown dog over a brown river",
        "the brown letter",
        "a river brown dog",
        "the river over a brown dog",
        "a letter over the brown river",
        "brown over the dog a river",
    ),
)
"""Minimal pairs of unequal lengths, but for the last; "quick" without its space is other tokens."""

_PARTS = ("constant", "word", "token", "sink", "direction", "answer")
_SLOW = D_HEAD // 2 - 1
"""The dimension of a head that rotary embeddings turn slowest: 0.001 rad a position."""
Shape = Literal["gpt2", "llama"]


@dataclass(frozen=True, eq=False)
class Planted:
    """A planted model and what is known of it."""

    folder: Path
    model: Any
    """Of `load_model`."""
    direction: Tensor
    """Unit vector of d_model: what the writer writes and the reader reads."""
    by: str
    """What of the reader reads it: "q", "k" or "v"."""
    up: int
    down: int
    """Tokens of the metric."""
    writer: tuple[int, int] = WRITER
    reader: tuple[int, int] = READER
    pairs: ContrastPairs = PAIRS

    def concept(self, layers: tuple[int, ...] = tuple(range(N_LAYERS))) -> ConceptVector:
        """The direction, as long as the writer writes it, at these layers."""
        vectors = (SIZE * self.direction).expand(len(layers), -1).clone()
        return ConceptVector(vectors, layers, "planted", identify(self.model))

    def metric(self, logits: Tensor) -> Tensor:
        """Logits at the last real token, "... d_vocab", to how much the one is ahead of the other."""
        return logits[..., self.up] - logits[..., self.down]


def planted(folder: Path, shape: Shape = "gpt2", *, by: Literal["q", "k", "v"] = "v", seed: int = 0) -> Planted:
    """Build it in this folder and load it."""
    tokenizer = save_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    # The vector of ones comes first, so that what follows is orthogonal to it.
    square = torch.cat([torch.ones(D_MODEL, 1), torch.randn(D_MODEL, D_MODEL - 1, generator=generator)], 1)
    parts = dict(zip(_PARTS, torch.linalg.qr(square).Q[:, 1:].T, strict=False))
    up, down, *words = (tokenizer.encode(word, add_special_tokens=False) for word in (UP, DOWN, *WORDS))
    assert all(len(ids) == 1 for ids in (up, down, *words))
    model = _model(shape, seed)
    _plant(model, shape, by, parts, [ids[0] for ids in words], up[0], down[0], tokenizer.bos_token_id)
    model.save_pretrained(folder)
    return Planted(folder, load_model(folder, device="cpu"), parts["direction"], by, up[0], down[0])


def _model(shape: Shape, seed: int) -> Any:
    """With noise for weights, and norms that do nothing but norm."""
    sizes = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    if shape == "gpt2":
        config: Any = GPT2Config(**sizes, n_embd=D_MODEL, n_inner=48, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_CTX)
    else:
        config = LlamaConfig(
            **sizes,
            hidden_size=D_MODEL,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=N_CTX,
        )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        is_norm = weight.ndim == 1 and name.endswith("weight")
        weight.data = float(is_norm) + NOISE * torch.randn_like(weight)
    return model.eval()


def _plant(model: Any, shape: Shape, by: str, parts: dict[str, Tensor], words: list[int], up: int, down: int, bos: int) -> None:
    constant, word, token, sink, direction, answer = (parts[name] for name in _PARTS)
    embedding = model.get_input_embeddings().weight.data
    embedding += D_MODEL**0.5 * constant + 2 * token
    embedding[words] += 3 * word
    embedding[bos] += 3 * sink - 2 * token
    model.get_output_embeddings().weight.data[up] += answer
    model.get_output_embeddings().weight.data[down] -= answer
    _head(model, shape, WRITER, q=constant, k=1.2 * word, v=word, out=1.2 * direction)
    if by == "v":
        _head(model, shape, READER, v=direction, out=answer)
    elif by == "q":
        _head(model, shape, READER, q=2 * direction, k=sink, v=sink, out=answer)
    else:
        _head(model, shape, READER, q=constant, k=0.8 * sink + 1.4 * direction, v=token, out=answer)


def _head(model: Any, shape: Shape, head: tuple[int, int], *, v: Tensor, out: Tensor, q: Any = None, k: Any = None) -> None:
    """Let one head read q, k and v each into one of its dimensions, and write the value's to `out`."""
    layer, h = head
    if shape == "gpt2":
        attention = model.transformer.h[layer].attn
        start = h * D_HEAD
        if q is not None:
            attention.c_attn.weight.data[:, start + _SLOW] += q
            attention.c_attn.weight.data[:, D_MODEL + start + _SLOW] += k
        attention.c_attn.weight.data[:, 2 * D_MODEL + start] += v
        attention.c_proj.weight.data[start] += out
    else:
        attention = model.model.layers[layer].self_attn
        start, group = h * D_HEAD, h // 2 * D_HEAD
        if q is not None:
            attention.q_proj.weight.data[start + _SLOW] += q
            attention.k_proj.weight.data[group + _SLOW] += k
        attention.v_proj.weight.data[group] += v
        attention.o_proj.weight.data[:, start] += out
