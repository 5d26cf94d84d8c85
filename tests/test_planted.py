"""What `planted` says of its models is so: tests that lean on them find the truth there."""

import pytest
import torch
from planted import D_HEAD, N_HEADS, N_LAYERS, PAIRS, Planted, planted

from contrans_tl import collect
from contrans_tl.evaluation import plain
from contrans_tl.models import hook_name
from contrans_tl.tokens import encode, pad


@pytest.fixture(scope="module", params=[(shape, by) for shape in ("gpt2", "llama") for by in "qkv"], ids="-".join)
def case(request, tmp_path_factory) -> Planted:
    shape, by = request.param
    return planted(tmp_path_factory.mktemp("planted"), shape, by=by)


def metric(case: Planted, texts, hooks=()) -> torch.Tensor:
    tokens, mask = pad([encoding.ids for encoding in encode(case.model, texts)])
    with case.model.hooks(fwd_hooks=list(hooks)):
        logits = plain(case.model)(tokens, mask)
    return case.metric(logits[torch.arange(len(texts)), mask.sum(1) - 1])


def silence(head: tuple[int, int]):
    def zero(z, hook):
        z = z.clone()
        z[:, :, head[1]] = 0
        return z

    return [(hook_name(head[0], "z"), zero)]


def test_the_concepts_words_bring_the_direction_and_nothing_else_does(case):
    on, off = (collect(case.model, side).values @ case.direction for side in (PAIRS.positive, PAIRS.negative))
    assert (on[:, 0].abs() < 0.3).all() and (off.abs() < 0.6).all()
    assert (on[:, 1:] > 2).all() and (on[:, 1:] < 4.5).all()


def test_the_direction_moves_the_metric(case):
    on, off = metric(case, PAIRS.positive), metric(case, PAIRS.negative)
    assert on.min() > off.max() + 0.3 and (on - off).mean() > 1


def test_without_the_writer_or_the_reader_the_concept_is_gone(case):
    whole = (metric(case, PAIRS.positive) - metric(case, PAIRS.negative)).mean()
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            hooks = silence((layer, head))
            left = (metric(case, PAIRS.positive, hooks) - metric(case, PAIRS.negative, hooks)).mean() / whole
            assert abs(left) < 0.2 if (layer, head) in (case.writer, case.reader) else left > 0.8


def test_heads_have_the_size_that_is_said(case):
    assert (case.model.cfg.n_layers, case.model.cfg.n_heads, case.model.cfg.d_head) == (N_LAYERS, N_HEADS, D_HEAD)
