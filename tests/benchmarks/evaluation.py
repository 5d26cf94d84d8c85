"""Evaluation: all arms together against one run for each.

Both sides ask the same questions and measure the same neutral text, in the same batches, for the model as it is and under every
vector of an evaluation's arms. One run for each is `transplant` around plain forward passes: all blocks and the whole head,
every time (the clean pass that costs are measured against is made once here as well). Ours runs the blocks up to the layer
once for each batch and the head where it is read. Numbers are checked to agree. On the targets of the embedded pair, and on a
GPT-2-shaped model of random weights with GPT-2's vocabulary.

    python tests/benchmarks/evaluation.py [--quick]
"""

from measure import alternate, peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extraction import save_model, sentences

from contrans_tl import ContrastPairs, Question, load_model, transplant
from contrans_tl.data import read_sentences
from contrans_tl.demo import demo_data
from contrans_tl.evaluation import ReadQuestion, SteeredAt, answer_questions, plain, read_questions, side_effects
from contrans_tl.models import HookedModel, identify
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import by_length, encode, pad

BATCH = 64
Numbers = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Margins of the answers, loss increases and KL, one row an arm."""


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, vectors at one layer, and what is asked under each."""

    model: HookedModel
    vectors: list[ConceptVector]
    questions: list[ReadQuestion]
    texts: list[str]

    @classmethod
    def of(cls, folder: Path, layer: int, arms: int, questions: list[Question], texts: list[str]) -> "Bench":
        model = load_model(folder, device="cpu")
        draws = torch.randn(arms, 1, model.cfg.d_model, generator=torch.Generator().manual_seed(0))
        vectors = [ConceptVector(v, (layer,), "random", identify(model)) for v in draws]
        return cls(model, vectors, read_questions(model, questions), texts)

    def together(self) -> Numbers:
        """As `evaluate` does it."""
        at = SteeredAt(self.model, *self.vectors[0].layers)
        forwards = [at.base.forward, *(at.by(vector, 1.0) for vector in self.vectors)]
        answers = [answer_questions(self.model, self.questions, "token_accuracy", forward=forward) for forward in forwards]
        costs = side_effects(at.base, self.texts, forwards, batch_size=BATCH)
        return np.stack([a.margin for a in answers]), costs.loss_increase, costs.kl

    def one_by_one(self) -> Numbers:
        """As one writes it without this library's evaluation."""
        arms = [lambda: nullcontext(), *(lambda v=v: transplant(self.model, v) for v in self.vectors)]
        asked = [question.prompt for question in self.questions]
        told = [encoding.ids for encoding in encode(self.model, self.texts)]
        clean: dict[int, torch.Tensor] = {}
        margins, losses, kl = (np.zeros((len(arms), len(rows))) for rows in (asked, told, told))
        for k, arm in enumerate(arms):
            with arm():
                for batch in by_length([len(ids) for ids in asked], BATCH):
                    tokens, mask = pad([asked[i] for i in batch])
                    last = plain(self.model)(tokens, mask)[torch.arange(len(batch)), mask.sum(1) - 1].log_softmax(-1)
                    for i, logprobs in zip(batch, last, strict=True):
                        first = [option[0] for option in self.questions[i].options]
                        answer = first.pop(self.questions[i].answer)
                        margins[k, i] = logprobs[answer] - logprobs[first].max()
                for number, batch in enumerate(by_length([len(ids) for ids in told], BATCH)):
                    tokens, mask = pad([told[i] for i in batch])
                    logprobs = plain(self.model)(tokens, mask)[:, :-1].log_softmax(-1)
                    before, real, following = clean.setdefault(number, logprobs), mask[:, 1:], tokens[:, 1:, None]
                    losses[k, batch] = (((before - logprobs).gather(-1, following)[..., 0]) * real).sum(1)
                    kl[k, batch] = ((before.exp() * (before - logprobs)).sum(-1) * real).sum(1)
        return margins, losses, kl


def embedded(target: str, layer: int, arms: int) -> Bench:
    """Anger's test questions and the demo's neutral text."""
    questions = ContrastPairs.load(demo_data() / "concepts" / "anger.json").test
    neutral = read_sentences(demo_data() / "neutral.txt")[-30:]
    return Bench.of(demo_data() / "pair" / target, layer, arms, list(questions), neutral)


def gpt2_shaped(folder: Path, layer: int, arms: int, n: int) -> Bench:
    """Two thirds questions of six options, a third neutral text, as in the demo."""
    prompts = sentences(n + n // 2)
    options = tuple(f" w{i}" for i in range(6))
    return Bench.of(folder, layer, arms, [Question(prompt, options, 0) for prompt in prompts[:n]], prompts[n:])


def prepare(side: str, make: Callable[..., Bench], *args: Any) -> Any:
    """For the memory measurement, in a process of its own."""
    return getattr(make(*args), side)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    d_model, layers, layer, n, repeats, arms, many = (128, 2, 0, 8, 1, 2, 3) if quick else (768, 12, 8, 12, 3, 5, 32)
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name), d_model, layers)
        benches: dict[str, tuple[Any, ...]] = {
            "embedded target-gpt2, layer 3 of 5": (embedded, "target-gpt2", 3, many),
            "embedded target-llama, layer 4 of 6": (embedded, "target-llama", 4, many),
            f"GPT-2-shaped, layer {layer} of {layers}": (gpt2_shaped, Path(name), layer, arms, n),
        }
        for title, (make, *args) in benches.items():
            bench = make(*args)
            ours, theirs = bench.together(), bench.one_by_one()
            for mine, other in zip(ours, theirs, strict=True):
                error = np.abs(mine - other).max()
                assert error < 1e-3 * max(1.0, np.abs(other).max()), f"the numbers differ by {error}"
            taken = alternate(repeats, together=bench.together, one_by_one=bench.one_by_one)
            count = 1 + len(bench.vectors)
            print(f"{title}: {count} arms, {len(bench.questions)} questions, {len(bench.texts)} texts")
            print(f"  together {taken['together']:.2f} s, one by one {taken['one_by_one']:.2f} s, medians of {repeats}")
            each = {side: count / seconds for side, seconds in taken.items()}
            print(f"  arms a second: {each['together']:.1f} and {each['one_by_one']:.1f}", end="; ")
            print(f"ratio {each['together'] / each['one_by_one']:.2f}")
            for side in ("together", "one_by_one"):
                before, added = peak_megabytes(prepare, side, make, *args)
                print(f"  peak memory, {side}: {added:.0f} MB beside {before:.0f} MB of weights and libraries")


if __name__ == "__main__":
    main()
