"""Probes: which attention heads tell a concept's prompts apart (Li et al., 2306.03341: the accuracy map of ITI).

    found = probe_heads(model, pairs)
    found.scores                       accuracy, "layer head", cross-validated by pairs
    found.p_values, found.threshold    against permuted labels, head by head and for the best of all heads
    refine_heads(model, pairs, heads=found.above())

A probe reads a head's z = `attn.hook_z` at the last real token. `logistic` is ITI's, an L2-regularised logistic regression;
`mass` is the centre-of-mass direction, mean z+ - mean z-, with the threshold half way, which ITI found to steer better. With
1024 heads some are right by chance: `threshold` is what the best head stays below in 95% of permutations of the labels, so that
on labels that mean nothing any head at all is above it once in 20 times.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from contrans_tl.data import ContrastPairs
from contrans_tl.diagnostics.folds import Sides, p_values
from contrans_tl.diagnostics.scores import Diagnosis, Scores
from contrans_tl.diagnostics.scores import heads as head_labels
from contrans_tl.diagnostics.scores import layers as layer_labels
from contrans_tl.heads import Head, collect_heads
from contrans_tl.models import HookedModel, check_layers, identify
from contrans_tl.progress import track

Probe = Literal["logistic", "mass"]
"""A logistic regression, or the direction between the means (mass mean)."""
PENALTY = 1e-2
"""Of the logistic probe: times |w|^2 / 2 beside the mean log loss, features scaled to a mean norm of 1 (as in `refinement`)."""
STEPS = 60
"""Of the logistic probe. Each lowers the loss for certain (see `_logistic`), and permuted labels get as many."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadProbes(Diagnosis):
    """Cross-validated accuracy of a probe at every head. Axes: layer, head."""

    p_values: Scores
    """Of each head by itself: the share of label permutations in which it is as accurate. Many heads, many chances: see
    `threshold`."""
    threshold: float
    """Accuracy that the best of all heads stays below in 95% of permutations."""
    method: Probe
    permutations: int

    def above(self) -> list[Head]:
        """(layer, head) of those above the threshold, the most accurate first."""
        values, layers = self.scores.values, [int(label[1:]) for label in self.scores.axes["layer"]]
        order = values.flatten().argsort(descending=True, stable=True).tolist()
        n = values.shape[1]
        return [(layers[i // n], i % n) for i in order if float(values.flatten()[i]) > self.threshold]

    def to_dict(self) -> dict[str, Any]:
        about = {"threshold": self.threshold, "method": self.method, "permutations": self.permutations}
        return super().to_dict() | about | {"p_values": self.p_values.to_dict()}


def probe_heads(
    model: HookedModel,
    pairs: ContrastPairs,
    *,
    method: Probe = "logistic",
    layers: Sequence[int] | None = None,
    folds: int = 5,
    permutations: int = 100,
    prepend_bos: bool | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> HeadProbes:
    """How accurately a linear probe on every head tells positive prompts from negative ones, in folds by pairs.

    One pass over the prompts; then heads x folds x (1 + permutations) probes of d_head numbers.

    Args:
        method: `logistic` or `mass`.
        folds: pairs, and prompts of the same text, stay together.

    Raises:
        ValueError: an unknown method, too few pairs, a layer the model does not have, fewer than 19 permutations.
    """
    if method not in get_args(Probe):
        raise ValueError(f"expected method 'logistic' or 'mass'; got {method!r}.")
    if permutations < 19:
        raise ValueError(f"expected at least 19 permutations, below which no 95% can be told; got {permutations}.")
    layers = check_layers(layers, model.cfg.n_layers, str(model.cfg.model_name))
    sides = Sides.of(pairs)
    fold = sides.folds(folds, seed=seed, of=pairs.name)
    n_heads = model.cfg.n_heads
    places = [(layer, head) for layer in layers for head in range(n_heads)]
    prompts = [*pairs.positive, *pairs.negative]
    rows = collect_heads(model, prompts, heads=places, prepend_bos=prepend_bos, batch_size=batch_size)
    z = rearrange(rows.values.double(), "row (layer head) d -> layer head row d", head=n_heads)
    labels = torch.cat([sides.side[None], sides.permuted(permutations, seed=seed + 1)])
    accuracy = torch.stack(
        [accuracies(of_layer, labels, fold, method) for of_layer in track(z, f"probes: {pairs.name}", len(z))], dim=1
    )
    found, null = accuracy[0], accuracy[1:]
    axes = {"layer": layer_labels(layers), "head": head_labels(n_heads)}
    threshold = float(null.flatten(1).amax(1).quantile(0.95, interpolation="higher"))
    above = int((found > threshold).sum())
    return HeadProbes(
        about=f"{method} probes of {pairs.name} on the heads of {identify(model).name}, "
        f"{len(pairs.positive)} + {len(pairs.negative)} prompts, {folds} folds",
        scores=Scores(found.float(), axes, "accuracy"),
        notes=(
            f"{above} of {found.numel()} heads above {threshold:.3f}, which the best head stays below in 95% of "
            f"{permutations} permutations of the labels.",
        ),
        p_values=Scores(p_values(found, null).float(), axes, "share of permutations"),
        threshold=threshold,
        method=method,
        permutations=permutations,
    )


def accuracies(
    z: Float[Tensor, "head row d_head"],
    labels: Float[Tensor, "labelling row"],
    fold: Int[Tensor, " row"],
    method: Probe = "logistic",
) -> Float[Tensor, "labelling head"]:
    """Share of rows that a probe fitted on the other folds puts on the right side, for each labelling (1 and -1) of them."""
    hits = torch.zeros(len(labels), len(z)).double()
    fit = _logistic if method == "logistic" else _mass
    for k in range(int(fold.max()) + 1):
        out = fold == k
        w, b = fit(z[:, ~out], labels[:, ~out])
        scores = einsum(z[:, out], w, "head row d, labelling head d -> labelling head row") + b[..., None]
        hits += (scores * labels[:, None, out] > 0).sum(-1)
    return hits / labels.shape[1]


Plane = tuple[Float[Tensor, "labelling head d_head"], Float[Tensor, "labelling head"]]
"""w and b: a row is positive where z w + b > 0."""


def _mass(z: Float[Tensor, "head row d_head"], labels: Float[Tensor, "labelling row"]) -> Plane:
    sides = [(labels * sign > 0).double() for sign in (1, -1)]
    positive, negative = (
        einsum(side / side.sum(-1, keepdim=True).clamp_min(1), z, "labelling row, head row d -> labelling head d")
        for side in sides
    )
    w = positive - negative
    return w, -einsum(w, (positive + negative) / 2, "labelling head d, labelling head d -> labelling head")


def _logistic(z: Float[Tensor, "head row d_head"], labels: Float[Tensor, "labelling row"]) -> Plane:
    """Minimises mean log(1 + exp(-y (z w + b))) + PENALTY/2 |w|^2, for all labellings at once.

    The curvature of the log loss is at most 1/4 whatever the labels: H = Z^T Z / 4n + PENALTY is factored once for a head, and
    each step w <- w - H^-1 gradient lowers the loss (Boehning and Lindsay, 1988).
    """
    n, d = z.shape[1:]
    centre = z.mean(1, keepdim=True)
    scale = (z - centre).norm(dim=-1).mean(1)[:, None, None].clamp_min(1e-300)
    x = torch.cat([(z - centre) / scale, torch.ones(*z.shape[:2], 1).to(z)], dim=-1)
    penalty = PENALTY * torch.cat([torch.ones(d), torch.zeros(1)]).to(z)
    factor = torch.linalg.cholesky(einsum(x, x, "head row i, head row j -> head i j") / (4 * n) + torch.diag(penalty))
    w = torch.zeros(len(labels), len(z), d + 1).to(z)
    for _ in range(STEPS):
        margin = labels[:, None] * einsum(x, w, "head row d, labelling head d -> labelling head row")
        pull = labels[:, None] * torch.sigmoid(-margin) / n
        gradient = penalty * w - einsum(x, pull, "head row d, labelling head row -> labelling head d")
        step = torch.cholesky_solve(rearrange(gradient, "labelling head d -> head d labelling"), factor)
        w = w - rearrange(step, "head d labelling -> labelling head d")
    direction = w[..., :-1] / scale[:, 0]
    return direction, w[..., -1] - einsum(direction, centre[:, 0], "labelling head d, head d -> labelling head")
