"""Redaction: what of a value must not leave this machine - access tokens, and paths, which tell whose machine it was.

    redacted({"corpus": "/home/anna/corpus.txt"})       {"corpus": "corpus.txt"}
    redacted("see ~/notes/pairs.json, line 3")          "see pairs.json, line 3"
    redacted({"note": "hf_..."})                        ValueError

A path is cut to its last part, at any depth, in keys as in values; a home folder, whose last part is a user's name, becomes
"~". What could be a path counts as one: a text that begins with a slash is cut to what follows its last one. Hub ids, which
have one slash, and addresses of the web stay. A token cannot be cut out of a text that may be about it, so it is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TOKEN = re.compile(
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|://[^/\s:@]+:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_ROOT = (
    r"(?:(?:file|ssh|sftp|scp|smb|nfs)://+|[\w.-]+@[\w.-]+:(?=[/~])"  # at a host
    r"|~(?:[A-Za-z_][\w.-]*)?/|\.{1,2}/|(?:(?<!:)/+|/)(?![/\s])"
    r"|\\\\|[A-Za-z]:[\\/](?!/))"  # on Windows
)
_WHOLE = re.compile(rf"^[ \t]*{_ROOT}\S.*$|^[\w.-]+(?:/[\w.-]+){{2,}}$", re.MULTILINE)
"""A line that is a path: from a root, or of more parts than a hub id has."""
_WITHIN = re.compile(
    rf"(?<![\w.~/\\-])(?!/[A-Za-z]\w*>)"
    rf"(?:[A-Za-z]:\\(?:[^\\/:*?\"<>|\r\n]+\\)*[^\s\"<>|,;)\]}}]*|{_ROOT}[^\s\"'`<>|,;)\]}}]+)"
)
"""A path among words, and not the end tag of some HTML; what a Windows folder is called may have spaces in it."""


def redacted(value: Any) -> Any:
    """The value with every path in it cut to its last part. Lists and dictionaries are gone through, tuples become lists.

    Raises:
        ValueError: a text in it holds an access token; the message does not repeat it.
    """
    if isinstance(value, Mapping):
        return {redacted(key): redacted(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    if not isinstance(value, str):
        return value
    refuse_tokens(value)
    value = re.sub(r"(?<=://)[^/\s@]+@", "", value)  # who somebody is at a host
    return _WITHIN.sub(_last_part, _WHOLE.sub(_last_part, value))


def refuse_tokens(text: str) -> None:
    """ValueError for a text that holds an access token, a private key or an address with a password; it is not repeated."""
    if found := _TOKEN.search(text):
        raise ValueError(
            f"what would be written holds an access token or a password ({found[0][:3]}...): take it out, and revoke it if "
            "it has been anywhere else."
        )


def _last_part(path: re.Match[str]) -> str:
    *before, last = re.split(r"[\\/]+", path[0].strip().rstrip("\\/"))
    home = Path.home().name
    if not last or last.startswith("~") or (home and last == home) or (before and before[-1].lower() in {"home", "users"}):
        return "~"
    return last
