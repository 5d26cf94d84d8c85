"""Activations on disk are those in memory, whatever happens to the run and to the files."""

import multiprocessing
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, N_CTX, N_LAYERS, TEXTS, random_model, save_tokenizer, save_word_tokenizer, unchecked

from contrans_tl import activations, collect, load_model, pair
from contrans_tl.shards import StoredActivations, paired_shards, store

CORPUS = [f"{text} {i}" for i in range(3) for text in TEXTS]
SHARD = 4
"""Texts in a shard of these tests: the corpus has four of them, the last one of three."""
OPTIONS: dict[str, Any] = {"rows": "words", "batch_size": 2, "texts_per_shard": SHARD}
BATCHES = 8
"""Forward passes for all of them: two for each shard."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that a model runs."""
    seen: list[int] = []
    run_blocks = activations.run_blocks

    def counted(model: Any, tokens: Any, *rest: Any) -> None:
        seen.append(len(tokens))
        run_blocks(model, tokens, *rest)

    monkeypatch.setattr(activations, "run_blocks", counted)
    return seen


@pytest.fixture(scope="module")
def undisturbed(bridges: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> StoredActivations:
    return store(bridges["llama"], CORPUS, tmp_path_factory.mktemp("undisturbed"), **OPTIONS)


def files(stored: StoredActivations) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in stored.folder.iterdir() if not path.name.startswith(".")}


def shard_file(stored: StoredActivations, number: int) -> Path:
    (path,) = stored.folder.glob(f"shard-*{number}.safetensors")
    return path


def same_rows(a: Any, b: Any) -> bool:
    return torch.equal(a.values, b.values) and torch.equal(a.sentence, b.sentence) and torch.equal(a.end, b.end)


@pytest.mark.parametrize("rows", ["words", "last"])
def test_rows_on_disk_are_those_in_memory(bridges, tmp_path, rows):
    # One text a batch, so that both run the very same batches.
    memory = collect(bridges["llama"], CORPUS, rows=rows, layers=[2, 0], batch_size=1)
    stored = store(bridges["llama"], CORPUS, tmp_path, rows=rows, layers=[2, 0], batch_size=1, texts_per_shard=SHARD)
    assert same_rows(stored.read(), memory) and len(stored) == len(memory) and stored.n_shards == 4
    for name in ("layers", "model", "rows", "prepend_bos", "texts_hash"):
        assert getattr(stored, name) == getattr(memory, name) == getattr(stored.read(), name)
    shards = [stored.shard(number) for number in range(stored.n_shards)]
    assert torch.equal(torch.cat([shard.values for shard in shards]), memory.values)
    assert torch.equal(torch.cat([shard.end for shard in shards]), memory.end)
    assert torch.equal(stored.read([0]).at(0), memory.at(0))
    assert shards[1].sentence.unique().tolist() == [4, 5, 6, 7]


def test_what_was_stored_is_opened_without_the_model(undisturbed):
    opened = StoredActivations.load(undisturbed.folder)
    assert same_rows(opened.read(), undisturbed.read())
    assert vars(opened).keys() == vars(undisturbed).keys()
    for name, value in vars(undisturbed).items():
        assert torch.equal(getattr(opened, name), value) if isinstance(value, torch.Tensor) else getattr(opened, name) == value


def test_a_second_run_does_not_run_the_model(bridges, tmp_path, passes):
    first = store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    assert len(passes) == BATCHES and max(passes) == 2
    written = files(first)
    second = store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    assert len(passes) == BATCHES
    assert files(second) == written and same_rows(second.read(), first.read())


OTHERS: dict[str, dict[str, Any]] = {
    "texts": {"texts": CORPUS[::-1]},
    "layers": {"layers": [0, 1]},
    "kind of rows": {"rows": "last"},
    "beginning": {"prepend_bos": False},
    "shards": {"texts_per_shard": 5},
    "model": {"model": "qwen2"},
    "weights": {"model": "perturbed"},
    "precision": {"model": "bf16"},
}


@pytest.mark.parametrize("other", OTHERS)
def test_nothing_is_reused_for_other(other, bridges, folders, tmp_path, passes):
    first = store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    written = files(first)
    arguments = {"texts": CORPUS, "model": "llama"} | OPTIONS | OTHERS[other]
    model, texts = arguments.pop("model"), arguments.pop("texts")
    if model == "perturbed":
        random_model("llama", seed=1).save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        model = load_model(tmp_path / "model", device="cpu")
    elif model == "bf16":
        model = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16)
    else:
        model = bridges[model]
    passes.clear()
    second = store(model, texts, tmp_path, **arguments)
    assert sum(passes) == len(CORPUS)
    assert second.folder != first.folder and files(first) == written


def killed(at: str, count: int, model: Any, folder: Path) -> None:
    """Store, and kill -9 this process at the given call."""
    module, name = (activations, "run_blocks") if at == "forward pass" else (os, "replace")
    call = getattr(module, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count -= 1
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    setattr(module, name, deadly)
    store(model, CORPUS, folder, **OPTIONS)


@pytest.mark.parametrize(
    ("at", "count", "kept"),
    [("forward pass", 1, 0), ("forward pass", 6, 2), ("forward pass", BATCHES, 3), ("rename", 3, 2), ("rename", 5, 4)],
)
def test_a_run_killed_at_any_moment_is_resumed_and_loses_one_shard(at, count, kept, bridges, tmp_path, passes, undisturbed):
    # A child process with this one's models in it; the fifth rename is the index's.
    child = multiprocessing.get_context("fork").Process(target=killed, args=(at, count, bridges["llama"], tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob("*/shard-*"))) == kept
    with pytest.raises(ValueError, match="activation index"):
        StoredActivations.load(tmp_path / undisturbed.folder.name)
    resumed = store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    assert len(passes) == BATCHES - 2 * kept
    assert files(resumed) == files(undisturbed)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES = {
    "a byte in the middle flipped": lambda content: flipped(content, len(content) // 2),
    "the last byte flipped": lambda content: flipped(content, len(content) - 1),
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "something else": lambda content: b"something else",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_and_it_alone_is_redone(damage, bridges, tmp_path, passes):
    stored = store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    written, path = files(stored), shard_file(stored, 2)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path.name}' is missing or damaged.*store again"):
        stored.read()
    assert len(stored.shard(1)) and len(stored.shard(3))  # the others can be read
    passes.clear()
    with pytest.warns(UserWarning, match=f"{path.name}' is collected again") as caught:
        store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    assert len(caught) == 1 and passes == [2, 2]
    assert files(stored) == written


@pytest.mark.parametrize("of", ["other texts", "another model"])
def test_one_shard_in_the_place_of_another_is_noticed(of, bridges, tmp_path):
    options = OPTIONS | {"prepend_bos": True}
    stored, other = (store(bridges[name], CORPUS, tmp_path, **options) for name in ("llama", "qwen2"))
    written = files(stored)
    wrong = shard_file(stored, 0) if of == "other texts" else shard_file(other, 1)  # of the same tokens
    shard_file(stored, 1).write_bytes(wrong.read_bytes())
    with pytest.raises(ValueError, match="shard-000001"):
        stored.shard(1)
    with pytest.warns(UserWarning, match="shard-000001"):
        store(bridges["llama"], CORPUS, tmp_path, **options)
    assert files(stored) == written


def test_a_missing_shard_is_redone_without_a_warning(bridges, tmp_path, passes):
    stored = store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    written = files(stored)
    shard_file(stored, 0).unlink()
    with pytest.raises(ValueError, match="shard-000000.* is missing"):
        stored.shard(0)
    passes.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    assert passes == [2, 2] and files(stored) == written


FLIPS = 89
"""One byte in so many is flipped, in a file of some thousands."""


def test_whichever_byte_of_a_shard_flips_its_rows_are_right_or_refused(bridges, tmp_path):
    arguments = OPTIONS | {"layers": [0]}
    stored = store(bridges["llama"], CORPUS[:2], tmp_path, **arguments)
    path, whole = shard_file(stored, 0), stored.read()
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), FLIPS):
        path.write_bytes(flipped(content, at))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert same_rows(store(bridges["llama"], CORPUS[:2], tmp_path, **arguments).read(), whole)
        refused += bool(caught)
    tensors = whole.values.nbytes + whole.sentence.nbytes + whole.end.nbytes
    assert refused >= tensors / FLIPS - 1  # every byte of a tensor, and some of the header


def test_a_damaged_index_is_refused_and_made_anew(bridges, tmp_path, passes):
    stored = store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    index = stored.folder / "index.safetensors"
    content = index.read_bytes()
    index.write_bytes(flipped(content, len(content) - 1))
    with pytest.raises(ValueError, match="index.* is damaged"):
        StoredActivations.load(stored.folder)
    passes.clear()
    store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    assert index.read_bytes() == content and not passes


def test_shards_of_another_tokenizer_are_redone_with_a_warning(bridges, tmp_path, passes):
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder)
    save_word_tokenizer(folder)
    other = load_model(folder, device="cpu")  # the same weights
    options = OPTIONS | {"prepend_bos": True}
    first = store(bridges["llama"], CORPUS, tmp_path, **options)
    passes.clear()
    with pytest.warns(UserWarning, match="other tokens"):
        second = store(other, CORPUS, tmp_path, **options)
    assert second.folder == first.folder and len(passes) == BATCHES
    assert same_rows(second.read(), store(other, CORPUS, tmp_path / "afresh", **options).read())


def test_rows_of_a_bf16_model_take_half_the_room_and_lose_nothing(bridges, folders, tmp_path, undisturbed):
    model = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16)
    arguments = OPTIONS | {"texts_per_shard": len(CORPUS)}
    stored = store(model, CORPUS, tmp_path, **arguments)
    assert same_rows(stored.read(), collect(model, CORPUS, rows="words", batch_size=2))
    values = len(stored) * N_LAYERS * D_MODEL
    assert 2 * values < shard_file(stored, 0).stat().st_size < 4 * values
    assert 4 * values < sum(shard_file(undisturbed, number).stat().st_size for number in range(4))


def test_rows_that_half_precision_does_not_hold_stay_in_float32(folders, tmp_path, monkeypatch):
    from contrans_tl import shards

    model, read_rows = load_model(folders["llama"], device="cpu", dtype=torch.bfloat16), shards.read_rows
    monkeypatch.setattr(shards, "read_rows", lambda *arguments: read_rows(*arguments) + 1e-3)
    stored = store(model, CORPUS, tmp_path, **OPTIONS)
    assert torch.equal(stored.read().values, collect(model, CORPUS, rows="words", batch_size=2).values + 1e-3)


def test_a_bridge_with_a_device_map_gives_the_same_rows(folders, tmp_path, undisturbed):
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(folders["llama"]), device_map="cpu", dtype=torch.float32)
    model.eval().requires_grad_(False)
    assert files(store(model, CORPUS, tmp_path, **OPTIONS)) == files(undisturbed)


def test_samples_are_whole_texts_that_the_seed_alone_decides(bridges, tmp_path, undisturbed):
    whole = undisturbed.read()
    sample = undisturbed.sample(40, seed=3)
    texts = sample.sentence.unique()
    assert 40 - whole.sentence.bincount().max() < len(sample) <= 40
    assert same_rows(sample, whole.take(torch.isin(whole.sentence, texts).nonzero()[:, 0]))
    assert same_rows(sample, undisturbed.sample(40, seed=3))
    assert not torch.equal(texts, undisturbed.sample(40, seed=4).sentence.unique())
    assert same_rows(undisturbed.sample(10**6), whole)
    assert torch.equal(undisturbed.sample(40, seed=3, layers=[1]).at(1), sample.at(1))


@pytest.fixture
def across(tmp_path: Path) -> Any:
    """A model whose tokens may run over the end of a word, so that it has fewer rows."""
    random_model("gpt2").save_pretrained(tmp_path / "across")
    save_tokenizer(tmp_path / "across", across_words=True)
    return load_model(tmp_path / "across", device="cpu")


def test_samples_and_shards_of_two_tokenizers_pair_as_the_whole_does(across, tmp_path, undisturbed):
    other = store(across, CORPUS, tmp_path, **OPTIONS)
    assert 0 < len(other) < len(undisturbed)
    x, y = pair(undisturbed.read(), other.read())
    assert len(x) < len(undisturbed)
    shards = list(paired_shards(undisturbed, other, (2, 1)))
    for side, whole, layer in ((0, x, 2), (1, y, 1)):
        assert torch.equal(torch.cat([shard[side].values for shard in shards]), whole.only([layer]).values)
        assert torch.equal(torch.cat([shard[side].sentence for shard in shards]), whole.sentence)
        assert torch.equal(torch.cat([shard[side].end for shard in shards]), whole.end)
    a, b = pair(undisturbed.sample(40), other.sample(40))
    texts = torch.tensor(sorted(set(undisturbed.sample(40).sentence.tolist()) & set(other.sample(40).sentence.tolist())))
    assert len(texts) > 3
    kept = torch.isin(x.sentence, texts).nonzero()[:, 0]
    assert same_rows(a, x.take(kept)) and same_rows(b, y.take(kept))


def test_texts_without_rows_are_stored_as_such(bridges, tmp_path):
    stored = store(bridges["llama"], ["...", "!", "the dog", "?"], tmp_path, rows="words", texts_per_shard=1)
    assert stored.sizes.tolist() == [0, 0, 2, 0]
    assert stored.read().sentence.tolist() == [2, 2] == stored.sample(2).sentence.tolist()
    assert store(bridges["llama"], ["...", "!", "the dog", "?"], tmp_path, rows="words", texts_per_shard=1).sizes.sum() == 2


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "at least one text"),
        ("the dog", {}, "list of texts"),
        ([*CORPUS, "fox " * N_CTX], {}, "does not fit the context"),
        ([*CORPUS, ""], {}, "no tokens"),
        (["...", "!"], {"rows": "words"}, "none of the texts"),
        (CORPUS, {"rows": "word"}, "'last' or 'words'"),
        (CORPUS, {"layers": [N_LAYERS]}, f"between 0 and {N_LAYERS - 1}"),
        (CORPUS, {"batch_size": 0}, "batch_size"),
        (CORPUS, {"texts_per_shard": 0}, "texts_per_shard"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_the_model_runs(bridges, tmp_path, passes, texts, options, message):
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        store(bridges["llama"], texts, tmp_path, **({"texts_per_shard": 1} | options))
    assert "\n" not in str(caught.value)
    assert not passes and not list(tmp_path.iterdir())


def test_no_more_texts_than_a_shard_are_tokenized_or_run_at_once(bridges, tmp_path, monkeypatch):
    from contrans_tl import shards

    sizes: list[int] = []

    def watched(name: str, of: int) -> None:
        call = getattr(shards, name)
        monkeypatch.setattr(shards, name, lambda *args: (sizes.append(len(args[of])), call(*args))[1])

    watched("locate", 1)
    watched("read_rows", 1)
    store(bridges["llama"], CORPUS, tmp_path, **OPTIONS)
    assert max(sizes) == SHARD


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda stored: stored.shard(0, [N_LAYERS]), "stored layers"),
        (lambda stored: stored.sample(0), "at least a text's"),
        (lambda stored: StoredActivations.load(stored.folder.parent), "activation index"),
    ],
)
def test_what_is_not_there_is_refused(undisturbed, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(undisturbed)


@pytest.mark.parametrize("other", [{"texts_per_shard": 5}, {"rows": "last"}])
def test_stores_of_other_kinds_are_not_paired(bridges, tmp_path, undisturbed, other):
    with pytest.raises(ValueError, match="store both alike"):
        paired_shards(undisturbed, store(bridges["gpt2"], CORPUS, tmp_path, **(OPTIONS | other)), (0, 0))
