"""What is pushed is what is pulled, from the hub and from a folder alike; what was changed on the way is refused, and nothing
of whoever pushed goes along."""

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXTS, unchecked
from hub import Hub
from huggingface_hub import CommitInfo, ModelCard, ModelInfo
from huggingface_hub.hf_api import RepoSibling
from markdown_it import MarkdownIt
from test_report import RATES, transfer

from contrans_tl import (
    AffineMap,
    ConceptVector,
    ContrastPairs,
    HeadMaps,
    HeadVectors,
    LayerMaps,
    ModelId,
    fit_affine,
    fit_head_maps,
    fit_maps,
    pull,
    pull_scores,
    push,
    refine,
    refine_heads,
    reformulate,
    reformulate_heads,
    sharing,
)
from contrans_tl import artifacts as files
from contrans_tl.__main__ import main
from contrans_tl.activations import hash_texts
from contrans_tl.artifacts import write_json
from contrans_tl.leakage import Leak
from contrans_tl.sharing import CARD, MANIFEST, SCORES

SOURCE = ModelId("EleutherAI/pythia-160m", "50f5173d932e8e61f858120bcb800b97af589f46", "0123456789abcdef", 4, 6, "raw")
TARGET = ModelId("big", None, "fedcba9876543210", 5, 4, "raw")
PAIRS = ContrastPairs("anger", ("zebra one is furious", "zebra two rages"), ("zebra three rests", "zebra four naps"))
REFINED = {"method": "mean", "positive": 2, "negative": 2, "prompts_hash": hash_texts([*PAIRS.positive, *PAIRS.negative])}
CARRIED = {
    "carried_from": SOURCE.to_dict(),
    "layers": [[2, 3]],
    "method": "ridge",
    "weighting": "concept",
    "ridge": [0.01],
    "coverage": [0.99],
    "presence": [0.2],
    "effective_rows": [123.4],
    "rows": "words",
    "n_rows": 1000,
    "texts_hash": "cafecafecafecafe",
    "refined": REFINED,
}
TOKEN = "hf_" + "aB3" * 11


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


REFINED_CONCEPT = ConceptVector(drawn(4, 6), (0, 1, 2, 3), "anger", SOURCE, REFINED)
MOVED = ConceptVector(drawn(1, 4), (3,), "anger", TARGET, CARRIED)
HEADS = HeadVectors(drawn(2, 3), ((1, 0), (2, 1)), "anger", SOURCE, REFINED)


def layer_maps() -> LayerMaps:
    maps = LayerMaps.fit(drawn(30, 2, 6), drawn(30, 2, 4, seed=1), ridge=0.01)
    source, target = replace(maps.source, model=SOURCE, layers=(1, 2)), replace(maps.target, model=TARGET, layers=(3, 4))
    return replace(maps, source=source, target=target, _memo={})


def head_maps() -> HeadMaps:
    return HeadMaps(layer_maps(), SOURCE, TARGET, ((1, 0), (2, 1)), ((3, 0), (4, 2)), False)


EVERY: dict[str, Callable[[], Any]] = {
    "a refined concept": lambda: REFINED_CONCEPT,
    "a carried concept": lambda: MOVED,
    "a sum": lambda: REFINED_CONCEPT + 0.5 * REFINED_CONCEPT,
    "heads": lambda: HEADS,
    "layer maps": layer_maps,
    "head maps": head_maps,
}


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "hub")


def content(what: Any, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All that a file holds."""
    what.save(path)
    return files.load(path, files.header_of(path)["kind"])


def written(folder: Path) -> str:
    """All that was written, as text; tensors too, whatever they spell."""
    return "".join(path.read_bytes().decode("latin-1") for path in sorted(folder.iterdir()))


def manifest_with(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest; checksums of the files that it names are made right again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    for name, file in manifest["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            file |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    write_json(folder / MANIFEST, manifest)


# --- there and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["a folder", "the hub"])
@pytest.mark.parametrize("kind", EVERY)
def test_what_is_pulled_is_bit_for_bit_what_was_pushed(kind, place, hub, tmp_path):
    what = EVERY[kind]()
    where = "anna/anger" if place == "the hub" else str(tmp_path / "new" / "anger")
    pushed = push(what, where, api=hub)
    assert pushed == ("https://hub/anna/anger/commit/" + f"{1:040x}" if place == "the hub" else where)
    found = pull(where, api=hub)
    assert type(found) is type(what)
    (tensors, header), (again, header_again) = content(what, tmp_path / "a"), content(found, tmp_path / "b")
    assert header == header_again and list(tensors) == list(again)
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert place == "the hub" or not hub.calls


def test_a_folder_and_a_repository_hold_the_same(hub, tmp_path):
    push(MOVED, "x/anger", report=transfer(), api=hub)
    push(MOVED, tmp_path / "anger", report=transfer(), api=hub)
    there = {file.name: file.read_bytes() for file in hub.folder("x/anger").iterdir()}
    here = {file.name: file.read_bytes() for file in (tmp_path / "anger").iterdir()}
    assert there.pop(".gitattributes") and set(there) == set(here) == {"concept.safetensors", MANIFEST, CARD, SCORES}
    assert there["concept.safetensors"] == here["concept.safetensors"] and there[SCORES] == here[SCORES]
    assert there[CARD].replace(b"x/anger", b"./anger") == here[CARD]


def test_the_manifest_says_what_it_is_and_lists_the_files_with_size_and_sha256(tmp_path):
    folder = Path(push(MOVED, tmp_path / "a", report=transfer()))
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == sharing.FORMAT and manifest["kind"] == "concept vector" and manifest["name"] == "anger"
    assert manifest["models"] == {"model": TARGET.to_dict(), "source": SOURCE.to_dict()}
    assert (
        manifest["basis"] == "raw" and manifest["layers"] == [3] and manifest["rows"] == "words" and manifest["n_rows"] == 1000
    )
    assert manifest["corpus_hash"] == CARRIED["texts_hash"] and manifest["prompts_hash"] == REFINED["prompts_hash"]
    assert set(manifest["versions"]) == set(files.versions()) and manifest["evaluated"] is True
    assert set(manifest["files"]) == {"concept.safetensors", CARD, SCORES}
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert file == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    maps = json.loads((Path(push(layer_maps(), tmp_path / "m")) / MANIFEST).read_text())
    assert maps["models"] == {"source": SOURCE.to_dict(), "target": TARGET.to_dict()}
    assert (maps["source_layers"], maps["target_layers"], maps["n_rows"], maps["n_sentences"]) == ([1, 2], [3, 4], 30, 30)
    assert maps["corpus_hash"] == "30 rows" and maps["evaluated"] is False
    heads = json.loads((Path(push(head_maps(), tmp_path / "h")) / MANIFEST).read_text())
    assert heads["source_heads"] == [[1, 0], [2, 1]] and heads["target_heads"] == [[3, 0], [4, 2]] and not heads["pooled"]


def test_from_models_and_back_and_every_cards_code_runs(bridges, folders, tmp_path, monkeypatch, capsys):
    source, target, pairs = bridges["llama"], bridges["gpt2"], ContrastPairs("calm", tuple(TEXTS[:2]), tuple(TEXTS[2:4]))
    sentences = [f"{a} {b}" for a in TEXTS for b in TEXTS]
    maps = fit_maps(source, target, sentences, ridge=0.01)
    heads = fit_head_maps(source, target, sentences, source_heads=[(1, 2), (0, 3)], target_heads=[(2, 0)])
    concept, vectors = refine(source, pairs), refine_heads(source, pairs)
    made = [concept, reformulate(concept, maps, layers={1: 2}), vectors, reformulate_heads(vectors, heads), maps, heads]
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "gpt2"):
        Path(name).symlink_to(folders[name])
    monkeypatch.setattr("contrans_tl.load_model", lambda name: {"./llama": source, "./gpt2": target}[name], raising=False)
    for number, what in enumerate(made):
        push(what, f"./share{number}")
        [code] = re.findall(r"```python\n(.*?)```", Path(f"share{number}", CARD).read_text(), re.S)
        assert f'pull("./share{number}")' in code
        capsys.readouterr()
        exec(code, {})
        assert capsys.readouterr().out.startswith("The letter made me feel")


def test_a_carried_concepts_code_uses_the_layer_and_strength_that_were_measured(tmp_path):
    card = (Path(push(MOVED, tmp_path / "a", report=transfer())) / CARD).read_text()
    assert "with transplant(model, concept, layers=[3], strength=2.0):" in card and "was not looked for" not in card
    card = (Path(push(MOVED, tmp_path / "b")) / CARD).read_text()
    assert "strength=1.0):" in card and "was not looked for" in card
    card = (Path(push(REFINED_CONCEPT, tmp_path / "c", report=transfer())) / CARD).read_text()
    assert "layers=[2], strength=1.0):" in card  # what was measured is of the carried one, in the target


# --- the hub --------------------------------------------------------------------------------------------------------------


def test_a_repository_is_private_unless_asked_and_a_public_one_is_not_written_to_unasked(hub):
    push(MOVED, "anna/private", api=hub)
    push(MOVED, "anna/public", private=False, api=hub)
    assert hub.private == {"anna/private": True, "anna/public": False}
    before = dict(hub.branches["anna/public"])
    with pytest.raises(ValueError, match=r"'anna/public' is public: push with private=False \(--public\)"):
        push(MOVED, "anna/public", api=hub)
    assert hub.branches["anna/public"] == before
    push(REFINED_CONCEPT, "anna/public", private=False, api=hub)
    assert hub.branches["anna/public"] != before


def test_a_commit_that_was_pulled_stays_what_it_was(hub):
    first = push(MOVED, "anna/anger", commit_message="first", api=hub).rpartition("/")[2]
    push(2.0 * MOVED, "anna/anger", api=hub)
    assert torch.equal(pull("anna/anger", revision=first, api=hub).vectors, MOVED.vectors)
    assert torch.equal(pull("anna/anger", api=hub).vectors, 2 * MOVED.vectors)
    assert hub.messages == ["first", "Push concept vector 2 * anger"]


def test_a_push_to_a_branch_leaves_the_main_one(hub):
    push(MOVED, "anna/anger", api=hub)
    push(2.0 * MOVED, "anna/anger", revision="double", api=hub)
    assert torch.equal(pull("anna/anger", api=hub).vectors, MOVED.vectors)
    assert torch.equal(pull("anna/anger", revision="double", api=hub).vectors, 2 * MOVED.vectors)


def test_what_an_earlier_push_left_goes_with_the_next_and_other_files_stay(hub, tmp_path):
    folder = tmp_path / "anger"
    for where in ("anna/anger", folder):
        push(MOVED, where, report=transfer(), api=hub)
        (folder if where == folder else hub.folder("anna/anger")).joinpath("LICENSE").write_text("mine")
        assert [score["concept"] for score in pull_scores(where, api=hub)] == ["anger"]
        push(layer_maps(), where, api=hub)
        there = folder if where == folder else hub.folder("anna/anger")
        assert {file.name for file in there.iterdir()} - {".gitattributes"} == {"maps.safetensors", MANIFEST, CARD, "LICENSE"}
        assert isinstance(pull(where, api=hub), LayerMaps) and pull_scores(where, api=hub) == []


def test_a_repository_or_folder_that_holds_other_things_is_left_alone(hub, tmp_path):
    hub.create_repo("anna/model")
    (hub.folder("anna/model") / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="'anna/model' holds other files, and no contrans.json"):
        push(MOVED, "anna/model", api=hub)
    assert not any(name == "upload_folder" for name, _ in hub.calls)
    (tmp_path / CARD).write_text("my project")
    with pytest.raises(ValueError, match="holds other files, and no contrans.json: name a new folder"):
        push(MOVED, tmp_path)
    assert (tmp_path / CARD).read_text() == "my project"
    with pytest.raises(ValueError, match="is a file"):
        push(MOVED, tmp_path / CARD)


def test_the_stand_ins_answers_have_the_names_of_the_real_ones():
    for real, name in ((CommitInfo, "commit_url"), (ModelInfo, "private"), (ModelInfo, "siblings"), (RepoSibling, "rfilename")):
        assert name in {field.name for field in fields(real)}


def test_of_a_repository_only_files_of_a_share_are_downloaded(hub, tmp_path):
    push(MOVED, "anna/anger", api=hub)
    (hub.folder("anna/anger") / "model.pkl").write_bytes(b"\x80\x04.")
    pull("anna/anger", api=hub)
    [folder] = (tmp_path / "hub" / "cache" / "anna" / "anger").iterdir()
    assert {file.name for file in folder.iterdir()} == {"concept.safetensors", MANIFEST, CARD}


def test_what_the_hub_does_not_have_is_told_in_a_sentence(hub):
    push(MOVED, "anna/anger", api=hub)
    with pytest.raises(ValueError, match="no repository 'anna/joy' that you may read"):
        pull("anna/joy", api=hub)
    with pytest.raises(ValueError, match="'anna/anger' has no revision 'v9'"):
        pull("anna/anger", revision="v9", api=hub)
    hub.create_repo("anna/empty")
    with pytest.raises(ValueError, match="'anna/empty' has no contrans.json: nothing was pushed there"):
        pull("anna/empty", api=hub)


def test_offline_an_unknown_repository_is_one_sentence_and_nothing_is_asked_for(tmp_path, capsys):
    # HF_HUB_OFFLINE is set (conftest): this is the real HfApi.
    for attempt in (lambda: pull("anna/surely-not-in-the-cache"), lambda: push(MOVED, "anna/surely-not-in-the-cache")):
        with pytest.raises(ValueError, match="the hub cannot be reached, and 'anna/surely-not-in-the-cache'") as caught:
            attempt()
        assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0
    assert main(["pull", "anna/surely-not-in-the-cache", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_whatever_else_goes_wrong_at_the_hub_is_a_sentence_but_our_own_mistakes_are_not(hub, monkeypatch):
    def failing(error: Exception) -> Any:
        def create_repo(*args: Any, **kwargs: Any) -> None:
            raise error

        return SimpleNamespace(create_repo=create_repo)

    with pytest.raises(ValueError, match=r"'anna/anger' \(OSError: 403 Forbidden\)"):
        push(MOVED, "anna/anger", api=failing(OSError("403 Forbidden\nmore")))
    with pytest.raises(TypeError):
        push(MOVED, "anna/anger", api=failing(TypeError("ours")))


# --- what was changed on the way ------------------------------------------------------------------------------------------


@pytest.fixture(params=["a folder", "the hub"])
def share(request: pytest.FixtureRequest, hub: Hub, tmp_path: Path) -> tuple[Path, Callable[[], Any]]:
    """A pushed concept with scores: the folder its files lie in, and how to pull it."""
    where = "anna/anger" if request.param == "the hub" else str(tmp_path / "anger")
    push(MOVED, where, report=transfer(), api=hub)
    folder = hub.folder(where) if request.param == "the hub" else Path(where)
    return folder, lambda: pull(where, api=hub)


@pytest.mark.parametrize("name", ["concept.safetensors", SCORES])
def test_a_changed_a_truncated_and_a_missing_file_are_refused_by_name(share, name):
    folder, again = share
    whole = (folder / name).read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        changed = bytearray(whole)
        changed[position] ^= 1
        (folder / name).write_bytes(bytes(changed))
        with pytest.raises(ValueError, match=f"{name} of .* has another SHA-256 than contrans.json says"):
            again()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{name} of .* has {len(whole) - 1} bytes, contrans.json says {len(whole)}"):
        again()
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} of .* is missing, though contrans.json names it"):
        again()
    (folder / name).write_bytes(whole)
    assert torch.equal(again().vectors, MOVED.vectors)


def test_an_edited_card_is_told_and_keeps_nobody_from_the_concept(share):
    folder, again = share
    (folder / CARD).write_text((folder / CARD).read_text().replace("library_name", "license: mit\nlibrary_name"))
    with pytest.warns(UserWarning, match="README.md of .* is not the card that was pushed"):
        assert torch.equal(again().vectors, MOVED.vectors)
    (folder / CARD).unlink()
    with pytest.raises(ValueError, match="README.md of .* is missing"):
        again()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "sub/x", "..\\x", "C:\\x", "", ".", "x\x00", "model.pkl", "maps.safetensors"]
)
def test_a_manifest_that_names_any_other_file_is_refused(share, name):
    folder, again = share
    (folder.parent / "x").write_bytes(b"secret")
    manifest_with(folder, lambda manifest: manifest["files"].update({name: {"sha256": "0" * 64, "size": 6}}))
    with pytest.raises(ValueError, match="contrans.json of .* names .*; a concept vector has no files but") as caught:
        again()
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=sharing.FORMAT + 1), "has format 2; this version reads up to 1. Update contrans_tl"),
        (lambda m: m.update(format="new"), "has no format number"),
        (lambda m: m.update(kind="soul"), "is of a 'soul'; expected one of concept vector"),
        (lambda m: m.update(kind="layer maps"), "names 'concept.safetensors'; a layer maps has no files but"),
        (lambda m: m.update(files=[]), "does not list files"),
        (lambda m: m["files"].update({SCORES: 3}), "does not list files"),
        (lambda m: m["files"].pop("concept.safetensors"), "does not name concept.safetensors"),
    ],
)
def test_a_manifest_of_another_format_or_kind_is_refused(share, change, message):
    folder, again = share
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    write_json(folder / MANIFEST, manifest)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        again()
    assert MANIFEST in str(caught.value)


def test_a_manifest_that_is_no_manifest_is_refused(share):
    folder, again = share
    whole = (folder / MANIFEST).read_bytes()
    for data, message in ((whole[:-20], "truncated or not JSON"), (b"\xff\xfe", "truncated or not JSON"), (b"[]", "no format")):
        (folder / MANIFEST).write_bytes(data)
        with pytest.raises(ValueError, match=f"contrans.json of .*{message}"):
            again()
    (folder / MANIFEST).unlink()
    with pytest.raises(ValueError, match="has no contrans.json"):
        again()


def test_a_file_of_another_kind_a_pickle_and_a_header_that_is_not_whole_are_refused_though_checksums_fit(share, tmp_path):
    folder, again = share
    file = folder / "concept.safetensors"
    layer_maps().save(file)
    manifest_with(folder, lambda manifest: None)
    with pytest.raises(ValueError, match=r"of kind 'concept vector'; .*concept\.safetensors' is of kind 'layer maps'"):
        again()

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"vectors": Evil()}, file)
    manifest_with(folder, lambda manifest: None)
    with pytest.raises(ValueError, match=r"concept\.safetensors' is truncated or not a safetensors file"):
        again()
    assert not (tmp_path / "ran").exists()
    files.save(file, "concept vector", {"vectors": MOVED.vectors}, {"name": "x"})
    manifest_with(folder, lambda manifest: None)
    with pytest.raises(ValueError, match=r"concept\.safetensors of .* is not a whole concept vector"):
        again()


def test_pulled_maps_open_no_folder_of_this_machine(tmp_path):
    folder = Path(push(layer_maps(), tmp_path / "maps"))
    tensors, header = files.load(folder / "maps.safetensors", "layer maps")
    files.save(folder / "maps.safetensors", "layer maps", tensors, header | {"stored": [str(tmp_path), str(tmp_path)]})
    manifest_with(folder, lambda manifest: None)
    with pytest.raises(ValueError, match="refers to rows in a folder of whoever pushed it"):
        pull(folder)


def test_a_push_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    folder = Path(push(MOVED, tmp_path / "anger"))
    before = written(folder)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(sharing, "card", broken)
    for where in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="disk full"):
            push(2.0 * MOVED, where)
    assert [file.name for file in tmp_path.iterdir()] == ["anger"] and written(folder) == before


# --- what does not go along -----------------------------------------------------------------------------------------------

PLANTED = {
    "corpus": "/home/anna/secret-project/corpus.txt",
    "nested": [{"read from": ("~/anna/pairs.json", "C:\\Users\\Anna Smith\\pairs.json")}],
    "/home/anna/key": "file:///Users/anna/x.json",
    "said": "could not read /srv/anna/x.json, line 3",
    "home": str(Path.home()) + "/anna/models/x",
}


@pytest.mark.parametrize("kind", EVERY)
def test_no_path_of_the_user_is_in_any_file_and_what_is_left_can_be_pulled(kind, tmp_path):
    what, name = EVERY[kind](), "/home/anna/models/tuned"
    local = replace(TARGET if what is MOVED else SOURCE, name=name, revision=None)
    if isinstance(what, LayerMaps):
        what = replace(what, source=replace(what.source, model=local), _memo={})
    elif isinstance(what, HeadMaps):
        what = replace(what, source=local)
    else:
        what = replace(what, name="/home/anna/anger", provenance=what.provenance | PLANTED, model=local)
    folder = Path(push(what, tmp_path / "anna-was-here" / "share"))
    text = written(folder)
    for trace in (
        "anna",
        "Anna",
        "secret-project",
        "/home",
        "/Users",
        "Users\\",
        str(Path.home()) + "/",
        str(tmp_path),
        "/srv",
    ):
        assert trace not in text, trace
    found = pull(folder)
    home = found.source.model if isinstance(found, LayerMaps) else found.source if isinstance(found, HeadMaps) else found.model
    assert home.name == "tuned" and home.same_space(local)
    if not isinstance(what, (LayerMaps, HeadMaps)):
        assert found.name == "anger" and found.provenance["corpus"] == "corpus.txt" and found.provenance["key"] == "x.json"
        assert found.provenance["nested"] == [{"read from": ["pairs.json", "pairs.json"]}]
        assert torch.equal(found.vectors, what.vectors)


def test_a_token_anywhere_is_refused_before_anything_is_written_and_not_repeated(hub, tmp_path):
    pairs = replace(PAIRS, positive=(f"my token is {TOKEN}", "x"))
    no_hash = replace(MOVED, provenance={})
    attempts: list[Callable[[], Any]] = [
        lambda: push(replace(MOVED, provenance={"a": [{"b": f"made with {TOKEN}"}]}), tmp_path / "a"),
        lambda: push(replace(MOVED, provenance={TOKEN: 1}), tmp_path / "a"),
        lambda: push(replace(MOVED, name=TOKEN), "anna/anger", api=hub),
        lambda: push(replace(MOVED, model=replace(TARGET, name=f"https://anna:{TOKEN}@hub/x")), tmp_path / "a"),
        lambda: push(MOVED, tmp_path / "a", report=transfer(foreseen=TOKEN)),
        lambda: push(no_hash, tmp_path / "a", examples=pairs),
        lambda: push(MOVED, "anna/anger", commit_message=f"with {TOKEN}", api=hub),
        lambda: push(MOVED, tmp_path / TOKEN),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="access token") as caught:
            attempt()
        assert TOKEN[3:] not in str(caught.value)
    assert not hub.calls and not list(tmp_path.iterdir())


def test_no_prompt_is_in_any_file_unless_asked_for(bridges, tmp_path):
    source, pairs = bridges["llama"], ContrastPairs("calm", ("a zebra sleeps", "quick zebra"), ("the zebra runs", "zebra dog"))
    sentences = [f"zebra {a} {b}" for a in TEXTS for b in TEXTS]
    maps = fit_maps(source, source, sentences, ridge=0.01)
    concept = refine(source, pairs)
    told = transfer("anger", prompts=("zebra?",), texts={"base": ["zebra!"]}, groups=("zebra",) * 40)
    failed = replace(told, failures={"zero": "no answer to 'zebra'"}, arms={k: v for k, v in told.arms.items() if k != "zero"})
    assert "zebra" in failed.verdict and "zebra" in str(failed.to_dict())
    shares = [
        push(concept, tmp_path / "a"),
        push(reformulate(concept, maps, layers={1: 2}), tmp_path / "b"),
        push(maps, tmp_path / "c"),
        push(refine_heads(source, pairs), tmp_path / "d"),
        push(MOVED, tmp_path / "e", report=failed),
        push(MOVED, tmp_path / "f", report={"targets": {"big": {"anger": failed.to_dict()}}}),
    ]
    for folder in shares:
        assert "zebra" not in written(Path(folder))
    folder = Path(push(concept, tmp_path / "g", examples=pairs))
    assert all(prompt in (folder / CARD).read_text() for prompt in (*pairs.positive, *pairs.negative))
    assert all("zebra" not in (folder / name).read_text("latin-1") for name in ("concept.safetensors", MANIFEST))


def test_examples_are_the_concepts_own(tmp_path):
    with pytest.raises(ValueError, match="'anger', are not the pairs that 'anger' was refined from"):
        push(MOVED, tmp_path / "a", examples=replace(PAIRS, positive=("something else",)))
    with pytest.raises(ValueError, match="maps have none"):
        push(layer_maps(), tmp_path / "a", examples=PAIRS)
    assert not list(tmp_path.iterdir())


# --- the card -------------------------------------------------------------------------------------------------------------


def rendered(folder: Path) -> tuple[Any, str]:
    """Front matter and HTML of a card."""
    card = ModelCard.load(folder / CARD)
    return card.data, MarkdownIt("commonmark").enable("table").render(card.text)


def test_the_card_says_where_it_lives_how_it_was_made_and_what_was_measured(tmp_path):
    report = transfer()
    data, html = rendered(Path(push(MOVED, tmp_path / "a", report=report)))
    assert data.get("library_name") == "contrans_tl" and "steering-vector" in data.tags and data.license is None
    assert data.base_model == [SOURCE.name]  # the target is a folder
    for said in (
        SOURCE.name, SOURCE.revision, SOURCE.fingerprint, TARGET.name, TARGET.fingerprint, "raw", "blocks.{l}.hook_resid_post",
        "counted from 0", "<code>mean</code>", "<code>ridge</code>", "0.01", "1000 rows at the end of every word",
        CARRIED["texts_hash"], REFINED["prompts_hash"], "123 rows of equal weight", "coverage 0.99 and presence 0.2",
        "reversed", "from contrans_tl import load_model, pull, transplant", "95% intervals",
    ):  # fmt: skip
        assert str(said) in html, said
    effect = report.arms["transplanted"]["token_accuracy"]
    assert f"<td>{effect}</td>" in html and "apart from the base and every null control" in html
    assert html.count("<h2>") == 6 and html.count("<table>") == 2
    _, html = rendered(Path(push(MOVED, tmp_path / "b")))
    assert "Not evaluated" in html and "not looked for" in html
    data, html = rendered(Path(push(layer_maps(), tmp_path / "c")))
    assert (
        "30 rows of 30 sentences" in html
        and "weighted" not in html
        and "affine-map" in data.tags
        and "do not publish those of a text" in html
    )
    _, html = rendered(Path(push(layer_maps().reweighted(REFINED_CONCEPT), tmp_path / "w")))
    assert "each row weighted by what it says of a concept" in html
    _, html = rendered(Path(push(REFINED_CONCEPT + 0.5 * REFINED_CONCEPT, tmp_path / "d")))
    assert "sum of the concepts" in html and "multiplied by 0.5" in html and html.count("Refined by") == 2
    arrived = {
        "read_from": "gguf",
        "factor": 1.5,
        "of": {"carried_from": SOURCE.to_dict(), "layers": [[2, 3]], "method": "paper"},
    }
    _, html = rendered(Path(push(replace(MOVED, provenance=arrived), tmp_path / "g")))
    assert "Read from <code>gguf</code>. It was multiplied by 1.5" in html
    assert "layers <code>2 to 3</code>, through maps fitted by <code>paper</code>.</p>" in html
    older = {key: value for key, value in SOURCE.to_dict().items() if key != "quantization"}  # as earlier versions wrote it
    _, html = rendered(Path(push(replace(MOVED, provenance=CARRIED | {"carried_from": older}), tmp_path / "h")))
    assert "<code>ridge</code>" in html and SOURCE.fingerprint in html
    for number, unknown in enumerate(({}, {"carried_from": "somewhere"}, {"made": ["by", "hand"]})):
        _, html = rendered(Path(push(replace(MOVED, provenance=unknown), tmp_path / f"e{number}")))
        assert "How it was made is not recorded" in html and "this file does not tell" in html


def test_a_report_that_is_in_sample_partial_or_negative_says_so_in_the_card(tmp_path):
    leak = Leak("Is it?", "the fit corpus", "Is it? Yes.", "contained")
    _, html = rendered(Path(push(MOVED, tmp_path / "a", report=transfer(rates=RATES | {"transplanted": 0.1}))))
    assert "no transfer beyond controls" in html
    _, html = rendered(Path(push(MOVED, tmp_path / "b", report=transfer(leaks=(leak,), missing=("native",)))))
    assert "<strong>In-sample" in html and "<strong>Partial" in html


HOSTILE = [
    "`x` ``` ---\n---\nlicense: evil\n# Heading\n<script>alert(1)</script> [a](javascript:x) ![b](x) |a| *b* <!-- \\ "
    "\u202e 🦓 '\"",
    "one ` <script>alert(1)</script> <!-- [a](javascript:x)",
]


@pytest.mark.parametrize("text", HOSTILE, ids=["everything", "one backtick"])
def test_names_and_prompts_are_text_in_the_card_whatever_they_hold(text, tmp_path):
    pairs = ContrastPairs(text, (text, "```\n</code>"), ("---", "~~~"))
    known = REFINED | {"prompts_hash": hash_texts([*pairs.positive, *pairs.negative])}
    hostile = replace(MOVED, name=text, model=replace(TARGET, name=text), provenance=CARRIED | {"refined": known})
    report = transfer(text, target=text, metric=text)
    report = replace(report, arms={text: {text: report.arms["base"]["token_accuracy"]}}, failures={text: "x"})
    data, html = rendered(Path(push(hostile, tmp_path / "a", report=report, examples=pairs)))
    _, plain = rendered(Path(push(MOVED, tmp_path / "b", report=transfer(), examples=PAIRS)))
    assert set(data.to_dict()) == {"library_name", "tags", "base_model"}
    for tag in ("h1", "h2", "h3", "pre", "table", "hr", "script", "img", "a ", "em", "strong"):
        assert html.count(f"<{tag}") == plain.count(f"<{tag}"), tag
    assert "<!--" not in html and "javascript:x" in html and "\u202e" not in html
    card = (tmp_path / "a" / CARD).read_text()
    [shown] = re.findall(r"```json\n(.*?)\n```", card, re.S)
    assert json.loads(shown) == {"with the concept": list(pairs.positive), "without it": list(pairs.negative)}
    [code] = re.findall(r"```python\n(.*?)\n```", card, re.S)
    assert f"./{text}" in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert not set("<>`") & set(shown + code)


def test_the_report_has_to_be_of_what_is_pushed(tmp_path):
    whole = {"targets": {"big": {"anger": transfer().to_dict(), "joy": transfer("joy").to_dict()}}}
    models = {"source": SOURCE.to_dict(), "big": TARGET.to_dict()}
    [score] = pull_scores(push(MOVED, tmp_path / "a", report=whole))
    told = json.loads(json.dumps(transfer().to_dict()))
    assert {name: told[name] for name in score} == score
    assert not {"items", "prompts", "texts", "groups", "leaks", "task", "failures"} & set(score)
    assert [s["concept"] for s in pull_scores(push(layer_maps(), tmp_path / "b", report=whole))] == ["anger", "joy"]
    assert pull_scores(push(MOVED, tmp_path / "c", report=whole | {"models": models}))
    for report in (
        transfer("joy"),
        transfer(layer_target=4),
        transfer(target="small"),
        whole | {"models": models | {"big": TARGET.to_dict() | {"fingerprint": "other"}}},
        whole | {"models": models | {"source": SOURCE.to_dict() | {"fingerprint": "other"}}},
    ):
        with pytest.raises(ValueError, match="expected a report of what is pushed; this one is of"):
            push(MOVED, tmp_path / "d", report=report)
    with pytest.raises(ValueError, match="this is a head vectors"):
        push(HEADS, tmp_path / "d", report=transfer())
    with pytest.raises(ValueError, match="this is something else"):
        push(MOVED, tmp_path / "d", report={"verdict": "good"})


def test_what_cannot_be_shared_is_refused_with_what_to_do(hub, tmp_path):
    fitted: Any = fit_affine(drawn(30, 4), drawn(30, 5))
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: push(fitted, tmp_path / "a"), "got AffineMap"),
        (
            lambda: push(replace(layer_maps(), stored=(SimpleNamespace(), SimpleNamespace())), tmp_path / "a"),
            "push maps of their",
        ),
        (lambda: push(MOVED, "a/b/c", api=hub), "as in user/name, or a folder as in ./name; got 'a/b/c'"),
        (lambda: push(MOVED, "", api=hub), "got ''"),
        (lambda: pull("name", api=hub), "got 'name'"),
        (lambda: push(MOVED, tmp_path / "a", revision="x"), "revision= is for repositories"),
        (lambda: pull(tmp_path, revision="x"), "revision= is for repositories"),
        (lambda: pull(tmp_path / "nowhere"), "is not there"),
    ]
    for attempt, message in refused:
        with unchecked(), pytest.raises(ValueError, match=re.escape(message)):
            attempt()
    assert not hub.calls and not list(tmp_path.iterdir())


# --- the command line -----------------------------------------------------------------------------------------------------


def test_push_and_pull_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    MOVED.save("moved.safetensors")
    Path("pairs.json").write_text(json.dumps({"name": "anger", "positive": PAIRS.positive, "negative": PAIRS.negative}))
    report = {"kind": "contrans report", "format": 2, "targets": {"big": {"anger": transfer().to_dict()}}}
    write_json("report.json", report)
    assert main(["push", "moved.safetensors", "./anger", "--report", "report.json", "--examples", "pairs.json"]) == 0
    assert capsys.readouterr().out == "./anger\n"
    assert main(["pull", "./anger", "--out", "back.safetensors"]) == 0
    assert "ConceptVector('anger'" in capsys.readouterr().out
    assert torch.equal(ConceptVector.load("back.safetensors").vectors, MOVED.vectors)
    assert pull_scores("anger") and PAIRS.positive[0] in Path("anger", CARD).read_text()
    shutil.copy("moved.safetensors", "anger/concept.safetensors")
    AffineMap.save(fit_affine(drawn(30, 4), drawn(30, 5)), "map.safetensors")
    for arguments, message in (
        (["push", "nowhere.safetensors", "./x"], "there is no file"),
        (["push", "map.safetensors", "./x"], "is of kind 'affine map'"),
        (["push", "moved.safetensors", "./x", "--report", "pairs.json"], "expected a report.json"),
        (["pull", "./nowhere", "--out", "x"], "not there"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not Path("x").exists()


def test_on_the_command_line_a_repository_is_private_and_named_commits_are_pulled(tmp_path, monkeypatch, capsys, hub):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda **kwargs: hub)
    MOVED.save(tmp_path / "moved.safetensors")
    assert main(["push", str(tmp_path / "moved.safetensors"), "anna/anger", "--message", "the first"]) == 0
    commit = capsys.readouterr().out.strip().rpartition("/")[2]
    assert main(["push", str(tmp_path / "moved.safetensors"), "anna/open", "--public"]) == 0
    assert hub.private == {"anna/anger": True, "anna/open": False} and hub.messages[0] == "the first"
    assert main(["pull", "anna/anger", "--revision", commit, "--out", str(tmp_path / "back.safetensors")]) == 0
    assert torch.equal(ConceptVector.load(tmp_path / "back.safetensors").vectors, MOVED.vectors)
