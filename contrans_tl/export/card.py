"""What a steered folder says about itself: `contrans.json` for programs, a section of the model card for people.

Both are made to be published. They name the concept, the model, the layers and the biases; no path, no user and no text of a
prompt is in them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from contrans_tl.artifacts import versions
from contrans_tl.redaction import redacted
from contrans_tl.refinement import ConceptVector

if TYPE_CHECKING:
    from contrans_tl.export.target import ModelFolder

ABOUT, CARD = "contrans.json", "README.md"
FORMAT = 1
_LONG = 120
"""Characters of a string from which on it is taken for text."""


def about(
    concept: ConceptVector, source: "ModelFolder", *, strength: float, vectors: Mapping[int, Tensor], biases: Sequence[str]
) -> dict[str, Any]:
    """The content of contrans.json. ValueError for a provenance with an access token in it."""
    before = source.path / ABOUT
    earlier = {"earlier": json.loads(before.read_text("utf-8"))} if before.is_file() else {}
    return earlier | {
        "format": FORMAT,
        "kind": "contrans export",
        "concept": publishable({"name": concept.name, "provenance": concept.provenance}),
        "model": source.model.to_dict(),
        "strength": strength,
        "layers": list(vectors),
        "norms": [float(x.norm()) for x in vectors.values()],
        "biases": list(biases),
        "versions": versions(),
    }


def publishable(content: Any) -> Any:
    """The same as plain values, `redacted`, and without texts: a prompt may be one."""
    return _without_texts(redacted(json.loads(json.dumps(content, default=str))))


def _without_texts(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {_without_texts(key): _without_texts(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_texts(value) for value in content]
    is_text = isinstance(content, str) and (len(content) > _LONG or "\n" in content)
    return "(left out)" if is_text else content


def steered_card(card: str, content: Mapping[str, Any], *, hub_id: str | None, switched: bool) -> str:
    """The target's model card with one more section, and `base_model` in its front matter if there is a hub id and none yet."""
    matter = re.match(r"\ufeff?---[ \t]*\r?\n.*?^---[ \t]*\r?$\n?", card, re.DOTALL | re.MULTILINE)
    if hub_id and matter is None:
        card = f"---\nbase_model: {hub_id}\n---\n{card}"
    elif hub_id and matter is not None and not re.search(r"^base_model\s*:", matter[0], re.MULTILINE):
        end = matter[0].rstrip().rindex("---")
        newline = "\r\n" if "\r\n" in matter[0] else "\n"
        card = f"{card[:end]}base_model: {hub_id}{newline}{card[end:]}"
    gap = "" if not card else "\n" if card.endswith("\n") else "\n\n"
    return f"{card}{gap}{_section(content, switched)}"


def _section(content: Mapping[str, Any], switched: bool) -> str:
    name = _plain(content["concept"]["name"])
    model = _plain(content["model"]["name"]) + (f" at {content['model']['revision']}" if content["model"]["revision"] else "")
    layers = ", ".join(map(str, content["layers"]))
    where = ", ".join(f"`{bias}`" for bias in content["biases"])
    zeros = (
        " All other biases that `config.json` switches on are zero; an engine that does not read them from it would serve the "
        "model unsteered."
        if switched
        else ""
    )
    return f"""## Steered with contrans_tl

This is `{model}` with the concept `{name}` added to its residual stream after block {layers} (counted from 0), at every \
token, at strength {content["strength"]:g}. The vector is in {where}; nothing was trained, and every other weight is the \
original's, bit for bit.{zeros} `contrans.json` says where the vector comes from. Writing this folder did not test what the \
concept does beside what it is meant to do.

License and terms of use are the original model's own. Method: ConTrans, \
[arXiv 2405.13578](https://arxiv.org/abs/2405.13578).
"""


def _plain(text: str) -> str:
    """Text that ends no code span and no line."""
    return " ".join(text.replace("`", "'").split())
