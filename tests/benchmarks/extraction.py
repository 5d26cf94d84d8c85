"""Extraction: `collect` against a plain Hugging Face forward that returns all hidden states.

Last-token rows of every layer for sentences of unequal length, on a GPT-2-shaped model of random weights with GPT-2's real
vocabulary. Ours stops before the language-model head and keeps rows only; plain Hugging Face computes the logits of every
position and holds every layer's states of the batch. The same batches of the same size; the rows are checked to agree.

    python tests/benchmarks/extraction.py [--quick]
"""

from measure import alternate, peak_megabytes  # isort: skip  # first: it settles the number of threads
import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, PreTrainedTokenizerFast
from transformers.utils import logging

from contrans_tl import load_model
from contrans_tl.activations import collect

VOCABULARY = 50257
BATCH = 32
logging.disable_progress_bar()


def save_model(folder: Path, d_model: int, layers: int) -> None:
    """Random weights, GPT-2's shape; a word is a token."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=d_model, n_layer=layers, n_head=d_model // 64, n_positions=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {"<|endoftext|>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def sentences(n: int) -> list[str]:
    """Of 5 to 40 words."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 41, (n,), generator=g).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(VOCABULARY - 1, (length,), generator=g).tolist()) for length in lengths]


def ours(folder: Path, texts: list[str]) -> Callable[[], Tensor]:
    """`collect`, ready to run."""
    model = load_model(folder, device="cpu")
    return lambda: collect(model, texts, rows="last", prepend_bos=False, batch_size=BATCH).values


def plain(folder: Path, texts: list[str]) -> Callable[[], Tensor]:
    """Hugging Face, texts sorted by length as ours are, padded on the right with an attention mask."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def run() -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i].split()))
        rows = torch.empty(len(texts), model.config.n_layer, model.config.n_embd)
        for first in range(0, len(texts), BATCH):
            chosen = order[first : first + BATCH]
            batch = tokenizer([texts[i] for i in chosen], padding=True, return_tensors="pt")
            states = model(**batch, output_hidden_states=True, use_cache=False).hidden_states[1:]
            last = batch["attention_mask"].sum(1) - 1
            rows[chosen] = torch.stack([state[torch.arange(len(chosen)), last] for state in states], dim=1)
        return rows

    return run


def prepare(side: str, folder: Path, texts: list[str]) -> Any:
    """For the memory measurement, in a process of its own."""
    return {"ours": ours, "plain": plain}[side](folder, texts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    d_model, layers, n, repeats = (128, 2, 64, 3) if quick else (768, 12, 128, 5)
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), sentences(n)
        save_model(folder, d_model, layers)
        sides = {"ours": ours(folder, texts), "plain": plain(folder, texts)}
        # hidden_states[-1] of Hugging Face is behind the final norm, so the last layer is left out of the comparison
        error = (sides["ours"]()[:, :-1] - sides["plain"]()[:, :-1]).abs().max()
        assert error < 1e-4, f"the rows differ by {error}"
        taken = alternate(repeats, **sides)
        print(f"extraction: {n} sentences, {layers} layers of {d_model}, vocabulary {VOCABULARY}, batches of {BATCH}")
        print(f"  ours {taken['ours']:.2f} s, plain Hugging Face {taken['plain']:.2f} s, medians of {repeats}")
        print(f"  ours over plain: {taken['ours'] / taken['plain']:.2f}")
        for side in sides:
            before, added = peak_megabytes(prepare, side, folder, texts)
            print(f"  peak memory, {side}: {added:.0f} MB beside {before:.0f} MB of weights and libraries")


if __name__ == "__main__":
    main()
