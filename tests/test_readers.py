"""Readers, pattern changes and paths: the head that reads is named first, and chance is as rare as said."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, TEXTS, save_tokenizer, unchecked
from einops import einsum
from planted import PAIRS, Planted, planted
from test_hooked_transformer import HookedTransformer, hooked_transformer

from contrans_tl import ConceptVector, identify
from contrans_tl.data import Question
from contrans_tl.diagnostics import patch_paths, pattern_changes, readers
from contrans_tl.diagnostics.reading import _chances, _reads
from contrans_tl.evaluation.intervals import clopper_pearson

TOLERANCE = 1e-5
"""float32 at a stream of scale 1 to 10, as for the two model classes."""


def some_concept(model, seed: int = 0) -> ConceptVector:
    vectors = 3 * torch.randn(N_LAYERS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    return ConceptVector(vectors, tuple(range(N_LAYERS)), "some", identify(model))


def some_metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 7] - logits[:, 9]


def cached(model, text: str, hooks=()) -> dict[str, torch.Tensor]:
    """Everything of one prompt, and the logits behind it, from TransformerLens's own cache."""
    with model.hooks(fwd_hooks=list(hooks)):
        logits, cache = model.run_with_cache(model.to_tokens(text))
    return {**dict(cache.items()), "logits": logits[0, -1]}


def add(vector: torch.Tensor, layer: int, *, last: bool = False):
    def hook_fn(resid, hook):
        return torch.cat([resid[:, :-1], resid[:, -1:] + vector], 1) if last else resid + vector

    return (f"blocks.{layer}.hook_resid_post", hook_fn)


@pytest.fixture(scope="module", params=[(shape, by) for shape in ("gpt2", "llama") for by in "qkv"], ids="-".join)
def case(request, tmp_path_factory) -> Planted:
    shape, by = request.param
    return planted(tmp_path_factory.mktemp("planted"), shape, by=by)


def named(case: Planted) -> str:
    return "L{}H{}".format(*case.reader)


def test_the_planted_reader_is_named_first_by_what_it_reads_with(case):
    shares = case.by != "q" and case.model.cfg.n_key_value_heads == 2
    readers_ = {f"{named(case)} {case.by}"} | ({f"L3H0 {case.by}"} if shares else set())
    for layer in (0, 1, 2):
        found = readers(case.model, case.concept(), PAIRS.negative, layer=layer, draws=200)
        assert {label for label, _ in found.top(len(readers_))} == readers_
        assert found.top(1)[0][1] > 5
        beyond = [found.family.label(i) for i in range(found.family.values.numel()) if found.family.values.flatten()[i] <= 0.05]
        assert set(beyond) == readers_
        assert any(reader in str(found) for reader in readers_)


def test_attention_of_the_planted_reader_moves_most_if_queries_or_keys_read(case):
    found = pattern_changes(case.model, case.concept(), PAIRS.negative, layer=1, positions="last" if case.by == "k" else "all")
    if case.by == "v":
        assert found.scores.values.max() < 1e-4
    else:
        (first, most), (_, second) = found.top(2)
        assert first == named(case) and most > 0.3 and most > 100 * second
        assert found.ratio.at(layer="L3", head="H1") > 10


def test_the_effect_passes_through_the_planted_reader_alone(case):
    options = dict(metric=case.metric, layer=1, positions="last" if case.by == "k" else "all")
    found = patch_paths(case.model, case.concept(), PAIRS.negative, **options)
    assert found.top(1)[0][0] in (f"{named(case)} {case.by}", f"{named(case)} qkv")
    head = dict(layer="L3", head="H1")
    assert found.scores.at(by=case.by, **head) == pytest.approx(found.whole.value, rel=0.5)
    others = [value for label, value in found.top(99) if not label.startswith(named(case))]
    assert max(map(abs, others)) < 0.1 * found.whole.value
    if case.by == "k":
        everywhere = patch_paths(case.model, case.concept(), PAIRS.negative, **options | {"positions": "all"}, by=["k"])
        assert abs(everywhere.scores.at(by="k", **head)) < 0.15 * found.scores.at(by="k", **head)


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_size_is_that_of_the_change_with_the_norms_scale_held(bridges, architecture):
    model = bridges[architecture]
    concept, strength, text = some_concept(model), 0.7, TEXTS[1]
    found = readers(model, concept, [text], layer=1, strength=strength, draws=20)
    clean = cached(model, text)
    scale = "blocks.2.ln1.hook_scale"
    held = (scale, lambda _, hook: clean[scale])
    changed = cached(model, text, [add(strength * concept.at(1), 1), held])
    for by in "qkv":
        site = f"blocks.2.attn.hook_{by}"
        size = (changed[site] - clean[site])[0].norm(dim=-1).mean(0)
        expected = size.repeat_interleave(model.cfg.n_heads // len(size))
        assert (found.size.at(by=by, layer="L2").values - expected).abs().max() < 1e-4 * expected.max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["all", "last"])
def test_a_patched_head_puts_out_what_it_would_under_the_transplant_and_nothing_else_does(bridges, architecture, positions):
    model = bridges[architecture]
    concept, text, layer = some_concept(model), TEXTS[1], 2
    at = [(layer, head) for head in range(model.cfg.n_heads)]
    found = patch_paths(model, concept, [text], metric=some_metric, layer=1, positions=positions, at=at)
    clean = cached(model, text)
    changed = cached(model, text, [add(concept.at(1), 1, last=positions == "last")])
    site = f"blocks.{layer}.attn.hook_z"
    shared = model.cfg.n_heads // changed[f"blocks.{layer}.attn.hook_v"].shape[2]
    pattern, values = clean[f"blocks.{layer}.attn.hook_pattern"], changed[f"blocks.{layer}.attn.hook_v"]
    values = values.repeat_interleave(shared, dim=2)
    z = {
        "qkv": changed[site],
        "v": einsum(pattern, values, "prompt head query key, prompt key head d_head -> prompt query head d_head"),
    }
    base = some_metric(clean["logits"][None])
    assert found.whole.value == pytest.approx(float(some_metric(changed["logits"][None]) - base), abs=1e-4)
    for by, new in z.items():
        for head in range(model.cfg.n_heads):
            mixed = clean[site].clone()
            mixed[:, :, head] = new[:, :, head]
            effect = some_metric(cached(model, text, [(site, lambda _, hook, mixed=mixed: mixed)])["logits"][None]) - base
            assert found.scores.at(by=by, layer="L2", head=head) == pytest.approx(float(effect), abs=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_queries_and_keys_are_patched_for_one_head(bridges, architecture):
    model = bridges[architecture]
    concept, text = some_concept(model), TEXTS[1]
    found = patch_paths(model, concept, [text], metric=some_metric, layer=1)
    clean, changed = cached(model, text), cached(model, text, [add(concept.at(1), 1)])
    for by in ("q", "k"):
        site, z_site = f"blocks.2.attn.hook_{by}", "blocks.2.attn.hook_z"
        # All heads' queries or keys changed: a head's own output does not depend on the others'.
        z = cached(model, text, [(site, lambda _, hook, new=changed[site]: new)])[z_site]
        for head in range(model.cfg.n_heads):
            mixed = clean[z_site].clone()
            mixed[:, :, head] = z[:, :, head]
            logits = cached(model, text, [(z_site, lambda _, hook, mixed=mixed: mixed)])["logits"]
            effect = some_metric(logits[None]) - some_metric(clean["logits"][None])
            assert found.scores.at(by=by, layer="L2", head=head) == pytest.approx(float(effect), abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pattern_changes_are_those_of_single_prompts(bridges, architecture):
    model = bridges[architecture]
    concept = some_concept(model)
    found = pattern_changes(model, concept, TEXTS, layer=0, strength=0.5, batch_size=3)
    expected = torch.zeros(len(TEXTS), 2, model.cfg.n_heads)
    for row, text in enumerate(TEXTS):
        clean, changed = cached(model, text), cached(model, text, [add(0.5 * concept.at(0), 0)])
        for m in (1, 2):
            p, q = (run[f"blocks.{m}.attn.hook_pattern"][0] for run in (clean, changed))
            kl = torch.where(p > 0, p * (p / q.clamp_min(1e-30)).log(), 0.0).sum(-1)[:, 1:]
            expected[row, m - 1] = kl.mean(-1) if kl.numel() else 0.0
    assert (found.scores.values - expected.mean(0)).abs().max() < TOLERANCE
    assert (found.random.values > 0).all() and len(found.to_dataframe()) == 2 * model.cfg.n_heads


def test_random_directions_are_named_as_rarely_as_said(bridges):
    """Of random models: places alone at 5%, and any of them at all at 5%. 60 concepts a model, each beside 99 directions."""
    lists, places, families = 60, [], 0
    for architecture in ARCHITECTURES:
        drawn = torch.randn(lists * 100, D_MODEL, generator=torch.Generator().manual_seed(0))
        sizes = torch.stack([_reads(bridges[architecture], m, drawn) for m in (1, 2)], dim=2)
        for some in sizes.split(100):
            alone, family = _chances(some)
            places.append(float((alone <= 0.05).double().mean()))
            families += bool((family <= 0.05).any())
    low, high = clopper_pearson(families, len(places))
    assert low < 0.05 < high, families
    rate = torch.tensor(places)
    assert abs(rate.mean() - 0.05) < 3 * rate.std() / len(places) ** 0.5


def test_a_random_concept_is_named_as_rarely_as_said(bridges):
    """The whole way, some times only."""
    lists, named = 30, 0
    for seed in range(lists):
        model = bridges[ARCHITECTURES[seed % len(ARCHITECTURES)]]
        found = readers(model, some_concept(model, 100 + seed), TEXTS[:1], layer=0, draws=99, seed=seed)
        named += bool((found.family.values <= 0.05).any())
    assert clopper_pearson(named, lists)[0] < 0.05, named


def test_batches_rows_and_subsets_change_nothing(bridges):
    model = bridges["llama"]
    concept = some_concept(model)
    options = dict(metric=some_metric, layer=0)
    one, many = (patch_paths(model, concept, TEXTS, batch_size=n, rows=r, **options) for n, r in ((2, 6), (8, 40)))
    assert (one.scores.values - many.scores.values).abs().max() < 1e-4
    some = patch_paths(model, concept, TEXTS, at=[(2, 3)], by=["v"], **options)
    assert some.scores.at(by="v", layer="L2", head="H3") == pytest.approx(
        one.scores.at(by="v", layer="L2", head="H3"), abs=1e-4
    )
    assert some.scores.values.isnan().sum() == some.scores.values.numel() - 1 and len(some.top(5)) == 1
    sizes = [readers(model, concept, TEXTS, layer=0, draws=20, batch_size=n).size.values for n in (1, 8)]
    assert (sizes[0] - sizes[1]).abs().max() < 1e-4
    twice = readers(model, concept, TEXTS, layer=0, strength=2.0, draws=20)
    assert torch.allclose(twice.size.values, 2 * sizes[0], rtol=1e-4)


def test_questions_bring_their_metric(bridges):
    questions = [Question("the lazy dog", (" quick", " river"), 0), Question("a letter", (" over", " dog"), 1)]
    found = patch_paths(bridges["gpt2"], some_concept(bridges["gpt2"]), questions, layer=1, by=["qkv"])
    assert found.metric == "logit_difference" and "logits" in found.scores.unit
    assert found.to_dict()["whole"]["value"] == found.whole.value


if HookedTransformer is not None:

    @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
    def test_both_classes_have_the_same_readers(bridges, references, folders, architecture):
        hooked = hooked_transformer(architecture, references[architecture], save_tokenizer(folders[architecture]))
        both = [(model, some_concept(model)) for model in (hooked, bridges[architecture])]
        for name in ("scores", "size", "family"):
            x, y = (getattr(readers(*one, TEXTS, layer=0, draws=40), name).values for one in both)
            assert (x - y).abs().max() < 1e-3
        x, y = (pattern_changes(*one, TEXTS, layer=0, draws=1).scores.values for one in both)
        assert (x - y).abs().max() < TOLERANCE
        x, y = (patch_paths(*one, TEXTS, layer=0, metric=some_metric).scores.values for one in both)
        assert (x - y).abs().max() < 1e-4

    def test_a_folded_norm_reads_the_same(references, folders):
        sizes = []
        for processed in (False, True):
            model = hooked_transformer("gpt2", references["gpt2"], save_tokenizer(folders["gpt2"]), processed=processed)
            sizes.append(readers(model, some_concept(model), TEXTS, layer=0, draws=20).size.values)
        assert (sizes[0] - sizes[1]).abs().max() < 1e-4


def test_an_architecture_that_reads_otherwise_is_refused(bridges):
    model = bridges["qwen2"]

    def normed(q, hook):
        return q / q.norm(dim=-1, keepdim=True)

    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_q", normed)]):
        for run in (readers, partial(patch_paths, metric=some_metric)):
            with pytest.raises(ValueError, match="q of layer 2 is not"):
                run(model, some_concept(model), TEXTS, layer=0)


def test_what_cannot_be_is_refused_before_any_pass(bridges, monkeypatch):
    model, other = bridges["llama"], bridges["gpt2"]
    concept = some_concept(model)
    monkeypatch.setattr(type(model), "run_with_hooks", lambda *a, **k: pytest.fail("a pass was made"))
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("a pass was made"))
    both = [readers, pattern_changes, partial(patch_paths, metric=some_metric)]
    of_positions, of_paths = both[1:], both[2:]
    for run_these, change, message in [
        (both, dict(concept=some_concept(other)), "lives in"),
        (both, dict(layer=None), "choose one"),
        (both, dict(layer=N_LAYERS - 1), "expected a layer of 0 to 1"),
        (both, dict(layer=9), "there is none at 9"),
        (both, dict(strength=0.0), "other than 0"),
        (both, dict(prompts=[]), "none|got 0"),
        (both[:1], dict(draws=3), "at least 20 draws"),
        (both[1:2], dict(draws=0), "at least one draw"),
        (of_positions, dict(positions="first"), "'all' or 'last'"),
        (of_paths, dict(at=[(0, 1)]), "behind the injection"),
        (of_paths, dict(at=[(2, 4)]), r"got \[\(2, 4\)\]"),
        (of_paths, dict(by=["z"]), "q, k, v, qkv"),
        (of_paths, dict(metric=lambda logits: logits.mean()), "one floating-point number a prompt"),
    ]:
        for run in run_these:
            options = dict(concept=concept, prompts=TEXTS, layer=0) | change
            with unchecked(), pytest.raises(ValueError, match=message):
                run(model, **options)


def test_a_concept_of_another_basis_is_refused(bridges):
    concept = some_concept(bridges["gpt2"])
    concept = replace(concept, model=replace(concept.model, basis="centred"))
    with pytest.raises(ValueError, match="reformulate"):
        readers(bridges["gpt2"], concept, TEXTS, layer=0)
