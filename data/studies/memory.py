"""How much memory the steps take, from the sizes of the models alone: a table for 7B, 13B and 70B, and a check at small sizes.

    python data/studies/memory.py                 the table, Markdown
    python data/studies/memory.py --check         the same formulas beside measured peaks of small models; a minute

Each formula counts the tensors that are alive at the peak and says which. `--check` builds untrained models of small sizes,
runs each step in a process of its own, and fails where the prediction is off by more than `WITHIN`. The sizes of the table are
those of Llama 2's published configurations (arXiv 2307.09288).
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "benchmarks"))
from measure import peak_megabytes  # isort: skip  # first: it settles the number of threads
import torch
from streaming import WORDS, write

from contrans_tl import ContrastPairs, LayerMaps, load_model, refine, transplant
from contrans_tl.demo import demo_data
from contrans_tl.loading import bitsandbytes
from contrans_tl.models import identify
from contrans_tl.moments import Moments, fit_streamed
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import SAMPLE
from contrans_tl.shards import TEXTS_PER_SHARD, StoredActivations

WITHIN = 1.25
"""Factor between prediction and measurement that `--check` allows."""
PROMPTS, BATCH, TOKENS = 256, 32, 64
"""Of a refinement: prompts of both sides, of a batch, and tokens of a prompt."""
TEXT = 2048
"""Positions of a steered generation, prompt included."""
STATISTICS = 8
"""Bytes of a float64."""


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    d_model: int
    n_layers: int
    d_mlp: int
    n_heads: int
    key_heads: int
    vocab: int

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads

    @property
    def matrices(self) -> int:
        """Numbers in the linear layers of all blocks, which are what gets quantised: q and o, k and v, three of the MLP."""
        d, per_key = self.d_model, self.key_heads * self.d_head
        return self.n_layers * (2 * d * d + 2 * d * per_key + 3 * d * self.d_mlp)

    @property
    def rest(self) -> int:
        """Embedding, head (untied) and norms."""
        return 2 * self.vocab * self.d_model + (2 * self.n_layers + 1) * self.d_model

    @property
    def outputs(self) -> int:
        """Rows of those linear layers."""
        return self.n_layers * (2 * self.d_model + 2 * self.key_heads * self.d_head + 2 * self.d_mlp + self.d_model)


LLAMAS = {
    "7B": Shape(4096, 32, 11008, 32, 32, 32000),
    "13B": Shape(5120, 40, 13824, 40, 40, 32000),
    "70B": Shape(8192, 80, 28672, 64, 8, 32000),
}


def weights(shape: Shape, kind: str) -> float:
    """Bytes. Half precision is 2 a number. LLM.int8 keeps a float32 scale for each output (arXiv 2208.07339, sec. 2); NF4 half
    a byte, a scale of one byte for 64 numbers, and a float32 for 256 of those scales (arXiv 2305.14314, sec. 3). What is not
    in the blocks' linear layers stays in half precision."""
    if kind in ("float32", "bfloat16"):
        return (4 if kind == "float32" else 2) * (shape.matrices + shape.rest)
    packed = shape.matrices + 4 * shape.outputs if kind == "8bit" else shape.matrices * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    return packed + 2 * shape.rest


def block_pass(shape: Shape, batch: int, tokens: int, size: int) -> float:
    """What is alive at the peak of one block's pass, in weights of `size` bytes a number: the stream, its norm in float32, and
    the larger of attention and MLP. Attention, computed eagerly: q, k and v, before and after the rotation, k and v repeated
    for every head, z; scores as products and as float32 softmax, which is then made half precision (8 bytes either way). MLP:
    gate, its activation, up and their product."""
    rows = batch * tokens
    stream = rows * shape.d_model * (3 * size + 4)
    heads = rows * shape.d_head * size * (2 * (shape.n_heads + 2 * shape.key_heads) + 3 * shape.n_heads)
    scores = batch * shape.n_heads * tokens**2 * 8
    return stream + max(heads + scores, 4 * rows * shape.d_mlp * size)


def refining(shape: Shape, size: int) -> tuple[float, float]:
    """Peak beside the weights, where the model is and in main memory: a block's pass (the head is never computed); the last
    token of every prompt at every layer in float32, and again in float64 for the statistics."""
    return block_pass(shape, BATCH, TOKENS, size), PROMPTS * row(shape, 4 + STATISTICS)


def row(shape: Shape, size: int) -> float:
    """One stored row of all layers."""
    return shape.n_layers * shape.d_model * size


def grid(source: Shape, target: Shape, rows: int) -> float:
    """All pairs of layers on a sample of n rows, n no more than d_source: the rows of both in float32; U of each source layer,
    n x n in float64; the n x n products of each target layer, in float64 where n is near d_source; and six n x n of the layer
    that is decomposed and scanned."""
    near = rows > 0.9 * source.d_model
    square = rows**2
    kept = square * (source.n_layers * STATISTICS + target.n_layers * (STATISTICS if near else 4) + 6 * STATISTICS)
    return rows * (row(source, 4) + row(target, 4)) + kept


def one_map(source: Shape, target: Shape) -> float:
    """W and b in float32."""
    return 4 * target.d_model * (source.d_model + 1)


def streamed(source: Shape, target: Shape) -> float:
    """One pair fitted on all rows. While they are read: S_xx and S_yx in float64 of four fifths and of a fifth of them; a
    shard's rows in float32, in float64 and centred. Then: those moments, of both together and of a copy; eigenvectors of S_xx
    and as much to find them, S_yx in them, and W."""
    moments = STATISTICS * source.d_model * (source.d_model + target.d_model)
    shard = TEXTS_PER_SHARD * WORDS * (source.d_model + target.d_model) * (4 + 2 * STATISTICS)
    return max(2 * moments + shard, 4 * moments + 2 * moments)


def generating(shape: Shape, positions: int, prompt: int, size: int) -> float:
    """A steered generation beside the weights: keys and values of every layer, and those of one layer again while a token is
    appended; the prompt's logits, or a block's pass over the prompt. The injected vector is d_model numbers."""
    cache = 2 * shape.key_heads * shape.d_head * positions * size * (shape.n_layers + 1)
    return cache + max(prompt * shape.vocab * size, block_pass(shape, 1, prompt, size))


def table() -> str:
    """Markdown, gigabytes of 10^9 bytes."""

    def line(name: str, *numbers: float) -> str:
        return f"| {name} | " + " | ".join(f"{x / 1e9:.3g}" for x in numbers) + " |"

    shapes, source = list(LLAMAS.values()), LLAMAS["7B"]
    rows = min(SAMPLE, source.d_model)
    lines = [f"| GB | {' | '.join(LLAMAS)} |", "|---" * (1 + len(shapes)) + "|"]
    lines += [line(f"weights, {kind}", *(weights(s, kind) for s in shapes)) for kind in ("float32", "bfloat16", "8bit", "4bit")]
    passes, held = zip(*(refining(s, 2) for s in shapes), strict=True)
    lines += [
        line(f"refining: a pass over {BATCH} prompts of {TOKENS} tokens", *passes),
        line(f"refining: {PROMPTS} prompts at all layers, main memory", *held),
        line("100,000 stored rows, all layers, bfloat16, disk", *(1e5 * row(s, 2) for s in shapes)),
        line("100,000 stored rows, one layer, bfloat16, disk", *(1e5 * 2 * s.d_model for s in shapes)),
        line(f"from 7B: the grid on {rows:,} rows", *(grid(source, s, rows) for s in shapes)),
        line("from 7B: one map", *(one_map(source, s) for s in shapes)),
        line("from 7B: one pair streamed, any number of rows", *(streamed(source, s) for s in shapes)),
        line(f"steered generation of {TEXT} positions", *(generating(s, TEXT, TOKENS, 2) for s in shapes)),
    ]
    return "\n".join(lines)


SMALL = Shape(d_model=512, n_layers=6, d_mlp=1408, n_heads=8, key_heads=2, vocab=16000)
OTHER = Shape(d_model=640, n_layers=8, d_mlp=1728, n_heads=10, key_heads=10, vocab=16000)
SMALL_ROWS = 480


def llama(shape: Shape) -> Any:
    """Its configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layers,
        intermediate_size=shape.d_mlp,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.key_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=TEXT,
        tie_word_embeddings=False,
    )


def save_model(folder: Path, shape: Shape) -> None:
    """Untrained, with the embedded pair's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama(shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_data() / "pair" / "source").save_pretrained(folder)


def counted(folder: Path, kind: str) -> int:
    """Bytes of all tensors that a loaded model holds."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    quantised = {"quantization_config": bitsandbytes(kind, dtype)} if "bit" in kind else {}
    model: Any = load_model(folder, device="cpu", dtype=dtype, **quantised)
    held = {x.data_ptr(): x for module in model.original_model.modules() for x in module.parameters(recurse=False)}
    total = sum(x.nbytes for x in held.values())
    for module in model.original_model.modules():
        if (state := getattr(module, "quant_state", None)) is not None:
            # As a GPU keeps them: the CPU's own packing has made the scales of the scales one bfloat16 each.
            total += state.absmax.numel() * 1 + 4 * -(-state.absmax.numel() // 256)
        elif (scales := getattr(getattr(module, "state", None), "SCB", None)) is not None:
            total += scales.nbytes
    return total


def prepare_refining(folder: Path, tokens: int) -> Any:
    model = load_model(folder, device="cpu")
    prompts = [model.tokenizer.decode(list(range(20 + i, 20 + i + 2 * tokens))) for i in range(PROMPTS)]
    cut = [model.tokenizer.decode(model.tokenizer(p)["input_ids"][: tokens - 2]) for p in prompts]
    return partial(refine, model, ContrastPairs("any", tuple(cut[::2]), tuple(cut[1::2])), batch_size=BATCH)


def prepare_grid(source: Shape, target: Shape, rows: int) -> Any:
    g = torch.Generator().manual_seed(0)
    latent = torch.randn(rows, 32, generator=g)

    def side(shape: Shape) -> torch.Tensor:
        values = torch.empty(rows, shape.n_layers, shape.d_model)
        for layer in range(shape.n_layers):
            values[:, layer] = latent @ torch.randn(32, shape.d_model, generator=g)
        return values.add_(torch.randn(rows, 1, shape.d_model, generator=g))

    def fit(n: int) -> Any:
        maps = LayerMaps.fit(side(source)[:n], side(target)[:n])
        return maps.r2, maps.carry(torch.ones(source.n_layers, source.d_model))

    fit(20)  # the libraries' own memory
    return partial(fit, rows)


def prepare_streamed(folders: list[Path]) -> Any:
    stored = list(map(StoredActivations.load, folders))
    Moments(64, 64).update(torch.randn(99, 64), torch.randn(99, 64)).solve(0.1)  # the libraries' own memory
    return partial(fit_streamed, *stored, (0, 0))


def prepare_generating(folder: Path, positions: int, prompt: int) -> Any:
    model = load_model(folder, device="cpu")
    vector = torch.ones(1, model.cfg.d_model)
    concept = ConceptVector(vector, (model.cfg.n_layers // 2,), "any", identify(model))
    tokens = torch.arange(1, prompt + 1)[None]

    def generate(new: int) -> Any:
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        with transplant(model, concept, strength=2.0):
            return model.generate(tokens, max_new_tokens=new, **options)

    return partial(generate, positions - prompt)


def check() -> None:
    """Prediction beside measurement, float32 on the CPU. AssertionError for one that is off by more than `WITHIN`."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # what is freed goes back to the system at once
    found: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_model(folder, SMALL)
        for kind in ("float32", "bfloat16", "8bit", "4bit"):
            found.append((f"weights, {kind}", weights(SMALL, kind), counted(folder, kind)))
        for tokens in (TOKENS, 4 * TOKENS):
            _, added = peak_megabytes(prepare_refining, folder, tokens)
            predicted = block_pass(SMALL, BATCH, tokens, 4) + PROMPTS * row(SMALL, 4 + STATISTICS)
            found.append((f"refining, {BATCH} x {tokens}", predicted, added * 2**20))
        _, added = peak_megabytes(prepare_generating, folder, 1040, 1000)
        found.append(("steered generation", generating(SMALL, 1040, 1000, 4), added * 2**20))
        for rows in (SMALL_ROWS, SMALL_ROWS // 2):
            _, added = peak_megabytes(prepare_grid, SMALL, OTHER, rows)
            found.append((f"grid, {rows} rows", grid(SMALL, OTHER, rows), added * 2**20))
        folders = write(Path(name) / "rows", 2 * TEXTS_PER_SHARD * WORDS, 3 * SMALL.d_model, 3 * OTHER.d_model)
        wide = (Shape(3 * shape.d_model, 1, 1, 1, 1, 1) for shape in (SMALL, OTHER))
        _, added = peak_megabytes(prepare_streamed, folders)
        found.append(("streamed fit", streamed(*wide), added * 2**20))
    print("| MB | predicted | measured | predicted / measured |\n|---|---|---|---|")
    for what, predicted, measured in found:
        print(f"| {what} | {predicted / 1e6:.1f} | {measured / 1e6:.1f} | {predicted / measured:.2f} |")
    off = [what for what, predicted, measured in found if not 1 / WITHIN <= predicted / measured <= WITHIN]
    assert not off, f"off by more than {WITHIN}: {', '.join(off)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="measure at small sizes")
    if parser.parse_args().check:
        check()
    else:
        print(table())
