"""Models that are folders, and architectures of the user's own."""

import json
import shlex
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.cli.main import group
from d4c_onnx.errors import D4CError, ModelError
from d4c_onnx.models.load import STEPS, load_model
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.recipe_file import load_recipe

PIXELS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def folder(tmp_path: Path, tiny_models: tuple[str, str]) -> Path:
    """As open_clip saves a model."""
    made = tmp_path / "mine"
    made.mkdir()
    config = {"model_cfg": {**open_clip.get_model_config(tiny_models[0]), "quick_gelu": True}, "preprocess_cfg": PIXELS}
    (made / "open_clip_config.json").write_text(json.dumps(config))
    _save(tiny_models[0], 7, made / "open_clip_model.safetensors")
    return made


def _save(name: str, seed: int, file: Path) -> None:
    state = load_model(name, "random", seed).model.state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, file)


def _run(*words: object) -> Any:
    return CliRunner().invoke(group, [*map(str, words), "--quiet"])


def test_a_folder_says_all_of_itself(folder: Path, tiny_models: tuple[str, str]) -> None:
    expected = load_model(tiny_models[0], "random", 7).weights_sha256
    for name in (str(folder), f"local-dir:{folder}"):
        loaded = load_model(name)
        assert (loaded.name, loaded.pretrained, loaded.quick_gelu) == ("mine", "folder", True)
        assert loaded.weights_sha256 == expected
        assert (loaded.preprocess.mean, loaded.preprocess.resize_mode) == ((0.1, 0.2, 0.3), "squash")
        assert loaded.sources["mean"] == "open_clip_config.json beside the weights"
    assert load_model(str(folder), options=ModelOptions(mean=(0.5,) * 3)).preprocess.mean == (0.5, 0.5, 0.5)


def test_a_folder_without_pixels_is_asked_about(folder: Path, tiny_models: tuple[str, str]) -> None:
    config = {"model_cfg": open_clip.get_model_config(tiny_models[0])}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="nothing in the folder says which mean, std, interpolation and resize mode"):
        load_model(str(folder))
    assert load_model(str(folder), options=ModelOptions(like="ViT-B-16-SigLIP:webli")).preprocess.std == (0.5, 0.5, 0.5)


def test_a_folder_that_leaves_the_size_to_open_clip_gets_its_default(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["vision_cfg"]["image_size"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert load_model(str(folder)).preprocess.size == (224, 224)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "open_clip_model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "open_clip_config.json").unlink(), "holds neither open_clip_config.json"),
        (lambda folder: (folder / "open_clip_config.json").write_text("{}"), "embed_dim.*It takes what open_clip's"),
        (lambda folder: (folder / "open_clip_config.json").write_text("no"), "cannot be read"),
    ],
)
def test_incomplete_folders_are_refused(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_model(f"local-dir:{folder}")


@pytest.mark.slow
def test_a_config_stands_with_and_without_a_name(tmp_path: Path, tiny_models: tuple[str, str]) -> None:
    config, weights = tmp_path / "my_arch.json", tmp_path / "w.safetensors"
    config.write_text(json.dumps({**open_clip.get_model_config(tiny_models[1]), "quick_gelu": True}))
    _save(tiny_models[1], 3, weights)
    given = ["--config", config, "--pretrained", weights, "-o", tmp_path / "out"]
    result = _run("export", *given)
    assert result.exit_code == 0, result.output
    manifest = open_bundle(tmp_path / "out" / "my_arch").manifest
    assert (manifest.model.name, manifest.model.quick_gelu) == ("my_arch", True)
    assert manifest.model.sources["quick_gelu"] == "my_arch.json, by --config"
    called = load_model("called", str(weights), options=ModelOptions(config=config))
    assert (called.name, called.weights_sha256) == ("called", manifest.model.weights_sha256)
    assert called.weights_sha256 == load_model(tiny_models[1], "random", 3).weights_sha256
    assert "which weights?" in _run("export", "--config", config, "-o", tmp_path / "empty").output
    config.write_text(json.dumps({**open_clip.get_model_config(tiny_models[1]), "no_such_key": 1}))
    result = _run("export", *given, "--overwrite")
    assert result.exit_code == 2
    assert "my_arch: no model can be made of its config" in result.output


def test_an_unknown_name_lists_what_was_tried() -> None:
    with pytest.raises(ModelError) as raised:
        load_model("ViT-B32")
    lines = str(raised.value).splitlines()
    assert "Did you mean ViT-B-32" in lines[0]
    assert lines[0].endswith("Tried, in this order:")
    assert lines[1:] == [f"  {number}. {step.name}" for number, step in enumerate(STEPS, 1)]


@pytest.mark.slow
def test_other_weights_in_an_old_folder_name_the_one_command(tmp_path: Path, tiny_models: tuple[str, str]) -> None:
    """Of another name, of the same name, and of another folder of the same name."""
    name, out = tiny_models[0], tmp_path / "an out"
    recipe = load_recipe(None, [f"synthesis.{key}" for key in ("images=2", "held_out=1", "method=noise")])

    def synthesize(source: str, pretrained: Path | None, options: ModelOptions | None = None) -> None:
        given = None if pretrained is None else str(pretrained)
        pipeline.synthesize_calibration_set(source, recipe, output=out, pretrained=given, options=options)

    files = [tmp_path / where / file for where, file in (("a", "w.pt"), ("b", "w.pt"), ("b", "other.pt"))]
    for seed, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        torch.save(load_model(name, "random", seed).model.state_dict(), file)
    pipeline.export_bundle(name, out, recipe, pretrained=str(files[0]))
    for file in files[1:]:
        with pytest.raises(D4CError, match=r"was exported from other weights") as raised:
            synthesize(name, file, ModelOptions(mean=(0.48145466, 0.4578275, 0.40821073)))
        command = shlex.split(str(raised.value).partition("all inside it: ")[2])
        assert command[:5] == ["d4c-onnx", "export", name, "--pretrained", str(file)]
    result = _run(*command[1:])
    assert result.exit_code == 0, result.output
    synthesize(name, files[-1])


@pytest.mark.slow
def test_another_folder_of_the_same_name_is_noticed(tmp_path: Path, folder: Path, tiny_models: tuple[str, str]) -> None:
    recipe = load_recipe(None, [f"synthesis.{key}" for key in ("images=2", "held_out=1", "method=noise")])
    out = tmp_path / "out"
    pipeline.synthesize_calibration_set(str(folder), recipe, output=out)
    assert open_bundle(out / "mine").manifest.model.pretrained == "folder"
    _save(tiny_models[0], 8, folder / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=r"mine: was exported from other weights.*d4c-onnx export .*--overwrite"):
        pipeline.synthesize_calibration_set(str(folder), recipe, output=out)
    for old in (out / "mine").glob("calibration-*"):
        old.rename(tmp_path / old.name)
    asking = load_recipe(None, [f"synthesis.{key}" for key in ("images=2", "held_out=1", "steps=1")])
    with pytest.raises(ModelError, match="Name the folder of mine"):
        pipeline.synthesize_calibration_set(str(out / "mine"), asking, output=out)


@pytest.mark.parametrize("place", ["tokenizer", "config"])
def test_no_code_of_a_folder_is_run(folder: Path, tiny_models: tuple[str, str], place: str) -> None:
    """Neither where its tokenizer brings code, nor where its config allows it."""
    pytest.importorskip("transformers")
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    mapped = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(mapped))
    config = {"model_cfg": open_clip.get_model_config(tiny_models[0]), "preprocess_cfg": PIXELS}
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "some/body"
    if place == "config":
        config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    message = "holds no tokenizer that can be read" if place == "tokenizer" else "Nothing is ever run"
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))
    assert not mark.exists()


def test_a_tokenizer_that_the_hub_does_not_give_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: tuple[str, str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tmp_path / "own.json"
    architecture = open_clip.get_model_config(tiny_models[0])
    architecture["text_cfg"]["hf_tokenizer_name"] = "some/body-that-is-not-there"
    config.write_text(json.dumps(architecture))
    with pytest.raises(ModelError, match=r"own: its tokenizer is that of .* 'some/body.*--tokenizer FOLDER"):
        load_model("own", "random", options=ModelOptions(config=config))
    with pytest.raises(ModelError, match=r"open_clip's own tokenizer. Leave it away"):
        load_model(tiny_models[0], "random", options=ModelOptions(tokenizer=tmp_path))


def test_a_config_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("404")

    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", refuse)
    with pytest.raises(ModelError, match=r"open_clip_config\.json of the repository a/b cannot be had \(404\).*folder"):
        load_model("hf-hub:a/b")


def test_a_text_tower_that_the_hub_does_not_describe_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_models: tuple[str, str]
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    architecture = open_clip.get_model_config(tiny_models[0])
    architecture["text_cfg"] = {"hf_model_name": "some/body-that-is-not-there", "hf_tokenizer_name": "some/body"}
    (tmp_path / "own.json").write_text(json.dumps(architecture))
    with pytest.raises(ModelError, match=r"own: its text tower is described by config\.json of .* 'some/body"):
        load_model("own", "random", options=ModelOptions(config=tmp_path / "own.json"))


def test_a_folder_for_pretrained_is_told_what_to_do(folder: Path, tiny_models: tuple[str, str]) -> None:
    with pytest.raises(ModelError, match=f"is a folder.*in place of {tiny_models[0]}"):
        load_model(tiny_models[0], str(folder))
    assert torch.is_tensor(load_model(str(folder)).model.logit_scale)
