"""Transplantation: add a concept to the residual stream while the target runs (ConTrans 3.3).

    h^l <- h^l + strength * v^l                            eq. 3, after block l

    with transplant(target, moved, strength=2.0):
        target.generate("The letter made me feel", max_new_tokens=20)

`injection_hooks` gives the same thing as plain data, (hook name, function) pairs for run_with_hooks or run_with_cache, to be
mixed with hooks of your own. Hooks add up: several concepts, or nested `transplant`s, sum in the stream.

Which tokens are steered is told by what enters the model and what it attends to, not by positions within a chunk, so that
generation with and without key-value cache, batched or single, gives the same. A pass that continues a cache is generated
text, and so is the last token of a pass that repeats the pass before it with one token more: that is how a model generates
without a cache. (To steer two such prompts one after the other, open two `transplant`s.)
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.models import (
    Hook,
    HookedModel,
    attention_site,
    check_ready,
    embedding_site,
    hook_name,
    identify,
    is_padding,
)
from contrans_tl.refinement import ConceptVector

Positions = Literal["all", "prompt", "generated", "last"]


@dataclass(frozen=True, eq=False)
class Injection:
    """One vector, ready to be added after one block."""

    layer: int
    vector: Float[Tensor, " d_model"]
    """Strength included."""
    positions: Positions = "all"
    """`all` tokens (the paper's), those of the `prompt`, the `generated` ones, or the `last` real token of the prompt (padding
    is what ends in padding tokens: a prompt that ends in one of its own counts without it)."""


def injections(
    concepts: ConceptVector | Sequence[ConceptVector],
    *,
    strength: float | Sequence[float] = 1.0,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
) -> list[Injection]:
    """The injections of one or several concepts; they add up where they meet.

    Raises:
        ValueError: several layers and no choice among them (the paper injects at one), a layer that a concept has no vector
            for, a number of strengths other than that of the concepts, unknown positions.
    """
    concepts = [concepts] if isinstance(concepts, ConceptVector) else list(concepts)
    strengths = [strength] * len(concepts) if isinstance(strength, (int, float)) else list(strength)
    if not all(map(math.isfinite, strengths)):
        raise ValueError(f"expected a finite strength; got {strengths}.")
    if not concepts or len(strengths) != len(concepts):
        raise ValueError(f"expected one strength or one for each concept; got {len(strengths)} for {len(concepts)} concepts.")
    if positions not in get_args(Positions):
        raise ValueError(f"expected positions {', '.join(get_args(Positions))}; got {positions!r}.")
    for concept in concepts:
        if layers is None and len(concept.layers) > 1:
            raise ValueError(
                f"{concept.name!r} has vectors at {len(concept.layers)} layers; choose, as in layers=[{concept.layers[-1]}]. "
                "(The paper injects at one layer; at all of them at once the effects add up.)"
            )
    return [
        Injection(layer, strength * concept.at(layer), positions)
        for concept, strength in zip(concepts, strengths, strict=True)
        for layer in (concept.layers if layers is None else layers)
    ]


def injection_hooks(model: HookedModel, steps: Sequence[Injection]) -> list[Hook]:
    """Hooks that carry out the injections: plain (name, function) pairs for `hooks`, `run_with_hooks` or `run_with_cache`.

    With `positions="all"` they hold no state. Otherwise they share what the first of them sees of the tokens: use one such
    list for one sequence of passes (a `generate`, or independent passes), and make another for the next model.

    Raises:
        ValueError: a layer that the model does not have, or vectors of another width.
    """
    hooks: list[Hook] = []
    if any(step.positions != "all" for step in steps):
        passes = _Passes(model)
        hooks.append((embedding_site(model), passes.embed))
        hooks.append((hook_name(0, "resid_pre"), passes.enter))
        if site := attention_site(model):
            hooks.append((site, passes.attend))
    for step in steps:
        name = hook_name(step.layer)
        if name not in model.hook_dict:
            raise ValueError(f"{model.cfg.model_name} has {model.cfg.n_layers} layers; there is no layer {step.layer}.")
        if step.vector.shape != (model.cfg.d_model,):
            raise ValueError(f"expected a vector of d_model = {model.cfg.d_model}; got shape {tuple(step.vector.shape)}.")
        if step.positions == "all":
            hooks.append((name, partial(add_everywhere, vector=step.vector)))
        else:
            hooks.append((name, partial(add_where, vector=step.vector, passes=passes, positions=step.positions)))
    return hooks


@contextmanager
def transplant(
    model: HookedModel,
    concepts: ConceptVector | Sequence[ConceptVector],
    *,
    strength: float | Sequence[float] = 1.0,
    layers: Sequence[int] | None = None,
    positions: Positions = "all",
) -> Iterator[HookedModel]:
    """Run the model with one or several concepts added to its residual stream; afterwards it is as it was.

    Args:
        concepts: refined in this model or reformulated into it.
        strength: one for all or one for each; in units of the vector as refined. 0 changes nothing.
        layers: block outputs to inject at; not needed for a concept at one layer.
        positions: see `Injection`.

    Raises:
        ValueError: a concept of another model or basis, or what `injections` raises.
    """
    check_ready(model)
    here = identify(model)
    for concept in [concepts] if isinstance(concepts, ConceptVector) else concepts:
        if concept.model.same_space(here):
            continue
        if concept.model.name == here.name and concept.model.basis != here.basis:
            remedy = "refine or reformulate it again in that basis"
        elif concept.model.name == here.name:
            remedy = "it has the same name but other weights; refine or reformulate it with these"
        else:
            remedy = "reformulate it first"
        raise ValueError(f"the concept {concept.name!r} lives in {concept.model}, the model is {here}: {remedy}.")
    steps = injections(concepts, strength=strength, layers=layers, positions=positions)
    with model.hooks(fwd_hooks=injection_hooks(model, steps)):
        yield model


def add_everywhere(resid: Tensor, hook: Any, *, vector: Tensor) -> Tensor:
    """h + v at every position, in the residual's dtype, on its device."""
    return resid + vector.to(resid)


def add_where(resid: Tensor, hook: Any, *, vector: Tensor, passes: "_Passes", positions: Positions) -> Tensor:
    """h + v where the positions say so."""
    where = passes.where(positions).to(resid.device)
    return resid + where[..., None] * vector.to(resid)


@dataclass(eq=False)
class _Passes:
    """Which tokens of the current pass belong to the prompt, seen where tokens enter the model and first attend."""

    model: HookedModel
    _padding: Tensor | None = None
    """Which tokens of this pass are padding; None where the embedding did not tell."""
    _entering: Tensor | None = None
    _cached: bool | None = None
    """Whether this pass continues a key-value cache; None where no attention pattern has told."""
    _before: Tensor | None = None
    """What entered in the pass before, where that was a whole sequence."""
    _prompt: int = 0
    """Positions of this pass that are prompt."""
    _masks: dict[Positions, Tensor] = field(default_factory=dict)

    def embed(self, embedded: Tensor, hook: Any) -> None:
        self._padding, self._entering = is_padding(self.model, embedded), None

    def enter(self, entering: Tensor, hook: Any) -> None:
        # HookedTransformer.generate embeds outside of its hooks: then nothing was seen of this pass, and nothing needs to be,
        # as prompts to be continued have no padding on the right.
        self._padding = self._padding if self._entering is None else None
        self._entering, self._cached, self._masks = entering.detach(), None, {}

    def attend(self, pattern: Tensor, hook: Any) -> None:
        self._cached = pattern.shape[-1] > pattern.shape[-2]

    def where(self, positions: Positions) -> Tensor:
        if not self._masks:
            self._tell_apart()
        return self._masks[positions]

    def _tell_apart(self) -> None:
        entering, before = self._entering, self._before
        if entering is None:
            raise ValueError("only positions='all' can be injected into a pass that starts at a later layer.")
        length = entering.shape[1]
        # Where no attention pattern tells, a single token after any pass counts as its continuation.
        cached = self._cached if self._cached is not None else before is not None and length == 1
        if cached:
            self._prompt = 0
        elif not (
            before is not None
            and length == before.shape[1] + 1
            and len(entering) == len(before)
            and torch.equal(entering[:, :-1], before)
        ):
            self._prompt = length  # not the previous pass with one more token: a new prompt
        self._before = None if self._cached else entering
        position = torch.arange(length, device=entering.device).expand(entering.shape[:2])
        in_prompt = position < self._prompt
        # As in TransformerLens's get_attention_mask: padding is the run of padding tokens at the end, so that a padding
        # token within the text, or a bos that is the same token, counts as text.
        real = in_prompt if self._padding is None else in_prompt & ~self._padding.to(entering.device)
        last = (real * position).amax(1, keepdim=True)
        self._masks = {"prompt": in_prompt, "generated": ~in_prompt, "last": in_prompt & (position == last)}
