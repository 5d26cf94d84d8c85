"""A concept is the direction that the formulas say, in float64, whatever is added to all activations."""

import math
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, hf_residuals, unchecked
from torch import Tensor

from contrans_tl import ConceptVector, ContrastPairs, ModelId, identify, load_model, refine
from contrans_tl.refinement import first_component, logistic_direction, mean_difference

PAIRS = ContrastPairs(
    "happiness",
    ("a letter made me feel happy", "the dog sleeps over a river", "happy brown fox", "quick letters"),
    ("the lazy dog", "a river feels lazy over the fox and the dog", "brown", "me"),
)
METHODS = ("mean", "pca", "logistic")
MODEL = ModelId("tiny", None, "0123456789abcdef", 3, 4, "raw")


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mean_method_is_equation_1_by_hand(bridges, references, architecture):
    model, hf = bridges[architecture], references[architecture]

    def last(prompt: str) -> Tensor:
        return hf_residuals(hf, model.to_tokens(prompt)[0].tolist())[:, -1]

    sides = [torch.stack([last(prompt) for prompt in side]) for side in (PAIRS.positive, PAIRS.negative)]
    expected = sides[0].mean(0) - sides[1].mean(0)
    concept = refine(model, PAIRS, batch_size=3)
    # float32 activations of scale 1 to 10, batched or alone: the bound of the activation table
    assert (concept.vectors - expected).abs().max() < 1e-5
    assert concept.layers == tuple(range(N_LAYERS)) and concept.model == identify(model)
    assert concept.vectors.dtype == torch.float32


def test_layers_and_batches_change_nothing(bridges):
    model = bridges["llama"]
    for method in METHODS:
        whole = refine(model, PAIRS, method=method)
        part = refine(model, PAIRS, method=method, layers=[2, 0], batch_size=1)
        assert part.layers == (2, 0)
        assert cosine(part.vectors, whole.only(2, 0).vectors).min() > 1 - 1e-6  # float32 rounding of the activations


def test_provenance_tells_where_a_concept_comes_from(bridges):
    about = refine(bridges["neox"], PAIRS, method="pca").provenance
    assert (about["method"], about["positive"], about["negative"], about["prepend_bos"]) == ("pca", 4, 4, False)
    other = ContrastPairs("happiness", PAIRS.negative, PAIRS.positive)
    assert refine(bridges["neox"], other).provenance["prompts_hash"] != about["prompts_hash"]


def test_a_bf16_model_is_averaged_in_float64(folders):
    """Each activation is a bfloat16 number, their mean is not: a mean taken in bfloat16 would be one."""
    from contrans_tl import collect

    model = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16)
    concept = refine(model, PAIRS, batch_size=2)
    rows = [collect(model, side, batch_size=2).values.double() for side in (PAIRS.positive, PAIRS.negative)]
    exact = rows[0].mean(0) - rows[1].mean(0)
    # the same prompts in batches of other lengths: bfloat16 activations may differ by a step or two of 2^-8
    assert (concept.vectors - exact).norm() / exact.norm() < 0.05
    assert not torch.equal(concept.vectors.bfloat16().float(), concept.vectors)


def test_small_differences_on_a_large_mean_are_not_lost():
    n, offset = 2000, 1000.0
    common = offset + seeded(0, n, 1, 8)
    concept = 1e-3 * seeded(1, 1, 1, 8)
    positive, negative = ((common + shift).float() for shift in (concept, 0 * concept))
    # float32 inputs around 1000 are rounded to 6e-5; 2000 of them average that to 2e-6
    assert (mean_difference(positive.double(), negative.double())[0] - concept[0, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("find", [mean_difference, first_component, logistic_direction])
def test_a_constant_added_to_all_activations_changes_no_direction(find):
    positive, negative = seeded(0, 20, 3, 6) + 1.0, seeded(1, 20, 3, 6)
    constant = 50 * seeded(2, 1, 3, 6)
    before, after = find(positive, negative), find(positive + constant, negative + constant)
    # float64 at scale 100 is rounded to 1e-14; the logistic stops at steps of 1e-9
    assert (before - after).abs().max() < 1e-7


@pytest.mark.parametrize("find", [mean_difference, first_component, logistic_direction])
def test_swapping_the_sides_turns_the_direction_round(find):
    positive, negative = seeded(0, 20, 2, 6) + 1.0, seeded(1, 20, 2, 6)
    assert (find(positive, negative) + find(negative, positive)).abs().max() < 1e-7  # as above


def test_pca_is_not_centred_again_so_it_finds_the_mean_difference_with_its_sign():
    """Peers centre the differences first, which removes the very thing that is looked for (cosine 0.02 against 0.999)."""
    v = torch.nn.functional.normalize(seeded(0, 1, 1, 64), dim=-1)
    noise, negative = 0.2 * seeded(1, 100, 1, 64), seeded(2, 100, 1, 64)
    for sign in (1, -1):
        found = first_component(negative + sign * 3 * v + noise, negative)
        # noise of 0.2 * sqrt(64 / 100) = 0.16 on a mean of 3: an angle of 0.05
        assert cosine(sign * v[0], found).item() > 0.995
        differences = (sign * 3 * v + noise)[:, 0]
        recentred = torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[0]
        assert abs(cosine(v[0, 0], recentred)) < 0.5  # what the peers would find


def test_pca_is_the_first_right_singular_vector_scaled_to_the_mean_difference():
    positive, negative = seeded(0, 9, 2, 5) + 0.5, seeded(1, 9, 2, 5)
    found, mean = first_component(positive, negative), mean_difference(positive, negative)
    for layer in range(2):
        d = (positive - negative)[:, layer]
        values, vectors = torch.linalg.eigh(d.T @ d)
        unit = vectors[:, -1]
        # float64: the eigenvectors of d^T d carry the square of the condition number, far from 1e-9 here
        assert (found[layer] - unit * (unit @ mean[layer])).abs().max() < 1e-9


@pytest.mark.parametrize("shape", [(12, 40), (60, 5)], ids=["fewer rows than dimensions", "more rows than dimensions"])
@pytest.mark.parametrize("overlap", [0.3, 4.0], ids=["nearly inseparable", "separable"])
def test_logistic_is_the_minimum_of_the_regularised_log_loss(shape, overlap):
    n, d = shape
    positive, negative = seeded(0, n, 1, d) + overlap / math.sqrt(d), seeded(1, n + 3, 1, d)
    found = logistic_direction(positive, negative)[0]

    # The objective in its primal form, minimised by another method.
    x = torch.cat([positive, negative])[:, 0]
    x = x - x.mean(0)
    x = x / x.norm(dim=-1).mean()
    side = torch.cat([torch.ones(n), -torch.ones(n + 3)]).double()
    w, b = torch.zeros(d, dtype=torch.float64, requires_grad=True), torch.zeros((), dtype=torch.float64, requires_grad=True)

    def objective() -> Tensor:
        return torch.nn.functional.softplus(-side * (x @ w + b)).mean() + 1e-2 / 2 * w @ w

    optimiser = torch.optim.LBFGS(
        [w, b], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimiser.step(closure)
    closure()
    # The objective is 1e-2-strongly convex: a gradient of 1e-8 bounds the distance to its minimum by 1e-6.
    assert w.grad is not None and w.grad.norm() < 1e-8
    assert 1 - cosine(found, w.detach()) < 1e-9
    # and, on the line of the found direction, the gradient of the objective vanishes
    with torch.no_grad():
        w.copy_(found * (w.norm() / found.norm()))
    closure()
    assert w.grad.norm() < 1e-6


def test_logistic_separates_what_can_be_separated_and_points_to_the_positive_side():
    direction = seeded(0, 1, 1, 16)
    positive, negative = seeded(1, 30, 1, 16) + 4 * direction, seeded(2, 30, 1, 16) - 4 * direction
    found = logistic_direction(positive, negative)[0]
    assert (positive[:, 0] @ found).min() > (negative[:, 0] @ found).max()
    assert cosine(found, direction[0, 0]) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_strength_means_the_same_with_every_method(bridges, method):
    """Every vector has the length of the mean difference's projection on it."""
    concept, mean = (refine(bridges["qwen2"], PAIRS, method=m).vectors.double() for m in (method, "mean"))
    assert torch.allclose((concept * mean).sum(-1), concept.square().sum(-1), rtol=1e-5)  # float32 vectors
    assert bool(((concept * mean).sum(-1) > 0).all())


def test_pca_of_sides_of_different_size_is_refused(bridges):
    pairs = ContrastPairs("x", PAIRS.positive, PAIRS.negative[:2])
    with pytest.raises(ValueError, match="as many negative prompts as positive"):
        refine(bridges["llama"], pairs, method="pca")
    assert refine(bridges["llama"], pairs, method="logistic").provenance["negative"] == 2


def test_an_unknown_method_and_layer_are_refused(bridges):
    with unchecked(), pytest.raises(ValueError, match="'mean', 'pca' or 'logistic'; got 'median'"):
        refine(bridges["llama"], PAIRS, method="median")
    with pytest.raises(ValueError, match=f"between 0 and {N_LAYERS - 1}"):
        refine(bridges["llama"], PAIRS, layers=[N_LAYERS])


# --- the vector --------------------------------------------------------------------------------------------------------


def vector(seed: int = 0, *, layers: tuple[int, ...] = (0, 2), model: Any = MODEL, name: str = "a") -> ConceptVector:
    return ConceptVector(seeded(seed, len(layers), 4).float(), layers, name, model, {"seed": seed})


def test_sums_and_multiples_are_those_of_the_vectors_and_say_so():
    a, b = vector(0), vector(1, name="b")
    mixed = 0.5 * a - b * 2.0
    assert torch.allclose(mixed.vectors, 0.5 * a.vectors - 2 * b.vectors, rtol=1e-6)  # float32
    assert "a" in mixed.name and "b" in mixed.name and mixed.model == MODEL
    assert torch.equal((-a).vectors, -a.vectors) and torch.equal((a + b).vectors, a.vectors + b.vectors)
    assert "sum" in mixed.provenance


def test_layers_are_picked_by_their_number():
    a = vector()
    assert torch.equal(a.at(2), a.vectors[1])
    assert torch.equal(a.only(2, 0).vectors, a.vectors.flip(0)) and a.only(2).layers == (2,)
    for pick in (a.at, a.only):
        with pytest.raises(ValueError, match=r"at layers \(0, 2\); there is none at 1"):
            pick(1)


def test_cosine_and_norm_matching_are_layer_by_layer():
    a, b = vector(0), 3.0 * vector(1)
    assert torch.allclose(a.cosine(b), cosine(a.vectors, b.vectors).float(), atol=1e-6)  # float32
    assert torch.allclose(a.cosine(-2.0 * a), torch.tensor([-1.0, -1.0]), atol=1e-6)
    matched = a.matched_to(b)
    assert torch.allclose(matched.vectors.norm(dim=-1), b.vectors.norm(dim=-1), rtol=1e-6)
    assert torch.allclose(matched.cosine(a), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (vector(1, layers=(0, 1)), r"same layers; got \(0, 2\) and \(0, 1\)"),
        (vector(1, model=ModelId("big", None, "f" * 16, 3, 4, "raw")), "in big .*reformulate"),
        (vector(1, model=ModelId("tiny", None, MODEL.fingerprint, 3, 4, "centred")), "centred"),
    ],
)
def test_vectors_of_other_models_bases_or_layers_do_not_mix(other, message):
    for mix in (lambda: vector() + other, lambda: vector().cosine(other), lambda: vector().matched_to(other)):
        with pytest.raises(ValueError, match=message):
            mix()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(bad):
    vectors = torch.ones(2, 4)
    vectors[1, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        ConceptVector(vectors, (0, 2), "x", MODEL)
    with pytest.raises(ValueError, match="NaN or infinity"):
        vector() * bad


def test_a_vector_for_each_layer_of_the_models_width():
    with pytest.raises(ValueError, match="one vector a layer"):
        ConceptVector(torch.ones(2, 4), (0,), "x", MODEL)
    with pytest.raises(ValueError, match="d_model = 4"):
        ConceptVector(torch.ones(1, 5), (0,), "x", MODEL)


def test_a_concept_shows_what_it_is():
    text = repr(vector())
    assert "'a'" in text and "layers 0..2" in text and "'tiny'" in text and "norm" in text
    assert "layers 2," in repr(vector().only(2))


def test_a_refined_concept_is_loaded_as_it_was_saved(bridges, tmp_path):
    concept = refine(bridges["gemma2"], PAIRS, method="logistic")
    assert concept.vectors.shape == (N_LAYERS, D_MODEL)
    loaded = ConceptVector.load(concept.save(tmp_path / "c.safetensors"))
    assert torch.equal(loaded.vectors, concept.vectors)
    assert (loaded.layers, loaded.name, loaded.model, loaded.provenance) == (
        concept.layers,
        concept.name,
        concept.model,
        concept.provenance,
    )
