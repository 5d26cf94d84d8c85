"""Rows of activations are those of each text alone in plain Hugging Face, however the texts are batched and padded."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    D_MODEL,
    N_CTX,
    N_LAYERS,
    TEXTS,
    hf_residuals,
    hooks_on,
    random_model,
    save_tokenizer,
    save_word_tokenizer,
    unchecked,
)
from transformers import AutoTokenizer

from contrans_tl import collect, load_model, pair
from contrans_tl.tokens import by_length, encode, word_ends

TOLERANCE = 1e-5
"""The brief's bound. Float32 sums in another order (batched or alone) differ by 1e-6 at a stream of scale 1 to 10; a row at a
wrong token, or one that saw padding, differs by more than 0.1."""


def expected_rows(hf: Any, tokenizer: Any, text: str, *, rows: str, bos: bool) -> torch.Tensor:
    """The rows of one text, "row layer d_model", through nothing but Hugging Face."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [tokenizer.bos_token_id] * bos + encoding["input_ids"]
    resid = hf_residuals(hf, ids)
    if rows == "last":
        return resid[:, -1][None]
    ends = [end for _, end in encoding["offset_mapping"]]
    words = [len(ids) - 1 - ends[::-1].index(m.end()) for m in re.finditer(r"\w+", text) if m.end() in ends]
    return resid[:, words].transpose(0, 1)


@pytest.fixture(scope="module", params=itertools.product(ARCHITECTURES, (True, False), ("right", "left")))
def cell(request: Any, tmp_path_factory: Any, references: dict[str, Any]) -> tuple[Any, Any, Any]:
    """One cell of the table: (model, plain Hugging Face model, plain tokenizer)."""
    architecture, pad_is_eos, side = request.param
    folder = tmp_path_factory.mktemp("cell")
    random_model(architecture).save_pretrained(folder)
    tokenizer = save_tokenizer(folder, pad_is_eos=pad_is_eos, side=side)
    assert (tokenizer.pad_token_id == tokenizer.eos_token_id, tokenizer.padding_side) == (pad_is_eos, side)
    return load_model(folder, device="cpu"), references[architecture], tokenizer


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("rows", ["last", "words"])
def test_rows_of_a_padded_batch_equal_one_text_at_a_time_through_hugging_face(cell, rows, bos):
    model, hf, tokenizer = cell
    x = collect(model, TEXTS, rows=rows, prepend_bos=bos, batch_size=3)
    expected = torch.cat([expected_rows(hf, tokenizer, text, rows=rows, bos=bos) for text in TEXTS])
    assert x.values.shape == expected.shape == (len(x), N_LAYERS, D_MODEL)
    assert (x.values - expected).abs().max() < TOLERANCE
    assert x.prepend_bos is bos
    assert not hooks_on(model)


def test_bos_is_kept_or_dropped_as_asked_and_the_family_decides_otherwise(bridges):
    rows = {bos: collect(bridges["llama"], TEXTS, prepend_bos=bos) for bos in (True, False, None)}
    assert (rows[True].values - rows[False].values).abs().max() > 0.01  # bos changes what follows it
    assert torch.equal(rows[None].values, rows[True].values) and rows[None].prepend_bos is True
    assert collect(bridges["neox"], TEXTS).prepend_bos is False


def test_layers_and_batches_do_not_change_a_row(bridges):
    model = bridges["qwen2"]
    whole = collect(model, TEXTS, rows="words", batch_size=1)
    for layers in ([0], [1], [N_LAYERS - 1], [2, 0]):
        part = collect(model, TEXTS, rows="words", layers=layers, batch_size=2)
        assert part.layers == tuple(layers)
        assert (part.values - whole.only(layers).values).abs().max() < TOLERANCE
        assert torch.equal(part.end, whole.end) and torch.equal(part.sentence, whole.sentence)


def test_the_last_layer_is_the_last_blocks_output_and_not_the_final_norms(bridges, references):
    hf = references["llama"]
    ids = hf_ids(bridges["llama"], TEXTS[1])
    with torch.no_grad():
        after_norm = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
    last = collect(bridges["llama"], [TEXTS[1]]).at(N_LAYERS - 1)[0]
    assert (last - hf_residuals(hf, ids)[-1, -1]).abs().max() < TOLERANCE
    assert (last - after_norm).abs().max() > 0.1


def hf_ids(model: Any, text: str) -> list[int]:
    return [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_head_is_never_computed(bridges, architecture):
    model = bridges[architecture]
    fired: list[str] = []
    names = [name for name in model.hook_dict if name.startswith(("unembed", "ln_final"))]
    assert any(name.startswith("unembed") for name in names)
    with model.hooks(fwd_hooks=[(name, lambda x, hook: fired.append(hook.name)) for name in names]):
        collect(model, TEXTS)
        collect(model, TEXTS, layers=[0])
        assert not fired
        model(torch.tensor([[1, 2, 3]]))
    assert fired  # and the hooks would have told


def test_blocks_above_the_highest_requested_layer_are_not_computed(bridges):
    model = bridges["llama"]
    fired: list[str] = []
    with model.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda x, hook: fired.append(hook.name))]):
        collect(model, TEXTS, layers=[0, 1])
    assert not fired


def test_a_text_beyond_the_context_is_refused_at_the_last_token(bridges):
    long = "fox " * N_CTX
    with pytest.raises(ValueError, match=f"does not fit the context of .* \\({N_CTX}\\)"):
        collect(bridges["llama"], ["the dog", long])


def test_a_text_that_just_fits_the_context_is_accepted(bridges, references):
    model = bridges["gpt2"]
    words = "fox " * N_CTX
    ids = model.tokenizer(words, add_special_tokens=False)["input_ids"][: N_CTX - 1]
    text = model.tokenizer.decode(ids)
    x = collect(model, [text, "the dog"])
    assert (x.values[0] - hf_residuals(references["gpt2"], [0, *ids])[:, -1]).abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="does not fit"):
        collect(model, [text + " the dog"])


def test_words_beyond_the_context_of_one_model_are_dropped_from_both(bridges, tmp_path):
    short = load_model(
        save_model(tmp_path, "llama", save_word_tokenizer), device="cpu"
    )  # a token a word: its context holds more words than that of the byte-level model
    text = " ".join(["quick brown", "letters"] * 20)
    x = collect(bridges["llama"], [text], rows="words")
    y = collect(short, [text], rows="words")
    assert len(x) < len(y) <= N_CTX
    x2, y2 = pair(x, y)
    assert len(x2) == len(y2) == len(x)
    assert torch.equal(x2.end, y2.end)
    assert torch.equal(y2.values, y.values[: len(x)])


def save_model(folder: Path, architecture: str, tokenizer: Any) -> Path:
    random_model(architecture).save_pretrained(folder)
    tokenizer(folder)
    return folder


def test_two_tokenizers_give_rows_of_the_same_words(bridges, references, tmp_path):
    other = load_model(save_model(tmp_path, "gpt2", save_word_tokenizer), device="cpu")
    texts = [*TEXTS, "unknown words, too: xylophone 42!"]
    x, y = pair(collect(bridges["llama"], texts, rows="words"), collect(other, texts, rows="words"))
    words = [(i, m.end()) for i, text in enumerate(texts) for m in re.finditer(r"\w+", text)]
    for rows in (x, y):
        assert list(zip(rows.sentence.tolist(), rows.end.tolist(), strict=True)) == words
    # and they are those of each model, each with its own tokens
    plain = AutoTokenizer.from_pretrained(tmp_path)
    expected = torch.cat([expected_rows(references["gpt2"], plain, text, rows="words", bos=True) for text in texts])
    assert (y.values - expected).abs().max() < TOLERANCE


def test_words_at_which_one_tokenizer_ends_no_token_are_dropped_from_both(bridges, tmp_path):
    across = load_model(save_model(tmp_path, "llama", lambda folder: save_tokenizer(folder, across_words=True)), device="cpu")
    texts = ["the quick brown fox jumps over the lazy dog", "quick river"]
    x, y = collect(bridges["llama"], texts, rows="words"), collect(across, texts, rows="words")
    assert 0 < len(y) < len(x) == 11
    shared = set(zip(x.sentence.tolist(), x.end.tolist(), strict=True))
    shared &= set(zip(y.sentence.tolist(), y.end.tolist(), strict=True))
    x2, y2 = pair(x, y)
    assert list(zip(x2.sentence.tolist(), x2.end.tolist(), strict=True)) == sorted(shared)
    assert torch.equal(x2.end, y2.end) and torch.equal(x2.sentence, y2.sentence)
    rows_of_y = list(zip(y.sentence.tolist(), y.end.tolist(), strict=True))
    kept = [rows_of_y.index(key) for key in zip(y2.sentence.tolist(), y2.end.tolist(), strict=True)]
    assert torch.equal(y2.values, y.values[kept])


def test_a_word_of_multi_byte_characters_ends_at_the_last_byte_of_its_last_character(bridges, references):
    model, text = bridges["llama"], "café 犬 naïveté dog"
    plain = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    # The bytes tell where a word ends without any offsets: tokens of this tokenizer are bytes of the text.
    sizes = [len(model.tokenizer.convert_ids_to_tokens([i])[0]) for i in plain]  # byte-level: a character a byte
    ends = [len(text[: m.end()].encode()) for m in re.finditer(r"\w+", text)]
    upto = torch.tensor(sizes).cumsum(0).tolist()
    assert upto[-1] == len(text.encode()) > len(text)
    expected = hf_residuals(references["llama"], [0, *plain])[:, [1 + upto.index(end) for end in ends]].transpose(0, 1)
    x = collect(model, [text], rows="words")
    assert x.end.tolist() == [m.end() for m in re.finditer(r"\w+", text)]
    assert (x.values - expected).abs().max() < TOLERANCE


def test_a_character_cut_in_two_by_the_context_ends_no_word(bridges, monkeypatch):
    model = bridges["llama"]
    for fill in range(4):  # the cut falls before, within and behind the three bytes of the character
        text = "a " * 20 + "." * fill + " 犬 dog"
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        places = word_ends(text, encode(model, [text], prepend_bos=False)[0])
        assert len(places) == 22
        for room in range(20, len(ids) + 1):
            with monkeypatch.context() as patch:
                patch.setattr(model.cfg, "n_ctx", room)
                short = encode(model, [text], prepend_bos=False, truncate=True)[0]
            assert word_ends(text, short) == {end: place for end, place in places.items() if place < room}


def test_bf16_rows_are_kept_in_float32(folders, bridges):
    model = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16)
    x, exact = collect(model, TEXTS), collect(bridges["llama"], TEXTS)
    assert x.values.dtype == torch.float32
    # bfloat16 keeps 8 bits: relative steps of 2^-8, a few of them over three layers
    assert (x.values - exact.values).norm() / exact.values.norm() < 0.05


def test_training_mode_is_refused_with_the_remedy(folders):
    model = load_model(folders["gpt2"], device="cpu")
    model.train()
    with pytest.raises(ValueError, match="eval mode.*model.eval()"):
        collect(model, TEXTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "at least one text"),
        ({"texts": "the dog"}, "list of texts"),
        ({"texts": ["the dog", ""]}, "no tokens"),
        ({"texts": ["..."], "rows": "words"}, "none of the texts"),
        ({"rows": "word"}, "'last' or 'words'"),
        ({"layers": [0, N_LAYERS]}, f"between 0 and {N_LAYERS - 1}"),
        ({"layers": [-1]}, f"between 0 and {N_LAYERS - 1}"),
        ({"layers": []}, f"between 0 and {N_LAYERS - 1}"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_collected_is_one_line_of_error(bridges, arguments, message):
    arguments = {"texts": TEXTS} | arguments
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        collect(bridges["llama"], arguments.pop("texts"), **arguments)
    assert "\n" not in str(caught.value)


def test_activations_of_other_texts_or_rows_are_not_paired(bridges):
    x = collect(bridges["llama"], TEXTS, rows="words")
    for texts, rows in ((TEXTS[::-1], "words"), (TEXTS, "last")):
        with pytest.raises(ValueError, match="same texts"):
            pair(x, collect(bridges["gpt2"], texts, rows=rows))


def test_a_layer_that_was_not_collected_is_refused(bridges):
    x = collect(bridges["llama"], TEXTS, layers=[1])
    with pytest.raises(ValueError, match="collected layer"):
        x.at(0)


def test_batches_hold_every_text_once_and_the_longest_first():
    batches = by_length([3, 9, 1, 9, 4], 2)
    assert sorted(itertools.chain(*batches)) == list(range(5))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert set(batches[0]) == {1, 3}


def test_tokens_are_those_of_the_text_whatever_the_tokenizer_adds_by_itself(bridges):
    model = bridges["llama"]
    text = TEXTS[0]
    assert encode(model, [text], prepend_bos=True)[0].ids == tuple(model.to_tokens(text, prepend_bos=True)[0].tolist())
    assert encode(model, [text], prepend_bos=False)[0].ids == tuple(model.to_tokens(text, prepend_bos=False)[0].tolist())
