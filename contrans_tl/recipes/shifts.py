"""Token shifts: the words that the source's own, the carried and the native vector speak for and against (ConTrans, Table 8),
as `diagnostics.readout` reads them."""

from collections.abc import Sequence

from contrans_tl.data import ContrastPairs
from contrans_tl.diagnostics.readout import readout
from contrans_tl.experiment import layer_at
from contrans_tl.models import identify
from contrans_tl.recipes.results import RecipeResult, Row
from contrans_tl.recipes.setup import ModelOrName, Models, Setup
from contrans_tl.refinement import refine
from contrans_tl.reformulation import fit_maps, reformulate

PAPER_DEPTH = 0.75


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
                [(up, down)] = readout(where, concept, k=k).tokens
                labels = {"concept": pairs.name, "vector": kind, "of": identify(where).name if where is model else name}
                rows.append(Row({**labels, "up": _words(up), "down": _words(down)}, {}))
    notes = (f"layers at {depth:g} of the depth; through the final norm and the unembedding, without their biases.",)
    return RecipeResult("token_shifts", "ConTrans, Table 8", tuple(rows), notes)


def _words(tokens: Sequence[str]) -> str:
    return " ".join(token.strip() or repr(token) for token in tokens)
