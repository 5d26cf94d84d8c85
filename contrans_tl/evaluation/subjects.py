"""Subjects: a model as one arm of an evaluation runs it - plain, steered, told to, or with others' logits added.

    Subject(target)                                          base
    SteeredAt(target, layer).subject(concept, strength)      what `transplant` does at all positions
    SteeredAt(target, layer).base                            base, what it has at the layer kept for those
    Subject(target, opening="Pretend you are honest.")       the paper's Inst-Align
    ProxyTuned(target, expert=..., novice=...)               the paper's EFT baseline

A task asks a subject in two ways only: `forward`, tokens and mask to logits, and `generate`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.models import HookedModel, check_ready, hook_name
from contrans_tl.passes import resumed_after, run_blocks
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import by_length, pad
from contrans_tl.transplantation import Injection, injection_hooks
from contrans_tl.weights import device_of

Forward = Callable[[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]], Float[Tensor, "prompt pos vocab"]]
"""Tokens and mask -> logits in float32."""


def plain(model: HookedModel) -> Forward:
    """The model as it is."""

    def forward(tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos vocab"]:
        with torch.no_grad():
            return model(tokens, return_type="logits", attention_mask=mask).float()

    return forward


def same_tokens(one: HookedModel, other: HookedModel) -> bool:
    """Whether the two read texts as the same ids."""
    return one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn where they are not greedy. Every prompt has a generator of its own, so that what is drawn
    depends on neither batch nor arm."""

    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"expected a temperature above 0; got {self.temperature}. (Greedy continuations have no Sampling.)"
            )


@dataclass(frozen=True, eq=False)
class Subject:
    """A model as it is, with or without an opening before every prompt."""

    model: HookedModel
    """The model, and whose tokens it reads."""
    opening: str = ""

    @property
    def forward(self) -> Forward:
        return plain(self.model)

    @contextmanager
    def running(self) -> Iterator[HookedModel]:
        """The model, to be used as it is used anywhere, generation with a key-value cache included."""
        yield self.model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        batch_size: int = 64,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, up to the end of sequence: the likeliest ones, or drawn.

        Greedy ones come from the model's own `generate`, with its cache; drawn ones read the whole text at each step.
        """
        if sampling is not None:
            with self.running() as model:  # and not self.forward: nothing that is shared by vectors is shared by their texts
                return self._step_by_step(plain(model), prompts, max_new_tokens, sampling, batch_size)
        lengths, written = defaultdict(list), [[0] for _ in prompts]
        for i, prompt in enumerate(prompts):
            lengths[len(prompt)].append(i)  # of one length: nothing to pad, so nothing to mask
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        with self.running() as model:
            for length, members in sorted(lengths.items()):
                for batch in (members[i : i + batch_size] for i in range(0, len(members), batch_size)):
                    tokens = torch.tensor([list(prompts[i]) for i in batch], device=device_of(model))
                    out = model.generate(tokens, max_new_tokens=max_new_tokens, **options)[:, length:].tolist()
                    for i, row in zip(batch, out, strict=True):
                        written[i] = row
        return [self._until_end(row) for row in written]

    def _step_by_step(
        self,
        forward: Forward,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None,
        batch_size: int,
    ) -> list[list[int]]:
        texts = [list(prompt) for prompt in prompts]
        rngs = [torch.Generator().manual_seed((sampling.seed if sampling else 0) * 1_000_003 + i) for i in range(len(texts))]
        end = getattr(self.model.tokenizer, "eos_token_id", None)
        for _ in range(max_new_tokens):
            open_ = [i for i, text in enumerate(texts) if len(text) == len(prompts[i]) or text[-1] != end]
            for batch in by_length([len(texts[i]) for i in open_], batch_size):
                tokens, mask = pad([texts[open_[k]] for k in batch], device_of(self.model))
                last = forward(tokens, mask)[torch.arange(len(batch)), mask.sum(1) - 1].cpu()
                for k, logits in zip(batch, last, strict=True):
                    i = open_[k]
                    if sampling is None:
                        texts[i].append(int(logits.argmax()))
                    else:
                        chances = (logits / sampling.temperature).softmax(-1)
                        texts[i].append(int(torch.multinomial(chances, 1, generator=rngs[i])))
        return [self._until_end(text[len(prompt) :]) for text, prompt in zip(texts, prompts, strict=True)]

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = getattr(self.model.tokenizer, "eos_token_id", None)
        return tokens[: tokens.index(end)] if end in tokens else tokens


@dataclass(frozen=True, eq=False)
class SteeredAt:
    """A model to be steered at one layer with one vector after another: the blocks up to that layer run once for each batch of
    tokens, not once for each vector."""

    model: HookedModel
    layer: int
    kept: int = 2**30
    """Bytes of residuals that are held at most; batches beyond run all their blocks every time."""
    _below: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    @property
    def base(self) -> "Steered":
        """The model as it is."""
        return Steered(self.model, at=self, vector=None)

    def by(self, concept: ConceptVector, strength: float) -> Forward:
        """Forward passes with strength * vector added after the block, at all positions."""
        return self.subject(concept, strength).forward

    def subject(self, concept: ConceptVector, strength: float) -> "Steered":
        return Steered(self.model, at=self, vector=strength * concept.at(self.layer))

    def residual(
        self, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]
    ) -> Float[Tensor, "prompt pos d_model"]:
        """Of these tokens after the block, before anything is added."""
        key = self._key(tokens, mask)
        if key in self._below:
            return self._below[key]
        seen: list[Tensor] = []
        run_blocks(self.model, tokens, mask, [(hook_name(self.layer), lambda resid, hook: seen.append(resid))], self.layer)
        self._keep(key, seen[0])
        return seen[0]

    def logits(
        self, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"], vector: Float[Tensor, " d_model"] | None
    ) -> Float[Tensor, "prompt pos vocab"]:
        """In float32, with the vector added, or of the model as it is."""
        above, key = plain(self.model), self._key(tokens, mask)
        if vector is None and key not in self._below:
            with self.model.hooks(fwd_hooks=[(hook_name(self.layer), lambda resid, hook: self._keep(key, resid))]):
                return above(tokens, mask)
        resid = self.residual(tokens, mask)
        with resumed_after(self.model, self.layer, resid if vector is None else resid + vector.to(resid)):
            return above(tokens, mask)

    def _key(self, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]) -> bytes:
        return str(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes() + mask.cpu().numpy().tobytes()

    def _keep(self, key: bytes, resid: Tensor) -> None:
        if sum(held.nbytes for held in self._below.values()) + resid.nbytes <= self.kept:
            self._below[key] = resid.detach().clone()


@dataclass(frozen=True, eq=False, kw_only=True)
class Steered(Subject):
    """A model with a vector added after one block, at all positions: `transplant`, its lower blocks shared."""

    at: SteeredAt
    vector: Float[Tensor, " d_model"] | None
    """None: the model as it is."""

    @property
    def forward(self) -> Forward:
        check_ready(self.model)
        return partial(self.at.logits, vector=self.vector)

    @contextmanager
    def running(self) -> Iterator[HookedModel]:
        check_ready(self.model)
        injections = [] if self.vector is None else [Injection(self.at.layer, self.vector)]
        with self.model.hooks(fwd_hooks=injection_hooks(self.model, injections)):
            yield self.model


@dataclass(frozen=True, eq=False)
class ProxyTuned(Subject):
    """Decoding-time tuning: logits of the model + those of a small aligned model - those of the same before alignment.

    The paper's EFT baseline. All three read the same tokens. ValueError for other vocabularies.
    """

    expert: HookedModel = field(kw_only=True)
    novice: HookedModel = field(kw_only=True)

    def __post_init__(self) -> None:
        for role, other in (("expert", self.expert), ("novice", self.novice)):
            if not same_tokens(other, self.model):
                raise ValueError(
                    f"expected for {role} a model that reads the same tokens as {self.model.cfg.model_name}; "
                    f"{other.cfg.model_name} has another vocabulary, so that logits cannot be added."
                )

    @property
    def forward(self) -> Forward:
        base, expert, novice = (plain(model) for model in (self.model, self.expert, self.novice))

        def forward(tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"]) -> Float[Tensor, "prompt pos vocab"]:
            small = device_of(self.expert)
            tuned = expert(tokens.to(small), mask.to(small)) - novice(tokens.to(small), mask.to(small))
            logits = base(tokens, mask)
            shared = min(logits.shape[-1], tuned.shape[-1])  # a head may be padded beyond the vocabulary
            return logits[..., :shared] + tuned[..., :shared].to(logits)

        return forward

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        batch_size: int = 64,
    ) -> list[list[int]]:
        """As any subject's, step by step: three models have no cache in common."""
        return self._step_by_step(self.forward, prompts, max_new_tokens, sampling, batch_size)
