"""What a command finds of earlier runs: finished, unfinished, or of another model."""

import json
import shutil
from pathlib import Path

import pytest
from encoders import recipe_of

from d4c_onnx import measure, pipeline
from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.errors import BundleError, CalibrationError, CheckFailed, ModelError, RecipeError
from d4c_onnx.manifest import Manifest
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.measure.accuracy import check_limits
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.results import Accuracy, BundleAccuracy, PairedDifference, Versus


@pytest.mark.slow
def test_what_was_not_measured_is_measured_by_the_rerun(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(*keys: str) -> pipeline.QuantizeReport:
        return pipeline.quantize_bundle(str(own), recipe_of(*keys), output=own.parent)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("d4c_onnx.pipeline.quantize_measure.evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize()
    left = open_bundle(own / "w4a8")
    assert left.manifest.quantization.accuracy is None
    with pytest.raises(BundleError, match="already exists"):
        quantize("quantization.smoothing=none")  # another quantisation: not this run's to finish
    with monkeypatch.context() as patched:
        patched.setattr("d4c_onnx.quantization.quantize_bundle_files", interrupted)  # nothing is quantised again
        report = quantize("evaluation.min_cosine=0.1")
    done = open_bundle(own / "w4a8")
    assert done.manifest.files == left.manifest.files
    assert done.manifest.quantization.accuracy.kind == "fidelity"
    assert report.bits == "w4a8"
    with pytest.raises(BundleError, match="already exists"):
        quantize()


@pytest.mark.slow
def test_a_given_set_says_what_calibrated(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = pipeline.synthesize_calibration_set(str(own), recipe_of("seed=3"), output=own.parent)
    recipe = load_recipe(None, ["quantization.rounding=nearest", "evaluation.dataset=fidelity"])  # d4c, 128 images

    def quantize() -> pipeline.QuantizeReport:
        return pipeline.quantize_bundle(str(own), recipe, output=own.parent, calibration=folder)

    with monkeypatch.context() as patched:
        patched.setattr("d4c_onnx.pipeline.quantize_measure.evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize()
    quantize()  # measures what was left unmeasured
    manifest = open_bundle(own / "w4a8").manifest
    made_with = manifest.quantization
    recorded = made_with.recipe["synthesis"]
    assert (recorded["method"], recorded["images"], recorded["held_out"]) == ("noise", 8, 4)
    assert made_with.recipe["text"]["prompts"] == len(made.texts)
    assert (manifest.seed, made_with.calibration_seed) == (0, 3)
    assert made_with.calibration == made.manifest.key.id


@pytest.mark.slow
def test_widths_share_one_fp16_bundle(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(*keys: str) -> list[str]:
        recipe = recipe_of("quantization.target=cuda", *keys)
        report = pipeline.quantize_bundle(str(own), recipe, output=own.parent)
        return [Path(row.bundle).name for row in report.accuracy.bundles]

    def killed(path: Path, manifest: Manifest) -> Manifest:
        if path.name == "w4a8":
            raise KeyboardInterrupt
        return write_manifest(path, manifest)

    with monkeypatch.context() as patched:
        patched.setattr("d4c_onnx.pipeline.quantize_measure.write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize()
    half = (own / "fp16" / "image_encoder.onnx").stat().st_mtime_ns
    assert quantize() == ["mini-vit", "w4a8", "fp16"]  # measures both, makes neither
    assert quantize("quantization.bits=w8a8") == ["mini-vit", "w8a8", "fp16"]
    assert (own / "fp16" / "image_encoder.onnx").stat().st_mtime_ns == half
    assert quantize("quantization.bits=w4a16") == ["mini-vit", "w4a16", "fp16"]
    assert (own / "fp16" / "image_encoder.onnx").stat().st_mtime_ns == half
    for name in ("w4a8", "w8a8", "w4a16", "fp16"):
        made = open_bundle(own / name)
        assert made.manifest.quantization.accuracy.bundles[-1].bundle == "fp16"
        assert made.manifest.quantization.accuracy.bundles[-1].versus_first.cosine_image > 0.999
        assert "CUDA" in made.manifest.quantization.target_note or name == "w4a16"
    with pytest.raises(BundleError, match="fp16: already exists"):  # of another form: not this run's to replace
        quantize("quantization.bits=w6a6", "quantization.external_data=true")
    assert not (own / "w6a6").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    ["portable", "openvino", "tensorrt"],
)
def test_every_target_walks_the_whole_way(own: Path, target: str) -> None:
    report = pipeline.quantize_bundle(str(own), recipe_of(f"quantization.target={target}"), output=own.parent)
    made = open_bundle(report.bundle)
    assert made.manifest.quantization.target == target
    assert report.target_note == made.manifest.quantization.target_note
    assert report.accuracy.bundles[1].versus_first.cosine_image > 0.95
    assert not (own / "fp16").exists()


def test_a_set_of_another_model_is_refused(
    own: Path, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(vit_calibration[0], tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["key"]["weights_sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CalibrationError, match="other weights"):
        pipeline.quantize_bundle(str(own), recipe_of(), output=own.parent, calibration=other)
    with pytest.raises(CalibrationError, match="other weights"):
        measure.evaluate_bundles([own], recipe_of(), calibration=other)
    assert not (own / "w4a8").exists()


def test_bundles_of_two_models_are_not_compared(vit_bundle: Bundle, rn_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="other weights"):
        measure.evaluate_bundles([vit_bundle.path, rn_bundle.path], load_recipe())
    with pytest.raises(BundleError, match="other input"):
        measure.benchmark_bundles([vit_bundle.path, rn_bundle.path], rounds=1)


def test_what_the_measuring_would_stumble_over_is_refused_before_the_work(own: Path) -> None:
    for keys, kind, message in (
        (("evaluation.max_drop=0.5",), RecipeError, "max_drop"),
        (("synthesis.held_out=0",), CalibrationError, "held_out"),
        (("text.held_out=0",), CalibrationError, "held_out"),
    ):
        with pytest.raises(kind, match=message):
            pipeline.quantize_bundle(str(own), recipe_of(*keys), output=own.parent)
    assert not list(own.glob("calibration-*"))
    folder, _ = pipeline.synthesize_calibration_set(str(own), recipe_of(), output=own.parent)
    (own / "nouns.txt").write_text("cat\ndog\n")
    with pytest.raises(RecipeError, match="other nouns"):
        pipeline.quantize_bundle(
            str(own), recipe_of(), output=own.parent, prompts=own / "nouns.txt", calibration=folder
        )
    assert not (own / "w4a8").exists()


@pytest.mark.slow
def test_a_failed_check_carries_what_was_measured(own: Path) -> None:
    with pytest.raises(CheckFailed, match="min_cosine") as failed:
        pipeline.quantize_bundle(str(own), recipe_of("evaluation.min_cosine=1.0"), output=own.parent)
    assert failed.value.report is not None
    assert failed.value.report.accuracy.kind == "fidelity"


def test_values_that_are_not_numbers_pass_no_check() -> None:
    nan = float("nan")
    versus = Versus(100.0, nan, 1.0, 0.0, PairedDifference(nan, nan, nan))
    measured = Accuracy("zero-shot", 1, (BundleAccuracy("fp32"), BundleAccuracy("w4a8", versus_first=versus)))
    for key in ("max_drop=50.0", "min_cosine=0.5"):
        with pytest.raises(CheckFailed):
            check_limits(measured, load_recipe(None, [f"evaluation.{key}"]), measured)


@pytest.mark.slow
def test_weights_are_those_that_were_asked_for(tmp_path: Path, tiny_models: tuple[str, str]) -> None:
    """The manifest knows the name of a checkpoint, and what is in it: the same name elsewhere is another model."""
    import open_clip
    import torch

    for seed in (0, 1):
        torch.manual_seed(seed)
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        torch.save(open_clip.create_model(tiny_models[0]).state_dict(), folder / "model.pt")

    def quantize(pretrained: object, *keys: str) -> None:
        recipe = recipe_of("text.prompts=2", "text.held_out=1", *keys)
        pipeline.quantize_bundle(tiny_models[0], recipe, output=tmp_path / "out", pretrained=str(pretrained))

    quantize(tmp_path / "run0" / "model.pt")
    with pytest.raises(ModelError, match="other weights"):
        quantize(tmp_path / "run1" / "model.pt", "quantization.bits=w8a8")
    with pytest.raises(ModelError, match="no such file"):
        quantize(tmp_path / "nowhere" / "model.pt", "quantization.bits=w8a8")
    pipeline.export_bundle(tiny_models[0], tmp_path / "random", recipe_of(), pretrained="random")
    with pytest.raises(BundleError, match="seed 0, not 7"):
        pipeline.quantize_bundle(tiny_models[0], recipe_of("seed=7"), output=tmp_path / "random", pretrained="random")
