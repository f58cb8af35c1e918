"""Weights that people bring: their GELU, their pixels and their positions are the model's, or are asked about."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.cli.main import group
from d4c_onnx.errors import BundleError, ModelError
from d4c_onnx.graph.gates import quick_gelu_gates
from d4c_onnx.graph.model import load_model as load_onnx
from d4c_onnx.manifest import Preprocess, Resampled
from d4c_onnx.models.load import LoadedModel, load_model
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession

OPENAI = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}
IMAGES, TEXTS = "visual.positional_embedding", "positional_embedding"


@pytest.fixture
def weights(tmp_path: Path, tiny_models: tuple[str, str]) -> Path:
    """A checkpoint that says nothing of itself."""
    _save(load_model(tiny_models[0], "random", 7).model.state_dict(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


@pytest.fixture
def tags(weights: Path, tiny_models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The architecture with two tags published, which differ in all there is; both are of the same weights."""
    half = {"mean": (0.5, 0.4, 0.3), "std": (0.6, 0.5, 0.4), "interpolation": "bilinear", "resize_mode": "squash"}
    published = {"plain": {"file": str(weights)}, "quick": {"file": str(weights), **half, "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_models[0], published)
    return tiny_models[0]


def _save(state: dict[str, Any], file: Path) -> None:
    save_file({name: value.clone().contiguous() for name, value in state.items()}, file)


def _gates(encoder: Path) -> int:
    return len(list(quick_gelu_gates(load_onnx(encoder).graph)))


@pytest.mark.slow
def test_a_bundle_of_own_weights_answers_as_open_clip_does_with_the_tag(
    tmp_path: Path, tags: str, weights: Path
) -> None:
    """Images go in, and both sides make pixels of them by themselves."""
    model, _, transform = open_clip.create_model_and_transforms(tags, "quick", force_quick_gelu=True)
    model.eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8))
    ids = open_clip.get_tokenizer(tags)(["a photo of a cat."])
    with torch.no_grad():
        expected = model.encode_image(transform(image)[None], normalize=True).numpy()
        expected_text = model.encode_text(ids, normalize=True).numpy()
    like, recipe = ModelOptions(like="quick"), load_recipe(None, [])
    bundle = pipeline.export_bundle(tags, tmp_path, recipe, pretrained=str(weights), options=like)
    pixels = preprocess_image(image, bundle.manifest.preprocess)[None]
    assert np.abs(EncoderSession(bundle.image_encoder).run(pixels) - expected).max() <= 1e-4
    assert np.abs(EncoderSession(bundle.text_encoder).run(ids.numpy()) - expected_text).max() <= 1e-4
    assert bundle.manifest.model.quick_gelu
    assert _gates(bundle.image_encoder) == _gates(bundle.text_encoder) == 1
    outright = _outright(open_clip.get_pretrained_cfg(tags, "quick"))
    for loaded in (load_model(tags, "quick"), load_model(tags, str(weights), options=outright)):
        assert (loaded.preprocess, loaded.quick_gelu) == (bundle.manifest.preprocess, True)
        assert loaded.weights_sha256 == bundle.weights_sha256


def _outright(cfg: dict[str, Any]) -> ModelOptions:
    return ModelOptions(**{name: cfg[name] for name in ("mean", "std", "interpolation", "resize_mode", "quick_gelu")})


def test_the_command_asks(tmp_path: Path, tags: str, weights: Path) -> None:
    result = CliRunner().invoke(group, ["export", tags, "--pretrained", str(weights), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "nothing says which mean, std, interpolation, resize mode and GELU" in result.output
    assert "--like plain  mean 0.4815" in result.output
    assert "--like quick  mean 0.5, 0.4, 0.3" in result.output


@pytest.mark.slow
def test_the_command_takes_an_answer(tmp_path: Path, tags: str, weights: Path) -> None:
    asked = ["export", tags, "--pretrained", str(weights), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(group, [*asked, "--like", "quick", "--mean", "0", "--image-size", "48", "--quiet"])
    assert result.exit_code == 0, result.output
    assert (
        "made for 48 x 48 (--image-size); mean 0, 0, 0 (--mean); std 0.6, 0.5, 0.4, bilinear, squash" in result.output
    )
    assert "squash, QuickGELU (tag quick, by --like)" in result.output
    assert f"warning: {IMAGES} was resampled from 5 positions to 10" in result.output
    manifest = open_bundle(tmp_path / "out" / tags).manifest
    assert manifest.preprocess == Preprocess((48, 48), (0.0,) * 3, (0.6, 0.5, 0.4), "bilinear", "squash")
    assert manifest.model.sources["mean"] == "--mean"
    assert manifest.model.resampled == (Resampled(IMAGES, 5, 10),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mean", "0.5,0.5"], "neither one number nor 3"),
        (["--std", "0"], "from 1e-06"),
        (["--image-size", "big"], "neither one number nor 2"),
        (["--interpolation", "sinc"], "bicubic"),
        (["--like", "nobody"], "no such published tag"),
    ],
)
def test_bad_options_are_exit_code_2(
    options: list[str], message: str, tmp_path: Path, tags: str, weights: Path
) -> None:
    result = CliRunner().invoke(group, ["export", tags, "--pretrained", str(weights), "-o", str(tmp_path), *options])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "pretrained", "options", "message"),
    [
        ("mini-vit", None, {"mean": (0.5,) * 3}, "--mean: mini-vit ships with its preprocessing"),
        ("mini-vit", None, {"quick_gelu": False}, "--no-quick-gelu"),
        ("hf-hub:a/b", None, {"like": "openai"}, "--like openai: hf-hub:a/b says its own"),
        ("ViT-B-32", "openai", {"like": "laion2b_e16"}, "--like laion2b_e16: --pretrained openai is a tag itself"),
    ],
)
def test_options_that_say_nothing_are_refused(name: str, pretrained: Any, options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name, pretrained, options=ModelOptions(**options))


def test_a_config_beside_the_weights_is_as_good_as_an_answer(tags: str, weights: Path) -> None:
    config = {
        "model_cfg": {"quick_gelu": True, "vision_cfg": {"image_size": 32}},
        "preprocess_cfg": {"mean": [0, 0, 0]},
    }
    (weights.parent / "open_clip_config.json").write_text(json.dumps(config))
    loaded = load_model(tags, str(weights))
    assert loaded.quick_gelu
    assert loaded.preprocess.mean == (0.0, 0.0, 0.0)
    assert set(loaded.sources.values()) == {"open_clip_config.json beside the weights"}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_openais_state_dicts_say_what_they_are(tags: str, weights: Path, suffix: str) -> None:
    state = {**load_model(tags, "random", 7).model.state_dict(), **OPENAI}
    file = weights.with_name(f"openai{suffix}")
    _save(state, file) if suffix == ".safetensors" else torch.save(state, file)
    loaded = load_model(tags, str(file))
    assert loaded.quick_gelu
    assert loaded.preprocess.mean == (0.48145466, 0.4578275, 0.40821073)
    assert set(loaded.sources.values()) == {"OpenAI's input_resolution, context_length, vocab_size in the checkpoint"}
    assert loaded.weights_sha256 == load_model(tags, str(weights), options=ModelOptions(like="plain")).weights_sha256
    overruled = load_model(tags, str(file), options=ModelOptions(quick_gelu=False, mean=(0.5,) * 3))
    assert not overruled.quick_gelu
    assert overruled.preprocess.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("value", [torch.tensor(0), torch.zeros(3), torch.tensor(10**9)])
def test_numbers_that_openai_never_wrote_are_refused(tags: str, weights: Path, value: torch.Tensor) -> None:
    _save({**load_model(tags, "random").model.state_dict(), **OPENAI, "input_resolution": value}, weights)
    with pytest.raises(ModelError, match=r"mine\.safetensors: input_resolution is"):
        load_model(tags, str(weights))


def test_gelu_is_as_said_and_in_every_layer(tags: str, weights: Path) -> None:
    made = {
        quick: load_model(tags, str(weights), options=ModelOptions("plain", quick_gelu=quick))
        for quick in (True, False)
    }
    for quick, loaded in made.items():
        assert loaded.quick_gelu is quick
        kinds = {type(module).__name__ for module in loaded.model.modules()}
        assert ("QuickGELU" in kinds) is quick
        assert ("GELU" in kinds) is not quick
    assert made[True].weights_sha256 == made[False].weights_sha256


def test_a_hub_model_with_quick_gelu_says_so(weights: Path, tags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model_cfg": {**open_clip.get_model_config(tags), "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"},
    }
    (weights.parent / "open_clip_config.json").write_text(json.dumps(config))
    sent = {"open_clip_config.json": weights.parent / "open_clip_config.json", None: weights}

    def download(model_id: str, filename: str | None = None, cache_dir: object = None) -> str:
        return str(sent[filename])

    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", download)
    loaded = load_model("hf-hub:some/body")
    assert loaded.quick_gelu
    assert (loaded.preprocess.mean, loaded.preprocess.interpolation) == ((0.1, 0.2, 0.3), "bilinear")
    assert set(loaded.sources.values()) == {"hf-hub:some/body"}
    expected = load_model(tags, str(weights), options=ModelOptions(like="plain")).weights_sha256
    assert loaded.weights_sha256 == expected
    other = load_model("hf-hub:some/body", options=ModelOptions(quick_gelu=False, image_size=(48, 48)))
    assert not other.quick_gelu
    assert other.preprocess.size == (48, 48)
    assert other.resampled == (Resampled(IMAGES, 5, 10),)


def _resized(state: dict[str, torch.Tensor], name: str, count: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {**state, name: torch.randn(count, state[name].shape[1])}


@pytest.mark.parametrize(("name", "stored", "taken"), [(IMAGES, 10, 5), (TEXTS, 40, 16)])
def test_resampled_positions_are_told_and_strict_refuses(
    tags: str, weights: Path, name: str, stored: int, taken: int
) -> None:
    state = _resized(load_model(tags, "random").model.state_dict(), name, stored)
    _save({key: value.half() for key, value in state.items()}, weights)  # as many are published
    loaded = load_model(tags, str(weights), options=ModelOptions(like="plain"))
    assert loaded.resampled == (Resampled(name, stored, taken),)
    with pytest.raises(
        ModelError, match=rf"--strict.*{name} has {stored} positions, the model takes {taken}.*image-size"
    ):
        load_model(tags, str(weights), options=ModelOptions(like="plain", strict=True))


def test_weights_of_the_size_that_is_said_keep_their_positions(tags: str, weights: Path) -> None:
    _save(_resized(load_model(tags, "random").model.state_dict(), IMAGES, 10), weights)
    options = ModelOptions(like="plain", image_size=(48, 48), strict=True)
    loaded: LoadedModel = load_model(tags, str(weights), options=options)
    assert loaded.resampled == ()
    assert loaded.preprocess.size == (48, 48)


def test_a_timm_tower_takes_another_size_and_tells(tmp_path: Path) -> None:
    config = {
        "embed_dim": 96,
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-timm.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    told = Resampled("visual.trunk.pos_embed", 101, 145)
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    _save(load_model("tiny-timm", "random").model.state_dict(), small)
    options = ModelOptions(image_size=(192, 192))
    resized = load_model("tiny-timm", str(small), options=options)
    assert resized.resampled == (told,)
    assert resized.preprocess.size == (192, 192)
    with torch.no_grad():
        assert resized.model.encode_image(torch.randn(1, 3, 192, 192)).shape == (1, 96)
    _save(resized.model.state_dict(), large)
    again = load_model("tiny-timm", str(large), options=ModelOptions(image_size=(192, 192), strict=True))
    assert again.resampled == ()
    assert again.weights_sha256 == resized.weights_sha256
    assert load_model("tiny-timm", "random", options=options).preprocess.size == (192, 192)


@pytest.mark.slow
def test_a_bundle_is_not_taken_for_another_preprocessing(tmp_path: Path, tags: str, weights: Path) -> None:
    """And the one that it has is not asked about a second time."""
    recipe = load_recipe(None, [f"synthesis.{key}" for key in ("images=2", "held_out=1", "method=noise")])
    given = {"output": tmp_path / "out", "pretrained": str(weights)}
    with pytest.raises(ModelError, match="nothing says"):
        pipeline.synthesize_calibration_set(tags, recipe, **given)
    pipeline.export_bundle(tags, tmp_path / "out", recipe, pretrained=str(weights), options=ModelOptions(like="quick"))
    for options in (None, ModelOptions(), ModelOptions(like="quick", strict=True)):
        _, made = pipeline.synthesize_calibration_set(tags, recipe, options=options, **given)
    assert made.pixel_values[0].shape == (3, 32, 32)
    with pytest.raises(BundleError, match=r"was exported with mean .*quick_gelu True, not False.*--overwrite"):
        pipeline.synthesize_calibration_set(tags, recipe, options=ModelOptions(like="plain"), **given)


@pytest.mark.slow
def test_a_config_goes_before_the_tag_and_its_bundle_is_found_again(tmp_path: Path, tags: str) -> None:
    """The config says nothing of pixels, and plain GELU; the tag says otherwise pixels, and QuickGELU."""
    config = tmp_path / "own.json"
    config.write_text(json.dumps(open_clip.get_model_config(tags)))
    recipe = load_recipe(None, [f"synthesis.{key}" for key in ("images=2", "held_out=1", "method=noise")])
    options = ModelOptions(config=config, like=f"{tags}:quick")
    given = {"output": tmp_path / "out", "pretrained": "random", "options": options}
    folder, _ = pipeline.synthesize_calibration_set("own", recipe, **given)
    manifest = open_bundle(tmp_path / "out" / "own").manifest
    assert (manifest.preprocess.mean, manifest.model.quick_gelu) == ((0.5, 0.4, 0.3), False)
    assert pipeline.synthesize_calibration_set("own", recipe, **given)[0] == folder
