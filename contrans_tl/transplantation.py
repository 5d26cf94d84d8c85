"""Transplantation: add a concept to the residual stream, or to single heads, while the target runs (ConTrans 3.3).

    h^l <- h^l + strength * v^l                            eq. 3, after block l

    with transplant(target, moved, strength=2.0):
        target.generate("The letter made me feel", max_new_tokens=20)

Vectors of attention heads (`refine_heads`) are added to what those heads gather, `attn.hook_z`, before W_O:

    with transplant(target, head_vectors, heads=[(4, 1), (5, 0)], strength=4.0): ...

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
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from contrans_tl.anatomy import attention_site, embedding_site, is_padding
from contrans_tl.heads import Head, HeadVectors
from contrans_tl.models import Hook, HookedModel, ModelId, check_ready, hook_name, identify
from contrans_tl.refinement import ConceptVector

Concept = ConceptVector | HeadVectors
"""Vectors of layers or of heads."""
Positions = Literal["all", "prompt", "generated", "last"]
"""Which tokens are steered; see `Injection`."""


@dataclass(frozen=True, eq=False)
class Injection:
    """One vector, ready to be added after one block, or to what one head of it gathers."""

    layer: int
    vector: Float[Tensor, " width"]
    """Strength included. Of d_model numbers, or d_head for a head."""
    positions: Positions = "all"
    """`all` tokens (the paper's), those of the `prompt`, the `generated` ones, or the `last` real token of the prompt (padding
    is what ends in padding tokens: a prompt that ends in one of its own counts without it)."""
    head: int | None = None
    """Add to this head's z, before W_O, and not to the residual stream."""


def injections(
    concepts: Concept | Sequence[Concept],
    *,
    strength: float | Sequence[float] = 1.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | None = None,
    positions: Positions = "all",
) -> list[Injection]:
    """The injections of one or several concepts; they add up where they meet.

    Raises:
        ValueError: several layers or heads and no choice among them (the paper injects at one), a layer or head that a concept
            has no vector for, layers chosen for vectors of heads or heads for those of layers, a number of strengths other
            than that of the concepts, unknown positions.
    """
    concepts = [concepts] if isinstance(concepts, (ConceptVector, HeadVectors)) else list(concepts)
    strengths = [strength] * len(concepts) if isinstance(strength, (int, float)) else list(strength)
    if not all(map(math.isfinite, strengths)):
        raise ValueError(f"expected a finite strength; got {strengths}.")
    if not concepts or len(strengths) != len(concepts):
        raise ValueError(f"expected one strength or one for each concept; got {len(strengths)} for {len(concepts)} concepts.")
    if positions not in get_args(Positions):
        raise ValueError(f"expected positions {', '.join(get_args(Positions))}; got {positions!r}.")
    for chosen, kind, needed in ((layers, ConceptVector, "ConceptVector"), (heads, HeadVectors, "HeadVectors of refine_heads")):
        if chosen is not None and not any(isinstance(concept, kind) for concept in concepts):
            what = "layers" if kind is ConceptVector else "heads"
            raise ValueError(f"{what}= says where to add a {needed}; there is none among the concepts.")
    return [
        Injection(layer, strength * vector, positions, head)
        for concept, strength in zip(concepts, strengths, strict=True)
        for layer, vector, head in _places(concept, layers, heads)
    ]


def _places(
    concept: Concept, layers: Sequence[int] | None, heads: Sequence[Head] | None
) -> list[tuple[int, Tensor, int | None]]:
    """Where a concept is added, (layer, vector, head)."""
    chosen = heads if isinstance(concept, HeadVectors) else layers
    known = concept.heads if isinstance(concept, HeadVectors) else concept.layers
    if chosen is None and len(known) > 1:
        what = "heads" if isinstance(concept, HeadVectors) else "layers"
        raise ValueError(
            f"{concept.name!r} has vectors at {len(known)} {what}; choose, as in {what}=[{known[-1]}]. "
            "(The paper injects at one layer; at all of them at once the effects add up.)"
        )
    if isinstance(concept, HeadVectors):
        return [(layer, concept.at(layer, head), head) for layer, head in (concept.heads if heads is None else heads)]
    return [(layer, concept.at(layer), None) for layer in (concept.layers if layers is None else layers)]


def injection_hooks(model: HookedModel, steps: Sequence[Injection]) -> list[Hook]:
    """Hooks that carry out the injections: plain (name, function) pairs for `hooks`, `run_with_hooks` or `run_with_cache`.

    With `positions="all"` they hold no state. Otherwise they share what the first of them sees of the tokens: use one such
    list for one sequence of passes (a `generate`, or independent passes), and make another for the next model.

    Raises:
        ValueError: a layer or head that the model does not have, or vectors of another width.
    """
    hooks: list[Hook] = []
    if any(step.positions != "all" for step in steps):
        passes = _Passes(model)
        hooks.append((embedding_site(model), passes.embed))
        hooks.append((hook_name(0, "resid_pre"), passes.enter))
        if site := attention_site(model):
            hooks.append((site, passes.attend))
    for step in steps:
        name, width = _site(model, step)
        if step.vector.shape != (width,):
            kind = "d_model" if step.head is None else "d_head"
            raise ValueError(f"expected a vector of {kind} = {width}; got shape {tuple(step.vector.shape)}.")
        options: dict[str, Any] = {"vector": step.vector, "head": step.head}
        if step.positions == "all":
            hooks.append((name, partial(add_everywhere, **options)))
        else:
            hooks.append((name, partial(add_where, passes=passes, positions=step.positions, **options)))
    return hooks


def _site(model: HookedModel, step: Injection) -> tuple[str, int]:
    """Name of the hook point to write at, and the width there."""
    cfg = model.cfg
    name = hook_name(step.layer, "resid_post" if step.head is None else "z")
    if not 0 <= step.layer < cfg.n_layers:
        raise ValueError(f"{cfg.model_name} has {cfg.n_layers} layers; there is no layer {step.layer}.")
    if step.head is not None and not 0 <= step.head < cfg.n_heads:
        raise ValueError(f"{cfg.model_name} has {cfg.n_heads} heads a layer; there is no head {step.head}.")
    if name not in model.hook_dict:
        raise ValueError(f"{cfg.model_name} has no hook point {name}: nothing can be added there.")
    return name, cfg.d_model if step.head is None else cfg.d_head


@contextmanager
def transplant(
    model: HookedModel,
    concepts: Concept | Sequence[Concept],
    *,
    strength: float | Sequence[float] = 1.0,
    layers: Sequence[int] | None = None,
    heads: Sequence[Head] | None = None,
    positions: Positions = "all",
) -> Iterator[HookedModel]:
    """Run the model with one or several concepts added to its residual stream or its heads; afterwards it is as it was.

    Args:
        concepts: refined in this model or reformulated into it.
        strength: one for all or one for each; in units of the vector as refined. 0 changes nothing.
        layers: block outputs to inject at; not needed for a concept at one layer.
        heads: (layer, head) of `HeadVectors` to inject at, through `attn.hook_z`; not needed for those of one head.
        positions: see `Injection`.

    Raises:
        ValueError: a concept of another model or basis, or what `injections` raises.
    """
    check_ready(model)
    here = identify(model)
    for concept in [concepts] if isinstance(concepts, (ConceptVector, HeadVectors)) else concepts:
        check_home(concept, here)
    steps = injections(concepts, strength=strength, layers=layers, heads=heads, positions=positions)
    with model.hooks(fwd_hooks=injection_hooks(model, steps)):
        yield model


def check_home(concept: Concept, here: ModelId) -> None:
    """ValueError, with what to do, for a concept that does not live in this model."""
    if concept.model.same_space(here):
        return
    if concept.model.name == here.name and concept.model.basis != here.basis:
        remedy = "refine or reformulate it again in that basis"
    elif concept.model.name == here.name and concept.model.quantization != here.quantization:
        remedy = (
            "one of the two is quantised, which makes it another model; refine or reformulate the concept with it, or, to use "
            "this one all the same, dataclasses.replace(concept, model=identify(model))"
        )
    elif concept.model.name == here.name:
        remedy = "it has the same name but other weights; refine or reformulate it with these"
    else:
        remedy = "reformulate it first"
    raise ValueError(f"the concept {concept.name!r} lives in {concept.model}, the model is {here}: {remedy}.")


def add_everywhere(x: Tensor, hook: Any, *, vector: Tensor, head: int | None = None) -> Tensor:
    """x + v at every position, or to one head of "prompt pos head d_head", in the dtype of x, on its device."""
    return x + _at_head(vector.to(x), head, x)


def add_where(
    x: Tensor, hook: Any, *, vector: Tensor, passes: "_Passes", positions: Positions, head: int | None = None
) -> Tensor:
    """x + v where the positions say so."""
    where = passes.where(positions).to(x.device)
    return x + einsum(where.to(x), _at_head(vector.to(x), head, x), "prompt pos, ... -> prompt pos ...")


def _at_head(vector: Tensor, head: int | None, x: Tensor) -> Tensor:
    """The vector as it is added to x: to one of its heads only, if there is one."""
    if head is None:
        return vector
    at = torch.zeros(x.shape[2:], dtype=x.dtype, device=x.device)
    at[head] = vector
    return at


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
