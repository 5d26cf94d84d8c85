"""Streams: texts -> what the residual stream is at every real token, as the model is and under injections.

Passes over prompts only. Injections at other positions than `all` go into batches of one length, where nothing is padded: which
token is the last is then beyond doubt.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.diagnostics.runs import Batch
from contrans_tl.evaluation.intervals import RESAMPLES
from contrans_tl.models import Hook, HookedModel, hook_name
from contrans_tl.passes import run_blocks
from contrans_tl.tokens import Encoding, by_length, pad
from contrans_tl.transplantation import Injection, injection_hooks
from contrans_tl.weights import device_of

Look = Callable[[int, Float[Tensor, "prompt pos d_model"]], None]
"""What is done with the stream after a layer."""


def batches(
    model: HookedModel, encodings: Sequence[Encoding], batch_size: int, steps: Sequence[Injection] = ()
) -> Iterator[Batch]:
    """The texts in batches of similar length, or of one length where the injections need it, longest first."""
    lengths = [len(encoding.ids) for encoding in encodings]
    if all(step.positions == "all" for step in steps):
        groups = by_length(lengths, batch_size)
    else:
        alike = defaultdict(list)
        for i, length in enumerate(lengths):
            alike[length].append(i)
        groups = [[of[k] for k in chunk] for of in alike.values() for chunk in by_length([1] * len(of), batch_size)]
    for group in groups:
        yield Batch(torch.tensor(group), *pad([encodings[i].ids for i in group], device_of(model)))


def check_steps(model: HookedModel, steps: Injection | Sequence[Injection]) -> list[Injection]:
    """The injections as a list. ValueError, before any pass, for what the model cannot take and for `generated` positions."""
    steps = [steps] if isinstance(steps, Injection) else list(steps)
    if any(step.positions == "generated" for step in steps):
        raise ValueError("expected injections at positions all, prompt or last: nothing is generated here; got 'generated'.")
    injection_hooks(model, steps)
    return steps


def follow(model: HookedModel, batch: Batch, layers: Sequence[int], look: Look, steps: Sequence[Injection] = ()) -> None:
    """Run one batch under injections and look at the stream after each of these layers, injected there included."""

    def hand_over(resid: Tensor, hook: Any, *, layer: int) -> None:
        look(layer, resid.detach())

    reading: list[Hook] = [(hook_name(layer), partial(hand_over, layer=layer)) for layer in layers]
    run_blocks(model, batch.tokens, batch.mask, [*injection_hooks(model, steps), *reading], max(layers))


def over_texts(
    values: Float[np.ndarray, " *place text"], *, seed: int = 0
) -> tuple[Float[Tensor, " *place"], Float[Tensor, " *place"], Float[Tensor, " *place"]]:
    """Mean over texts and its 95% bootstrap interval, at every place. NaN marks texts that have nothing there."""
    there = ~np.isnan(values)
    n = values.shape[-1]
    picked = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)
    sums, counts = np.where(there, values, 0.0), there.astype(float)
    low = np.full(values.shape[:-1], np.nan)
    high, mean = low.copy(), low.copy()
    for place in np.ndindex(*values.shape[:-1]):
        if there[place].any():
            drawn = picked @ counts[place]
            means = (picked @ sums[place])[drawn > 0] / drawn[drawn > 0]
            mean[place] = sums[place].sum() / counts[place].sum()
            low[place], high[place] = np.percentile(means, [2.5, 97.5])
    return torch.tensor(mean), torch.tensor(low), torch.tensor(high)
