"""Writers: the full decomposition of a concept's projection against the plain extraction of the same prompts.

`writers` at the last layer - tokens, positions, every head, MLP and bias, with intervals and chances - against `collect` of
every layer at the last tokens, on a GPT-2-shaped model of random weights. Both run the blocks once and no language-model head.
A cache of all head outputs, which is the other way to do it, is stated beside the peak memory.

    python tests/benchmarks/writers.py [--quick]
"""

from measure import alternate, peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from extraction import BATCH, save_model, sentences

from contrans_tl import ConceptVector, ContrastPairs, collect, identify, load_model
from contrans_tl.diagnostics import writers


def decomposition(folder: Path, texts: list[str]) -> Callable[[], Any]:
    """`writers` at the last layer, the first half of the texts against the second, ready to run."""
    model = load_model(folder, device="cpu")
    layer = model.cfg.n_layers - 1
    direction = torch.randn(1, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    concept = ConceptVector(direction, (layer,), "random", identify(model))
    pairs = ContrastPairs("halves", tuple(texts[: len(texts) // 2]), tuple(texts[len(texts) // 2 :]))
    return lambda: writers(model, concept, pairs, layer=layer, prepend_bos=False, batch_size=BATCH)


def extraction(folder: Path, texts: list[str]) -> Callable[[], Any]:
    """`collect`, ready to run."""
    model = load_model(folder, device="cpu")
    return lambda: collect(model, texts, rows="last", prepend_bos=False, batch_size=BATCH)


SIDES = {"writers": decomposition, "extraction": extraction}


def prepare(side: str, folder: Path, texts: list[str]) -> Any:
    """For the memory measurement, in a process of its own."""
    return SIDES[side](folder, texts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    d_model, layers, n, repeats = (128, 2, 64, 3) if quick else (768, 12, 128, 5)
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), sentences(n)
        save_model(folder, d_model, layers)
        sides = {side: make(folder, texts) for side, make in SIDES.items()}
        found = sides["writers"]()
        assert found.completeness < 1e-4, f"the parts miss the whole by {found.completeness}"
        taken = alternate(repeats, **sides)
        heads = d_model // 64
        print(f"writers: {n} sentences, {layers} layers of {heads} heads, d_model {d_model}, batches of {BATCH}")
        print(f"  {len(found.intervals)} parts, off the whole by {found.completeness:.0e} of the largest")
        print(f"  writers {taken['writers']:.2f} s, extraction {taken['extraction']:.2f} s, medians of {repeats}")
        print(f"  writers over extraction: {taken['writers'] / taken['extraction']:.2f}")
        for side in sides:
            before, added = peak_megabytes(prepare, side, folder, texts)
            print(f"  peak memory, {side}: {added:.0f} MB beside {before:.0f} MB of weights and libraries")
        longest = max(len(text.split()) for text in texts)
        print(
            f"  (every head's output at every position of one batch: {BATCH * longest * layers * heads * d_model * 4 >> 20} MB)"
        )


if __name__ == "__main__":
    main()
