"""A sweep gives what single runs give, and loses nothing that was finished."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, N_LAYERS, TEXTS, hooks_on, unchecked
from test_attribution import difference, metric_of, ramp

from contrans_tl.diagnostics import sweep, sweeps
from contrans_tl.models import hook_name
from contrans_tl.tokens import encode

ARCHITECTURES = ("llama", "gpt2", "neox", "qwen2", "gemma2")
HEADS = [(0, 1), (2, 3), (2, 0)]


def head_vectors() -> torch.Tensor:
    return torch.randn(N_LAYERS, 4, D_MODEL // 4, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sweep_is_single_runs(bridges, architecture):
    model, concept = bridges[architecture], ramp(bridges[architecture])
    found = sweep(
        model, concept, TEXTS, metric=difference, strengths=(-1.0, 0.5, 2.0), positions=("all", "last"), batch_size=17
    )
    assert {name: len(labels) for name, labels in found.scores.axes.items()} == {
        "layer": 3,
        "strength": 3,
        "positions": 2,
        "prompt": len(TEXTS),
    }
    assert torch.allclose(found.base, metric_of(model, TEXTS), atol=2e-5)
    for layer in concept.layers:
        for strength in (-1.0, 2.0):
            for positions in ("all", "last"):
                single = metric_of(model, TEXTS, concept, layers=[layer], strength=strength, positions=positions)
                here = found.scores.at(layer=layer, strength=f"x{strength:g}", positions=positions).values
                assert torch.allclose(here, single, atol=2e-5)
    label, effect = found.top(1)[0]
    layer, strength, positions = label.split()
    assert effect == pytest.approx(
        float((found.scores.at(layer=layer, strength=strength, positions=positions).values - found.base).mean())
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sweep_of_heads_is_single_runs_with_a_write_at_that_head(bridges, architecture):
    model, vectors = bridges[architecture], head_vectors()
    found = sweep(
        model,
        ramp(model),
        TEXTS,
        metric=difference,
        heads=HEADS,
        head_vectors=vectors,
        strengths=(2.0,),
        positions=("all", -2),
        batch_size=11,
    )
    assert found.scores.axes["head"] == ("L0H1", "L2H3", "L2H0")
    for layer, head in HEADS:
        for positions, where in (("all", slice(None)), ("-2", slice(-2, -1))):

            def write(z: torch.Tensor, hook: Any, where: slice = where, at: tuple[int, int] = (layer, head)) -> torch.Tensor:
                z = z.clone()
                z[:, where, at[1]] += 2.0 * vectors[at]
                return z

            singles = []
            for encoding in encode(model, TEXTS):
                with torch.no_grad():
                    hooks = [(hook_name(layer, "z"), write)]
                    logits = model.run_with_hooks(torch.tensor([encoding.ids]), fwd_hooks=hooks)
                singles.append(difference(logits[:, -1])[0])
            here = found.scores.at(head=f"L{layer}H{head}", strength="x2", positions=positions).values
            assert torch.allclose(here, torch.stack(singles), atol=2e-5)


def test_only_what_a_setting_can_change_is_run(bridges, monkeypatch):
    model, concept, read = bridges["gpt2"], ramp(bridges["gpt2"]), []
    options: dict[str, Any] = dict(metric=difference, layers=[1], strengths=(1.0, 2.0), positions=("all", "last", -2))
    true = sweeps.read_logits

    def look(model: Any, batch: Any, **more: Any) -> torch.Tensor:
        read.append((tuple(batch.tokens.shape), more.get("past") is not None))
        return true(model, batch, **more)

    monkeypatch.setattr(sweeps, "read_logits", look)
    found = sweep(model, concept, TEXTS[:1], **options)
    length = read[0][0][1]
    assert read[1:] == [((2, length), False), ((2, 1), True), ((2, 2), True)]
    monkeypatch.setattr(sweeps.Past, "holds", lambda past, positions: False)  # as of an architecture without such a cache
    read.clear()
    whole = sweep(model, concept, TEXTS[:1], **options)
    assert read[1:] == [((2, length), False)] * 3
    assert torch.allclose(found.scores.values, whole.scores.values, atol=2e-5)


def test_batches_do_not_matter(bridges):
    model, concept = bridges["gpt2"], ramp(bridges["gpt2"])
    one, many = (sweep(model, concept, TEXTS, metric=difference, strengths=(1.0, 3.0), batch_size=n) for n in (1, 1000))
    assert torch.allclose(one.scores.values, many.scores.values, atol=2e-5)


def test_an_interrupted_sweep_keeps_what_was_finished_and_goes_on_from_there(bridges, tmp_path, monkeypatch):
    model, concept, path = bridges["llama"], ramp(bridges["llama"]), tmp_path / "sweep.safetensors"
    options: dict[str, Any] = dict(metric=difference, strengths=(1.0, 2.0), positions=("all", "last"), batch_size=6)
    whole = sweep(model, concept, TEXTS, **options)
    passes = 0
    read = sweeps.read_logits

    def counted(*args: Any, after: Any = None, **kwargs: Any) -> torch.Tensor:
        nonlocal passes
        passes += after is not None
        if passes == 7 and stop:
            raise KeyboardInterrupt
        return read(*args, after=after, **kwargs)

    monkeypatch.setattr(sweeps, "read_logits", counted)
    stop = False
    sweep(model, concept, TEXTS, **options)
    complete, passes, stop = passes, 0, True
    with pytest.raises(KeyboardInterrupt):
        sweep(model, concept, TEXTS, save=path, **options)
    assert path.exists() and not hooks_on(model)
    passes, stop = 0, False
    resumed = sweep(model, concept, TEXTS, save=path, **options)
    assert passes == complete - 6
    assert torch.equal(resumed.scores.values, whole.scores.values) and torch.equal(resumed.base, whole.base)
    passes = 0
    again = sweep(model, concept, TEXTS, save=path, **options)
    assert passes == 0 and torch.equal(again.scores.values, whole.scores.values)


def test_a_file_of_another_question_is_refused(bridges, tmp_path):
    path, model = tmp_path / "sweep.safetensors", bridges["llama"]
    options: dict[str, Any] = dict(metric=difference, strengths=(1.0,), layers=[1], save=path)
    sweep(model, ramp(model), TEXTS, **options)
    others: list[tuple[Any, Any, Any, dict[str, Any]]] = [
        (bridges["qwen2"], ramp(bridges["qwen2"]), TEXTS, options),
        (model, 2.0 * ramp(model), TEXTS, options),
        (model, ramp(model), TEXTS[1:], options),
        (model, ramp(model), TEXTS, options | {"strengths": (1.0, 2.0)}),
        (model, ramp(model), TEXTS, options | {"layers": [2]}),
        (model, ramp(model), TEXTS, options | {"metric": lambda logits: logits[:, 3]}),
    ]
    for other in others:
        with pytest.raises(ValueError, match="holds another sweep"):
            sweep(*other[:3], **other[3])
    (tmp_path / "text").write_text("no sweep")
    with pytest.raises(ValueError, match="not a safetensors file"):
        sweep(model, ramp(model), TEXTS, **options | {"save": Path(tmp_path / "text")})


def test_what_cannot_be_swept_is_refused_in_a_sentence(bridges):
    model, concept = bridges["llama"], ramp(bridges["llama"])
    wrong: list[tuple[dict[str, Any], str]] = [
        (dict(layers=[3]), "between 0 and 2"),
        (dict(layers=[1, 1]), "each of layer once"),
        (dict(strengths=()), "finite strengths"),
        (dict(strengths=(float("nan"),)), "finite strengths"),
        (dict(strengths=(1.0, 1.0)), "each of strength once"),
        (dict(positions=("first",)), "positions 'all', 'last' or from"),
        (dict(positions=(-9,)), "the shortest prompt has"),
        (dict(positions=(0,)), "positions 'all', 'last' or from"),
        (dict(positions=()), "expected positions"),
        (dict(heads=[(0, 4)], head_vectors=head_vectors()), "below \\(3, 4\\)"),
        (dict(heads=[(0, 1), (0, 1)], head_vectors=head_vectors()), "each of head once"),
        (dict(heads=[], head_vectors=head_vectors()), "expected heads of"),
        (dict(heads=[(0, 1)]), "names none at a head's output"),
        (dict(heads=[(0, 1)], head_vectors=head_vectors()[:2]), "expected head_vectors of shape"),
        (dict(heads=[(0, 1)], layers=[0], head_vectors=head_vectors()), "not both"),
        (dict(metric=lambda logits: logits.mean()), "one floating-point number a prompt"),
        (dict(batch_size=0), "batch_size of at least 1"),
    ]
    with unchecked():
        for options, message in wrong:
            with pytest.raises(ValueError, match=message):
                sweep(model, concept, TEXTS, **{"metric": difference, **options})
        with pytest.raises(ValueError, match="there is none at 2"):
            sweep(model, concept.only(0, 1), TEXTS, metric=difference, layers=[2])
        with pytest.raises(ValueError, match="reformulate it first"):
            sweep(bridges["gpt2"], concept, TEXTS, metric=difference)
    assert not hooks_on(model)


def test_what_is_swept_needs_no_gradient(bridges):
    model, concept = bridges["gpt2"], ramp(bridges["gpt2"])
    hits = sweep(model, concept, TEXTS, metric=lambda logits: (logits[:, 41] > 0).float(), strengths=(4.0,))
    assert set(hits.scores.values.flatten().tolist()) <= {0.0, 1.0}
    assert hits.to_dict()["base"] == hits.base.tolist() and str(hits).startswith("Sweep: random")
    assert len(hits.to_dataframe()) == hits.scores.values.numel()
