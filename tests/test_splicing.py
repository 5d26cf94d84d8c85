"""Theorems of splicing: a model spliced with itself reads on as if nothing had happened; the mean is the zero of the scale.

Tolerances: residuals and maps are float32; nats a token agree within 1e-4.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CORPUS, TEXTS, hf_steered_logits, random_model, save_word_tokenizer
from torch import Tensor

from contrans_tl import load_model, read_sentences
from contrans_tl.demo import demo_data
from contrans_tl.reformulation import fit_maps
from contrans_tl.splicing import SpliceReport, same_ends, splice
from contrans_tl.tokens import Encoding, encode

HELD_OUT = [*TEXTS, "feel the brown letter", "a happy river, lazy dogs; the fox\tsleeps"]


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model that can read: to a random one, ablation is no loss."""
    return load_model(str(demo_data() / "pair" / "source"), device="cpu")


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    return read_sentences(demo_data() / "generic.txt")[:80]


@pytest.fixture(scope="module")
def itself(trained: Any, sentences: list[str]) -> SpliceReport:
    """A model spliced into itself by identity maps, but for the last pair, of different layers."""
    maps = fit_maps(trained, trained, sentences[:60], method="identity", source_layers=[0, 2], target_layers=[0, 2])
    return splice(trained, trained, maps, sentences[60:], layers=[(0, 0), (2, 2), (0, 2)])


def test_a_model_spliced_with_itself_reads_on_as_if_nothing_had_happened(itself: SpliceReport) -> None:
    for one in itself.splices[:2]:
        assert one.loss["spliced"].value == pytest.approx(one.loss["clean"].value, abs=1e-5)
        assert one.recovered["spliced"].value == pytest.approx(1, abs=1e-5)
        assert one.kl["spliced"].value == pytest.approx(0, abs=1e-5) and one.increase["spliced"].value == pytest.approx(
            0, abs=1e-5
        )
        assert one.recovered["mean"].value == 0 and one.kl["mean"].value > 2 and one.increase["mean"].low > 2
    assert itself.replaced > 0.85 and itself.texts == 20, "all but BOS and the last token of every text"


def test_another_layer_is_not_as_good_as_its_own(itself: SpliceReport) -> None:
    assert itself.splices[2].recovered["spliced"].high < 0.99 and itself.splices[2].kl["spliced"].low > 0.05
    assert itself.splices[0].loss["clean"] == itself.splices[2].loss["clean"]


def test_where_ablation_costs_nothing_there_is_nothing_to_recover(bridges: dict[str, Any]) -> None:
    maps = fit_maps(bridges["gpt2"], bridges["gpt2"], CORPUS, source_layers=[1], target_layers=[1])
    one = splice(bridges["gpt2"], bridges["gpt2"], maps, HELD_OUT, layers=[(1, 1)]).splices[0]
    costs = one.increase["mean"].low > 0
    assert all(np.isfinite(estimate.value) == costs for estimate in one.recovered.values()) and not costs


def test_recovered_is_the_share_of_the_cross_entropy_between_mean_and_clean(itself: SpliceReport) -> None:
    for one in itself.splices:
        loss = {arm: estimate.value for arm, estimate in one.loss.items()}
        for arm in ("spliced", "shuffled", "mean"):
            share = (loss["mean"] - loss[arm]) / (loss["mean"] - loss["clean"])
            assert one.recovered[arm].value == pytest.approx(share, abs=1e-6)
            assert one.recovered[arm].low <= one.recovered[arm].value <= one.recovered[arm].high
            assert one.increase[arm].value == pytest.approx(loss[arm] - loss["clean"], abs=1e-6)


def test_the_splice_is_what_writing_into_the_plain_model_gives(bridges: dict[str, Any], references: dict[str, Any]) -> None:
    """Against Hugging Face without TransformerLens: every token but BOS and the last overwritten with the mean row."""
    llama = bridges["llama"]
    maps = fit_maps(llama, llama, CORPUS)
    texts, mean = TEXTS[1:4], maps.target.at(1).mean(0)
    losses, n, kls = 0.0, 0, 0.0
    for encoding in encode(llama, texts):
        ids = list(encoding.ids)

        def write(resid: Tensor, ids: list[int] = ids) -> Tensor:
            resid = resid.clone()
            resid[1 : len(ids) - 1] = mean
            return resid

        clean, ablated = (
            hf_steered_logits(references["llama"], ids, 1, how).log_softmax(-1)[1:-1] for how in (lambda resid: resid, write)
        )
        losses -= float(ablated.gather(-1, torch.tensor(ids[2:])[:, None]).sum())
        kls += float((clean.exp() * (clean - ablated)).sum())
        n += len(ids) - 2
    report = splice(llama, llama, maps, texts, layers=[(1, 1)])
    assert report.tokens == n
    assert report.splices[0].loss["mean"].value == pytest.approx(losses / n, abs=1e-4)
    assert report.splices[0].kl["mean"].value == pytest.approx(kls / n, abs=1e-4)


def test_batches_are_texts_one_by_one(bridges: dict[str, Any]) -> None:
    maps = fit_maps(bridges["llama"], bridges["gpt2"], CORPUS)
    reports = [
        splice(bridges["llama"], bridges["gpt2"], maps, HELD_OUT, layers=[(2, 1), (0, 2)], batch_size=size) for size in (1, 8)
    ]
    for alone, batched in zip(*(report.splices for report in reports), strict=True):
        for name in ("loss", "kl"):
            for arm, estimate in getattr(alone, name).items():
                assert estimate.value == pytest.approx(getattr(batched, name)[arm].value, abs=1e-4), (name, arm)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("words")
    random_model("neox", seed=1).save_pretrained(folder)
    save_word_tokenizer(folder)
    return load_model(folder, device="cpu")


def test_different_tokenizers_meet_where_their_tokens_end_at_one_character(bridges: dict[str, Any], words: Any) -> None:
    llama = bridges["llama"]
    text = "a letter made me feel happy, and the dog"
    for source, target in ((llama, words), (words, llama)):
        reads = [encode(model, [text])[0] for model in (source, target)]
        places = same_ends(*reads)
        ends = [reads[0].ends[s] for s in places]
        assert ends == [reads[1].ends[t] for t in places.values()] and len(ends) >= 7 and 0 not in ends
        assert all(t + 1 < len(reads[1].ids) for t in places.values()), "something follows"
    report = splice(llama, words, fit_maps(llama, words, CORPUS), HELD_OUT, layers=[(1, 1)])
    counts = sum(len(same_ends(*pair)) for pair in zip(encode(llama, HELD_OUT), encode(words, HELD_OUT), strict=True))
    assert report.tokens == counts
    back = splice(words, llama, fit_maps(words, llama, CORPUS), HELD_OUT, layers=[(1, 1)])
    assert back.replaced < 0.9, "what the word-level source has no row for is left alone"


def test_a_token_amid_a_character_is_not_replaced() -> None:
    whole = Encoding(ids=(0, 5, 6, 7), ends=(-1, 1, 2, 4))
    bytewise = Encoding(ids=(0, 5, 8, 9, 7, 3), ends=(0, 1, -1, 2, 4, 6))
    assert same_ends(whole, bytewise) == {1: 1, 2: 3, 3: 4}
    assert same_ends(bytewise, whole) == {1: 1, 3: 2}, "nothing follows the last token"


def test_a_map_without_pairing_recovers_nothing(trained: Any, sentences: list[str]) -> None:
    maps = fit_maps(trained, trained, sentences[:60], source_layers=[2], target_layers=[1])
    one = splice(trained, trained, maps, sentences[60:], layers=[(2, 1)]).splices[0]
    assert one.recovered["spliced"].low > 0.5 > 0.1 > one.recovered["shuffled"].high
    assert one.kl["spliced"].high < one.kl["shuffled"].low


def test_a_report_is_short_to_print_and_plain_to_save(itself: SpliceReport) -> None:
    lines = str(itself).splitlines()
    assert len(lines) == 2 + 3 and max(map(len, lines)) <= 128 and "CE recovered" in lines[1]
    assert json.loads(json.dumps(itself.to_dict()))["splices"][0]["recovered"]["mean"]["value"] == 0


def test_what_cannot_be_spliced_is_said_before_any_model_runs(bridges: dict[str, Any]) -> None:
    llama, gpt2 = bridges["llama"], bridges["gpt2"]
    maps = fit_maps(llama, gpt2, CORPUS, source_layers=[1], target_layers=[1])
    with pytest.raises(ValueError, match="these maps are between"):
        splice(gpt2, llama, maps, HELD_OUT, layers=[(1, 1)])
    with pytest.raises(ValueError, match="expected a collected layer"):
        splice(llama, gpt2, maps, HELD_OUT, layers=[(1, 2)])
    with pytest.raises(ValueError, match="at least one pair of layers"):
        splice(llama, gpt2, maps, HELD_OUT, layers=[])
    with pytest.raises(ValueError, match="a list of at least two texts"):
        splice(llama, gpt2, maps, HELD_OUT[:1], layers=[(1, 1)])
    with pytest.raises(ValueError, match="at least two texts in which tokens of both"):
        splice(llama, gpt2, maps, [HELD_OUT[0], "a"], layers=[(1, 1)])


def test_maps_of_models_without_bos_are_spliced_as_they_were_fitted(bridges: dict[str, Any]) -> None:
    llama = bridges["llama"]
    with_bos, without = (fit_maps(llama, llama, CORPUS, prepend_bos=bos, method="identity") for bos in (True, False))
    reports = [splice(llama, llama, maps, HELD_OUT, layers=[(1, 1)]) for maps in (with_bos, without)]
    assert reports[0].splices[0].loss["clean"].value != reports[1].splices[0].loss["clean"].value
    assert all(report.splices[0].kl["spliced"].value == pytest.approx(0, abs=1e-5) for report in reports)
