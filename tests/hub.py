"""A stand-in for the Hugging Face hub: repositories as folders, a folder for every commit, under `HfApi`'s own method names.

Each call is bound to the signature of the installed `HfApi`'s method, so that a call that the real one would not take fails
here too, and is recorded. Errors are the real ones.
"""

import inspect
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)


def _as_the_real_one(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(self: "Hub", *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(getattr(HfApi, method.__name__)).bind(self, *args, **kwargs)
        arguments = {name: value for name, value in bound.arguments.items() if name != "self"}
        self.calls.append((method.__name__, arguments))
        return method(self, **arguments)

    return call


class Hub:
    def __init__(self, root: Path):
        self.root = root
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.private: dict[str, bool] = {}
        self.branches: dict[str, dict[str, str]] = {}
        """Repository -> branch -> commit."""
        self.messages: list[str] = []

    def folder(self, repo_id: str, revision: str | None = None) -> Path:
        if repo_id not in self.branches:
            raise RepositoryNotFoundError("404 Client Error\nRepository Not Found", response=RESPONSE)
        commit = self.branches[repo_id].get(revision or "main", revision or "")
        if not (folder := self.root / repo_id / commit).is_dir() or not commit:
            raise RevisionNotFoundError("404 Client Error\nRevision Not Found", response=RESPONSE)
        return folder

    def _commit(self, repo_id: str, branch: str) -> Path:
        commit = f"{len(list((self.root / repo_id).glob('*'))):040x}"
        new = self.root / repo_id / commit
        if branch in self.branches[repo_id]:
            shutil.copytree(self.folder(repo_id, branch), new)
        else:
            new.mkdir(parents=True)
        self.branches[repo_id][branch] = commit
        return new

    @_as_the_real_one
    def create_repo(self, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> str:
        if repo_id in self.branches and not exist_ok:
            raise ValueError("409 Conflict")
        if repo_id not in self.branches:
            self.private[repo_id], self.branches[repo_id] = bool(private), {}
            (self._commit(repo_id, "main") / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        return f"https://hub/{repo_id}"

    @_as_the_real_one
    def repo_info(self, repo_id: str) -> Any:
        names = [SimpleNamespace(rfilename=file.name) for file in self.folder(repo_id).iterdir()]
        return SimpleNamespace(private=self.private[repo_id], siblings=names)

    @_as_the_real_one
    def create_branch(self, repo_id: str, branch: str, exist_ok: bool = False) -> None:
        if branch not in self.branches[repo_id]:
            self.branches[repo_id][branch] = self.branches[repo_id]["main"]

    @_as_the_real_one
    def upload_folder(
        self,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        revision: str | None = None,
        delete_patterns: list[str] | None = None,
    ) -> Any:
        self.folder(repo_id, revision)
        new = self._commit(repo_id, revision or "main")
        for file in new.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in delete_patterns or []):
                file.unlink()
        shutil.copytree(folder_path, new, dirs_exist_ok=True)
        self.messages.append(commit_message)
        return SimpleNamespace(oid=new.name, commit_url=f"https://hub/{repo_id}/commit/{new.name}")

    @_as_the_real_one
    def snapshot_download(self, repo_id: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        commit = self.folder(repo_id, revision)
        cache = self.root / "cache" / repo_id / commit.name
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        for file in commit.iterdir():
            if allow_patterns is None or any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, cache)
        return str(cache)
