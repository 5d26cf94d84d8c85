"""What diagnostics by layer say is what hooks written by hand see, one unpadded text at a time."""

from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, TEXTS, hf_residuals, hooks_on, save_tokenizer, unchecked
from test_hooked_transformer import HookedTransformer, hooked_transformer
from test_transplantation import concept
from torch import Tensor
from torch.nn.functional import cosine_similarity

from contrans_tl import ContrastPairs, Injection, LayerMaps, identify, refine, transplant
from contrans_tl.diagnostics import grids, probe_heads, projections, readout, separability, survival
from contrans_tl.diagnostics.folds import Sides
from contrans_tl.diagnostics.readout import through_head, token_shift
from contrans_tl.diagnostics.separability import agreement, separated
from contrans_tl.evaluation import Marks, Task
from contrans_tl.heads import refine_heads
from contrans_tl.models import hook_name
from contrans_tl.reformulation import reformulate
from contrans_tl.tokens import encode
from contrans_tl.transplantation import injections

TOLERANCE = 1e-4
"""of numbers of order 1 to 30 in float32; a token or layer mistaken for another is off by more than 0.01."""
LAYERS = range(N_LAYERS)


def residuals(model: Any, text: str, *, steered: Any = None, **options: Any) -> Tensor:
    """The stream of one text by itself, "layer pos d_model"."""
    tokens = torch.tensor([encode(model, [text])[0].ids])
    names = [hook_name(layer) for layer in LAYERS]
    if steered is None:
        _, cache = model.run_with_cache(tokens, names_filter=names)
    else:
        with transplant(model, steered, **options):
            _, cache = model.run_with_cache(tokens, names_filter=names)
    return torch.stack([cache[name][0] for name in names])


# --- projections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_projection_of_one_prompt_is_that_of_plain_hugging_face_token_by_token(bridges, references, architecture):
    model, v = bridges[architecture], concept(bridges[architecture], 0, 1, 2)
    found = projections(model, v, TEXTS[1:2])
    [encoding] = encode(model, TEXTS[1:2])
    stream = hf_residuals(references[architecture], list(encoding.ids))
    expected = torch.stack([stream[layer] @ v.at(layer) / v.at(layer).norm() for layer in LAYERS])
    assert (found.scores.at(run="clean").values - expected).abs().max() < TOLERANCE
    assert len(found.scores.axes["position"]) == len(encoding.ids) and found.scores.axes["run"] == ("clean",)


def test_projections_of_several_prompts_are_means_of_each_alone_counted_back_from_its_last_token(bridges):
    model, v = bridges["llama"], concept(bridges["llama"], 0, 2)
    found = projections(model, v, TEXTS, last=6, batch_size=2)
    alone = [torch.stack([residuals(model, text)[k] @ v.at(k) / v.at(k).norm() for k in (0, 2)]) for text in TEXTS]
    for back in range(1, 7):
        there = [one[:, -back] for one in alone if one.shape[1] >= back]
        assert (found.scores.at(run="clean", position=str(-back)).values - torch.stack(there).mean(0)).abs().max() < TOLERANCE
    assert {one.shape[1] >= 6 for one in alone} == {True, False}, "some prompts do not reach so far"
    assert bool((found.low.values <= found.scores.values + 1e-6).all() and (found.high.values >= found.low.values).all())
    whole = projections(model, v, TEXTS, last=6, batch_size=64)
    assert (whole.scores.values - found.scores.values).abs().max() < TOLERANCE


@pytest.mark.parametrize("positions", ["all", "prompt", "last"])
def test_under_an_injection_it_is_what_a_transplant_makes_of_each_prompt_alone(bridges, positions):
    model = bridges["gpt2"]  # whose padding token is its end of text: told apart from text by the mask only
    v, w = concept(model, 0, 1, 2), concept(model, 1, seed=3)
    steps = injections(w, strength=2.0, positions=positions)
    found = projections(model, v, TEXTS, injected=steps, last=3)
    alone = [residuals(model, text, steered=w, strength=2.0, positions=positions) for text in TEXTS]
    for back in (1, 2, 3):
        there = [
            torch.stack([one[k, -back] @ v.at(k) / v.at(k).norm() for k in LAYERS]) for one in alone if one.shape[1] >= back
        ]
        seen = found.scores.at(run="transplanted", position=str(-back)).values
        assert (seen - torch.stack(there).mean(0)).abs().max() < TOLERANCE
    change = found.change
    assert not change.at(layer="L0").values.any()
    assert change.at(layer="L1", position="-1") == pytest.approx(float(2 * w.at(1) @ v.at(1) / v.at(1).norm()), abs=TOLERANCE)
    assert (abs(change.at(layer="L1", position="-3")) < TOLERANCE) == (positions == "last")
    assert found.top(1)[0][0].split()[0] in ("L1", "L2")
    assert not hooks_on(model)


def test_an_injection_into_a_head_is_seen_in_the_stream_from_its_layer_on(bridges):
    model = bridges["llama"]
    pairs = ContrastPairs("x", (TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3]))
    steps = injections(refine_heads(model, pairs), strength=9.0, heads=[(1, 2)])
    change = projections(model, concept(model, 0, 1, 2), TEXTS[:2], injected=steps).change
    assert not change.at(layer="L0").values.any() and bool((change.at(layer="L1").values.abs() > 1e-3).any())


def test_what_cannot_be_projected_is_one_line_of_error(bridges):
    model, other = bridges["llama"], bridges["gpt2"]
    v = concept(model, 0, 1)
    with pytest.raises(ValueError, match="lives in gpt2"):
        projections(model, concept(other, 0), TEXTS)
    with pytest.raises(ValueError, match="there is none at 2"):
        projections(model, v, TEXTS, layers=[2])
    with pytest.raises(ValueError, match="a list of texts"):
        projections(model, v, "one text")
    with pytest.raises(ValueError, match="zero at layer 1"):
        projections(model, 0.0 * v.only(1), TEXTS)
    with pytest.raises(ValueError, match="nothing is generated"):
        projections(model, v, TEXTS, injected=Injection(0, v.at(0), "generated"))
    with pytest.raises(ValueError, match="no layer 9"):
        projections(model, v, TEXTS, injected=[Injection(9, v.at(0))])
    with pytest.raises(ValueError, match="no head 7"):
        projections(model, v, TEXTS, injected=[Injection(0, torch.zeros(D_MODEL // 4), head=7)])
    with pytest.raises(ValueError, match="last=0"):
        projections(model, v, TEXTS, last=0)
    with pytest.raises(ValueError, match="nothing was injected"):
        _ = projections(model, v, TEXTS).change


# --- survival ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_where_it_is_injected_all_of_an_injection_is_there(bridges, architecture):
    model = bridges[architecture]
    found = survival(model, concept(model, 1), TEXTS, strength=3.0, random=2, native=concept(model, 0, 1, 2))
    for vector in ("concept", "random"):
        assert found.scores.at(vector=vector, measure="size", layer="L1") == pytest.approx(1.0, abs=1e-5)
        assert found.scores.at(vector=vector, measure="cosine to injected", layer="L1") == pytest.approx(1.0, abs=1e-5)
    assert found.scores.at(vector="concept", measure="cosine to native", layer="L1") == pytest.approx(
        float(cosine_similarity(concept(model, 1).at(1), concept(model, 0, 1, 2).at(1), dim=0)), abs=1e-5
    )
    assert found.scores.axes["layer"] == ("L1", "L2") and not hooks_on(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_later_it_is_what_hand_written_runs_of_each_text_leave_of_it(bridges, architecture):
    model = bridges[architecture]
    v, native = concept(model, 0), concept(model, 2, seed=5)
    found = survival(model, v, TEXTS, strength=2.0, random=1, native=native, batch_size=2)
    rows: dict[str, list[Tensor]] = {measure: [] for measure in found.scores.axes["measure"]}
    bos = 0 if architecture == "neox" else 1  # NeoX prepends none
    for text in TEXTS:
        clean = residuals(model, text)[:, bos:]
        delta = residuals(model, text, steered=v, strength=2.0)[:, bos:] - clean
        rows["size"].append(delta.norm(dim=-1).mean(-1) / (2 * v.at(0)).norm())
        rows["share of stream"].append((delta.norm(dim=-1) / clean.norm(dim=-1)).mean(-1))
        rows["cosine to injected"].append(cosine_similarity(delta, v.at(0), dim=-1).mean(-1))
        rows["cosine to native"].append(cosine_similarity(delta, native.at(2), dim=-1).mean(-1))
    for measure, each in rows.items():
        mean, seen = torch.stack(each).mean(0), found.scores.at(vector="concept", measure=measure).values
        if measure == "cosine to native":
            assert bool(seen[:2].isnan().all()), "where the native concept has no vector"
            mean, seen = mean[2:], seen[2:]
        assert (seen - mean).abs().max() < TOLERANCE, measure
    assert found.top(1)[0][0] == "L2"
    assert "random" in str(found) and "L2" in str(found)


def test_the_random_vectors_beside_an_injection_are_as_long_and_the_range_of_several(bridges):
    model = bridges["llama"]
    found = survival(model, concept(model, 0), TEXTS[:2], random=4, seed=1)
    one = survival(model, concept(model, 0), TEXTS[:2], random=4, seed=2)
    low, high = (x.at(vector="random", measure="cosine to injected", layer="L2") for x in (found.low, found.high))
    assert low < found.scores.at(vector="random", measure="cosine to injected", layer="L2") < high
    assert torch.equal(found.scores.values[0], one.scores.values[0])
    assert not torch.equal(found.scores.values[1], one.scores.values[1])


def test_what_cannot_survive_is_one_line_of_error(bridges):
    model = bridges["llama"]
    with pytest.raises(ValueError, match="vectors at 2 layers; choose one"):
        survival(model, concept(model, 0, 1), TEXTS)
    with pytest.raises(ValueError, match="there is none at 2"):
        survival(model, concept(model, 0, 1), TEXTS, layer=2)
    with pytest.raises(ValueError, match="longer than 0"):
        survival(model, concept(model, 0), TEXTS, strength=0.0)
    with pytest.raises(ValueError, match="lives in gpt2"):
        survival(model, concept(model, 0), TEXTS, native=concept(bridges["gpt2"], 0))


# --- separability ----------------------------------------------------------------------------------------------------------


def planted(n: int, distance: float, *, seed: int = 0, width: int = 40) -> tuple[Tensor, ContrastPairs]:
    """Rows of standard normal noise, "prompt 1 width", positive ones that far along one axis, and pairs of as many prompts."""
    rows = torch.randn(2 * n, 1, width, generator=torch.Generator().manual_seed(seed)).double()
    rows[:n, 0, 0] += distance
    return rows, ContrastPairs("planted", tuple(f"p{i}" for i in range(n)), tuple(f"n{i}" for i in range(n)))


def scored(rows: Tensor, pairs: ContrastPairs, vectors: Tensor | None = None, **options: Any) -> Any:
    sides = Sides.of(pairs)
    return separated(rows, sides, sides.folds(5, seed=0), vectors, options.get("permutations", 40), options.get("seed", 0))


def test_a_planted_separation_is_measured_and_not_overrated():
    rows, pairs = planted(400, 2.0, seed=1)
    truth = torch.eye(40)[None, 0].double()
    for vectors, d_prime in ((truth, 2.0), (None, 2.0)):
        value, low, high, null = scored(rows, pairs, vectors)
        # the standard error of d' at 400 + 400 is sqrt(2/400 + d'^2/1600) = 0.09
        assert abs(float(value[0]) - d_prime) < 0.27 and float(low[0]) < d_prime < float(high[0])
        # AUROC of two normals d' apart: Phi(d' / sqrt 2) = 0.921
        assert abs(float(value[1]) - 0.921) < 0.03 and float(low[1]) < 0.921 < float(high[1])
        assert float(null[0]) < 0.3 and float(null[1]) < 0.57


def test_no_pair_scores_the_vector_that_it_made():
    rows, pairs = planted(30, 0.0, width=400)  # with more dimensions than rows, its own vector separates any labels
    sides = Sides.of(pairs)
    own = rows[:30].mean(0) - rows[30:].mean(0)
    assert float(scored(rows, pairs, own)[0][1]) > 0.99
    value, *_, null = scored(rows, pairs)
    assert 0.3 < float(value[1]) < 0.7 and float(null[1]) < 0.75
    found, *_, half_null = agreement(rows, sides, 50, 0)
    assert abs(float(found)) < 0.3 and float(half_null) < 0.4
    far = planted(30, 30.0, width=400)[0]
    assert float(agreement(far, sides, 50, 0)[0]) > 0.9


def test_cross_fitted_scores_are_those_of_vectors_refined_from_the_other_folds():
    rows, pairs = planted(20, 1.0, seed=3)
    sides = Sides.of(pairs)
    fold = sides.folds(4, seed=1)
    value, *_ = separated(rows, sides, fold, None, 2, 0)
    wins = compared = 0.0
    gaps, squares = 0.0, 0.0
    for k in range(4):
        held, other = (fold == k), (fold != k)
        up = sides.side > 0
        v = rows[other & up, 0].mean(0) - rows[other & ~up, 0].mean(0)
        p, n = (rows[held & side, 0] @ v / v.norm() for side in (up, ~up))
        wins += float((p[:, None] > n).double().sum())
        compared += len(p) * len(n)
        gaps += float(len(p) + len(n)) * float(p.mean() - n.mean())
        squares += float(((p - p.mean()) ** 2).sum() + ((n - n.mean()) ** 2).sum())
    assert float(value[1]) == pytest.approx(wins / compared)
    assert float(value[0]) == pytest.approx(gaps / 40 / (squares / (40 - 8)) ** 0.5)


def test_prompts_that_belong_together_stay_in_one_fold_and_change_sides_together():
    pairs = ContrastPairs("x", ("a", "b", "c", "A "), ("d", "e", "f", "g"))
    sides = Sides.of(pairs)
    assert (
        len(set(sides.cluster.tolist())) == 3 and sides.cluster[0] == sides.cluster[3] == sides.cluster[4] == sides.cluster[7]
    )
    fold = sides.folds(3, seed=0)
    assert all(len(set(fold[sides.cluster == k].tolist())) == 1 for k in range(3))
    swapped = sides.permuted(50, seed=0) * sides.side
    assert all(bool((swapped[:, sides.cluster == k].std(1) == 0).all()) for k in range(3)) and bool((swapped == -1).any())
    uneven = Sides.of(ContrastPairs("x", ("a", "b", "c", "d"), ("e", "f")))
    assert all(set(uneven.side[uneven.folds(2, seed=0) == k].tolist()) == {1.0, -1.0} for k in (0, 1))
    assert bool((uneven.permuted(20, seed=0).sum(1) == 2).all())
    with pytest.raises(ValueError, match="got 5 folds"):
        sides.folds(5, seed=0)


PAIRS = ContrastPairs("words", tuple(f"happy {t}" for t in TEXTS), tuple(f"the lazy {t}" for t in TEXTS))


def test_separability_of_a_model_is_that_of_its_last_tokens(bridges):
    model = bridges["neox"]
    found = separability(model, PAIRS, folds=2, splits=10, permutations=19)
    v = refine(model, PAIRS)
    last = torch.stack([residuals(model, text)[:, -1].norm(dim=-1) for text in (*PAIRS.positive, *PAIRS.negative)]).mean(0)
    assert torch.allclose(found.scores.at(measure="norm / stream").values, v.vectors.norm(dim=-1) / last, rtol=1e-4)
    assert found.scores.values.shape == (4, N_LAYERS) and "cross-fitted" in str(found)
    assert bool((found.low.values[:3] <= found.high.values[:3]).all()) and found.null.values[3].isnan().all()
    some = separability(model, PAIRS, concept=-1.0 * concept(model, 1, 2), folds=2, permutations=19)
    assert some.scores.axes["layer"] == ("L1", "L2")
    other = separability(model, PAIRS, concept=concept(model, 1, 2), folds=2, permutations=19)
    aurocs = some.scores.at(measure="AUROC").values + other.scores.at(measure="AUROC").values
    assert torch.allclose(aurocs, torch.ones(2)), "the opposite direction has the opposite ranks"


def test_a_vector_is_not_scored_on_the_pairs_that_made_it(bridges):
    model = bridges["llama"]
    with pytest.raises(ValueError, match="refined from these very pairs"):
        separability(model, PAIRS, concept=refine(model, PAIRS), folds=2)
    maps = LayerMaps.fit(torch.randn(40, 1, D_MODEL), torch.randn(40, 1, D_MODEL))
    from dataclasses import replace

    here = identify(model)
    maps = replace(maps, source=replace(maps.source, model=here), target=replace(maps.target, model=here))
    moved = reformulate(refine(model, PAIRS, layers=[0]), maps, layers={0: 0})
    found = separability(model, PAIRS, concept=moved, folds=2, permutations=19)
    assert "noise may be shared" in str(found)
    with pytest.raises(ValueError, match="lives in gpt2"):
        separability(model, PAIRS, concept=concept(bridges["gpt2"], 1))
    with pytest.raises(ValueError, match="between 0 and 2"):
        separability(model, PAIRS, layers=[5], folds=2)
    with pytest.raises(ValueError, match="got 9 folds"):
        separability(model, PAIRS, folds=9)


# --- readout ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_readout_is_what_norm_and_head_of_plain_hugging_face_say(bridges, references, architecture):
    model, hf = bridges[architecture], references[architecture]
    norm = {"gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm"}.get(architecture, "model.norm")
    v = concept(model, 0, 2)
    with torch.no_grad():
        sides = [hf.get_output_embeddings()(hf.get_submodule(norm)(sign * v.vectors)) for sign in (1, -1)]
    if cap := getattr(hf.config, "final_logit_softcapping", None):
        sides = [cap * torch.tanh(side / cap) for side in sides]
    expected = (sides[0] - sides[1]) / 2
    assert torch.allclose(token_shift(model, v.vectors), expected, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(through_head(model, v.vectors), sides[0], atol=1e-5 * float(sides[0].abs().max()))
    found = readout(model, v, k=3)
    words = len(model.tokenizer)
    for k in (0, 1):
        for way, sign in ((0, 1), (1, -1)):
            best = (sign * expected[k, :words]).topk(3)
            assert torch.allclose(found.scores.values[k, way], sign * best.values, atol=1e-4)
            assert list(found.tokens[k][way]) == [model.tokenizer.decode([i]) for i in best.indices.tolist()]
    [(name, value)] = found.top(1)
    assert abs(value) == pytest.approx(float(found.scores.values.abs().max())) and name.startswith(("L0 ", "L2 "))
    assert list(found.to_dataframe().columns) == ["layer", "way", "rank", "value", "token"]
    assert found.to_dict()["tokens"][0][0][0] == found.tokens[0][0][0]


def test_what_cannot_be_read_out_is_one_line_of_error(bridges):
    model = bridges["llama"]
    for k in (0, 10**6):
        with pytest.raises(ValueError, match="expected k from 1"):
            readout(model, concept(model, 0), k=k)
    with pytest.raises(ValueError, match="lives in gpt2"):
        readout(model, concept(bridges["gpt2"], 0))
    with pytest.raises(ValueError, match="there is none at 2"):
        readout(model, concept(model, 0), layers=[2])


# --- grids -----------------------------------------------------------------------------------------------------------------


class Projected(Task):
    """A task that is the mean logit of one token."""

    name, metric = "token 5", "logit"

    def prompts(self, split: Any) -> list[str]:
        return ["a letter"] if split == "select" else []

    def measure(self, subject: Any, split: Any) -> Marks:
        tokens = torch.tensor([[0, 41, 77]])
        return Marks({"logit": subject.forward(tokens, torch.ones_like(tokens))[0, -1:, 5].double().numpy()})


@pytest.fixture(scope="module")
def maps(bridges: dict[str, Any]) -> LayerMaps:
    from contrans_tl import fit_maps

    texts = [f"{a} {b}" for a in TEXTS for b in TEXTS]
    return fit_maps(bridges["llama"], bridges["gpt2"], texts, source_layers=[0, 2])


@pytest.mark.parametrize("weighting", ["concept", "uniform"])
def test_every_cell_of_the_grids_is_what_its_pair_of_layers_gives(bridges, maps, weighting):
    target, v = bridges["gpt2"], concept(bridges["llama"], 0, 1, 2)
    native = concept(target, 0, 1, seed=4)
    found = grids(maps, v, native=native, task=Projected(), target=target, strength=2.0, weighting=weighting)
    base = float(target(torch.tensor([[0, 41, 77]]))[0, -1, 5])
    assert found.base == pytest.approx(base, abs=1e-5)
    for s, t in ((0, 0), (0, 2), (2, 1)):
        moved = reformulate(v, maps, layers={s: t}, weighting=weighting)
        cell = {"source_layer": f"L{s}", "target_layer": f"L{t}"}
        assert found.scores.at(measure="R2", **cell) == pytest.approx(float(maps.only([s], [t]).r2), abs=1e-5)
        assert found.scores.at(measure="coverage", **cell) == pytest.approx(moved.provenance["coverage"][0], abs=1e-5)
        cosine = found.scores.at(measure="cosine to native", **cell)
        if t == 2:
            assert cosine != cosine, "the native concept has no vector there"
        else:
            assert cosine == pytest.approx(float(cosine_similarity(moved.at(t), native.at(t), dim=0)), abs=1e-4)
        with transplant(target, moved, strength=2.0):
            effect = float(target(torch.tensor([[0, 41, 77]]))[0, -1, 5]) - base
        assert found.scores.at(measure="effect", **cell) == pytest.approx(effect, abs=1e-3)
    best, value = found.top(1)[0]
    assert value == pytest.approx(float(found.scores.at(measure="effect").values.max())) and " -> " in best
    assert grids(maps, v).scores.axes["measure"] == ("R2", "coverage")


def test_what_has_no_grid_is_one_line_of_error(bridges, maps):
    source, target = bridges["llama"], bridges["gpt2"]
    v = concept(source, 0, 2)
    with pytest.raises(ValueError, match="task= and target= together"):
        grids(maps, v, task=Projected())
    with pytest.raises(ValueError, match="no prompts in the split 'test'"):
        grids(maps, v, task=Projected(), target=target, split="test")
    with pytest.raises(ValueError, match="these maps end in gpt2"):
        grids(maps, v, native=concept(source, 0))
    with pytest.raises(ValueError, match="these maps end in gpt2"):
        grids(maps, v, task=Projected(), target=source)
    with pytest.raises(ValueError, match="these maps start in llama"):
        grids(maps, concept(target, 0, 2))
    with unchecked(), pytest.raises(ValueError, match="weighting 'concept' or 'uniform'"):
        grids(maps, v, weighting="both")


# --- a HookedTransformer -----------------------------------------------------------------------------------------------------

if HookedTransformer is not None:

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_a_hooked_transformer_of_the_same_weights_gives_the_same_numbers(bridges, references, folders, architecture):
        hooked = hooked_transformer(architecture, references[architecture], save_tokenizer(folders[architecture]))
        reports: list[list[Tensor]] = []
        for model in (hooked, bridges[architecture]):
            v, heads = concept(model, 0, 1, 2), refine_heads(model, PAIRS)
            steps = [*injections(v, layers=[1], positions="last"), *injections(heads, heads=[(0, 2)], strength=5.0)]
            reports.append(
                [
                    heads.vectors,
                    projections(model, v, TEXTS, injected=steps).scores.values,
                    survival(model, v, TEXTS, layer=0, random=2, native=v).scores.values,
                    separability(model, PAIRS, folds=2, splits=10, permutations=19).scores.values,
                    readout(model, v).scores.values,
                    probe_heads(model, PAIRS, folds=2, permutations=19, method="mass").scores.values,
                ]
            )
            assert not hooks_on(model)
        for one, other in zip(*reports, strict=True):
            assert torch.allclose(one, other, atol=1e-3, rtol=1e-3, equal_nan=True)
