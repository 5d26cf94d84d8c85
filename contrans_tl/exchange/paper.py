"""The paper's files (Dong et al., github.com/willowdong/ConTrans): its concept vectors and its affine maps.

    concept = read_arrays("llama-7b_anger_mean.npy", identify(source))            # all 32 layers
    maps = read_maps("affine_weights/llama-7b_llama-13b_svd_wiki_split")          # affine_24_to_30.pth, ...
    moved = carry(concept, maps, identify(target))                                # what convert_vector.py writes
    write_npy(moved, "llama-7to13-anger.npy")

A vector is a row of a float32 array "layer d_model", as `read_arrays` reads it. A map is `affine_{source}_to_{target}.pth`:
from `train_affine_svd.py` a tensor W "d_target d_source", without bias, such that y = W x; from `train_affine.py` the state of
a linear layer, which has one. Layers are block outputs counted from 0 in both, so they are ours.

Their files do not say which models, how many rows or how good: `fit` then says 0 rows and an R2 of NaN, and whoever reads them
says the models. Folders of `--use_activation`, whose maps end in a ReLU, are told by their name and refused.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from contrans_tl.affine import AffineMap, FitReport
from contrans_tl.exchange.arrays import load_arrays
from contrans_tl.exchange.rows import home, incoming
from contrans_tl.models import HookedModel, ModelId
from contrans_tl.refinement import ConceptVector

_NAME = re.compile(r"affine_(\d+)_to_(\d+)\.(?:pth|npy)")
_WEIGHT, _BIAS = "linear.weight", "linear.bias"


def read_map(path: str | os.PathLike[str]) -> AffineMap:
    """An affine map of the paper's code, "d_target d_source", from its .pth or, saved as an array, .npy.

    Raises:
        ValueError: no such file, a truncated one, one with more in it than tensors, a map with an activation.
    """
    path = Path(path)
    if path.resolve().parent.name.endswith("_activation"):
        raise ValueError(f"the maps in {path.resolve().parent.name!r} end in a ReLU; they are not affine and are not read.")
    content = load_arrays(path)
    if isinstance(content, Mapping):
        if set(content) != {_WEIGHT, _BIAS}:
            raise ValueError(f"expected {_WEIGHT} and {_BIAS}; {path.name!r} has {', '.join(map(str, content))}.")
        weight, bias = content[_WEIGHT], content[_BIAS]
    else:
        weight, bias = content, torch.zeros(content.shape[:1])
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or not (weight.is_floating_point() and bias.is_floating_point()):
        raise ValueError(
            f'expected a matrix "d_target d_source"; {path.name!r} holds {weight.dtype} of shape {tuple(weight.shape)}.'
        )
    weight, bias = weight.detach().float(), bias.detach().float()
    rank = int(torch.linalg.matrix_rank(weight.double()))
    return AffineMap(weight, bias, FitReport("paper", rows=0, sentences=0, rank=rank, ridge=0.0, r2=math.nan))


def read_maps(folder: str | os.PathLike[str]) -> dict[tuple[int, int], AffineMap]:
    """All maps of a folder, by source and target layer. ValueError for a folder without any, or what `read_map` raises."""
    found = {match: path for path in sorted(Path(folder).glob("affine_*")) if (match := _NAME.fullmatch(path.name))}
    if not found:
        raise ValueError(f"expected files affine_SOURCE_to_TARGET.pth; {str(folder)!r} has none.")
    return {(int(match[1]), int(match[2])): read_map(path) for match, path in found.items()}


def carry(concept: ConceptVector, maps: Mapping[tuple[int, int], AffineMap], target: HookedModel | ModelId) -> ConceptVector:
    """The concept at the target layers of these maps: W v, never the bias.

    Raises:
        ValueError: no maps, two into one layer, a source layer that the concept has no vector at, a target layer or a width
            that the target does not have.
    """
    here = home(target, None, concept.name)
    pairs = sorted(maps, key=lambda pair: pair[1])
    if len({t for _, t in pairs}) < len(pairs):
        raise ValueError(f"expected one map into a target layer; got {pairs}. Choose among them.")
    for pair in pairs:
        shape = tuple(maps[pair].weight.shape)
        if shape != (here.d_model, concept.model.d_model):
            raise ValueError(
                f"expected maps of shape {(here.d_model, concept.model.d_model)}, from {concept.model.name} to {here.name}; "
                f"that from layer {pair[0]} to {pair[1]} is {shape}."
            )
    provenance = {
        "carried_from": concept.model.to_dict(),
        "layers": [list(pair) for pair in pairs],
        "method": "paper",
        "read_from": "maps of the paper's code",
        "refined": concept.provenance,
    }
    return incoming({t: maps[s, t].direction(concept.at(s)) for s, t in pairs}, here, concept.name, provenance)
