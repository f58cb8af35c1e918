"""Forms of checkpoints, and what comes of each: the rows of the table in docs/own-model.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from d4c_onnx import pipeline
from d4c_onnx.errors import ModelError
from d4c_onnx.models.load import load_model
from d4c_onnx.models.misfit import fitting
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.source import open_or_export
from d4c_onnx.progress import silent
from d4c_onnx.recipe_file import load_recipe

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state(tiny_models: tuple[str, str]) -> State:
    return load_model(tiny_models[0], "random", 7).model.state_dict()


@pytest.fixture(scope="module")
def expected(tiny_models: tuple[str, str]) -> str:
    return load_model(tiny_models[0], "random", 7).weights_sha256


def _prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "step": 5},
    "data parallel": _prefixed("module."),
    "compiled": _prefixed("_orig_mod."),
    "Lightning": lambda state: {"state_dict": _prefixed("model.")(state), "pytorch-lightning_version": "2.0"},
    "compiled, in data parallel": lambda state: {"model": _prefixed("module._orig_mod.")(state)},
    "merged peft": _prefixed("base_model.model."),
    "averaged": lambda state: {"n_averaged": torch.tensor(4), **_prefixed("module.")(state)},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_wrappers_come_off(
    tmp_path: Path, tiny_models: tuple[str, str], state: State, expected: str, form: str
) -> None:
    torch.save(WRAPPED[form](state), tmp_path / "w.pt")
    assert load_model(tiny_models[0], str(tmp_path / "w.pt")).weights_sha256 == expected


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_half_floats_become_float32(
    tmp_path: Path, tiny_models: tuple[str, str], state: State, kind: torch.dtype, suffix: str
) -> None:
    file = tmp_path / f"w{suffix}"
    halved = {name: value.to(kind).contiguous() for name, value in state.items()}
    save_file(halved, file) if suffix == ".safetensors" else torch.save(halved, file)
    loaded = load_model(tiny_models[0], str(file)).model.state_dict()
    assert all(torch.equal(value, halved[name].float()) for name, value in loaded.items())
    assert {value.dtype for value in loaded.values()} == {torch.float32}


def test_a_mini_takes_a_file(tmp_path: Path, mini_vit) -> None:
    """As a mini that somebody went on training."""
    state = {name: value.clone() for name, value in mini_vit.model.state_dict().items()}
    state["logit_scale"] += 0.5
    torch.save(state, tmp_path / "mine.pt")
    loaded = load_model("mini-vit", str(tmp_path / "mine.pt"))
    assert (loaded.pretrained, loaded.quick_gelu) == ("mine.pt", True)
    assert loaded.preprocess == mini_vit.preprocess
    assert torch.equal(loaded.model.logit_scale, state["logit_scale"])
    assert loaded.weights_sha256 != mini_vit.weights_sha256
    half = load_model("mini-vit", str(tmp_path / "mine.pt"), options=ModelOptions(mean=(0.5,) * 3))
    assert half.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.mark.slow
def test_a_mini_of_random_weights_is_loaded_again(tmp_path: Path) -> None:
    recipe = load_recipe(None, [f"synthesis.{key}" for key in ("images=2", "held_out=1", "method=noise")])
    pipeline.export_bundle("mini-rn", tmp_path, recipe, pretrained="random")
    model = open_or_export("mini-rn", tmp_path / "mini-rn", recipe, None, silent)
    assert model.load(silent).weights_sha256 == model.bundle.weights_sha256


def _with(name: str, value: torch.Tensor) -> Callable[[State], State]:
    return lambda state: {**state, name: value}


def _spoilt(value: float) -> Callable[[State], State]:
    def spoil(state: State) -> State:
        weight = state["text_projection"].clone()
        weight[3, 5] = value
        return {**state, "text_projection": weight}

    return spoil


REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "LoRA": (
        lambda state: {"base_model.model.visual.proj.lora_A.weight": torch.zeros(4, 32)},
        r"w\.pt: is a LoRA adapter, or .*lora_A.*have to be merged first.*merge_and_unload",
    ),
    "LoRA in a model": (_with("visual.proj.lora_up.weight", torch.zeros(2, 2)), "merged first"),
    "NaN": (_spoilt(float("nan")), r"w\.pt: 'text_projection' holds 1 values of 1024 that are NaN or infinite"),
    "infinite": (_spoilt(float("inf")), "'text_projection' holds 1 values of 1024"),
    "integers": (
        _with("text_projection", torch.zeros(32, 32, dtype=torch.int8)),
        "'text_projection' holds int8, not floating point",
    ),
    "no tensors": (lambda state: {"epoch": 3, "lr": 0.1}, r"holds no tensors \(only 'epoch', 'lr'\)"),
    "no state dict": (lambda state: [1, 2], "holds 'list', no state dict"),
    "another size": (
        _with("text_projection", torch.zeros(32, 48)),
        r"do not fit tiny-one:\n  text_projection is 32 x 48, and 32 x 32 in the architecture\n",
    ),
    "a missing tensor": (
        lambda state: {name: value for name, value in state.items() if name != "visual.proj"},
        r"\n  visual.proj is not in the file, and 32 x 32 in the architecture\n",
    ),
    "a tensor too many": (
        _with("head.weight", torch.zeros(10, 32)),
        r"\n  'head.weight' is 10 x 32, and not in the architecture\n",
    ),
    "transformers' names": (
        lambda state: {f"text_model.{name}": value for name, value in state.items()},
        r"and \d+ more\nThese are transformers' names. Name the folder",
    ),
    "another model's": (lambda state: {"fc.weight": torch.zeros(3, 3)}, "No architecture of open_clip has these"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_no_model_is_refused(tmp_path: Path, tiny_models: tuple[str, str], state: State, form: str) -> None:
    make, message = REFUSED[form]
    torch.save(make(dict(state)), tmp_path / "w.pt")
    with pytest.raises(ModelError, match=message):
        load_model(tiny_models[0], str(tmp_path / "w.pt"))


def test_a_misfit_shows_five_differences_and_what_would_fit(
    tmp_path: Path, tiny_models: tuple[str, str], state: State
) -> None:
    name, other = tiny_models
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError) as raised:
        load_model(other, str(tmp_path / "w.pt"))
    lines = str(raised.value).splitlines()
    assert lines[0] == f"{tmp_path / 'w.pt'}: the weights do not fit {other}:"
    assert lines[1] == "  visual.class_embedding is 32, and 64 in the architecture"
    assert len(lines) == 8
    assert lines[6].startswith("  and ")
    assert lines[7] == f"They would fit {name}. Name the architecture that they belong to."


@pytest.mark.slow
def test_architectures_that_fit_are_those_of_the_same_shapes() -> None:
    """On tensors without memory: a ViT-B-16's names and shapes are its own and its QuickGELU twin's."""
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-16", device="meta", load_weights=False)
    found = fitting(model.state_dict())
    assert found[0] in ("ViT-B-16", "ViT-B-16-quickgelu")
    assert {"ViT-B-16", "ViT-B-16-quickgelu"} <= set(found)
    assert "ViT-B-32" not in found
