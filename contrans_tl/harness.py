"""Harness: EleutherAI's lm-evaluation-harness on a model as it runs here, hooks included (extra `lm-eval`).

    import lm_eval

    with transplant(target, moved, strength=2.0):
        results = lm_eval.simple_evaluate(model=harness_model(target), tasks=["mmlu", "truthfulqa_mc2"])

Tasks, few-shot examples, metrics and files are theirs; from here come tokens, log-probabilities and generated text. A
TransformerBridge and a HookedTransformer are read through their own forward and `generate`, where hooks fire, and not through
the Hugging Face model beneath one of them.

Where a number differs from that of their own Hugging Face model: texts begin with a bos token where TransformerLens has that
policy for the family, as everywhere in this library (GPT-2's and Pythia's do; `prepend_bos=False` is what theirs does there),
and of a text for perplexity each token is predicted once (theirs predicts the bos of a Llama from another bos as well).

Not done: their `use_cache`, which remembers answers by their text alone and would hand those of one strength to another;
several processes; beam search.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from contrans_tl.evaluation.questions import continuation_logprobs
from contrans_tl.models import HookedModel, check_ready, identify
from contrans_tl.progress import track
from contrans_tl.tokens import prepends_bos
from contrans_tl.weights import device_of

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

MAX_NEW_TOKENS = 256
"""Where a task names no limit; the harness's own."""


def harness_model(model: HookedModel, *, batch_size: int = 16, prepend_bos: bool | None = None) -> "TemplateLM":
    """The model as `lm_eval.simple_evaluate(model=...)` takes it.

    Raises:
        ImportError: without the extra `lm-eval`.
        ValueError: a model in training mode, without a tokenizer, or asked for a bos token that it does not have.
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ImportError("the evaluation harness is an extra: pip install 'contrans-tl[lm-eval]'") from error
    check_ready(model)
    if model.tokenizer is None:
        raise ValueError(f"{model.cfg.model_name} has no tokenizer; load it with one.")

    class HookedModelLM(_Requests, TemplateLM):
        """Made here, as what it derives from is an extra."""

    return HookedModelLM(model, batch_size, prepends_bos(model, prepend_bos))


@dataclass(frozen=True)
class _Decoding:
    """What a task asks of a continuation, by the names it uses."""

    max_new_tokens: int
    until: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]
    """For the model's `generate`."""

    @classmethod
    def of(cls, asked: dict[str, Any]) -> "_Decoding":
        asked = {name: value for name, value in asked.items() if value is not None}
        until = asked.pop("until", [])
        limits = [asked.pop(f"max_{name}", None) for name in ("gen_toks", "new_tokens", "tokens", "completion_tokens")]
        temperature = float(asked.pop("temperature", 0.0))
        options: dict[str, Any] = {"do_sample": asked.pop("do_sample", temperature > 0)}
        shape: dict[str, Any] = {name: asked.pop(name) for name in ("top_k", "top_p") if name in asked}
        if options["do_sample"]:
            options |= {"temperature": temperature or 1.0} | shape
        if asked.pop("num_beams", 1) != 1 or asked:
            raise ValueError(f"expected greedy decoding or sampling by temperature, top_k, top_p; got {asked or 'num_beams'}.")
        limit = next((int(limit) for limit in limits if limit is not None), MAX_NEW_TOKENS)
        return cls(limit, (until,) if isinstance(until, str) else tuple(until), tuple(options.items()))

    def cut(self, text: str) -> str:
        """The text up to whichever stop comes first."""
        return text[: min((text.index(stop) for stop in self.until if stop and stop in text), default=None)]


class _Requests:
    """The harness's three requests; the pairing of contexts with continuations, and chat templates, are its TemplateLM's."""

    def __init__(self, model: HookedModel, batch_size: int, bos: bool):
        super().__init__()
        self.model, self.batch_size, self.bos = model, batch_size, bos
        self.tokenizer = model.tokenizer
        self.max_length: int = model.cfg.n_ctx
        self.max_gen_toks = MAX_NEW_TOKENS
        self._device = device_of(model)

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the bos token, where there is none the eos token."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        prefix = next((i for i in ids if i is not None), None)
        if prefix is None:
            raise ValueError(f"{self.model.cfg.model_name} has neither bos nor eos token to begin a text with.")
        return prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        begins = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)  # a chat template wrote it
        bos = self.bos and not begins if add_special_tokens is None else add_special_tokens
        return [self.tokenizer.bos_token_id, *ids] if bos else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for texts, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, not read
            if not continuation or room < 1:
                raise ValueError(
                    f"expected a continuation of 1 to {self.max_length} tokens, which fits the context of "
                    f"{self.model.cfg.model_name}; got {len(continuation)} of {texts!r}."
                )
            asked.append((tuple(context[-room:]), tuple(continuation)))
        return continuation_logprobs(self.model, asked, batch_size=self.batch_size)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        totals, windows = [0.0] * len(requests), []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(i, *make_disjoint_window(window)) for window in rolling]
        for (i, *_), (total, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += total
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, written = [], [""] * len(requests)
        alike: dict[tuple[int, _Decoding], list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            text, asked = request.args
            decoding = _Decoding.of(asked)
            if (room := self.max_length - decoding.max_new_tokens) < 1:
                raise ValueError(
                    f"{decoding.max_new_tokens} new tokens leave no room for a prompt in the context of "
                    f"{self.model.cfg.model_name} ({self.max_length}); ask for fewer with gen_kwargs={{'max_gen_toks': ...}}."
                )
            prompts.append((self.tok_encode(text) or [self.prefix_token_id])[-room:])
            alike[len(prompts[i]), decoding].append(i)  # of one length: nothing to pad, so nothing to mask
        batches = [
            (decoding, members[k : k + self.batch_size])
            for (_, decoding), members in sorted(alike.items(), key=lambda item: -item[0][0])
            for k in range(0, len(members), self.batch_size)
        ]
        for decoding, batch in track(batches, "continuations", len(batches)):
            for i, row in zip(batch, self._generate([prompts[i] for i in batch], decoding), strict=True):
                written[i] = decoding.cut(self.tokenizer.decode(row, skip_special_tokens=True))
        return written

    def _generate(self, prompts: Sequence[Sequence[int]], decoding: _Decoding) -> list[list[int]]:
        """The tokens behind prompts of one length, up to the end of sequence."""
        end = self.eot_token_id
        out = self.model.generate(
            torch.tensor(prompts, device=self._device),
            max_new_tokens=decoding.max_new_tokens,
            stop_at_eos=end is not None,
            return_type="tokens",
            verbose=False,
            **dict(decoding.options),
        )
        rows = out[:, len(prompts[0]) :].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """For the `config` of their results."""
        return {"hooked_model": identify(self.model).to_dict()}
