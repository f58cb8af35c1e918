"""The real-image control: a folder or a parquet file becomes a calibration set, and its place stays private."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import d4c_onnx
from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.dataset import work_folder
from d4c_onnx.cli.main import group
from d4c_onnx.errors import DatasetError, RecipeError
from d4c_onnx.evaluation.datasets import open_dataset
from d4c_onnx.manifest import Preprocess
from d4c_onnx.measure import inspect_bundle
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime import ClipSession
from d4c_onnx.runtime.preprocess import preprocess_image


def _recipe(source: Path, images: int = 3, more: tuple[str, ...] = ()):
    keys = ("method=real", f"source={source}", f"images={images}", "held_out=1")
    return load_recipe(None, [*(f"synthesis.{key}" for key in keys), "text.prompts=4", *more])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five images."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (60, 50), (50 * number, 0, 0)).save(folder / f"{number}.png")
    return folder


def test_folder_becomes_a_set(own: Path, photos: Path) -> None:
    folder, made = pipeline.synthesize_calibration_set(str(own), _recipe(photos), output=own.parent)
    assert made.pixel_values.shape == (3, 3, 48, 48)
    assert made.labels == ()
    reds = np.unique(np.round(np.concatenate([made.pixel_values, made.held_out])[:, 0, 0, 0], 3))
    assert len(reds) == 4  # four of five, none twice
    assert "my photos" not in json.dumps(made.manifest.record())
    left = work_folder(folder)  # as a run leaves it that is killed after its last rename
    left.mkdir()
    (left / "key.json").write_text("{}")
    again, _ = pipeline.synthesize_calibration_set(str(own), _recipe(photos), output=own.parent)
    assert again == folder
    assert not left.exists()
    Image.new("RGB", (60, 50), (0, 9, 9)).save(photos / "3.png")
    changed, _ = pipeline.synthesize_calibration_set(str(own), _recipe(photos), output=own.parent)
    assert changed != folder
    with pytest.raises(DatasetError, match=r"holds 5 images; images \+ held_out are 10"):
        pipeline.synthesize_calibration_set(str(own), _recipe(photos, 9), output=own.parent)


@pytest.mark.slow
def test_a_manifest_holds_what_was_read_not_where_it_lay(
    own: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("text.held_out=2", "quantization.rounding=nearest", "evaluation.dataset=fidelity")
    recipe = _recipe(photos, more=more)

    def quantize() -> pipeline.QuantizeReport:
        return pipeline.quantize_bundle(str(own), recipe, output=own.parent)

    with monkeypatch.context() as patched:
        patched.setattr("d4c_onnx.pipeline.quantize_measure.evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize()
    report = quantize()  # the same images: what was not measured is measured
    manifest = (report.bundle / "manifest.json").read_text()
    assert "my photos" not in manifest
    assert len(json.loads(manifest)["recipe"]["synthesis"]["source"]) == 64


@pytest.mark.slow
def test_public_functions_take_paths_as_strings(tmp_path: Path) -> None:
    """A notebook's user writes strings."""
    nouns = tmp_path / "nouns.txt"
    nouns.write_text("cat\ndog\n")
    keys = ("method=noise", "images=4", "held_out=2")
    rest = ("text.prompts=4", "text.held_out=2", "quantization.rounding=nearest", "evaluation.dataset=fidelity")
    recipe = load_recipe(None, [*(f"synthesis.{key}" for key in keys), *rest])
    output = str(tmp_path / "out")
    folder, _ = d4c_onnx.synthesize_calibration_set("mini-vit", recipe, output=output, prompts=str(nouns))
    made = d4c_onnx.quantize_bundle(
        str(folder.parent), recipe, output=output, calibration=str(folder), prompts=str(nouns)
    )
    assert made.bundle == folder.parent / "w4a8"
    compared = d4c_onnx.evaluate_bundles([str(folder.parent), str(made.bundle)], recipe, calibration=str(folder))
    assert len(compared.bundles) == 2
    assert inspect_bundle(str(made.bundle)).weight_bits_average <= 4.5


def test_source_and_method_belong_together(own: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"synthesis\.source"):
        load_recipe(None, ["synthesis.method=real"])
    with pytest.raises(RecipeError, match=r"synthesis\.source"):
        load_recipe(None, [f"synthesis.source={tmp_path}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no image"):
        pipeline.synthesize_calibration_set(str(own), _recipe(tmp_path / "empty"), output=own.parent)


def test_pictures_are_turned_upright_where_that_is_asked_for(own: Path, tmp_path: Path, vit_bundle: Bundle) -> None:
    folder = tmp_path / "turned"
    folder.mkdir()
    lying = np.zeros((48, 48, 3), np.uint8)
    lying[:24] = 200  # its first row is on the right of what the camera saw
    exif = Image.Exif()
    exif[0x0112] = 6
    for number in range(4):
        Image.fromarray(lying).save(folder / f"{number}.png", exif=exif)
    made = {}
    for word in ("false", "true"):
        recipe = _recipe(folder, more=(f"evaluation.exif_rotation={word}",))
        made[word] = pipeline.synthesize_calibration_set(str(own), recipe, output=tmp_path)
    assert made["false"][0] != made["true"][0]
    seen = {word: one.pixel_values[0] for word, (_, one) in made.items()}
    assert np.array_equal(seen["true"], np.rot90(seen["false"], -1, axes=(1, 2)))
    assert not np.array_equal(seen["true"], seen["false"])
    upright, plain = (ClipSession(vit_bundle, exif_rotation=turned) for turned in (True, False))
    asked = upright.embed_images(folder / "0.png")
    assert np.array_equal(asked, plain.embed_images(Image.fromarray(np.rot90(lying, -1))))
    assert not np.array_equal(asked, plain.embed_images(folder / "0.png"))


def test_evaluate_passes_the_rotation_on(tmp_path: Path, vit_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def preprocess(image: Image.Image, config: Preprocess, exif_rotation: bool = False) -> np.ndarray:
        asked.append(exif_rotation)
        return preprocess_image(image, config)

    few = open_dataset("cifar10").select(range(2))
    monkeypatch.setattr("d4c_onnx.evaluation.datasets.open_dataset", lambda name: few)
    monkeypatch.setattr("d4c_onnx.runtime.clip_session.preprocess_image", preprocess)
    for words in ([], ["--exif-rotation"]):
        done = CliRunner().invoke(group, ["evaluate", str(vit_bundle.path), "--quiet", *words])
        assert done.exit_code == 0, done.output
    assert asked == [False, False, True, True]
