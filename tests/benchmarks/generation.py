"""Generation: `generate` under `transplant` against the same bridge without.

Greedy, the same number of new tokens, on a GPT-2-shaped model of random weights.

    python tests/benchmarks/generation.py [--quick]
"""

from measure import alternate, peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from extraction import save_model

from contrans_tl import load_model, transplant
from contrans_tl.models import identify
from contrans_tl.refinement import ConceptVector


def runs(folder: Path, tokens: int) -> dict[str, Callable[[], Any]]:
    """Both sides, on one bridge."""
    model = load_model(folder, device="cpu")
    layer = model.cfg.n_layers // 2
    vector = torch.randn(1, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    concept = ConceptVector(vector, (layer,), "random", identify(model))

    def plain() -> Any:
        return model.generate(
            "w1 w2 w3 w4 w5 w6", max_new_tokens=tokens, do_sample=False, stop_at_eos=False, verbose=False, return_type="tokens"
        )

    def transplanted() -> Any:
        with transplant(model, concept, strength=2.0):
            return plain()

    return {"plain": plain, "transplanted": transplanted}


def prepare(side: str, folder: Path, tokens: int) -> Any:
    """For the memory measurement, in a process of its own."""
    return runs(folder, tokens)[side]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    d_model, layers, tokens, repeats = (128, 2, 8, 3) if quick else (768, 12, 24, 11)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, d_model, layers)
        sides = runs(folder, tokens)
        assert sides["plain"]().shape == sides["transplanted"]().shape
        taken = alternate(repeats, **sides)
        print(f"generation: {tokens} new tokens, {layers} layers of {d_model}")
        print(f"  plain {taken['plain']:.2f} s, under transplant {taken['transplanted']:.2f} s, medians of {repeats}")
        print(f"  transplanted over plain: {taken['transplanted'] / taken['plain']:.3f}")
        for side in sides:
            before, added = peak_megabytes(prepare, side, folder, tokens)
            print(f"  peak memory, {side}: {added:.0f} MB beside {before:.0f} MB of weights and libraries")


if __name__ == "__main__":
    main()
