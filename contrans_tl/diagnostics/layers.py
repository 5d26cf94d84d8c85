"""Layers: where along the stream a concept stands, and what becomes of an injection on its way up.

    seen = projections(target, moved, texts, injected=injections(moved, strength=2.0, layers=[3]))
        <h, v / |v|> at every layer and position, clean and transplanted
    kept = survival(target, moved, texts, layer=3, strength=2.0, native=native)
        delta = h_transplanted - h_clean at every layer from 3 on: its size, its share of the stream, its cosines

The projection is that of Arditi et al. (2406.11717, figure 5). Where two vectors give a delta of like size, the cosine with the
native direction tells which of them the model takes up; vectors drawn at random, of the same norm, stand beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from contrans_tl.activations import check_texts
from contrans_tl.diagnostics.runs import Batch
from contrans_tl.diagnostics.scores import Diagnosis, Scores
from contrans_tl.diagnostics.scores import layers as layer_labels
from contrans_tl.diagnostics.streams import batches, check_steps, follow, over_texts
from contrans_tl.models import HookedModel, check_ready, identify
from contrans_tl.progress import track
from contrans_tl.refinement import ConceptVector
from contrans_tl.tokens import Encoding, encode, prepends_bos
from contrans_tl.transplantation import Injection, check_home

RANDOM = 8
"""Vectors drawn at random that stand beside an injection."""
POSITIONS = 12
"""Positions, counted back from the last real token, that are shown of several prompts."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Projections(Diagnosis):
    """Projection of the stream on the concept's unit direction. Axes: run (clean, transplanted), layer, position."""

    low: Scores
    """Lower end of the 95% bootstrap interval over prompts; of one prompt, the projection itself."""
    high: Scores
    prompts: int

    @property
    def change(self) -> Scores:
        """Transplanted less clean. ValueError where nothing was injected."""
        if "transplanted" not in self.scores.axes["run"]:
            raise ValueError("nothing was injected: pass injected=injections(concept, strength=..., layers=[...]).")
        axes = {name: labels for name, labels in self.scores.axes.items() if name != "run"}
        return Scores(self.scores.values[1] - self.scores.values[0], axes, self.scores.unit)

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The places where an injection changed the projection most; without one, those where it is largest."""
        return self.scores.top(k) if len(self.scores.axes["run"]) == 1 else self.change.top(k)


def projections(
    model: HookedModel,
    concept: ConceptVector,
    texts: Sequence[str],
    *,
    injected: Injection | Sequence[Injection] = (),
    layers: Sequence[int] | None = None,
    last: int | None = None,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Projections:
    """<h, v / |v|> after every layer at every position, as the model is and, if asked, with something injected.

    The positions of one prompt are its tokens, a beginning-of-sequence token included. Those of several are counted back from
    the last real token, -1, and a number is the mean over the prompts that reach so far.

    Args:
        injected: what is added in the second run, `injections(...)`: at layers or heads, all positions or the last.
        layers: of the concept's; all by default.
        last: how many positions to show; None is all of one prompt, and `POSITIONS` of several.

    Raises:
        ValueError: a concept of another model, a layer it has no vector for, a vector of zeros, no texts, injections that the
            model cannot take.
    """
    check_ready(model)
    here = identify(model)
    check_home(concept, here)
    concept = concept.only(*(concept.layers if layers is None else layers))
    norms = concept.vectors.norm(dim=-1)
    if not bool((norms > 0).all()):
        raise ValueError(
            f"the vector of {concept.name!r} is zero at layer {concept.layers[int(norms.argmin())]}: no direction."
        )
    texts, steps = check_texts(texts, "last"), check_steps(model, injected)
    encodings = encode(model, texts, prepend_bos=prepend_bos)
    most = max(len(encoding.ids) for encoding in encodings)
    shown = min(most, last or (most if len(texts) == 1 else POSITIONS))
    if last is not None and last < 1:
        raise ValueError(f"expected at least one position; got last={last}.")
    units = dict(zip(concept.layers, concept.vectors / norms[:, None], strict=True))
    runs = {"clean": [], "transplanted": steps} if steps else {"clean": []}
    values = np.full((len(runs), len(units), shown, len(texts)), np.nan)

    def measure(run: int, batch: Batch, steps: Sequence[Injection]) -> None:
        def look(layer: int, resid: Float[Tensor, "prompt pos d_model"]) -> None:
            along = einsum(resid.float(), units[layer].to(resid.device), "prompt pos d, d -> prompt pos").cpu().numpy()
            for row, text in enumerate(batch.prompts.tolist()):
                reach = along[row, : len(encodings[text].ids)][-shown:]
                values[run, concept.layers.index(layer), shown - len(reach) :, text] = reach

        follow(model, batch, concept.layers, look, steps)

    todo = list(batches(model, encodings, batch_size, steps))
    for batch in track(todo, f"projections in {model.cfg.model_name}", len(todo)):
        for run, injected in enumerate(runs.values()):
            measure(run, batch, injected)
    axes = {
        "run": tuple(runs),
        "layer": layer_labels(concept.layers),
        "position": _named_tokens(model, encodings[0])[-shown:]
        if len(texts) == 1
        else tuple(str(-k) for k in range(shown, 0, -1)),
    }
    mean, low, high = (Scores(x.float(), axes, "stream units") for x in over_texts(values, seed=seed))
    what = f", {_written(steps)}" if steps else ""
    prompts = f"{len(texts)} prompt{'s' * (len(texts) > 1)}"
    return Projections(
        about=f"projection on {concept.name} in {here.name}, {prompts}{what}",
        scores=mean,
        low=low,
        high=high,
        prompts=len(texts),
        notes=("listed is the change under injection.",) if steps else (),
    )


def _named_tokens(model: HookedModel, encoding: Encoding) -> tuple[str, ...]:
    return tuple(f"{i} {model.tokenizer.decode([token])!r}" for i, token in enumerate(encoding.ids))


def _written(steps: Sequence[Injection]) -> str:
    """What was injected where, in a few words."""
    places = [f"L{step.layer}" + ("" if step.head is None else f"H{step.head}") for step in steps]
    few = ", ".join(places[:4]) + ", ..." * (len(places) > 4)
    return f"injected at {few} ({', '.join(sorted({step.positions for step in steps}))} positions)"


# --- survival -----------------------------------------------------------------------------------------------------------

MEASURES = ("size", "share of stream", "cosine to injected", "cosine to native")


@dataclass(frozen=True, eq=False, kw_only=True)
class Survival(Diagnosis):
    """What an injection has become at every later layer. Axes: vector (concept, random), measure, layer.

    The measures are `size`, |delta| / |what was injected|; `share of stream`, |delta| / |h_clean|; `cosine to injected`, and,
    with a native concept, `cosine to native`, with its vector of that layer. Each is a mean over the tokens of a text, a
    beginning-of-sequence token left out, and then over texts.
    """

    low: Scores
    """Of the concept, the lower end of the 95% bootstrap interval over texts; of `random`, the lowest of its vectors."""
    high: Scores
    layer: int
    """Where it was injected."""
    strength: float

    def top(self, k: int = 10) -> list[tuple[str, float]]:
        """The layers at which what is left points most along the native direction, or, without one, the injected one."""
        return self.scores.at(vector="concept", measure=self.scores.axes["measure"][-1]).top(k)

    def __str__(self) -> str:
        measures, labels = self.scores.axes["measure"], self.scores.axes["layer"]
        rows = [f"  {'':<5}" + "".join(f"{measure:>30}" for measure in measures)]
        for k, label in enumerate(labels):
            cells = [
                f"{self.scores.values[0, m, k]:.2f} [{self.low.values[0, m, k]:.2f}, {self.high.values[0, m, k]:.2f}]"
                f" ({self.scores.values[1, m, k]:+.2f})"
                for m in range(len(measures))
            ]
            rows.append(f"  {label:<5}" + "".join(f"{cell:>30}" for cell in cells))
        return "\n".join([f"Survival: {self.about}; in brackets 95%, in parentheses random vectors", *rows, *self.notes])


def survival(
    model: HookedModel,
    concept: ConceptVector,
    texts: Sequence[str],
    *,
    layer: int | None = None,
    strength: float = 1.0,
    native: ConceptVector | None = None,
    random: int = RANDOM,
    prepend_bos: bool | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Survival:
    """Of strength * v added after one layer at all positions: what of it is there after this and every later layer.

    Costs 2 + random passes over the texts.

    Args:
        layer: where it is injected; not needed for a concept at one layer.
        native: the target's own vector, at the layers it has; elsewhere the cosine is NaN.
        random: how many vectors of the same norm, drawn at random, are injected as well.

    Raises:
        ValueError: a concept of another model, a layer without a vector, a strength of 0, no texts.
    """
    check_ready(model)
    here = identify(model)
    check_home(concept, here)
    if native is not None:
        check_home(native, here)
    if layer is None:
        if len(concept.layers) > 1:
            raise ValueError(f"{concept.name!r} has vectors at {len(concept.layers)} layers; choose one, as in layer=1.")
        layer = concept.layers[0]
    v = strength * concept.at(layer).float()
    if random < 1 or not float(v.norm()) > 0:
        raise ValueError(f"expected random >= 1 and a vector longer than 0; got {random} and {concept.name!r} x {strength}.")
    texts = check_texts(texts, "last")
    encodings = encode(model, texts, prepend_bos=prepend_bos)
    drawn = torch.randn(random, len(v), generator=torch.Generator().manual_seed(seed))
    vectors = torch.cat([v[None], drawn * v.norm() / drawn.norm(dim=-1, keepdim=True)])
    layers = tuple(range(layer, model.cfg.n_layers))
    measures = MEASURES if native is not None else MEASURES[:-1]
    values = np.full((len(vectors), len(measures), len(layers), len(texts)), np.nan)
    bos = int(prepends_bos(model, prepend_bos))
    todo = list(batches(model, encodings, batch_size))
    for batch in track(todo, f"survival in {model.cfg.model_name}", len(todo)):
        values[..., batch.prompts.tolist()] = _survived(model, batch, layers, vectors, native, bos).cpu().numpy()
    mean, low, high = over_texts(values[:1], seed=seed)
    others = torch.tensor(values[1:].mean(-1))
    axes = {"vector": ("concept", "random"), "measure": measures, "layer": layer_labels(layers)}
    made = [
        Scores(torch.cat([own, other[None]]).float(), axes, "ratio or cosine")
        for own, other in ((mean, others.mean(0)), (low, others.amin(0)), (high, others.amax(0)))
    ]
    return Survival(
        about=f"{concept.name} × {strength:g} injected after L{layer} of {here.name}, {len(texts)} texts",
        scores=made[0],
        low=made[1],
        high=made[2],
        layer=layer,
        strength=strength,
    )


def _survived(
    model: HookedModel,
    batch: Batch,
    layers: Sequence[int],
    vectors: Float[Tensor, "vector d_model"],
    native: ConceptVector | None,
    bos: int,
) -> Float[Tensor, "vector measure layer prompt"]:
    """`MEASURES` of each vector injected after the first of the layers, means over each prompt's tokens behind its bos."""
    clean: dict[int, Tensor] = {}
    follow(model, batch, layers, lambda layer, resid: clean.update({layer: resid.float().clone()}))
    counted = batch.mask.bool()
    counted[:, :bos] = False

    def left_of(vector: Float[Tensor, " d_model"]) -> Float[Tensor, "measure layer prompt"]:
        found: dict[int, Tensor] = {}

        def look(layer: int, resid: Float[Tensor, "prompt pos d_model"]) -> None:
            base = clean[layer]
            by_token = _of_delta(resid.float() - base, base, vector.to(base.device), _native_at(native, layer))
            here = counted.to(base.device)
            found[layer] = (torch.where(here, by_token, 0.0).sum(-1) / here.sum(-1)).cpu()

        follow(model, batch, layers, look, [Injection(layers[0], vector)])
        return torch.stack([found[layer] for layer in layers], dim=1)

    return torch.stack([left_of(vector) for vector in vectors])


def _native_at(native: ConceptVector | None, layer: int) -> Tensor | None:
    if native is None:
        return None
    return native.at(layer).float() if layer in native.layers else torch.full((native.model.d_model,), torch.nan)


def _of_delta(
    delta: Float[Tensor, "prompt pos d_model"],
    clean: Float[Tensor, "prompt pos d_model"],
    vector: Float[Tensor, " d_model"],
    native: Float[Tensor, " d_model"] | None,
) -> Float[Tensor, "measure prompt pos"]:
    """`MEASURES` at every token."""
    size = delta.norm(dim=-1)
    found = [size / vector.norm(), size / clean.norm(dim=-1), cosine_similarity(delta, vector, dim=-1)]
    if native is not None:
        found.append(cosine_similarity(delta, native.to(delta.device), dim=-1))
    return torch.stack(found)
