"""Tiny seeded models, saved to a temporary folder and loaded as any user loads his own. Nothing comes from the network.

Norm weights and biases are drawn at random: trivial ones (ones and zeros) would hide folding and centring. Hugging Face
copies (`references`) are never wrapped by TransformerLens; they are what the library is compared with.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import jaxtyping  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.utils import logging  # noqa: E402

RemoteBridge: Any = None
if not version("transformer-lens").startswith("3."):  # 3.9 has none
    pass  # noqa: E402

logging.disable_progress_bar()
torch.set_num_threads(1)

D_MODEL, N_LAYERS, N_CTX, VOCAB = 32, 3, 48, 320
ARCHITECTURES = ("llama", "gpt2", "neox", "qwen2", "gemma2")
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a letter made me feel happy and the dog sleeps",
    "brown letters feel lazy over a quick river",
]
TEXTS = [
    "the dog",
    "a letter made me feel happy, and then the lazy dog sleeps",
    "quick",
    "brown foxes jump over a river",
    "the quick brown fox",
]
"""Of unequal lengths, so that every batch of them is padded."""

_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=D_MODEL,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=N_CTX,
    bos_token_id=0,
    eos_token_id=0,
)
CONFIGS = {
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_inner=48,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=N_CTX,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "neox": lambda: GPTNeoXConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2),
    "gemma2": lambda: Gemma2Config(**_SIZES, num_key_value_heads=2, head_dim=8),
}


def save_tokenizer(folder: Path, *, pad_is_eos: bool = True, side: str = "right", across_words: bool = False) -> Any:
    """A byte-level BPE, small enough to split most words, saved beside a model. With `across_words` its tokens may run over
    the end of a word, and a character may take several of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across_words)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 10, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[0],
        pad_token=special[0] if pad_is_eos else special[1],
        padding_side=side,
    )
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save_word_tokenizer(folder: Path) -> Any:
    """A word-level tokenizer: nothing in common with the byte-level one but the text."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def random_model(architecture: str, seed: int = 0) -> Any:
    """A Hugging Face model in which no norm weight is 1 and no bias 0."""
    return random_weights(CONFIGS[architecture](), seed)


def random_weights(config: Any, seed: int = 0) -> Any:
    """The same, of any configuration."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 0.1))
    return model.eval()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders as from_pretrained opens them: config, weights, tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        random_model(architecture).save_pretrained(root / architecture)
        save_tokenizer(root / architecture)
    return {architecture: root / architecture for architecture in ARCHITECTURES}


@pytest.fixture(scope="session")
def references(folders: dict[str, Path]) -> dict[str, Any]:
    """The same models in plain Hugging Face, never wrapped."""
    return {
        name: AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        for name, folder in folders.items()
    }


@pytest.fixture(scope="session")
def bridges(folders: dict[str, Path]) -> dict[str, Any]:
    """The same models as load_model gives them. Shared by all tests: leave them as they are."""
    from contrans_tl import load_model

    return {name: load_model(folder, device="cpu") for name, folder in folders.items()}


@pytest.fixture(autouse=True)
def _models_are_left_as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test leaves a hook on a shared model: neither ours nor its own."""
    yield
    if "bridges" in request.fixturenames:
        for name, bridge in request.getfixturevalue("bridges").items():
            assert not hooks_on(bridge), f"{name} still carries hooks: {hooks_on(bridge)}"


@contextmanager
def unchecked() -> Iterator[None]:
    """As users run it, without the type checker of the tests, which would refuse some mistakes before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def hooks_on(model: Any) -> list[str]:
    """Names of the hook points that carry a hook."""
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


def decoder_layers(hf: Any) -> Any:
    """The list of blocks of a Hugging Face model."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers"):
        try:
            return hf.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError(f"no decoder layers in {type(hf).__name__}")


def hf_residuals(hf: Any, ids: list[int]) -> Tensor:
    """Outputs of all blocks for one sequence, "layer pos d_model", from hooks on the plain Hugging Face modules."""
    seen: list[Tensor] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0].detach())

    handles = [layer.register_forward_hook(look) for layer in decoder_layers(hf)]
    try:
        with torch.no_grad():
            hf(torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen)


def hf_steered_logits(hf: Any, ids: list[int], layer: int, write: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits "pos d_vocab" of one sequence with `write` applied to the output of one block ("pos d_model")."""

    def steer(module: Any, inputs: Any, output: Any) -> Any:
        resid = output[0] if isinstance(output, tuple) else output
        changed = write(resid[0])[None]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = decoder_layers(hf)[layer].register_forward_hook(steer)
    try:
        with torch.no_grad():
            return hf(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        handle.remove()
