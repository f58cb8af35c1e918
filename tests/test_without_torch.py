"""What `pip install d4c-onnx` does without the extra: every command but those that make files from a torch model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from d4c_onnx.bundle import Bundle

# None in sys.modules is a package that cannot be imported
SCRIPT = """
import json, sys
for name in ("torch", "torchvision", "open_clip", "onnxscript", "safetensors"):
    sys.modules[name] = None
from click.testing import CliRunner
from d4c_onnx.cli.main import group
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["d4c-onnx", *arguments]
    done = CliRunner().invoke(group, arguments)
    results.append((arguments[0], done.exit_code, done.output[-400:], repr(done.exception)))
print(json.dumps(results))
"""
TINY = [
    *("--set", "synthesis.images=4", "--set", "synthesis.held_out=2", "--set", "text.prompts=8"),
    *("--set", "text.held_out=4", "--set", "quantization.rounding=nearest"),
]


def _labelled(place: Path) -> Path:
    """Two classes of one image each."""
    rows = []
    for number in range(2):
        Image.fromarray(np.full((20, 20, 3), 90 * number, np.uint8)).save(place / f"{number}.png")
        rows.append({"bytes": (place / f"{number}.png").read_bytes(), "path": None})
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), place / "own.parquet")
    (place / "own.parquet.classes.txt").write_text("cat\ndog\n")
    return place / "own.parquet"


def _siglip_like(bundle: Bundle, place: Path) -> Path:
    """The bundle's files as somebody else would publish them."""
    place.mkdir()
    shutil.copy(bundle.image_encoder, place / "visual.onnx")
    shutil.copy(bundle.text_encoder, place / "textual.onnx")
    shutil.copy(bundle.tokenizer, place / "tokenizer.json")
    (place / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {"size": 48}}))
    return place


def _run(commands: list[list[str]]) -> list[list]:
    """Name, exit code, output and exception of each command, in one process that has no torch."""
    code = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[list] = json.loads(done.stdout)
    return found


def test_a_bundle_is_used_without_torch(vit_bundle: Bundle, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (20, 20)).save(photos / "a.png")
    bundle, output = str(vit_bundle.path), str(tmp_path / "out.npy")
    commands = [
        ["--help"],
        ["verify", bundle],
        ["embed", bundle, str(photos), "-o", output],
        ["export", "mini-vit", "--output", str(tmp_path)],
    ]
    results = _run(commands)
    assert [code for _, code, *_ in results] == [0, 0, 0, 2], results
    assert "pip install 'd4c-onnx[export]'" in results[-1][2]


@pytest.mark.slow
def test_all_but_making_files_works_without_torch(own: Path, vit_bundle: Bundle, tmp_path: Path) -> None:
    data = ["--dataset", str(_labelled(tmp_path))]
    foreign = _siglip_like(vit_bundle, tmp_path / "theirs")
    files = ["--image", str(foreign / "visual.onnx"), "--text", str(foreign / "textual.onnx")]
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(tmp_path / "0.png", photos)
    commands = [
        ["--help"],
        ["verify", str(own)],
        ["embed", str(own), str(photos), "-o", str(tmp_path / "out.npy")],
        ["quantize", str(own), "--bits", "w8a8", "--set", "synthesis.method=leaves", *TINY, *data],
        ["evaluate", str(own), str(own / "w8a8"), *data],
        ["inspect", str(own / "w8a8")],
        ["import", *files, "--context-length", "77", "-o", str(tmp_path / "out")],
        ["quantize", str(tmp_path / "out" / "theirs"), "--bits", "w8a8", *TINY, *data],
        ["recipe"],
    ]
    refused = [
        ["export", "mini-vit", "-o", str(tmp_path / "new")],
        ["quantize", "-o", str(tmp_path / "new")],
        ["quantize", str(own), "--bits", "w4a8", *TINY, *data],  # D4C asks the model
        ["models"],
        ["import", *files, "--like", "ViT-B-32:openai", "-o", str(tmp_path / "other")],
    ]
    results = _run([*commands, *refused])
    assert [(name, code) for name, code, *_ in results[: len(commands)]] == [(command[0], 0) for command in commands], (
        results
    )
    for name, code, output, _ in results[len(commands) :]:
        assert code == 2, (name, output)
        assert "pip install 'd4c-onnx[export]'" in output, (name, output)
