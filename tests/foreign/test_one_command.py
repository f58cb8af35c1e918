"""Others' ONNX files quantised by one command, calibrated with the user's own images and texts; and run again."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from exports import Export, export_open_clip, open_clip_model
from PIL import Image

from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration import open_calibration_set
from d4c_onnx.cli.main import group

FEW = ("synthesis.images=4", "synthesis.held_out=2", "text.prompts=8", "text.held_out=4")
TEXTS = ["red boat", "the lake", "two words", "#7 small house", "the river", "red boat", "", "blue cat"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_open_clip(tmp_path_factory.mktemp("export"), open_clip_model(layers=1), False, 14)


@pytest.fixture
def photos(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{number}.png")
    return folder


def _quantize(files: Export, output: Path, *more: str) -> Result:
    keys = [word for key in FEW for word in ("--set", key)]
    command = ["quantize", "--image", str(files.image), "--text", str(files.text), "-o", str(output), "--bits", "w8a8"]
    return CliRunner().invoke(group, [*command, "--name", "theirs", "--quiet", *keys, *more])


@pytest.mark.slow
def test_one_command_with_own_images_and_texts(files: Export, photos: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\ufeff" + "\r\n".join(TEXTS), "utf-8")
    own = ("--images", str(photos), "--texts", str(texts))
    done = _quantize(files, tmp_path, *own, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["calibrated_with"] == {"images": 4, "method": "real", "texts": 5, "own_texts": True}
    quantized = open_bundle(tmp_path / "theirs" / "w8a8")
    made = quantized.manifest.quantization
    assert made is not None
    assert made.accuracy is not None
    versus = made.accuracy.bundles[1].versus_first
    assert versus is not None
    assert min(versus.cosine_image, versus.cosine_text) > 0.99
    dataset = open_calibration_set(tmp_path / "theirs" / f"calibration-{made.calibration}")
    assert {*dataset.texts, *dataset.held_out_texts} == {text for text in TEXTS if text}
    # again: neither imported nor synthesised anew, and what is printed says what calibrated
    before = (tmp_path / "theirs" / "image_encoder.onnx").stat().st_mtime_ns
    again = _quantize(files, tmp_path, *own, "--overwrite")
    assert again.exit_code == 0, again.output
    assert "calibrated with 4 real images and 5 texts of your own" in again.output
    assert (tmp_path / "theirs" / "image_encoder.onnx").stat().st_mtime_ns == before
    other = tmp_path / "other.txt"
    other.write_text("\n".join("abcdef"))
    set_folder = str(tmp_path / "theirs" / f"calibration-{made.calibration}")
    refused = _quantize(files, tmp_path, "--calibration", set_folder, "--texts", str(other), "--overwrite")
    assert refused.exit_code == 2
    assert "was made for other texts" in refused.output
    # a bundle that was made otherwise is in the way
    pixels = _quantize(files, tmp_path, "--mean", "0.1")
    assert pixels.exit_code == 2
    assert "was made with other pixels" in pixels.output
    assert f"d4c-onnx import --image {files.image} --text {files.text} --mean 0.1,0.1,0.1" in pixels.output
    swapped = _quantize(Export(files.image, files.image.with_name("nowhere.onnx")), tmp_path)
    assert swapped.exit_code == 2
    assert "nowhere.onnx: no such file" in swapped.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--image", "a.onnx"), "--image belongs to --image FILE and --text FILE"),
        (("--context-length", "9"), "--context-length belongs to"),
        (("mini-vit", "--image", "a.onnx", "--text", "b.onnx"), "MODEL is about a model that is named"),
        (("--image", "a.onnx", "--text", "b.onnx", "--pretrained", "openai"), "--pretrained is about"),
        (("--image", "a.onnx", "--text", "b.onnx"), "a.onnx: no such file"),
        (("--images", ".", "--calibration", "set"), "Leave one of the two out"),
    ],
)
def test_what_does_not_belong_together(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(group, ["quantize", *words, "-o", "out"])
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\nc\nd\na\n\n", "needs at least 5 different texts, one a line, has 4"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8 text"),
        (b"a\nb\x00\n", r"line 2 holds the control character '\x00'"),
        (b"a\n" + b"b" * 20_000, "line 2 has 20,000 characters"),
        (b"a\n" * 9_000_000, "is larger than 16 MB"),
    ],
)
@pytest.mark.parametrize("option", ["--texts", "--prompts"])
def test_texts_that_are_none(content: bytes, message: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_bytes(content)
    done = CliRunner().invoke(group, ["quantize", option, str(tmp_path / "own.txt"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert f"{option} {tmp_path / 'own.txt'}: " in done.output
    assert (message if option == "--texts" or "5 different" not in message else "stands there twice") in done.output
    assert not (tmp_path / "out").exists()
