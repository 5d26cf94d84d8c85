"""Sharing: concepts and maps go to a repository of the Hugging Face hub, or to a folder, and come back as they were.

    push(concept, "user/anger", report="out/report.json")       a repository, private unless private=False; its commit's address
    push(concept, "./shared/anger")                             a folder, which is the same without a network
    concept = pull("user/anger", revision="1f0c...")            or pull("./shared/anger")
    scores = pull_scores("user/anger")

What is pushed is a few files: the safetensors file, `contrans.json` with what it is and the SHA-256 and size of every other
file, a card for readers (`cards`) and, of a report, `scores.json`. No prompt is among it unless `examples=` asks for some, and
no path or token of whoever pushes (`redaction`).

`pull` opens only files of these names, checks each against `contrans.json` before it reads it, and unpickles nothing. That
finds what was damaged or changed on the way. Who can write to a repository can change file and checksum both: where it
matters, pull the commit that you have looked at, by `revision`.
"""

import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from contrans_tl import artifacts
from contrans_tl.activations import hash_texts
from contrans_tl.cards import card, models_of, steps_of
from contrans_tl.data import ContrastPairs
from contrans_tl.evaluation import TransferReport
from contrans_tl.heads import HeadMaps, HeadVectors
from contrans_tl.redaction import redacted, refuse_tokens
from contrans_tl.refinement import ConceptVector
from contrans_tl.reformulation import LayerMaps
from contrans_tl.report import read_report

FORMAT = 1
SHOWN = 3
"""Prompts of each side that a card shows where it may."""
MANIFEST, CARD, SCORES = "contrans.json", "README.md", "scores.json"
Shareable = ConceptVector | HeadVectors | LayerMaps | HeadMaps
KINDS: dict[str, tuple[type[Any], str]] = {
    "concept vector": (ConceptVector, "concept.safetensors"),
    "head vectors": (HeadVectors, "heads.safetensors"),
    "layer maps": (LayerMaps, "maps.safetensors"),
    "head maps": (HeadMaps, "head_maps.safetensors"),
}
"""Kind of artifact -> its class, and the name of its file."""
_FILES = [*(name for _, name in KINDS.values()), SCORES, CARD, MANIFEST]
"""All that is ever written or read; the manifest last, so that what is there without it is not whole."""
_MEASURED = (
    "concept target metric wanted layer_source layer_target strength dose coverage presence foreseen r2 arms differences leads "
    "transfer_rate steerability geometry search held_out items_hash null_vectors verdict transferred in_sample partial"
).split()
"""What of a report is shared: numbers and what they are of. Prompts, continuations and leaks are not."""


def push(
    what: Shareable,
    to: str | os.PathLike[str],
    *,
    report: TransferReport | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    examples: ContrastPairs | None = None,
    private: bool = True,
    revision: str | None = None,
    commit_message: str | None = None,
    api: Any = None,
) -> str:
    """Upload a concept or maps with their card, or write them to a folder; the address of the commit, or the folder.

    Args:
        to: a repository, "user/name"; or a folder: a `Path`, a text that begins with "." or "/" or "~", or one that names a
            folder that is there. It is made, or replaced if an earlier push made it.
        report: what was measured: a `TransferReport`, or a report.json, read or by its path. Of what it holds, the transfers of
            this concept, or through these maps, go into card and `scores.json`.
        examples: the pairs the concept was refined from, if a few of their prompts shall be printed in the card.
        private: of a repository that is made. One that is there already is left as it is, and refused if it is public.
        revision: branch to commit to, made if there is none; by default `main`.
        api: what asks the hub, as `huggingface_hub.HfApi(token=...)`; by default one with the token you are logged in with.

    Raises:
        ValueError: something that cannot be shared, a report or examples of something else, an access token in what would be
            written, a folder or repository that holds other things, or a hub that cannot be reached or refuses.
    """
    folder = _folder(to)
    kind = _kind_of(what)
    if folder is not None and revision is not None:
        raise ValueError(f"revision= is for repositories of the hub; {str(to)!r} is a folder.")
    if folder is None:
        _check_repository(str(to))
    else:
        folder = folder.resolve()
        _check_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
    where = str(to) if folder is None else f"./{folder.name}"
    refuse_tokens(where)
    message = redacted(commit_message or f"Push {kind}{f' {what.name}' if hasattr(what, 'name') else ''}")
    with tempfile.TemporaryDirectory(dir=None if folder is None else folder.parent, prefix=".contrans-") as temporary:
        built = Path(temporary) / "share"
        _write(what, kind, built, where, report, examples)
        if folder is not None:
            _move(built, folder)
            return str(to)
        return _upload(built, str(to), private, revision, message, api)


def pull(source: str | os.PathLike[str], *, revision: str | None = None, api: Any = None) -> Shareable:
    """What was pushed to a repository or a folder: a `ConceptVector`, `HeadVectors`, `LayerMaps` or `HeadMaps`.

    Args:
        source: as `to` of `push`.
        revision: branch, tag or commit of a repository; a commit never changes.
        api: as in `push`.

    Raises:
        ValueError: nothing of that name, a file that is missing, truncated or not the one that was pushed, a manifest that
            names other files than such a folder has, another kind, a newer format, or a hub that cannot be reached.

    Warns where the card is not the one that was pushed; owners of a repository may edit it.
    """
    folder, manifest = _fetched(source, revision, api)
    cls, name = KINDS[manifest["kind"]]
    # Files on this machine are named by whoever uses it, not by what comes from elsewhere.
    if artifacts.header_of(folder / name).get("stored"):
        raise ValueError(f"{name} of {str(source)!r} refers to rows in a folder of whoever pushed it; it cannot be pulled.")
    try:
        return cls.load(folder / name)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{name} of {str(source)!r} is not a whole {manifest['kind']}: {error!r} in its header.") from error


def pull_scores(source: str | os.PathLike[str], *, revision: str | None = None, api: Any = None) -> list[dict[str, Any]]:
    """What was measured of it, one dictionary for each transfer; empty if it was pushed without a report.

    Raises:
        ValueError: as `pull`.
    """
    folder, manifest = _fetched(source, revision, api)
    return list(json.loads((folder / SCORES).read_bytes())) if SCORES in manifest["files"] else []


def load(path: str | os.PathLike[str]) -> Shareable:
    """A concept or maps from a file, whichever it holds. ValueError for one that holds neither."""
    kind = artifacts.header_of(path)["kind"]
    if kind not in KINDS:
        raise ValueError(f"expected a file of {', '.join(KINDS)}; {str(path)!r} is of kind {kind!r}, which names no models.")
    return KINDS[kind][0].load(path)


def scores_of(
    report: TransferReport | Mapping[str, Any] | str | os.PathLike[str], kind: str, about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What of a report is of this concept, or of a transfer through these maps, less every text that was asked or answered.

    Raises:
        ValueError: no report, or one of something else.
    """
    if kind not in ("concept vector", "layer maps"):
        raise ValueError(f"reports are of concept vectors and of maps between layers; this is a {kind}.")
    if isinstance(report, TransferReport):
        content: Mapping[str, Any] = report.to_dict()
    else:
        content = report if isinstance(report, Mapping) else read_report(report)
    transfers = list(_transfers(content))
    if not all(set(_MEASURED) <= set(transfer) for transfer, _ in transfers):
        raise ValueError(
            "expected a TransferReport, or a report.json of contrans run, evaluate or demo; this is something else."
        )
    fitting = [_measured(transfer) for transfer, models in transfers if _is_of(transfer, models, kind, about)]
    if not fitting:
        known = "; ".join(
            f"{t['concept']} into {t['target']}, layer {t['layer_source']} to {t['layer_target']}" for t, _ in transfers
        )
        raise ValueError(f"expected a report of what is pushed; this one is of {known}, or of models with other weights.")
    return fitting


def _transfers(content: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], dict[str, str]]]:
    """Each transfer of a report, with the fingerprints of source and target as far as it tells them."""
    if "targets" not in content:
        yield content, {}
    models = content.get("models", {})
    for target, row in content.get("targets", {}).items():
        known = {side: models[key]["fingerprint"] for side, key in (("source", "source"), ("target", target)) if key in models}
        for transfer in row.values():
            yield transfer, known


def _is_of(transfer: Mapping[str, Any], fingerprints: Mapping[str, str], kind: str, about: Mapping[str, Any]) -> bool:
    """Whether a transfer is of this concept, or through these maps: by name, layers and models."""
    models = models_of(kind, about)
    if kind == "layer maps":
        sides, layers = models, {side: about[side]["layers"] for side in models}
    elif "source" in models:
        sides, layers = {"source": models["source"], "target": models["model"]}, {"target": about["layers"]}
    else:
        sides, layers = {"source": models["model"]}, {"source": about["layers"]}
    return (
        (kind == "layer maps" or transfer["concept"] == about["name"])
        and ("target" not in sides or transfer["target"] == sides["target"].name)
        and all(fingerprints.get(side, model.fingerprint) == model.fingerprint for side, model in sides.items())
        and all(transfer[f"layer_{side}"] in known for side, known in layers.items())
    )


def _measured(transfer: Mapping[str, Any]) -> dict[str, Any]:
    """Less why an arm failed: an error may quote the prompt it is about."""
    verdict = transfer["verdict"]
    for arm, reason in transfer.get("failures", {}).items():
        verdict = verdict.replace(f"{arm} ({reason})", arm).replace(f"{arm}: {reason}", arm)
    return {name: transfer[name] for name in _MEASURED} | {"verdict": verdict}


# --- written ------------------------------------------------------------------------------------------------------------


def _kind_of(what: Any) -> str:
    kind = next((kind for kind, (cls, _) in KINDS.items() if isinstance(what, cls)), None)
    if kind is None:
        known = ", ".join(cls.__name__ for cls, _ in KINDS.values())
        raise ValueError(f"expected one of {known} to push; got {type(what).__name__}.")
    if isinstance(what, LayerMaps) and what.stored is not None:
        raise ValueError(
            "these maps are of rows on disk, which stay there: push maps of their sample, as LayerMaps.fit(maps.source, "
            "maps.target), or the concept that they carried."
        )
    return kind


def _write(
    what: Shareable,
    kind: str,
    folder: Path,
    where: str,
    report: TransferReport | Mapping[str, Any] | str | os.PathLike[str] | None,
    examples: ContrastPairs | None,
) -> None:
    """All files of a share, into a folder that is not there yet."""
    file = what.save(folder / KINDS[kind][1])
    tensors, header = artifacts.load(file, kind)
    scores = [] if report is None else scores_of(report, kind, header)
    shown = {} if examples is None else _shown(examples, header)
    header, scores = redacted(header), redacted(scores)
    artifacts.save(file, kind, tensors, header)
    if scores:
        artifacts.write_json(folder / SCORES, scores)
    sizes = {}
    if "maps" in kind:
        sizes = {"rows": len(tensors["source"]), "sentences": len(tensors["sentence"].unique())}
        sizes["weighted"] = sizes["rows"] * ("weights" in tensors)
    text = card(kind, header, sizes, where, scores=scores, examples=redacted(shown))
    artifacts.write_atomically(folder / CARD, text.encode())
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    artifacts.write_json(folder / MANIFEST, _manifest(kind, header, sizes) | {"evaluated": bool(scores), "files": files})


def _manifest(kind: str, header: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """What it is, for those who do not open the file."""
    models = {role: model.to_dict() for role, model in models_of(kind, header).items()}
    manifest: dict[str, Any] = {"format": FORMAT, "kind": kind, "versions": header["versions"], "models": models}
    if "maps" in kind:
        manifest |= {"basis": models["target"]["basis"], "method": header["method"], "rows": header["rows"]}
        manifest |= {"n_rows": sizes["rows"], "n_sentences": sizes["sentences"], "corpus_hash": header["texts_hash"]}
        if kind == "head maps":
            return manifest | {key: header["heads"][key] for key in ("source_heads", "target_heads", "pooled")}
        return manifest | {f"{side}_layers": header[side]["layers"] for side in models}
    steps = list(steps_of(header["provenance"]))
    manifest |= {"name": header["name"], "basis": models["model"]["basis"]}
    manifest |= {places: header[places] for places in ("layers", "heads") if places in header}
    manifest |= {"rows": _first(steps, "rows"), "n_rows": _first(steps, "n_rows"), "corpus_hash": _first(steps, "texts_hash")}
    return manifest | {"method": _first(steps, "method"), "prompts_hash": _first(steps, "prompts_hash")}


def _first(steps: list[Mapping[str, Any]], key: str) -> Any:
    return next((step[key] for step in steps if key in step), None)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "size": path.stat().st_size}


def _shown(examples: ContrastPairs, header: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """A few prompts of each side. ValueError for those of another concept."""
    if "provenance" not in header:
        raise ValueError("examples= are prompts that a concept was refined from; maps have none.")
    known = {step["prompts_hash"] for step in steps_of(header["provenance"]) if "prompts_hash" in step}
    if known and hash_texts([*examples.positive, *examples.negative]) not in known:
        raise ValueError(f"the examples, {examples.name!r}, are not the pairs that {header['name']!r} was refined from.")
    return {"with the concept": examples.positive[:SHOWN], "without it": examples.negative[:SHOWN]}


def _check_free(folder: Path) -> None:
    """ValueError for a file, or a folder that something else lies in."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder; {str(folder)!r} is a file.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"{str(folder)!r} holds other files, and no {MANIFEST}: name a new folder, or an empty one.")


def _move(built: Path, folder: Path) -> None:
    """To where it belongs: at once, or file by file into a folder that is there."""
    if not folder.exists():
        os.replace(built, folder)
        return
    for name in _FILES:
        if (built / name).exists():
            os.replace(built / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier push


def _upload(built: Path, repository: str, private: bool, revision: str | None, message: str, api: Any) -> str:
    api = _api(api)
    with _asking(repository, revision):
        api.create_repo(repository, private=private, exist_ok=True)
        there = api.repo_info(repository)
    names = {file.rfilename for file in there.siblings or ()} - {".gitattributes"}
    if names and MANIFEST not in names:
        raise ValueError(f"the repository {repository!r} holds other files, and no {MANIFEST}: name a new one.")
    if private and not there.private:
        raise ValueError(f"the repository {repository!r} is public: push with private=False (--public), or to another one.")
    with _asking(repository, revision):
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=str(built),
            commit_message=message,
            revision=revision,
            delete_patterns=_FILES,  # of an earlier push; what is uploaded stays
        )
    return str(commit.commit_url)


# --- read ---------------------------------------------------------------------------------------------------------------


def _fetched(source: str | os.PathLike[str], revision: str | None, api: Any) -> tuple[Path, dict[str, Any]]:
    """The folder with the files, all of them checked, and what its manifest says."""
    folder = _folder(source)
    if folder is None:
        _check_repository(str(source))
        with _asking(str(source), revision):
            # Only files of these names: whatever else lies there is never downloaded.
            folder = Path(_api(api).snapshot_download(str(source), revision=revision, allow_patterns=_FILES))
    elif revision is not None:
        raise ValueError(f"revision= is for repositories of the hub; {str(source)!r} is a folder.")
    elif not folder.is_dir():
        raise ValueError(
            f"expected a folder that was pushed to; {str(source)!r} is {'a file' if folder.exists() else 'not there'}."
        )
    return folder, _checked(folder, str(source))


def _checked(folder: Path, source: str) -> dict[str, Any]:
    """The manifest of a folder whose files are those that were pushed."""
    manifest = _manifest_of(folder, source)
    for name, expected in manifest["files"].items():
        path, again = folder / name, "the file was damaged or changed; pull or push it again"
        if not path.is_file():
            raise ValueError(f"{name} of {source!r} is missing, though {MANIFEST} names it.")
        found = _fingerprint(path)
        if found == expected:
            continue
        if name == CARD:
            warnings.warn(f"{CARD} of {source!r} is not the card that was pushed: somebody edited it.", stacklevel=4)
        elif found["size"] != expected["size"]:
            raise ValueError(f"{name} of {source!r} has {found['size']} bytes, {MANIFEST} says {expected['size']}: {again}.")
        else:
            raise ValueError(f"{name} of {source!r} has another SHA-256 than {MANIFEST} says: {again}.")
    return manifest


def _manifest_of(folder: Path, source: str) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{source!r} has no {MANIFEST}: nothing was pushed there, or not by contrans_tl.")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{MANIFEST} of {source!r} is truncated or not JSON ({error}).") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise ValueError(f"{MANIFEST} of {source!r} is not one of contrans_tl: it has no format number.")
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{MANIFEST} of {source!r} has format {manifest['format']}; this version reads up to {FORMAT}. Update contrans_tl."
        )
    kind, files = manifest.get("kind"), manifest.get("files")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{MANIFEST} of {source!r} is of a {kind!r}; expected one of {', '.join(KINDS)}.")
    if not isinstance(files, dict) or not all(isinstance(f, dict) and {"sha256", "size"} <= set(f) for f in files.values()):
        raise ValueError(f"{MANIFEST} of {source!r} does not list files with their SHA-256 and size.")
    expected = {KINDS[kind][1], SCORES, CARD}
    if strange := sorted(set(files) - expected):
        raise ValueError(
            f"{MANIFEST} of {source!r} names {strange[0]!r}; a {kind} has no files but {', '.join(sorted(expected))}."
        )
    if KINDS[kind][1] not in files:
        raise ValueError(f"{MANIFEST} of {source!r} does not name {KINDS[kind][1]}, which holds the {kind}.")
    return manifest


# --- where --------------------------------------------------------------------------------------------------------------


def _folder(where: str | os.PathLike[str]) -> Path | None:
    """The folder that is meant, or None for a repository of the hub."""
    if not isinstance(where, str):
        return Path(where)
    path = Path(where).expanduser()
    return path if where.startswith(".") or path.is_absolute() or (where and path.exists()) else None


def _check_repository(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"expected a repository as in user/name, or a folder as in ./name; got {name!r}.")


def _api(api: Any) -> Any:
    if api is not None:
        return api
    from huggingface_hub import HfApi

    return HfApi(library_name="contrans_tl")


@contextmanager
def _asking(repository: str, revision: str | None) -> Iterator[None]:
    """What goes wrong between here and the hub, in a sentence: it may be any of its own errors or of its transport's."""
    from huggingface_hub import errors

    try:
        yield
    except (AttributeError, TypeError, AssertionError):  # not the hub's
        raise
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"the repository {repository!r} has no revision {revision or 'main'!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the hub has no repository {repository!r} that you may read: check the name, and that you are logged in "
            "(`hf auth login`)."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise ValueError(
            f"the hub cannot be reached, and {repository!r} is neither in the cache nor a folder here (a folder is named as "
            "in ./name)."
        ) from error
    except Exception as error:
        said = str(error).strip().split("\n")[0]
        raise ValueError(f"the hub did not do what was asked of {repository!r} ({type(error).__name__}: {said}).") from error
