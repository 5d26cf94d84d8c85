"""A sweep of 64 settings over 64 single runs.

Every layer, strengths and two kinds of positions, until 64 are together. A single run is `transplant` around a plain forward
pass of all prompts: all blocks and the whole head. A sweep runs the blocks below a layer once, several settings in a pass, and
the head behind the last token. Numbers are checked to agree. On the targets of the embedded pair, and on a GPT-2-shaped model
of random weights with GPT-2's vocabulary.

    python tests/benchmarks/sweep.py [--quick]
"""

from measure import alternate, peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from extraction import save_model, sentences

from contrans_tl import ContrastPairs, load_model, transplant
from contrans_tl.demo import demo_data
from contrans_tl.diagnostics import sweep
from contrans_tl.evaluation import plain
from contrans_tl.models import HookedModel, identify
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import encode, pad

POSITIONS: Any = ("all", "last")


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, a concept at the layers swept, and texts."""

    model: HookedModel
    concept: ConceptVector
    texts: list[str]
    strengths: list[float]

    @classmethod
    def of(cls, folder: Path, texts: list[str], n_layers: int, n_strengths: int) -> "Bench":
        """Layers are spread over the whole depth."""
        model = load_model(folder, device="cpu")
        layers = tuple(int((k + 0.5) * model.cfg.n_layers / n_layers) for k in range(n_layers))
        vectors = torch.randn(n_layers, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
        strengths = [float(2 ** (k / 2 - 2)) for k in range(n_strengths)]
        return cls(model, ConceptVector(vectors, layers, "random", identify(model)), texts, strengths)

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 40] - logits[:, 41]

    def together(self) -> torch.Tensor:
        options: dict[str, Any] = {"metric": self.metric, "strengths": self.strengths, "positions": POSITIONS}
        return sweep(self.model, self.concept, self.texts, **options).scores.values

    def single(self) -> torch.Tensor:
        read = [encoding.ids for encoding in encode(self.model, self.texts)]
        tokens, mask = pad(read)
        tokens[mask == 0] = self.model.tokenizer.pad_token_id  # by which a transplant at the last token knows padding
        rows = []
        for layer, strength, positions in product(self.concept.layers, self.strengths, POSITIONS):
            with transplant(self.model, self.concept, strength=strength, layers=[layer], positions=positions):
                rows.append(self.metric(plain(self.model)(tokens, mask)[torch.arange(len(read)), mask.sum(1) - 1]))
        return torch.stack(rows).view(len(self.concept.layers), len(self.strengths), len(POSITIONS), len(read))


def embedded(target: str, texts: int, n_layers: int, n_strengths: int) -> Bench:
    """Anger's test questions."""
    questions = ContrastPairs.load(demo_data() / "concepts" / "anger.json").test[:texts]
    return Bench.of(demo_data() / "pair" / target, [question.text for question in questions], n_layers, n_strengths)


def gpt2_shaped(folder: Path, texts: int, n_layers: int, n_strengths: int) -> Bench:
    return Bench.of(folder, sentences(texts), n_layers, n_strengths)


def prepare(side: str, make: Callable[..., Bench], *args: Any) -> Any:
    """For the memory measurement, in a process of its own."""
    return getattr(make(*args), side)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    d_model, layers, repeats, grid = (128, 2, 1, (2, 2)) if quick else (768, 12, 3, (4, 8))
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), d_model, layers)
        benches: dict[str, tuple[Any, ...]] = {
            "embedded target-gpt2, 8 texts": (embedded, "target-gpt2", 8, *grid),
            "embedded target-llama, 8 texts": (embedded, "target-llama", 8, *grid),
            "embedded target-llama, 64 texts": (embedded, "target-llama", 64, *grid),
            f"GPT-2-shaped, {layers} layers, 4 texts": (gpt2_shaped, Path(name), 4, *grid),
        }
        for title, (make, *args) in benches.items():
            bench = make(*args)
            ours, theirs = bench.together(), bench.single()
            error = float((ours - theirs).abs().max())
            assert error < 1e-4 * max(1.0, float(theirs.abs().max())), f"the numbers differ by {error}"
            rounds = 1 if make is gpt2_shaped else repeats  # minutes each
            taken = alternate(rounds, together=bench.together, single=bench.single)
            count = len(bench.concept.layers) * len(bench.strengths) * len(POSITIONS)
            print(f"{title}, {count} settings: layers {bench.concept.layers}")
            print(f"  together {taken['together']:.2f} s, single runs {taken['single']:.2f} s; ", end="")
            print(f"{taken['single'] / taken['together']:.2f} x faster (at least 3); numbers within {error:.0e}")
            for side in ("together", "single"):
                before, added = peak_megabytes(prepare, side, make, *args)
                print(f"  peak memory, {side}: {added:.0f} MB beside {before:.0f} MB of weights and libraries")


if __name__ == "__main__":
    main()
