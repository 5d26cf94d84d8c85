"""An exported folder is the steered model: plain transformers, in a process that cannot import this library, gives the hooked
model's logits and words; all that is not steered is the target's, byte for byte.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, D_MODEL, N_CTX, N_LAYERS, TEXTS, VOCAB, random_weights, save_tokenizer, unchecked
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig, Qwen2Config

from contrans_tl import ConceptVector, HeadVectors, export_folder, identify, load_model, transplant
from contrans_tl.__main__ import main
from contrans_tl.exchange import read_exchange
from contrans_tl.export import ModelFolder, read_concept
from contrans_tl.export import folder as folder_module
from contrans_tl.export.architectures import ARCHITECTURES, exported_config
from contrans_tl.export.card import publishable, steered_card
from contrans_tl.export.weights import read_header

TOLERANCE = 1e-5
"""As of the transplants: float32 sums in another order differ by 1e-6 here, a vector at a wrong place by more than 0.01."""
TOKENS = [[0, 41, 77, 130, 9, 250]]
NEW = 12
STRENGTH, LAYERS = 1.5, [0, 2]

_LLAMA = CONFIGS["llama"]().to_dict()
_SIZES = {key: _LLAMA[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")} | {
    key: _LLAMA[key] for key in ("num_attention_heads", "num_key_value_heads", "bos_token_id", "eos_token_id")
}
_NEOX = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_OPT = dict(vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=4, ffn_dim=48)
_OPT |= dict(max_position_embeddings=N_CTX, bos_token_id=0, eos_token_id=0, pad_token_id=1, word_embed_proj_dim=D_MODEL)
TARGETS = {
    "llama": CONFIGS["llama"],
    "gpt2": CONFIGS["gpt2"],
    "neox": CONFIGS["neox"],
    "opt": lambda: OPTConfig(**_OPT),
    # Defaults that a Llama does not share, and that config.json need not say.
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=None, rope_theta=5e5, head_dim=16),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**_SIZES, mlp_bias=True, attention_bias=True, tie_word_embeddings=True),
    "neox-sequential": lambda: GPTNeoXConfig(**_NEOX, use_parallel_residual=False),
    "opt-no-biases": lambda: OPTConfig(**_OPT, enable_bias=False),
}


def concept(model: Any, *layers: int, seed: int = 0) -> ConceptVector:
    """Of a model, or of a folder."""
    home = model.model if isinstance(model, ModelFolder) else identify(model)
    vectors = torch.randn(len(layers), D_MODEL, generator=torch.Generator().manual_seed(seed))
    return ConceptVector(vectors, layers, "anger", home, {"method": "mean", "prompts_hash": "abc"})


def save(folder: Path, config: Any, *, dtype: torch.dtype = torch.float32, shard: str = "1GB") -> Path:
    random_weights(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("targets")
    return {name: save(root / name, config()) for name, config in TARGETS.items()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In bfloat16, in several files, some of which hold no MLP."""
    root = tmp_path_factory.mktemp("sharded")
    names = ("llama", "gpt2", "neox", "opt", "qwen2")
    return {name: save(root / name, TARGETS[name](), dtype=torch.bfloat16, shard="16KB") for name in names}


@pytest.fixture(scope="module")
def hooked(targets: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model(folder, device="cpu") for name, folder in targets.items()}


@pytest.fixture(scope="module")
def exported(targets: dict[str, Path], hooked: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    for name, folder in targets.items():
        export_folder(concept(hooked[name], *LAYERS), folder, root / name, strength=STRENGTH, layers=LAYERS)
    return {name: root / name for name in targets}


# --- the same model ----------------------------------------------------------------------------------------------------

ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("contrans_tl", "transformer_lens"):
            raise ImportError(f"{name} is not needed here")

sys.meta_path.insert(0, Blocked())
import json
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

asked = json.loads(sys.argv[1])
answers = {}
for name, folder in asked["folders"].items():
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.eval().generation_config.eos_token_id = None
    tokens = torch.tensor(asked["tokens"])
    options = {"do_sample": False, "max_new_tokens": asked["new"], "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    with torch.no_grad():
        answers[name] = {
            "class": type(model).__name__,
            "wrong": [sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")],
            "logits": model(tokens).logits[0].tolist(),
            "cached": model.generate(tokens, use_cache=True, **options)[0].tolist(),
            "uncached": model.generate(tokens, use_cache=False, **options)[0].tolist(),
            "ids": AutoTokenizer.from_pretrained(folder)(asked["text"]).input_ids,
        }
assert not {"contrans_tl", "transformer_lens"} & set(sys.modules)
Path(asked["out"]).write_text(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def alone(exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plain transformers makes of the folders in a process that cannot import this library."""
    out = tmp_path_factory.mktemp("alone") / "answers.json"
    asked = {"folders": {name: str(folder) for name, folder in exported.items()}, "tokens": TOKENS, "new": NEW}
    asked |= {"text": TEXTS[1], "out": str(out)}
    command = [sys.executable, "-I", "-c", ALONE, json.dumps(asked)]
    done = subprocess.run(command, cwd=out.parent, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", TARGETS)
def test_plain_transformers_gives_the_hooked_models_logits_and_words(targets, hooked, alone, name):
    model, tokens, answer = hooked[name], torch.tensor(TOKENS), alone[name]
    with transplant(model, concept(model, *LAYERS), strength=STRENGTH, layers=LAYERS):
        steered = model(tokens)[0]
        options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
        words = model.generate(tokens, max_new_tokens=NEW, **options)[0].tolist()
    assert (torch.tensor(answer["logits"]) - steered).abs().max() < TOLERANCE
    assert (model(tokens)[0] - steered).abs().max() > 0.01
    assert answer["wrong"] == [[], [], []]
    assert answer["cached"] == answer["uncached"] == words
    assert answer["ids"] == AutoTokenizer.from_pretrained(targets[name])(TEXTS[1]).input_ids


def test_mistral_and_qwen2_are_written_as_llamas(alone):
    llamas = {name for name, answer in alone.items() if answer["class"] == "LlamaForCausalLM"}
    assert llamas == {"llama", "llama-biases", "mistral", "qwen2"}


@pytest.mark.parametrize("said", [{}, {"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}])
@pytest.mark.parametrize(("kind", "config"), [("mistral", MistralConfig), ("qwen2", Qwen2Config)])
def test_a_llama_is_told_what_mistral_and_qwen2_leave_to_their_own_defaults(kind, config, said):
    written = {"model_type": kind, "sliding_window": None, "bos_token_id": 7, **said}
    theirs = config.from_dict(dict(written))
    as_llama = exported_config(ARCHITECTURES[kind], written, theirs)
    ours = LlamaConfig.from_dict(dict(as_llama))
    for key in ("max_position_embeddings", "intermediate_size", "num_key_value_heads", "rope_parameters", "bos_token_id"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.rope_parameters["rope_theta"] == (1e6 if said else 1e4)
    assert (ours.mlp_bias, ours.attention_bias) == (True, kind == "qwen2")
    assert as_llama.keys() & {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"} == set()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_in_bfloat16_it_is_the_hooked_model_up_to_the_rounding_of_the_bias(sharded, tmp_path, name):
    v = concept(ModelFolder.open(sharded[name]), 1)
    written = export_folder(v, sharded[name], tmp_path / "out", strength=STRENGTH)
    tokens = torch.tensor(TOKENS)
    bridge = load_model(sharded[name], device="cpu")
    # The vector as the file holds it; the weights are exact in float32.
    bias = tensors(tmp_path / "out")[written.biases[0]].float()
    old = tensors(sharded[name]).get(written.biases[0], torch.zeros(D_MODEL)).float()
    assert (bias - old - STRENGTH * v.at(1)).abs().max() < 2**-7 * bias.abs().max()
    rounded = replace(v, vectors=(bias - old)[None])
    with transplant(bridge, rounded):
        steered = bridge(tokens)
    assert (load_model(tmp_path / "out", device="cpu")(tokens) - steered).abs().max() < TOLERANCE


def test_exporting_twice_adds_up_and_keeps_both_stories(targets, hooked, tmp_path):
    v, w = concept(hooked["llama"], 1), concept(hooked["llama"], 1, seed=1)
    first = export_folder(v, targets["llama"], tmp_path / "first", strength=2.0)
    second = replace(w, model=ModelFolder.open(tmp_path / "first").model)
    export_folder(second, tmp_path / "first", tmp_path / "second", strength=-1.0)
    bias = tensors(tmp_path / "second")[first.biases[0]]
    assert (bias - (2 * v.at(1) - w.at(1))).abs().max() < 1e-6
    told = json.loads((tmp_path / "second/contrans.json").read_text())
    assert (told["strength"], told["earlier"]["strength"]) == (-1.0, 2.0)
    assert (tmp_path / "second/README.md").read_text().count("## Steered with contrans_tl") == 2


# --- the same bytes ----------------------------------------------------------------------------------------------------


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def raw(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, in the order of the file."""
    content, stored = file.read_bytes(), read_header(file).values()
    return {x.name: (x.dtype, x.shape, content[x.start : x.start + x.size]) for x in stored}


@pytest.mark.parametrize("kind", ["targets", "sharded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "qwen2"])
def test_at_strength_0_every_tensor_is_there_byte_for_byte_and_all_new_ones_are_zero(request, tmp_path, kind, name):
    folder = request.getfixturevalue(kind)[name]
    out = tmp_path / "out"
    export_folder(concept(ModelFolder.open(folder), 0, 1), folder, out, strength=0.0, layers=[0, 1])
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == sorted(file.name for file in out.glob("*.safetensors"))
    assert (len(files) > 1) == (kind == "sharded")
    new = {}
    for file in files:
        before, after = raw(file), raw(out / file.name)
        assert list(after)[: len(before)] == list(before)
        assert {name: after[name] for name in before} == before
        new |= {name: after[name] for name in after if name not in before}
        if list(after) == list(before):
            assert (out / file.name).read_bytes() == file.read_bytes()
    assert not any(any(content) for _, _, content in new.values())
    assert {dtype for dtype, _, _ in new.values()} <= {"F32" if kind == "targets" else "BF16"}
    gated = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
    maps = {"llama": gated, "qwen2": [*gated, "self_attn.o_proj"]}
    expected = {f"model.layers.{layer}.{linear}.bias" for layer in range(N_LAYERS) for linear in maps.get(name, [])}
    assert set(new) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_only_the_steered_biases_differ(sharded, tmp_path, name):
    folder, out = sharded[name], tmp_path / "out"
    written = export_folder(concept(ModelFolder.open(folder), 1), folder, out, strength=STRENGTH)
    before, after = ({n: x for f in sorted(p.glob("*.safetensors")) for n, x in raw(f).items()} for p in (folder, out))
    assert {n for n in before if before[n] != after[n]} == ({written.biases[0]} if name == "gpt2" else set())
    assert {n for n in after if n not in before and any(after[n][2])} == ({written.biases[0]} if name == "llama" else set())


def test_files_without_a_steered_map_are_the_same_and_the_index_fits(sharded, tmp_path):
    folder, out = sharded["llama"], tmp_path / "out"
    export_folder(concept(ModelFolder.open(folder), 1), folder, out, strength=STRENGTH)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    there = {name: file.name for file in out.glob("*.safetensors") for name in read_header(file)}
    assert index["weight_map"] == there
    assert index["metadata"]["total_size"] == sum(x.numel() * 2 for x in tensors(out).values())
    if "total_parameters" in json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]:
        assert index["metadata"]["total_parameters"] == sum(x.numel() for x in tensors(out).values())
    same = [file.name for file in folder.glob("*.safetensors") if file.read_bytes() == (out / file.name).read_bytes()]
    assert len(same) == 2
    assert not any(".mlp." in name for file in same for name in read_header(out / file))


def test_a_configuration_that_names_no_class_gains_its_name_as_other_engines_need_it(targets, hooked, tmp_path):
    folder = shutil.copytree(targets["gpt2"], tmp_path / "in")
    written = json.loads((folder / "config.json").read_text())
    named = written.pop("architectures")
    (folder / "config.json").write_text(json.dumps(written))
    export_folder(concept(hooked["gpt2"], 1), folder, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == written | {"architectures": named}


def test_a_files_own_metadata_stay(targets, tmp_path):
    folder = shutil.copytree(targets["llama"], tmp_path / "in")
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt", "owner": "é"})
    export_folder(concept(ModelFolder.open(folder), 1), folder, tmp_path / "out")
    header = (tmp_path / "out/model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert json.loads(header[8 : 8 + length])["__metadata__"] == {"format": "pt", "owner": "é"}
    assert length % 8 == 0


def test_one_file_takes_precedence_over_an_index_and_names_may_lack_their_prefix(targets, hooked, tmp_path):
    folder = shutil.copytree(targets["gpt2"], tmp_path / "in")
    bare = {name.removeprefix("transformer."): x for name, x in load_file(folder / "model.safetensors").items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # as of old: a mask
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    stale = {"metadata": {}, "weight_map": {"wte.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    save_file({"wte.weight": torch.zeros(2, 2)}, folder / "model-00001-of-00002.safetensors")
    v = concept(hooked["gpt2"], *LAYERS)
    written = export_folder(v, folder, tmp_path / "out", strength=STRENGTH, layers=LAYERS)
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} == set(written.left_out)
    assert not set(written.left_out) & {file.name for file in (tmp_path / "out").iterdir()}
    tokens = torch.tensor(TOKENS)
    with transplant(hooked["gpt2"], v, strength=STRENGTH, layers=LAYERS):
        steered = hooked["gpt2"](tokens)
    assert (load_model(tmp_path / "out", device="cpu")(tokens) - steered).abs().max() < TOLERANCE


def test_all_other_files_come_along_as_files_but_no_other_weights_and_nothing_hidden(targets, tmp_path):
    folder, store = shutil.copytree(targets["neox"], tmp_path / "in"), tmp_path / "store"
    store.mkdir()
    (store / "blob").write_text("{{ messages }}")
    (folder / "chat_template.jinja").symlink_to(store / "blob")
    (folder / "templates").mkdir()
    (folder / "templates/tool.txt").write_text("tool")
    (folder / ".cache").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.onnx", ".env", ".cache/lock"):
        (folder / name).write_text("x")
    written = export_folder(concept(ModelFolder.open(folder), 1), folder, tmp_path / "out")
    assert set(written.left_out) == {"pytorch_model.bin", "consolidated.safetensors", "model.onnx", ".env"}
    out = tmp_path / "out"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - set(written.left_out)
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == (
        (names - {".cache/lock"}) | {"README.md", "contrans.json"}
    )
    assert not any(file.is_symlink() for file in out.rglob("*"))
    changed = {"model.safetensors"}
    for name in names - changed - {".cache/lock"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


# --- which model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_a_folder_is_told_to_be_what_its_loaded_model_is(targets, hooked, name):
    assert ModelFolder.open(targets[name]).model == identify(hooked[name])


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt", "qwen2"])
def test_also_one_in_several_files_of_bfloat16(sharded, name):
    assert ModelFolder.open(sharded[name]).model == identify(load_model(sharded[name], device="cpu"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt"])
def test_a_concept_of_other_weights_is_refused(targets, hooked, tmp_path, name):
    folder = shutil.copytree(targets[name], tmp_path / "in" / name)
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if "2." in key and "norm" not in key and "ln_" not in key and weights[key].ndim == 2)
    weights[key][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="same name but other weights"):
        export_folder(concept(hooked[name], 1), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_resolved_to_its_commit(targets, hooked, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache/models--someone--tiny"
    shutil.copytree(targets["neox"], repository / "snapshots" / commit)
    (repository / "snapshots" / commit / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    (repository / "refs/v1").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    export_folder(concept(hooked["neox"], 1), "someone/tiny", tmp_path / "out", revision="v1")
    told = json.loads((tmp_path / "out/contrans.json").read_text())
    assert (told["model"]["name"], told["model"]["revision"]) == ("someone/tiny", commit)
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: mit\nbase_model: someone/tiny\n---\n# Tiny\n\n## Steered")
    with pytest.raises((ValueError, OSError)):
        export_folder(concept(hooked["neox"], 1), "someone/other", tmp_path / "other")
    with pytest.raises(ValueError, match="a revision goes with a hub id"):
        export_folder(concept(hooked["neox"], 1), targets["neox"], tmp_path / "other", revision="main")


# --- refused before anything is copied ---------------------------------------------------------------------------------


def other(name: str, **changes: Any) -> Any:
    """What makes a folder another one, by its config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return name, change


def _truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])


def _only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _escaping_shard(folder: Path) -> None:
    _lost_shard(folder)
    shutil.copy(folder / "config.json", folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}}))


def _lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")


def _int8(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")


REFUSED = {
    "gemma2": (*other("llama", model_type="gemma2"), r"a gemma2 block adds .*\(expected llama"),
    "experts": (*other("llama", model_type="mixtral"), "a mixtral block adds .*Use transplant"),
    "classifier": (*other("llama", architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "code": (*other("llama", auto_map={"AutoModelForCausalLM": "x.Y"}), "auto_map"),
    "quantised": (*other("llama", quantization_config={"quant_method": "gptq"}), "quantised"),
    "post-norm": (*other("opt", do_layer_norm_before=False), "do_layer_norm_before=false"),
    "window": (*other("mistral", sliding_window=16), r"MistralForCausalLM .* sliding window \(16 tokens\)"),
    "layer windows": (*other("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1), "sliding window"),
    "other shapes": (*other("llama", intermediate_size=64), "as config.json says"),
    "truncated": ("llama", _truncate, "truncated or no safetensors"),
    "pickled": ("llama", _only_bin, r"there is pytorch_model.bin: save it again as safetensors"),
    "lost": ("llama", _lost_shard, "model-00001-of-00001.safetensors"),
    "escaping": ("llama", _escaping_shard, "which is no file beside it"),
    "lacking": ("llama", _lacking, "to have model.norm.weight"),
    "int8": ("llama", _int8, "stored as I8"),
    "adapter": ("llama", lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_exported_is_refused_with_the_reason(targets, hooked, tmp_path, monkeypatch, case):
    name, change, reason = REFUSED[case]
    folder = shutil.copytree(targets[name], tmp_path / "in" / name)
    change(folder)
    monkeypatch.setattr(folder_module, "_whole", lambda folder: pytest.fail("something was written"))
    with pytest.raises(ValueError, match=reason):
        export_folder(concept(hooked[name], 1), folder, tmp_path / "out" / "deep")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_concept_that_cannot_be_a_bias_is_refused(targets, hooked, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "_whole", lambda folder: pytest.fail("something was written"))
    v, folder, out = concept(hooked["llama"], 1), targets["llama"], tmp_path / "out"
    home = v.model
    heads = HeadVectors(torch.ones(1, 8), ((1, 0),), "anger", home)
    refused = [
        (heads, {}, r"added to single heads.*transplant\(\.\.\., heads="),
        (v, {"positions": "generated"}, "not only at 'generated': use transplant"),
        (v, {"positions": "first"}, "expected positions all, prompt"),
        (replace(v, model=replace(home, basis="centred")), {}, "lives in the centred basis"),
        (replace(v, model=replace(home, fingerprint="0" * 16, name="other")), {}, "reformulate it first"),
        (v, {"strength": float("nan")}, "finite strength"),
        (v, {"strength": float("inf")}, "finite strength"),
        (v, {"strength": 1e39}, "would not fit into float32"),
        (v, {"layers": [2]}, "there is none at 2"),
        (concept(hooked["llama"], 0, 1), {}, "choose, as in layers="),
        (concept(hooked["llama"], 7), {}, "between 0 and 2; got"),
    ]
    for refusable, options, reason in refused:
        with unchecked(), pytest.raises(ValueError, match=reason):
            export_folder(refusable, folder, out, **options)
    assert not list(tmp_path.iterdir())


def test_a_place_where_it_cannot_be_written_is_refused(targets, hooked, tmp_path, monkeypatch):
    v, folder = concept(hooked["llama"], 1), shutil.copytree(targets["llama"], tmp_path / "in" / "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    with pytest.raises(ValueError, match="new folder or an empty one"):
        export_folder(v, folder, tmp_path / "full")
    with pytest.raises(ValueError, match="is a file"):
        export_folder(v, folder, tmp_path / "full/note")
    with pytest.raises(ValueError, match="outside of the target's own folder"):
        export_folder(v, folder, folder / "steered")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    with pytest.raises(ValueError, match="takes 0.0 GB; 0.0 GB are free where --out is"):
        export_folder(v, folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "in"]


def test_an_empty_folder_is_filled_and_an_interrupted_export_leaves_nothing(sharded, tmp_path, monkeypatch):
    v, copied, copy = concept(ModelFolder.open(sharded["gpt2"]), 1), [], folder_module.copy_weights
    (tmp_path / "out").mkdir()

    def interrupted(path: Path, *args: Any, **options: Any) -> str:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(path)
        return copy(path, *args, **options)

    monkeypatch.setattr(folder_module, "copy_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_folder(v, sharded["gpt2"], tmp_path / "out")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out"]
    monkeypatch.undo()
    export_folder(v, sharded["gpt2"], tmp_path / "out")
    assert (tmp_path / "out/contrans.json").exists()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_finished_folder_that_cannot_get_its_name_is_kept_and_named(targets, hooked, tmp_path, monkeypatch):
    def refuse(*paths: Any) -> None:
        raise PermissionError("no")

    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"complete in .*\.out\..*could not be renamed"):
        patched.setattr(folder_module.os, "replace", lambda a, b: refuse() if ".out." in Path(a).name else os.rename(a, b))
        export_folder(concept(hooked["gpt2"], 1), targets["gpt2"], tmp_path / "out")
    (kept,) = tmp_path.iterdir()
    assert load_model(kept, device="cpu").cfg.n_layers == N_LAYERS


def test_a_copy_that_does_not_read_as_written_is_an_error(targets, hooked, tmp_path, monkeypatch):
    copy = folder_module.copy_weights
    monkeypatch.setattr(folder_module, "copy_weights", lambda *args, changed, added: copy(*args, changed={}, added=added))
    with pytest.raises(OSError, match="does not read as it was written"):
        export_folder(concept(hooked["gpt2"], 1), targets["gpt2"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_would_be_another_one_is_refused(targets, hooked, tmp_path, monkeypatch):
    class Other:
        chat_template = None
        all_special_ids = [0]

        def __init__(self, path: Any) -> None:
            self.model_type = json.loads((Path(path) / "config.json").read_text())["model_type"]

        def __call__(self, text: str) -> Any:
            return type("Encoding", (), {"input_ids": [ord(self.model_type[0])]})

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Other)
    with pytest.raises(ValueError, match="gives other tokens"):
        export_folder(concept(hooked["qwen2"], 1), targets["qwen2"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- what it says about itself -----------------------------------------------------------------------------------------


def test_the_folder_tells_what_was_done_without_any_path(targets, hooked, tmp_path):
    import hashlib

    inside = {"pairs": "/home/somebody/pairs.json", "from": {"name": r"C:\Users\somebody\model"}, "prompts": "Say it.\n" * 50}
    v = replace(concept(hooked["llama"], *LAYERS), name="`anger`\n# /home/somebody/x", provenance=inside | {"method": "mean"})
    written = export_folder(v, targets["llama"], tmp_path / "out", strength=STRENGTH, layers=LAYERS)
    told = json.loads((tmp_path / "out/contrans.json").read_text())
    assert told["concept"]["provenance"] == {
        "pairs": "pairs.json",
        "from": {"name": "model"},
        "prompts": "(left out)",
        "method": "mean",
    }
    assert told["model"] == identify(hooked["llama"]).to_dict()
    assert (told["strength"], told["layers"], told["biases"]) == (STRENGTH, LAYERS, list(written.biases))
    assert told["norms"] == pytest.approx([STRENGTH * float(v.at(layer).norm()) for layer in LAYERS])
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    assert told["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert {"contrans-tl", "transformers"} <= set(told["versions"])
    for file in ("contrans.json", "README.md"):
        text = (tmp_path / "out" / file).read_text()
        assert "somebody" not in text and str(tmp_path) not in text and "Say it" not in text
    assert "model.layers.2.mlp.down_proj.bias" in (tmp_path / "out/README.md").read_text()


def test_what_is_published_has_no_path_no_text_and_no_token(targets, hooked, tmp_path, monkeypatch):
    told = {
        "map": Path("/srv/x/maps.safetensors"),
        "prompt": "one word " * 20,
        "layers": ((3, 4),),
        5: ["a\nb", 0.5, None],
    }
    assert publishable(told) == {
        "map": "maps.safetensors",
        "prompt": "(left out)",
        "layers": [[3, 4]],
        "5": ["(left out)", 0.5, None],
    }
    assert publishable("EleutherAI/pythia-410m") == "EleutherAI/pythia-410m"
    monkeypatch.setattr(folder_module, "_whole", lambda folder: pytest.fail("something was written"))
    leaking = replace(concept(hooked["llama"], 1), provenance={"note": "hf_" + "a" * 30})
    with pytest.raises(ValueError, match="an access token"):
        export_folder(leaking, targets["llama"], tmp_path / "out")


@pytest.mark.parametrize(
    ("card", "hub_id", "start"),
    [
        ("", None, "## Steered"),
        ("", "a/b", "---\nbase_model: a/b\n---\n\n## Steered"),
        ("# Card", None, "# Card\n\n## Steered"),
        ("---\nlicense: mit\n---\n# Card\n", None, "---\nlicense: mit\n---\n# Card\n\n## Steered"),
        ("---\r\na: 1\r\n---\r\n# Card\r\n", "a/b", "---\r\na: 1\r\nbase_model: a/b\r\n---\r\n# Card\r\n\n## Steered"),
        ("---\nbase_model: c/d\n---\n# Card\n", "a/b", "---\nbase_model: c/d\n---\n# Card\n\n## Steered"),
        ("# Card\n\n---\n\nmore\n\n---\n", "a/b", "---\nbase_model: a/b\n---\n# Card\n\n---\n\nmore\n\n---\n\n## Steered"),
    ],
)
def test_a_model_card_is_kept_and_gains_a_section(card, hub_id, start):
    content = {"concept": {"name": "anger"}, "model": {"name": "b", "revision": None}, "strength": 2.0, "layers": [3]}
    text = steered_card(card, content | {"biases": ["x.bias"]}, hub_id=hub_id, switched=True)
    assert text.startswith(start)
    assert text.count("## Steered with contrans_tl") == 1
    assert "License and terms of use are the original model's own." in text


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_command_line_exports_a_saved_concept(targets, hooked, tmp_path, capsys):
    file, out = str(concept(hooked["neox"], *LAYERS).save(tmp_path / "anger.safetensors")), str(tmp_path / "out")
    call = ["export", file, str(targets["neox"]), "--out", out]
    assert main([*call, "--strength", "1.5"]) == 2
    assert "choose, as in layers=" in capsys.readouterr().err
    assert main([*call, "--layers", "0;2"]) == 2
    assert "expected --layers as in 3,4" in capsys.readouterr().err
    assert main([*call, "--layers", "0,2", "--format", "zip"]) == 2
    assert "expected --format among hf" in capsys.readouterr().err
    assert main([*call, "--layers", "0,2", "--positions", "last"]) == 2
    assert main([*call, "--layers", "0,2", "--strength", "1.5", "--format", "hf"]) == 0
    assert "gpt_neox.layers.2.mlp.dense_4h_to_h.bias" in capsys.readouterr().out
    again = export_folder(read_concept(file), targets["neox"], tmp_path / "again", strength=1.5, layers=[0, 2])
    for file in again.folder.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_the_command_line_writes_the_vector_alone_for_other_tools(hooked, folders, bridges, tmp_path, capsys):
    v, gemma = concept(hooked["neox"], *LAYERS), concept(bridges["gemma2"], 1)
    file = str(v.save(tmp_path / "anger.safetensors"))
    assert (
        main(["export", file, str(folders["llama"]), "--out", str(tmp_path / "v.npz"), "--format", "npz", "--strength", "2"])
        == 0
    )
    read = read_exchange(tmp_path / "v.npz", model=hooked["neox"])
    assert (read.layers, (read.vectors - 2 * v.vectors).abs().max()) == (v.layers, 0)
    # Also of an architecture whose weights cannot hold it.
    file, call = str(gemma.save(tmp_path / "anger.safetensors")), [str(folders["gemma2"]), "--layers", "1"]
    assert main(["export", file, *call, "--out", str(tmp_path / "v.json"), "--format", "spec", "--positions", "last"]) == 0
    assert main(["export", file, *call, "--out", str(tmp_path / "v.npy"), "--format", "npy", "--positions", "last"]) == 2
    assert main(["export", file, *call, "--out", str(tmp_path / "v.npy"), "--format", "npy", "--strength", "nan"]) == 2
    assert "what a gemma2 block adds" not in capsys.readouterr().err
    assert main(["export", file, *call, "--out", str(tmp_path / "v")]) == 2
    assert "what a gemma2 block adds" in capsys.readouterr().err
    data = Path(__file__).parents[1] / "data/pair/target-gpt2"
    assert main(["export", file, str(data), "--out", str(tmp_path / "v.npy"), "--format", "npy"]) == 2
    assert "target-gpt2 has 5 layers x 160: reformulate it first" in capsys.readouterr().err
    assert not (tmp_path / "v.npy").exists()


def test_the_command_line_refuses_vectors_of_heads_and_files_that_are_no_concept(targets, hooked, tmp_path, capsys):
    home = identify(hooked["llama"])
    heads = HeadVectors(torch.ones(1, 8), ((1, 0),), "anger", home).save(tmp_path / "heads.safetensors")
    call = [str(targets["llama"]), "--out", str(tmp_path / "out")]
    assert main(["export", str(heads), *call]) == 2
    assert "added to single heads" in capsys.readouterr().err
    assert main(["export", str(heads), *call, "--format", "npy"]) == 2
    assert "is of single heads, which no npy can say" in capsys.readouterr().err
    assert main(["export", str(targets["llama"] / "model.safetensors"), *call]) == 2
    assert "was not written by contrans_tl" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
