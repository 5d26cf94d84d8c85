"""Peers: vectors to repeng, steering-vectors and llama.cpp and back, with the packages themselves.

Each is installed alone into a temporary folder, as none of them shares an environment with this library: repeng 0.4.0 names
numpy's float_, which numpy 2 has not (it is put back here), steering-vectors asks for transformers 4, and llama.cpp is the
shared library of the xllamacpp wheel (Linux, x86-64). On a tiny random Llama, for every layer:

    repeng            import_gguf and export_gguf give our layers and numbers bit by bit; logits under ControlModel are those
                      under transplant; what it reads at layer l is resid_post of l - but for the last layer
    steering-vectors  the same in memory, for apply and record_activations
    llama.cpp         its own loader reads our file and refuses direction.0; its logits are transplant's

    python tests/benchmarks/peers.py
"""

import measure  # noqa: F401  # isort: skip  # first: it settles the number of threads
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama_cpp import LlamaCpp, write_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import D_MODEL, N_LAYERS, TEXTS, random_model, save_tokenizer  # noqa: E402

from contrans_tl import ConceptVector, identify, load_model, transplant  # noqa: E402
from contrans_tl.exchange import (  # noqa: E402
    from_repeng,
    from_steering_vector,
    read_gguf,
    to_repeng,
    to_steering_vector,
    write_gguf,
)

PACKAGES = ("repeng==0.4.0", "steering-vectors==0.12.2")
LLAMA_CPP = "xllamacpp==2026.10.11549"
IDS = [0, 50, 97, 200, 133, 7]
STRENGTH = 1.5
LOGITS = 1e-5
"""Of size 2, in float32, with and without TransformerLens."""
HALF = 2e-3
"""llama.cpp keeps keys and values in float16: without steering its logits are 8e-4 off."""


def install(package: str, folder: Path) -> None:
    """The package alone."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), package]
    subprocess.run(command, check=True)


def check(what: str, worst: float, allowed: float) -> None:
    """Print a difference; AssertionError if it is too large."""
    print(f"  {what}: {worst:.1e}", "(equal)" if worst == 0 else f"(allowed {allowed:.0e})", flush=True)
    assert worst <= allowed, what


class Subject:
    """One model, plain and through TransformerLens."""

    def __init__(self, folder: Path) -> None:
        random_model("llama").save_pretrained(folder)
        save_tokenizer(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bridge = load_model(folder, device="cpu")
        self.id = identify(self.bridge)
        self.folder = folder

    def plain(self) -> Any:
        """A fresh copy: repeng wraps its model for good."""
        return AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager", dtype=torch.float32).eval()

    def concept(self, *layers: int) -> ConceptVector:
        vectors = 5 * torch.randn(len(layers), D_MODEL, generator=torch.Generator().manual_seed(1))
        return ConceptVector(vectors, layers, "joy", self.id)

    def steered(self, concept: ConceptVector) -> Tensor:
        """Logits "pos d_vocab" under transplant."""
        with torch.no_grad(), transplant(self.bridge, concept, strength=STRENGTH, layers=concept.layers):
            return self.bridge(torch.tensor([IDS]))[0]

    def residual(self, text: str, layer: int) -> Tensor:
        """resid_post of the last token."""
        ids = torch.tensor([self.tokenizer(text).input_ids])
        return self.bridge.run_with_cache(ids)[1][f"blocks.{layer}.hook_resid_post"][0, -1]


def gap(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


def compare(a: ConceptVector, b: ConceptVector) -> float:
    assert a.layers == b.layers, (a.layers, b.layers)
    return gap(a.vectors, b.vectors)


def repeng_agrees(subject: Subject, folder: Path) -> None:
    np.float_ = np.float64  # type: ignore[attr-defined]
    from repeng import ControlModel, ControlVector
    from repeng.extract import batched_get_hiddens

    concept = subject.concept(1, 2)
    file = write_gguf(concept, folder / "ours.gguf", strength=STRENGTH, model_hint="llama")
    theirs = ControlVector.import_gguf(file)
    assert theirs.model_type == "llama" and sorted(theirs.directions) == [1, 2]
    check("import_gguf of our file", max(gap(theirs.directions[n], STRENGTH * concept.at(n)) for n in (1, 2)), 0)
    assert ControlVector.import_gguf(file) == to_repeng(concept, strength=STRENGTH, model_type="llama")
    to_repeng(subject.concept(1, 0)).export_gguf(folder / "theirs.gguf")
    check(
        "our reading of export_gguf",
        compare(read_gguf(folder / "theirs.gguf", subject.id), subject.concept(1, 0).only(0, 1)),
        0,
    )
    every = subject.concept(*range(N_LAYERS - 1))
    check("there and back in memory", compare(from_repeng(to_repeng(every), subject.id), every), 0)
    worst = 0.0
    for layer in range(N_LAYERS):
        model = ControlModel(subject.plain(), [layer])
        model.set_control(to_repeng(subject.concept(layer)), coeff=STRENGTH)
        with torch.no_grad():
            worst = max(worst, gap(model(torch.tensor([IDS])).logits[0], subject.steered(subject.concept(layer))))
    check("ControlModel's logits against transplant's, worst layer", worst, LOGITS)
    read = batched_get_hiddens(subject.plain(), subject.tokenizer, TEXTS[:1], list(range(N_LAYERS)), 1)
    gaps = [gap(read[layer][0], subject.residual(TEXTS[0], layer)) for layer in range(N_LAYERS)]
    check("what it reads at layer l against resid_post of l, all but the last", max(gaps[:-1]), LOGITS)
    print(f"  and at the last, which it reads behind the final norm: {gaps[-1]:.1e}")
    assert gaps[-1] > 0.1


def steering_vectors_agree(subject: Subject) -> None:
    from steering_vectors import record_activations

    every = subject.concept(*range(N_LAYERS))
    check("there and back in memory", compare(from_steering_vector(to_steering_vector(every), subject.id), every), 0)
    worst, hf = 0.0, subject.plain()
    for layer in range(N_LAYERS):
        with to_steering_vector(subject.concept(layer)).apply(hf, multiplier=STRENGTH), torch.no_grad():
            worst = max(worst, gap(hf(torch.tensor([IDS])).logits[0], subject.steered(subject.concept(layer))))
    check("apply's logits against transplant's, worst layer", worst, LOGITS)
    with record_activations(hf) as seen, torch.no_grad():
        hf(torch.tensor([subject.tokenizer(TEXTS[0]).input_ids]))
    gaps = [gap(seen[layer][0][0, -1], subject.residual(TEXTS[0], layer)) for layer in range(N_LAYERS)]
    check("what it reads at layer l against resid_post of l", max(gaps), LOGITS)


def llama_cpp_agrees(subject: Subject, library: Path, folder: Path) -> None:
    engine = LlamaCpp(library, write_model(subject.plain(), folder / "model.gguf"))
    with torch.no_grad():
        check("logits without a vector", gap(engine.logits(IDS), subject.bridge(torch.tensor([IDS]))[0, -1]), HALF)
    for layer in range(1, N_LAYERS):
        concept = subject.concept(layer)
        file = write_gguf(concept, folder / "ours.gguf", strength=STRENGTH)
        width, data = engine.load_control_vector(file)
        assert width == D_MODEL and len(data) == layer * D_MODEL
        check(f"its loader's numbers of layer {layer}", gap(data[-D_MODEL:], STRENGTH * concept.at(layer)), 0)
        steered = engine.logits(IDS, data)
        check(f"logits with direction.{layer} against transplant's", gap(steered, subject.steered(concept)[-1]), HALF)
        beside = gap(steered, subject.steered(replace(concept, layers=(layer - 1,)))[-1])
        print(f"  and against a transplant one layer before: {beside:.1e}")
        assert beside > 20 * HALF
    to_repeng(subject.concept(0)).export_gguf(folder / "zero.gguf")
    assert engine.load_control_vector(folder / "zero.gguf")[0] == -1
    print("  a file with direction.0 it refuses")


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        packages, folder = Path(work) / "packages", Path(work)
        for package in PACKAGES:
            install(package, packages)
        sys.path.append(str(packages))
        subject = Subject(folder / "model")
        print(PACKAGES[0])
        repeng_agrees(subject, folder)
        print(PACKAGES[1])
        steering_vectors_agree(subject)
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            print("llama.cpp: left out, as its wheel is read as Linux on x86-64 lays it out")
            return
        install(LLAMA_CPP, folder / "llama")
        print(f"llama.cpp in {LLAMA_CPP}")
        llama_cpp_agrees(subject, folder / "llama" / "xllamacpp" / "xllamacpp.abi3.so", folder)


if __name__ == "__main__":
    main()
