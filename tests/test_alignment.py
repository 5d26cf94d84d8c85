"""Words and tokens: where words end, which tokens truly end there, and how far two tokenizers agree."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
import regex
from conftest import CORPUS, N_CTX, TEXTS, VOCAB, random_model, save_tokenizer, save_word_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from contrans_tl import collect, load_model, pair
from contrans_tl.tokens import ALIGNED, alignment, check_alignment, encode, prepends_bos, word_ends, words

MANY_SCRIPTS = ["犬猫犬獣犬猫 이것은 한국어 ไทยน้ำ कक्षि café 👍🏽 the dog the dog the dog ", "dog\nthe\tquick\r\n"]
PIECES = "the dog|quick| |  |a|_|42|1|½|①|ﬁ|é|İ|ß|.|,|!|'|\u00ad|\u0301|\u0308|\u200d|\u200c|\u200b|\ufeff|\u2060|\ufe0f|\u20e3"
PIECES += "|👩|🔬|👍|🏽|❤|ℹ|🇫|🇷|犬|猫|獣|か|\u3099|ｶ|ﾞ|ไ|ท|ย|ำ|น|้|한|\u1112|\u1161|\u11ab|क|्|ष|ि|\u0d4e|\t|\r\n|\n|\r"
MIXED = st.lists(st.sampled_from(PIECES.split("|")), max_size=14).map(lambda pieces: "dog " + "".join(pieces))
PREPENDED = (0x111C2, 0x111C3, 0x1193F, 0x11941, *range(0x11A84, 0x11A8A), 0x11D46)
"""Letters that Unicode takes together with whatever follows."""
BYTES = ("bytes", "across", "trimmed")
"""Tokenizers whose tokens, put together, are the bytes of the text."""


def save_made(folder: Path, model: Any, trainer: Any, **parts: Any) -> None:
    """A tokenizer of these parts, trained on text of many scripts, saved beside a model."""
    tokenizer = Tokenizer(model)
    for part, value in parts.items():
        setattr(tokenizer, part, value)
    tokenizer.train_from_iterator(CORPUS * 2 + MANY_SCRIPTS * 3, trainer)
    unknown = {"unk_token": "<unk>"} if tokenizer.token_to_id("<unk>") is not None else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **unknown).save_pretrained(folder)


def byte_trainer(*special: str) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(vocab_size=VOCAB - 10, special_tokens=["<s>", *special], initial_alphabet=alphabet)


def save_across(folder: Path) -> None:
    """Tokens run across words, and from amid one character to amid the next."""
    across = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    save_made(folder, models.BPE(), byte_trainer(), pre_tokenizer=across, decoder=decoders.ByteLevel())


def save_nfkc(folder: Path) -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    save_made(folder, models.BPE(), byte_trainer(), normalizer=normalizers.NFKC(), pre_tokenizer=plain)


def save_stripped(folder: Path) -> None:
    """In lower case, without accents."""
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB - 10, special_tokens=["<s>", "<unk>"])
    parts = {"normalizer": normalizers.BertNormalizer(), "pre_tokenizer": pre_tokenizers.BertPreTokenizer()}
    save_made(folder, models.WordPiece(unk_token="<unk>"), trainer, **parts)


def save_unigram(folder: Path) -> None:
    """As SentencePiece makes them."""
    trainer = trainers.UnigramTrainer(vocab_size=VOCAB - 10, special_tokens=["<s>", "<unk>"], unk_token="<unk>")
    parts = {"normalizer": normalizers.NFKC(), "pre_tokenizer": pre_tokenizers.Metaspace()}
    save_made(folder, models.Unigram(), trainer, **parts)


def save_lossy(folder: Path) -> None:
    """It knows few characters and has no token for others: it skips them, and miscounts the offsets behind."""
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<s>"], limit_alphabet=30)
    save_made(folder, models.BPE(), trainer, pre_tokenizer=pre_tokenizers.Metaspace())


SAVE = {
    "bytes": save_tokenizer,
    "across": save_across,
    "trimmed": save_across,
    "word": save_word_tokenizer,
    "nfkc": save_nfkc,
    "stripped": save_stripped,
    "unigram": save_unigram,
    "lossy": save_lossy,
}


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One model a tokenizer."""
    root = tmp_path_factory.mktemp("readers")
    for name, save in SAVE.items():
        random_model("llama").save_pretrained(root / name)
        save(root / name)
    models = {name: load_model(root / name, device="cpu") for name in SAVE}
    # as GPT-2's: spaces at either end of a token are left out of its offsets (loading as TransformerLens does may undo it)
    models["trimmed"].tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return models


def graphemes(text: str) -> set[int]:
    """Where the characters that a reader sees end, by another implementation of Unicode's rules."""
    return {match.end() for match in regex.finditer(r"\X", text)}


@settings(max_examples=400, deadline=None)
@example("dog 犬्क")
@given(MIXED)
def test_no_word_ends_amid_what_a_reader_sees_as_one_character(text):
    assert set(words(text)) <= graphemes(text)


def test_no_character_of_unicode_makes_a_word_end_amid_a_grapheme():
    for code in range(0x110000):
        # No surrogates, nothing newer than Python's tables; of the ideographs and the syllables of Hangul, all alike, a few.
        alike = code > 0x3400 and chr(code).isalpha() and code % 97 and code not in PREPENDED
        if alike or unicodedata.category(chr(code)) in ("Cn", "Co", "Cs"):
            continue
        for text in (f"a{chr(code)}!", f"{chr(code)}犬"):
            if not text.isascii():
                assert set(words(text)) <= graphemes(text), f"U+{code:04X}"


@pytest.mark.parametrize("name", SAVE)
def test_a_token_at_a_word_end_has_read_the_text_up_to_there_and_nothing_behind(readers, name):
    model = readers[name]
    bos = prepends_bos(model)

    @settings(max_examples=100, deadline=None)
    @given(MIXED)
    def check(text: str) -> None:
        [encoding] = encode(model, [text], truncate=True)
        for end, position in word_ends(text, encoding).items():
            read = list(encoding.ids[bos : position + 1])
            if name in BYTES:  # the tokens spell the text, byte by byte: no offsets are asked
                spelled = "".join(model.tokenizer.convert_ids_to_tokens(read))
                [(expected, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text[:end])
                assert spelled == expected
            # The text up to there, alone, gives just these tokens. (For a BPE this holds of any boundary between tokens.)
            assert model.tokenizer(text[:end], add_special_tokens=False)["input_ids"] == read

    check()


def test_a_space_left_out_of_the_offsets_has_been_read(readers):
    model, text = readers["trimmed"], "dog the dog quick "
    encoding = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding.tokens() == ["dog", "ĠtheĠdogĠ", "quickĠ"]
    assert encoding["offset_mapping"] == [(0, 3), (4, 11), (12, 17)]  # 11 and 17, where words end
    assert encode(model, [text], prepend_bos=False)[0].ends == (3, -1, -1)


@pytest.mark.parametrize("other", [name for name in SAVE if name not in ("bytes", "lossy")])
def test_paired_rows_end_at_the_same_character_in_both_tokenizers(readers, other):
    texts = [
        *TEXTS,
        "the dog\t犬猫 cafe\u0301 the dog\r\n👩\u200d🔬 dog",
        "ไทยน้ำ quick\u200b river dog",
        "한국 \u1112\u1161\u11ab dog",
    ]
    x, y = pair(*(collect(readers[name], texts, rows="words") for name in ("bytes", other)))
    assert len(x) == len(y) > 5
    prefixes = [texts[i][:end] for i, end in zip(x.sentence.tolist(), x.end.tolist(), strict=True)]
    for name, rows in (("bytes", x), (other, y)):
        alone = collect(readers[name], prefixes, rows="last")
        # float32 in batches of other lengths: as TOLERANCE of test_activations.py
        assert (alone.values - rows.values).abs().max() < 1e-5


def test_a_tokenizer_that_skips_characters_is_believed_only_where_it_knows_them_all(readers):
    model = readers["lossy"]
    text = "the\x07dog"
    offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert offsets[-1][1] < len(text)  # what it claims: the text was read but for its last letter
    assert word_ends(text, encode(model, [text])[0]) == {}
    assert list(word_ends("the dog", encode(model, ["the dog"])[0])) == [3, 7]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("don't stop_2", [3, 5, 12]),  # ordinary text: as \w+ has it
        ("naïveté", [7]),
        ("cafe\u0301 x", [5, 7]),
        ("हिन्दी है", [6, 9]),
        ("می\u200cخواهم", [8]),  # the non-joiner is within the word
        ("dog\u200bcat", [3, 7]),  # the zero-width space is between two
        ("1\ufe0f\u20e3 👍🏽 👩\u200d🔬", [3]),  # a keycap is a digit; emoji are no words
        ("犬が好き。", [1, 2, 3, 4]),  # no spaces: every character
        ("か\u3099 ｶﾞ", [2, 5]),
        ("iPhone手机", [6, 7, 8]),
        ("น้ำ", [3]),
        ("ក្ក जगत् x", [3, 8, 10]),  # two consonants that a virama joins; and a virama that ends a word
        ("한국어 x", [3, 5]),  # Korean has spaces
        ("a\tb\r\nc", [1, 3, 6]),
        ("ℹ\u200d👩", []),  # a joiner takes the letter with it
    ],
)
def test_words_end_behind_what_extends_them(text, ends):
    assert words(text) == ends


def test_the_same_tokenizer_aligns_at_every_word_at_which_it_ends_a_token(readers):
    whole = alignment(readers["bytes"], readers["bytes"], TEXTS)
    n = sum(len(words(text)) for text in TEXTS)
    assert (whole.words, whole.kept, whole.share, whole.equal_ends, whole.equal_tokens) == (n, n, 1.0, 1.0, 1.0)
    # where tokens of both run across words there is nothing to align, and nothing dropped
    across = alignment(readers["across"], readers["across"], TEXTS)
    assert across.kept < n and across.share == 1.0


def test_an_alignment_counts_what_each_tokenizer_drops(readers):
    texts = ["the dog sleeps", "the dog"]
    x, y = (
        [set(word_ends(text, encoding)) for text, encoding in zip(texts, encode(readers[name], texts), strict=True)]
        for name in ("word", "across")
    )
    found = alignment(readers["word"], readers["across"], texts)
    assert found.words == 5 and found.kept == sum(len(a & b) for a, b in zip(x, y, strict=True))
    assert found.dropped_by_target == sum(len(a - b) for a, b in zip(x, y, strict=True)) > 0
    assert found.dropped_by_source == 0
    assert found.share == found.kept / 5
    assert 0 < found.equal_ends < 1
    back = alignment(readers["across"], readers["word"], texts)
    assert (back.dropped_by_source, back.dropped_by_target) == (found.dropped_by_target, found.dropped_by_source)
    assert str(found).startswith(f"{found.share:.1%} of words align: {found.kept} of 5 kept")


def test_equal_tokens_are_those_that_span_the_same_characters(readers):
    texts = ["the dog sleeps"]
    [x], [y] = (encode(readers[name], texts, prepend_bos=False) for name in ("bytes", "word"))
    assert y.ends == (3, 7, 14) and x.ends[:2] == (3, 7)  # "the" and "dog" are one token each, "sleeps" several
    found = alignment(readers["bytes"], readers["word"], texts)
    assert found.equal_ends == 3 / len(x.ends)
    assert found.equal_tokens == 2 * 2 / (len(x.ends) + 3)


def test_what_a_context_cuts_off_is_no_fault_of_the_tokenizers(readers):
    long = " ".join(["fox"] * 3 * N_CTX)
    assert alignment(readers["word"], readers["bytes"], [long]).kept == 3 * N_CTX


def test_tokenizers_that_part_the_text_differently_are_refused_before_any_model_runs(readers, monkeypatch):
    assert check_alignment(readers["bytes"], readers["word"], TEXTS).share == 1.0
    texts = ["犬猫犬獣犬猫。" * 3]
    for model in readers.values():
        monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("a model ran"))
    assert alignment(readers["bytes"], readers["word"], texts).share < ALIGNED
    with pytest.raises(ValueError, match=r"part these texts differently: .*Expected at least 25% of words.*rows='last'"):
        check_alignment(readers["bytes"], readers["word"], texts)


def test_texts_without_words_are_refused(readers):
    with pytest.raises(ValueError, match="0 of 0 kept"):
        check_alignment(readers["bytes"], readers["bytes"], ["...", "!?"])
