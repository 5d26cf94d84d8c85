"""Attribution of every layer, position and head, over one forward pass of the same prompts.

The forward pass is the model's own, with its whole head, as one runs it without this library. Attribution by one gradient is a
pass that keeps its graph, a backward pass, and the blocks above the layer under the transplant; its numbers are checked against
the slope of runs with the vector. On the targets of the embedded pair, and on a GPT-2-shaped model of random weights with
GPT-2's vocabulary.

    python tests/benchmarks/attribution.py [--quick]
"""

from measure import alternate, peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from extraction import save_model, sentences

from contrans_tl import ContrastPairs, load_model, transplant
from contrans_tl.demo import demo_data
from contrans_tl.diagnostics import Attribution, attribute
from contrans_tl.evaluation import plain
from contrans_tl.models import HookedModel, identify
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import by_length, encode, pad

BATCH = 32


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, a concept at all its layers, and texts."""

    model: HookedModel
    concept: ConceptVector
    texts: list[str]
    layer: int

    @classmethod
    def of(cls, folder: Path, texts: list[str]) -> "Bench":
        model = load_model(folder, device="cpu")
        n, d = model.cfg.n_layers, model.cfg.d_model
        vectors = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
        return cls(model, ConceptVector(vectors, tuple(range(n)), "random", identify(model)), texts, n // 3)

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 40] - logits[:, 41]

    def attribution(self) -> Attribution:
        options: dict[str, Any] = {"layer": self.layer, "check": 0, "batch_size": BATCH}
        return attribute(self.model, self.concept, self.texts, metric=self.metric, **options)

    def forward(self) -> float:
        """The mean of the metric."""
        total = 0.0
        read = [encoding.ids for encoding in encode(self.model, self.texts)]
        for batch in by_length([len(ids) for ids in read], BATCH):
            tokens, mask = pad([read[i] for i in batch])
            logits = plain(self.model)(tokens, mask)[torch.arange(len(batch)), mask.sum(1) - 1]
            total += float(self.metric(logits).sum())
        return total / len(read)

    def check(self) -> None:
        """The layer's attribution is the slope of runs with the vector."""
        means = []
        for strength in (1e-3, -1e-3):
            with transplant(self.model, self.concept, strength=strength, layers=[self.layer]):
                means.append(self.forward())
        slope, found = (means[0] - means[1]) / 2e-3, float(self.attribution().layers.at(layer=self.layer))
        assert abs(found - slope) < 0.02 * abs(slope) + 1e-2, f"attribution {found}, slope {slope}"


def embedded(target: str, n: int) -> Bench:
    """Anger's test questions."""
    questions = ContrastPairs.load(demo_data() / "concepts" / "anger.json").test
    return Bench.of(demo_data() / "pair" / target, [question.text for question in questions[:n]])


def gpt2_shaped(folder: Path, n: int) -> Bench:
    return Bench.of(folder, sentences(n))


def prepare(side: str, make: Callable[..., Bench], *args: Any) -> Any:
    """For the memory measurement, in a process of its own."""
    return getattr(make(*args), side)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    d_model, layers, n, many, repeats = (128, 2, 8, 8, 1) if quick else (768, 12, 16, 64, 3)
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), d_model, layers)
        benches: dict[str, tuple[Any, ...]] = {
            "embedded target-gpt2": (embedded, "target-gpt2", many),
            "embedded target-llama": (embedded, "target-llama", many),
            f"GPT-2-shaped, {layers} layers": (gpt2_shaped, Path(name), n),
        }
        for title, (make, *args) in benches.items():
            bench = make(*args)
            bench.check()
            taken = alternate(repeats, forward=bench.forward, attribution=bench.attribution)
            print(f"{title}: {len(bench.texts)} texts, transplant at L{bench.layer}")
            print(", ".join(f"  {side} {seconds:.3f} s" for side, seconds in taken.items()))
            print(f"  attribution over a forward pass: {taken['attribution'] / taken['forward']:.2f} x (at most 4)")
            for side in ("forward", "attribution"):
                before, added = peak_megabytes(prepare, side, make, *args)
                print(f"  peak memory, {side}: {added:.0f} MB beside {before:.0f} MB of weights and libraries")


if __name__ == "__main__":
    main()
