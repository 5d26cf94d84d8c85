"""Token shifts: the words that a vector speaks for and against, by the final norm and the unembedding (ConTrans, Table 8).

    shift(v) = (readout(v) - readout(-v)) / 2          readout(x) = ln_final(x) W_U + b_U

The odd part, as the biases of norm and head are no doing of the vector. TransformerLens's `logit_readout` where it has one
(from 4 on), otherwise the model's own `ln_final` and `W_U`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from contrans_tl.data import ContrastPairs
from contrans_tl.experiment import layer_at
from contrans_tl.models import HookedModel, identify
from contrans_tl.recipes.results import RecipeResult, Row
from contrans_tl.recipes.setup import ModelOrName, Models, Setup
from contrans_tl.refinement import refine
from contrans_tl.reformulation import fit_maps, reformulate

PAPER_DEPTH = 0.75


def token_shift(model: HookedModel, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    """By how much each vector, read by itself, raises and lowers the logit of each token."""
    up, down = (_readout(model, sign * vectors) for sign in (1.0, -1.0))
    return (up - down) / 2


def _readout(model: HookedModel, vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, "vector vocab"]:
    try:
        from transformer_lens.tools.analysis import logit_readout
    except ImportError:  # 3.9
        with torch.no_grad():
            lens = model.ln_final(vectors.to(model.W_U)[None])[0] @ model.W_U  # type: ignore[attr-defined]
        return lens.float().cpu()
    return logit_readout(model, vectors).values.float().cpu()


def token_shifts(
    source: ModelOrName, targets: Models, concepts: Sequence[ContrastPairs], setup: Setup, *, k: int = 10
) -> RecipeResult:
    """Table 8: the k tokens that each concept raises and lowers most, of its source's own vector, the carried one, and the
    target's own (native). At one layer of each model: the setup's depth, or the paper's. A list of words claims no transfer."""
    depth = PAPER_DEPTH if setup.depth is None else setup.depth
    model, rows = setup.open(source), []
    s = layer_at(model, depth)
    for name, target in setup.opened(targets):
        t = layer_at(target, depth)
        maps = fit_maps(model, target, setup.sentences, source_layers=[s], target_layers=[t], batch_size=setup.batch_size)
        for pairs in concepts:
            own, native = refine(model, pairs, layers=[s]), refine(target, pairs, layers=[t])
            moved = reformulate(own, maps, layers={s: t})
            vectors = (("own", model, own), ("carried", target, moved), ("native", target, native))
            for kind, where, concept in vectors:
                [shift] = token_shift(where, concept.vectors)
                labels = {"concept": pairs.name, "vector": kind, "of": identify(where).name if where is model else name}
                rows.append(Row({**labels, "up": _words(where, shift, k), "down": _words(where, -shift, k)}, {}))
    notes = (f"layers at {depth:g} of the depth; through the final norm and the unembedding, without their biases.",)
    return RecipeResult("token_shifts", "ConTrans, Table 8", tuple(rows), notes)


def _words(model: HookedModel, shift: Float[Tensor, " vocab"], k: int) -> str:
    # A head may be padded beyond the vocabulary.
    best = shift[: len(model.tokenizer)].topk(k).indices.tolist()
    return " ".join(model.tokenizer.decode([token]).strip() or repr(model.tokenizer.decode([token])) for token in best)
