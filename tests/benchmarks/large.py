"""Models of 7B and 13B: seconds and peak memory of every step, on one device, beside the memory that sizes alone predict.

Untrained Llamas of those shapes in bfloat16, made on the device; nothing is downloaded, the tokenizer is the embedded pair's.
The 7B is the source and is gone before the 13B, the target, is made. Of each: refine, rows of 2,000 sentences at the end of
every word, a generation, plain and steered. Then the grid of all pairs of layers on 2,000 of these rows.

    python tests/benchmarks/large.py --device cuda
    python tests/benchmarks/large.py --quick              the same at tiny sizes, on the CPU

What is untrained carries no concept: this measures cost alone. Wall seconds, as a device works beside the processor. Peak
memory is what torch held on a GPU, and on the CPU what the process gained, which at tiny sizes is mostly libraries; predictions
are those of `data/studies/memory.py`. The rows of the 13B take 28 GB of main memory while they are collected.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "data" / "studies"))
from measure import peak_here  # isort: skip  # first: it settles the number of threads
import memory
import torch
from memory import LLAMAS, Shape, block_pass, llama, row, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from contrans_tl import ConceptVector, ContrastPairs, LayerMaps, load_model, read_sentences, refine, transplant
from contrans_tl.activations import Activations, collect, pair
from contrans_tl.demo import demo_data

TINY = {"7B": Shape(64, 3, 128, 4, 4, 608), "13B": Shape(96, 4, 192, 4, 2, 608)}
SENTENCES, ROWS, BATCH, PROMPT, NEW = 2000, 2000, 32, 64, 192


def timed(what: str, device: str, run: Callable[[], Any], predicted: float | None = None) -> Any:
    """Run, print what it took and return what it made. The prediction is in bytes, of the peak beside what was there before."""
    made: list[Any] = []

    def work() -> None:
        made.append(run())
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    start = perf_counter()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        added = torch.cuda.max_memory_allocated() - before
    else:
        added = peak_here(work)[1] * 2**20
    beside = "" if predicted is None else f", predicted {predicted / 1e9:.3g} GB"
    print(f"  {what}: {perf_counter() - start:.1f} s, peak {added / 1e9:.3g} GB{beside}", flush=True)
    return made[0]


def untrained(shape: Shape, device: str) -> Any:
    """A bridge, its weights made where they stay."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama(shape), dtype=torch.bfloat16, attn_implementation="eager")
    return load_model(model.eval(), tokenizer=AutoTokenizer.from_pretrained(demo_data() / "pair" / "source"))


def steps(name: str, shape: Shape, device: str, sentences: list[str], n_rows: int) -> Activations:
    """All that one model does; the first of its rows."""
    print(f"\n{name}: {shape.n_layers} layers of {shape.d_model}, bfloat16, {device}")
    model = timed("made, wrapped, checked", device, lambda: untrained(shape, device), weights(shape, "bfloat16"))
    pairs = ContrastPairs.load(demo_data() / "concepts" / "happiness.json")
    longest = max(len(model.tokenizer(text)["input_ids"]) for text in (*pairs.positive, *pairs.negative))
    n_prompts = len(pairs.positive) + len(pairs.negative)
    concept: ConceptVector = timed(
        f"refine, {n_prompts} prompts",
        device,
        lambda: refine(model, pairs, batch_size=BATCH),
        block_pass(shape, BATCH, longest + 1, 2),
    )
    rows: Activations = timed(
        f"rows of {len(sentences)} sentences", device, lambda: collect(model, sentences, rows="words", batch_size=BATCH)
    )
    print(f"    {len(rows)} rows, {len(rows) * row(shape, 4) / 1e9:.3g} GB in main memory")
    tokens = torch.arange(1, PROMPT + 1, device=device)[None]
    options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    predicted = memory.generating(shape, PROMPT + NEW, PROMPT, 2)

    def generate() -> torch.Tensor:
        return model.generate(tokens, max_new_tokens=NEW, **options)

    plain = timed(f"{NEW} tokens, plain", device, generate, predicted)
    with transplant(model, concept, layers=[shape.n_layers * 3 // 4], strength=2.0):
        steered = timed(f"{NEW} tokens, steered", device, generate, predicted)
    assert plain.shape == steered.shape == (1, PROMPT + NEW)
    return rows.take(torch.arange(min(n_rows, len(rows))))  # a copy: the others are gone


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shapes, n_sentences, n_rows = (TINY, 60, 120) if args.quick else (LLAMAS, SENTENCES, ROWS)
    sentences = read_sentences(demo_data() / "generic.txt")[:n_sentences]
    start = perf_counter()
    sides = []
    for name in ("7B", "13B"):
        sides.append(steps(name, shapes[name], args.device, sentences, n_rows))
        gc.collect()  # a bridge is a ring of references
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    x, y = pair(*sides)

    def grid() -> LayerMaps:
        maps = LayerMaps.fit(x.values.to(args.device), y.values.to(args.device), sentence=x.sentence)
        _ = maps.r2, maps.carry(torch.ones(len(x.layers), x.values.shape[-1]))
        return maps

    print(f"\nthe grid, {len(x.layers)} x {len(y.layers)} layers, {len(x)} rows")
    maps = timed("ridges, R2, a vector carried", args.device, grid, memory.grid(shapes["7B"], shapes["13B"], len(x)))
    last = (x.layers[-1], y.layers[-1])
    timed("one map", args.device, lambda: maps[last], memory.one_map(shapes["7B"], shapes["13B"]))
    assert bool(maps.r2.isfinite().all())
    print(f"\nall of it: {perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
