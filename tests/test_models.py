"""Models are loaded ready to use, tell who they are, and are refused when their hook points are not what their names say."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, D_MODEL, N_LAYERS, RemoteBridge, random_model, save_tokenizer, unchecked
from transformers import AutoModelForCausalLM, AutoTokenizer

import contrans_tl
from contrans_tl import ConceptVector, identify, load_model, transplant
from contrans_tl.checks import caches_right, self_check
from contrans_tl.models import HookedModel, check_layers, hook_name

SOURCES = sorted(Path(contrans_tl.__file__).parent.rglob("*.py"))


def in_memory(folder: Path, **options: Any) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loaded_model_is_in_eval_mode_raw_and_without_gradients(bridges, architecture):
    model = bridges[architecture]
    assert isinstance(model, HookedModel)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    here = identify(model)
    assert (here.name, here.n_layers, here.d_model, here.basis) == (architecture, N_LAYERS, D_MODEL, "raw")
    assert here.revision is None
    assert repr(architecture)[1:-1] in str(here) and "raw" in str(here)


def test_a_model_in_memory_is_the_same_model_as_its_folder(folders, bridges):
    hf, tokenizer = in_memory(folders["llama"])
    model = load_model(hf, tokenizer=tokenizer, device="cpu")
    assert identify(model).same_space(identify(bridges["llama"]))
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    tokens = torch.tensor([[0, 5, 9]])
    assert torch.equal(model(tokens), bridges["llama"](tokens))


def test_a_model_in_memory_without_tokenizer_is_refused(folders):
    with pytest.raises(ValueError, match="tokenizer="):
        load_model(in_memory(folders["gpt2"])[0])


@pytest.mark.parametrize("given", ["the Hugging Face model", "the bridge"])
def test_a_model_that_is_wrapped_already_is_refused(folders, given):
    hf, tokenizer = in_memory(folders["neox"])
    bridge = load_model(hf, tokenizer=tokenizer, device="cpu")
    with pytest.raises(ValueError, match="pass that bridge"):
        load_model(bridge if given == "the bridge" else hf, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="pass that bridge"):
        load_model(bridge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_with_a_cache_that_is_lost_on_the_way_is_noticed(folders, monkeypatch, architecture, dtype):
    model = load_model(folders[architecture], device="cpu", dtype=dtype)
    assert caches_right(model)

    def forgetful(
        self: Any, tokens: torch.Tensor, *, max_new_tokens: int, use_past_kv_cache: bool, **options: Any
    ) -> torch.Tensor:
        entering = tokens
        for _ in range(max_new_tokens):
            following = self(entering)[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], 1)
            entering = following if use_past_kv_cache else tokens
        return tokens

    monkeypatch.setattr(type(model), "generate", forgetful)
    assert not caches_right(model)
    with pytest.warns(UserWarning, match="use_past_kv_cache=False"):
        load_model(folders[architecture], device="cpu", dtype=dtype)


def test_a_folder_that_holds_no_model_is_refused_before_transformer_lens_is_imported(tmp_path):
    code = (
        "import sys, contrans_tl\n"
        "for name in sys.argv[1:]:\n"
        "    try: contrans_tl.load_model(name)\n"
        "    except ValueError as error: print(error)\n"
        "assert 'transformer_lens' not in sys.modules\n"
    )
    arguments = [str(tmp_path), str(tmp_path / "missing"), "./missing"]
    out = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()
    assert len(lines) == 3
    assert "config.json" in lines[0] and "no folder" in lines[1] and "no folder" in lines[2]


def test_model_ids_survive_saving_and_loading_bf16_and_another_folder(folders, bridges, tmp_path):
    hf, tokenizer = in_memory(folders["gemma2"])
    hf.save_pretrained(tmp_path / "elsewhere")
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    here = identify(bridges["gemma2"])
    assert identify(load_model(tmp_path / "elsewhere", device="cpu")).same_space(here)
    assert identify(load_model(folders["gemma2"], device="cpu", dtype=torch.bfloat16)).same_space(here)
    assert type(here)(**here.to_dict()) == here


def test_other_weights_are_another_model_though_the_name_is_the_same(folders, bridges, tmp_path):
    folder = tmp_path / "llama"
    random_model("llama", seed=1).save_pretrained(folder)
    save_tokenizer(folder)
    other = identify(load_model(folder, device="cpu"))
    assert other.name == identify(bridges["llama"]).name
    assert not other.same_space(identify(bridges["llama"]))
    assert len({identify(model).fingerprint for model in bridges.values()}) == len(ARCHITECTURES)


def test_one_finetuned_matrix_makes_another_model(folders, bridges):
    hf, tokenizer = in_memory(folders["qwen2"])
    hf.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
    assert not identify(load_model(hf, tokenizer=tokenizer, device="cpu")).same_space(identify(bridges["qwen2"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gpt2", "neox"])
def test_compatibility_mode_of_a_layer_norm_model_is_another_basis_and_refuses_raw_concepts(
    folders, bridges, architecture, dtype
):
    model = load_model(folders[architecture], device="cpu", dtype=dtype)
    assert identify(model).basis == "raw"
    model.enable_compatibility_mode()
    assert identify(model).basis == "centred"
    raw = ConceptVector(torch.ones(1, D_MODEL), (1,), "ones", identify(bridges[architecture]))
    with pytest.raises(ValueError, match="raw basis.*centred basis.*in that basis"):
        with transplant(model, raw):
            pass


def test_centring_leaves_a_model_with_root_mean_square_norms_in_the_raw_basis(folders):
    model = load_model(folders["llama"], device="cpu")
    model.enable_compatibility_mode()
    assert identify(model).basis == "raw"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_self_check_passes_true_models(folders, bridges, architecture, dtype):
    self_check(load_model(folders[architecture], device="cpu", dtype=dtype))  # load_model has run it once already


class Altered:
    """A model that is the given one but for some of its hook points, as the library sees it."""

    def __init__(self, model: Any, alter: Any) -> None:
        self._model, self._alter = model, alter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    def run_with_hooks(self, *args: Any, fwd_hooks: Any, **kwargs: Any) -> Any:
        return self._model.run_with_hooks(*args, fwd_hooks=[self._alter(*hook) for hook in fwd_hooks], **kwargs)


def deaf(name: str, fn: Any) -> Any:
    """A hook point that shows the stream but drops what hooks return."""

    def look_only(x: Any, hook: Any) -> None:
        fn(x, hook=hook)

    return name, look_only


def shows(site: str, altered: Any) -> Any:
    """A hook point that shows something else than its name says."""

    def alter(name: str, fn: Any) -> Any:
        return (name, lambda x, hook: fn(altered(x), hook=hook)) if name.endswith(site) else (name, fn)

    return alter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (deaf, "a write at resid_post of layer 0"),
        (shows("hook_attn_out", lambda x: 1.25 * x), r"resid_pre \+ attn_out \+ mlp_out = resid_post at layer 0"),
        (shows("1.hook_mlp_out", torch.zeros_like), r"resid_pre \+ attn_out \+ mlp_out = resid_post at layer 1"),
        (shows("1.hook_resid_pre", lambda x: x * 1.2), "resid_post of layer 0|at layer 1"),
        (shows("2.hook_resid_post", lambda x: x * float("nan")), "at layer 2"),
    ],
    ids=["hook results dropped", "attention before its norm", "no MLP", "scaled stream", "NaN"],
)
def test_a_model_whose_hook_points_lie_is_refused_with_the_first_layer_that_does(folders, bridges, alter, message, dtype):
    model = bridges["gemma2"] if dtype == torch.float32 else load_model(folders["gemma2"], device="cpu", dtype=dtype)
    with unchecked(), pytest.raises(ValueError, match=message) as caught:
        self_check(Altered(model, alter))
    assert "not supported" in str(caught.value)


def test_load_model_refuses_a_block_that_does_more_than_attention_and_mlp(folders):
    hf, tokenizer = in_memory(folders["llama"])
    layer, forward = hf.model.layers[1], hf.model.layers[1].forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 1.1  # as architectures do that scale their stream
    with pytest.raises(ValueError, match=r"resid_pre \+ attn_out \+ mlp_out = resid_post at layer 1.*not supported"):
        load_model(hf, tokenizer=tokenizer, device="cpu")


def test_resid_mid_is_refused_with_the_reason():
    with unchecked(), pytest.raises(ValueError, match="does not reach the skip connection.*resid_post"):
        hook_name(0, "resid_mid")


def test_hook_names_are_those_of_the_models(bridges):
    for model in bridges.values():
        for site in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z"):
            assert hook_name(N_LAYERS - 1, site) in model.hook_dict


if RemoteBridge is not None:

    def test_a_remote_bridge_is_refused():
        """Its hooks look but cannot change anything."""
        with unchecked(), pytest.raises(ValueError, match="RemoteBridge: it drops what hooks return"):
            identify(RemoteBridge.__new__(RemoteBridge))


def test_layers_outside_the_model_are_refused_and_none_means_all():
    assert check_layers(None, 3, "m") == (0, 1, 2)
    assert check_layers([2, 0], 3, "m") == (2, 0)
    for layers in ([3], [-1, 0], []):
        with pytest.raises(ValueError, match="layers of m between 0 and 2"):
            check_layers(layers, 3, "m")


def test_importing_contrans_tl_imports_neither_torch_nor_transformer_lens():
    code = "import sys, contrans_tl; dir(contrans_tl); print({'torch', 'transformers', 'transformer_lens'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_every_public_name_is_there_and_no_other():
    for name in contrans_tl.__all__:
        if name != "evaluate":  # its module is imported by its own tests
            assert getattr(contrans_tl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'conjure'"):
        contrans_tl.conjure  # noqa: B018


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_transformer_lens_is_never_imported_at_top_level(path):
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    within = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in within:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.split(".")[0] == "transformer_lens" for name in names), ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_models_py_asks_a_model_for_its_class(path):
    classes = {"TransformerBridge", "HookedTransformer", "RemoteBridge", "HookedModel", "Module"}
    for node in ast.walk(ast.parse(path.read_text())):
        if path.name != "models.py" and isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "type"):
            assert not any(name in ast.unparse(node) for name in classes), ast.unparse(node)
