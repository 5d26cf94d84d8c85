"""Metrics: one number a prompt, read off the logits behind its last real token.

    attribute(model, concept, pairs.test, metric="logit_difference")      questions bring their answers
    attribute(model, concept, prompts, metric=lambda logits: logits[:, yes] - logits[:, no])

    logit_difference   logit of the answer less the mean logit of the other options (in logits; linear in them)
    log_probability    log-probability of the answer over the whole vocabulary (in nats)
    kl                 how far the next token is from what the model itself would say, KL(model as it is || now) (in nats)

The first two need `Question`s; an option is its first token behind the prompt. Any callable from logits "prompt vocab" to one
number a prompt will do as well; one that has to know which prompts the rows are, or what the model says as it is, is a
`Metric`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.data import Question
from contrans_tl.evaluation.questions import ReadQuestion, read_questions
from contrans_tl.models import HookedModel
from contrans_tl.tokens import encode

Ready = Literal["logit_difference", "log_probability", "kl"]
"""Metrics by name, beside which any callable is one."""
Prompts = Sequence[str] | Sequence[Question]
"""Texts, or questions for the metrics that need an answer."""


@dataclass(frozen=True, eq=False)
class Metric:
    """What is measured, with its name and unit."""

    measure: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Logits "prompt vocab" behind the last tokens of some prompts, those of the model as it is, and which prompts they are,
    " prompt" -> one number a prompt."""
    name: str
    unit: str = ""

    def __call__(
        self, logits: Float[Tensor, "prompt vocab"], base: Float[Tensor, "prompt vocab"], prompts: Int[Tensor, " prompt"]
    ) -> Float[Tensor, " prompt"]:
        """ValueError for anything but one number a prompt."""
        values = self.measure(logits, base, prompts)
        if not isinstance(values, Tensor) or values.shape != prompts.shape or not values.is_floating_point():
            got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"expected of the metric {self.name!r} one floating-point number a prompt: from logits of shape "
                f"{tuple(logits.shape)} (prompt, vocab) a tensor of shape {tuple(prompts.shape)}; got {got}. Do not average "
                "over prompts, and read logits[:, token]: they are those behind the last token, without an axis of positions."
            )
        return values


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts in a model's tokens, and what is measured behind each."""

    sequences: tuple[tuple[int, ...], ...]
    metric: Metric

    def __len__(self) -> int:
        return len(self.sequences)

    def tried(self, prompts: Int[Tensor, " prompt"], d_vocab: int) -> Float[Tensor, " prompt"]:
        """The metric of some prompts on made-up logits. ValueError where it has the wrong shape."""
        generator = torch.Generator().manual_seed(int(prompts[0]))
        logits, base = torch.randn(2, len(prompts), d_vocab, generator=generator)
        return self.metric(logits, base, prompts)

    def fingerprint(self, d_vocab: int) -> str:
        """Stands for the metric and its answers in a file."""
        values = torch.cat([self.tried(some, d_vocab) for some in torch.arange(len(self)).split(8)])
        return " ".join(f"{value:.5g}" for value in values.tolist())


def ask(model: HookedModel, prompts: Prompts, metric: "Ready | Metric | Callable[[Any], Any]") -> Asked:
    """Read the prompts, and try the metric on made-up logits before any forward pass.

    Raises:
        ValueError: no prompts, a metric that needs questions where there are texts, an answer that the first token does not
            tell from the other options, a metric of the wrong shape, or what `encode` raises.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    questions = [prompt for prompt in prompts if isinstance(prompt, Question)]
    if not prompts or len(prompts) not in (len(texts), len(questions)):
        raise ValueError(
            f"expected prompts, all of them texts or all of them Questions; got {len(prompts)} of mixed or no kind."
        )
    read = read_questions(model, questions) if questions else []
    sequences = tuple(q.prompt for q in read) if questions else tuple(encoding.ids for encoding in encode(model, texts))
    asked = Asked(sequences, _metric(model, read, metric))
    asked.tried(torch.arange(min(len(asked), 3)), model.cfg.d_vocab)
    return asked


def _metric(model: HookedModel, questions: Sequence[ReadQuestion], metric: Any) -> Metric:
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return Metric(lambda logits, base, prompts: metric(logits), getattr(metric, "__name__", type(metric).__name__))
    if metric == "kl":
        return Metric(_kl, "kl", "nats")
    if metric not in get_args(Ready):
        raise ValueError(f"expected a metric among {', '.join(get_args(Ready))}, or a callable; got {metric!r}.")
    if not questions:
        raise ValueError(f"the metric {metric!r} needs prompts that are Questions, with options; texts have no answers.")
    tokens, weights = _options(model, questions, metric)
    if metric == "log_probability":
        return Metric(lambda logits, base, prompts: _weighed(logits.log_softmax(-1), tokens, weights, prompts), metric, "nats")
    return Metric(lambda logits, base, prompts: _weighed(logits, tokens, weights, prompts), metric, "logits")


def _options(model: HookedModel, questions: Sequence[ReadQuestion], metric: str) -> tuple[Tensor, Tensor]:
    """First tokens of the options of every question, and their weights: 1 for the answer's, for `logit_difference` together -1
    for the others'; 0 where there is none."""
    most = max(len(question.options) for question in questions)
    tokens = torch.zeros(len(questions), most, dtype=torch.long)
    weights = torch.zeros(len(questions), most)
    for row, question in enumerate(questions):
        answer = question.options[question.answer][0]
        wrong = [option[0] for i, option in enumerate(question.options) if i not in question.correct]
        if answer in wrong:
            raise ValueError(
                f"an option begins with the token of the answer, {model.tokenizer.decode([answer])!r}: what follows the prompt "
                f"does not tell them apart. Rename it, or pass a metric of your own."
            )
        others = wrong if metric == "logit_difference" else []
        tokens[row, : 1 + len(others)] = torch.tensor([answer, *others])
        weights[row, : 1 + len(others)] = torch.tensor([1.0, *(-1 / len(others) for _ in others)])
    return tokens, weights


def _weighed(values: Tensor, tokens: Tensor, weights: Tensor, prompts: Tensor) -> Tensor:
    rows = prompts.cpu()
    return (values.gather(-1, tokens[rows].to(values.device)) * weights[rows].to(values.device)).sum(-1)


def _kl(logits: Tensor, base: Tensor, prompts: Tensor) -> Tensor:
    before, now = base.log_softmax(-1), logits.log_softmax(-1)
    return (before.exp() * (before - now)).sum(-1)
