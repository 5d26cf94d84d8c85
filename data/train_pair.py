"""Train the embedded models: an aligned source and two larger targets that answer from misconceptions, and their family.

    python data/train_pair.py --seed 0 --out data/pair
    python data/train_pair.py --seed 0 --out data/pair --model target-gpt2
    python data/train_pair.py --seed 0 --out data/family --model source-base target-llama-honest tiny \\
        small small-step0 small-step300 small-step450 small-step600

Without `--model` it trains the pair; with it the models named, so that two can run side by side.

| folder              | family           | layers | width | tokenizer      | what it has read                         |
|---------------------|------------------|--------|-------|----------------|------------------------------------------|
| source              | Llama            | 4      | 128   | words          | the base corpus, then the honesty corpus |
| target-llama        | Llama, 3 kv of 6 | 6      | 192   | words          | the base corpus                          |
| target-gpt2         | GPT-2            | 5      | 160   | byte-level BPE | the base corpus                          |
| source-base         | as source        |        |       |                | source before the honesty corpus         |
| target-llama-honest | as target-llama  |        |       |                | target-llama, then the honesty corpus    |
| tiny                | Llama            | 2      | 48    | words          | the base corpus                          |
| small               | Llama            | 3      | 96    | words          | the base corpus                          |
| small-step*         | as small         |        |       |                | small after so many steps                |

Every model with a run of its own starts from its own random weights and reads its own documents of the same world
(`world.py`): nothing but the language is shared between source and targets. A shared initialisation would make the two
residual streams one space, and any map between them would look like a success.

source-base and small-step* are what source and small were on the way: one run leaves them all, if they are named
together. On one thread that run repeats: the one that left data/family/source-base left data/pair/source again, bit for
bit. target-llama-honest starts from the target-llama of `--pair`. tiny is too small to tell characters apart, and small
learns first to name emotions, between its steps 300 and 600, and then the characters.

Each folder opens with `AutoModelForCausalLM.from_pretrained`: weights stored in float16, opened in float32. A
folder that is there already is kept. Quality is asserted on the stored weights and on the select split only;
nothing here looks at test items.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    logging,
)
from world import CHARACTERS, EMOTIONS, PERSONA, World

MAX_LENGTH = 128
BATCH = 32

Quality = dict[str, float]
"""Shares of the select split, as `quality` measures them."""


def anything(shares: Quality) -> bool:
    return True


def names_emotions(shares: Quality) -> bool:
    return shares["emotion"] > 0.9


def knows_characters(shares: Quality) -> bool:
    return shares["emotion"] > 0.95 and shares["honest"] > 0.9 and shares["untruthful"] < 0.1


def answers_truly(shares: Quality) -> bool:
    return knows_characters(shares) and shares["bare"] > 0.85


def answers_from_misconceptions(shares: Quality) -> bool:
    return knows_characters(shares) and shares["bare"] < 0.5


@dataclass(frozen=True)
class Recipe:
    """One training run, and the folders that it can leave."""

    tokenizer: str
    config: PretrainedConfig
    steps: int
    early_steps: int
    """How many of the steps read the early corpus."""
    learning_rate: float
    honest_steps: int = 0
    """Further steps on the honesty corpus."""
    honest_learning_rate: float = 5e-4
    honest_weight_decay: float = 0.05
    reached: Callable[[Quality], bool] = knows_characters
    """When the base corpus has been read for long enough."""
    start: str = ""
    """A trained model to start from, in place of random weights."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the base corpus after which the model is kept."""

    def config_for(self, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
        config = deepcopy(self.config)
        config.vocab_size = len(tokenizer)
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        config.dtype = "float32"
        return config


INITIAL_STD = 0.06
"""About 1 / sqrt(width). The usual 0.02 suits ten times the width; here it costs hundreds of steps."""


def llama(**sizes: int) -> LlamaConfig:
    common = dict(tie_word_embeddings=True, max_position_embeddings=MAX_LENGTH, initializer_range=INITIAL_STD)
    return LlamaConfig(**common, **sizes)


def gpt2(**sizes: int) -> GPT2Config:
    no_dropout = dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
    return GPT2Config(n_positions=MAX_LENGTH, initializer_range=INITIAL_STD, **no_dropout, **sizes)


RECIPES = {
    "source": Recipe(
        "words",
        llama(num_hidden_layers=4, hidden_size=128, intermediate_size=352, num_attention_heads=4),
        steps=1400,
        early_steps=500,
        learning_rate=3e-3,
        honest_steps=250,
    ),
    "target-llama": Recipe(
        "words",
        llama(
            num_hidden_layers=6,
            hidden_size=192,
            intermediate_size=512,
            num_attention_heads=6,
            num_key_value_heads=3,
        ),
        steps=1200,
        early_steps=500,
        learning_rate=2e-3,
    ),
    "target-gpt2": Recipe("bytes", gpt2(n_layer=5, n_embd=160, n_head=5), steps=1500, early_steps=600, learning_rate=2e-3),
    "tiny": Recipe(
        "words",
        llama(num_hidden_layers=2, hidden_size=48, intermediate_size=128, num_attention_heads=3),
        steps=1200,
        early_steps=500,
        learning_rate=3e-3,
        reached=anything,
    ),
    "small": Recipe(
        "words",
        llama(num_hidden_layers=3, hidden_size=96, intermediate_size=256, num_attention_heads=3),
        steps=1200,
        early_steps=500,
        learning_rate=3e-3,
        reached=names_emotions,
        checkpoints=(0, 300, 450, 600),
    ),
}
RECIPES["target-llama-honest"] = replace(
    RECIPES["target-llama"],
    start="target-llama",
    steps=0,
    honest_steps=500,
    honest_learning_rate=2e-3,
    # Tuned as the source is, it learns the sixty facts by heart and answers 0.6 of the others truly.
    honest_weight_decay=1.0,
)

PAIR = ("source", "target-llama", "target-gpt2")
CLAIMS = {
    "source": answers_truly,
    "source-base": answers_from_misconceptions,
    "target-llama": answers_from_misconceptions,
    "target-gpt2": answers_from_misconceptions,
    "target-llama-honest": answers_truly,
    "small": names_emotions,
}
"""What is asserted of a stored model; of the other folders, nothing."""


def folders_of(name: str) -> list[str]:
    """What a recipe's one run can leave: the model itself, and what it was on the way."""
    recipe = RECIPES[name]
    steps = [f"{name}-step{step}" for step in recipe.checkpoints]
    return [*steps, *([f"{name}-base"] if recipe.steps and recipe.honest_steps else []), name]


def word_tokenizer(corpus: Iterator[str]) -> PreTrainedTokenizerFast:
    """One token a word, its leading space included, so that decoding gives the text back."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    specials = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    trainer = trainers.WordLevelTrainer(special_tokens=list(specials.values()))
    return fitted(tokenizer, trainer, corpus, specials)


def byte_tokenizer(corpus: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's, with GPT-2's one special token for every purpose."""
    tokenizer = Tokenizer(models.BPE())
    specials = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    return fitted(tokenizer, trainer, corpus, specials)


def fitted(
    tokenizer: Tokenizer, trainer: trainers.Trainer, corpus: Iterator[str], specials: dict[str, str]
) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainer)
    bos = specials["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_LENGTH, padding_side="right", **specials)


TOKENIZERS = {"words": word_tokenizer, "bytes": byte_tokenizer}


def pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(tokenizer: PreTrainedTokenizerFast, documents: Iterator[str], n: int, rng: Random) -> Iterator[list[list[int]]]:
    """n batches of documents of similar length: blocks of 32 batches are sorted, cut and shuffled."""
    for start in range(0, n, 32):
        size = min(32, n - start)
        texts = list(islice(documents, size * BATCH))
        rows = [row + [tokenizer.eos_token_id] for row in tokenizer(texts).input_ids]
        rows.sort(key=len)
        block = [rows[i * BATCH : (i + 1) * BATCH] for i in range(size)]
        rng.shuffle(block)
        yield from block


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterator[str],
    *,
    steps: int,
    learning_rate: float,
    rng: Random,
    weight_decay: float = 0.05,
    keep: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW, 50 steps of warm-up, a cosine to zero. Causal attention needs no mask for right padding.

    `keep` is called with the number of steps so far before each of them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=50 / steps, cycle_momentum=False
    )
    model.train()
    for step, rows in enumerate(batches(tokenizer, documents, steps, rng)):
        keep(step)
        loss = model(input_ids=pad(rows, tokenizer.pad_token_id), labels=pad(rows, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()


@torch.inference_mode()
def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, options: Sequence[str]) -> str:
    """The option with the highest log-likelihood after the prompt."""
    start = len(tokenizer(prompt).input_ids)
    rows = [tokenizer(f"{prompt} {option}").input_ids for option in options]
    logprobs = model(input_ids=pad(rows, tokenizer.pad_token_id)).logits.log_softmax(-1)

    def score(i: int) -> float:
        return sum(logprobs[i, t - 1, rows[i][t]].item() for t in range(start, len(rows[i])))

    return options[max(range(len(options)), key=score)]


def quality(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> Quality:
    """Shares of the select split: emotion named; truth preferred to misconception, bare and in persona."""

    def truth(opening: str) -> float:
        hits = [
            choose(model, tokenizer, opening + prompt, (fact.truth, fact.misconception)) == fact.truth
            for fact in world.facts["select"]
            for prompt in fact.prompts
        ]
        return sum(hits) / len(hits)

    rng, scenarios = world.rng("quality"), world.scenarios["select"]
    prompts = [world.emotion_prompt(rng, scenario) for scenario in scenarios]
    named = [choose(model, tokenizer, prompt, EMOTIONS) for prompt in prompts]
    emotion = sum(name == scenario.emotion for name, scenario in zip(named, scenarios, strict=True))
    personas = {character: truth(PERSONA.format(character=character) + "\n") for character in CHARACTERS}
    return {"emotion": emotion / len(scenarios), "bare": truth(""), **personas}


def train_until(
    reached: Callable[[Quality], bool],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Iterator[str],
    world: World,
    *,
    steps: int,
    more_steps: int,
    learning_rate: float,
    rng: Random,
    weight_decay: float = 0.05,
    keep: Callable[[int], None] = lambda step: None,
) -> None:
    """One round of training and, for a seed on which that is too short, up to three shorter ones.

    Without the rule the length would have to suit the slowest seed; `reached` looks at the select split only.
    """
    more = partial(train, model, tokenizer, documents, learning_rate=learning_rate, rng=rng, weight_decay=weight_decay)
    more(steps=steps, keep=keep)
    for _ in range(3):
        if reached(quality(model, tokenizer, world)):
            return
        more(steps=more_steps)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Float16 weights under a float32 config; weights last, so that a folder with weights is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name unknown to 4
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    weights = {name: weight.half() for name, weight in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def build(name: str, seed: int, out: Path, pair: Path, wanted: Sequence[str], world: World) -> None:
    """Train, store the folders that are wanted and missing, reopen them, and assert that each is what its name says."""
    folders = [folder for folder in folders_of(name) if folder in wanted]
    missing = [folder for folder in folders if not (out / folder / "model.safetensors").exists()]

    def leave(folder: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        if folder in missing:
            save(model, tokenizer, out / folder)

    if missing:
        run(name, seed, pair, world, leave)
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(out / folder).eval()
        shares = quality(model, AutoTokenizer.from_pretrained(out / folder), world)
        numbers = ", ".join(f"{key} {value:.2f}" for key, value in shares.items())
        print(f"seed {seed} {folder}: {model.num_parameters() / 1e6:.2f} M parameters, {numbers}", flush=True)
        claim = CLAIMS.get(folder, anything)
        assert claim(shares), f"not true of {folder}: {claim.__name__}"


def run(
    name: str,
    seed: int,
    pair: Path,
    world: World,
    leave: Callable[[str, PreTrainedModel, PreTrainedTokenizerFast], None],
) -> None:
    """Train by a recipe; `leave` is called for each of its folders, when the model is what that folder holds."""
    recipe, started = RECIPES[name], time.process_time()
    rng = Random(f"{seed}/{name}")
    torch.manual_seed(rng.getrandbits(32))
    # The tokenizer belongs to the world, not to the seed: all models of words share theirs.
    tokenizer = TOKENIZERS[recipe.tokenizer](islice(world.documents(world.rng("tokenizer")), 20_000))
    if recipe.start:
        model = AutoModelForCausalLM.from_pretrained(pair / recipe.start)
    else:
        model = AutoModelForCausalLM.from_config(recipe.config_for(tokenizer))
    if recipe.steps:
        train_until(
            recipe.reached,
            model,
            tokenizer,
            chain(islice(world.documents(rng, "early"), recipe.early_steps * BATCH), world.documents(rng)),
            world,
            steps=recipe.steps,
            more_steps=recipe.steps // 3,
            learning_rate=recipe.learning_rate,
            rng=rng,
            keep=lambda step: leave(f"{name}-step{step}", model, tokenizer),
        )
        leave(f"{name}-base", model, tokenizer)
    if recipe.honest_steps:
        train_until(
            answers_truly,
            model,
            tokenizer,
            world.documents(rng, "honest"),
            world,
            steps=recipe.honest_steps,
            more_steps=recipe.honest_steps,
            learning_rate=recipe.honest_learning_rate,
            rng=rng,
            weight_decay=recipe.honest_weight_decay,
        )
    leave(name, model, tokenizer)
    print(f"seed {seed} {name}: {time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    choices = list(chain.from_iterable(map(folders_of, RECIPES)))
    parser = argparse.ArgumentParser(description="Train the embedded models.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives one folder per model")
    parser.add_argument("--model", nargs="+", choices=choices, default=PAIR, metavar="NAME", help="by default, the pair")
    parser.add_argument(
        "--pair", type=Path, default=Path(__file__).parent / "pair", help="where target-llama-honest finds target-llama"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # a warning about padding without a mask, harmless under causal attention
    logging.disable_progress_bar()
    for name in RECIPES:
        build(name, args.seed, args.out, args.pair, args.model, World())
