"""Real clients load packages from disk, unmodified, each in an environment of its own.

    pytest -m integration tests/integration

Environments are made once, with pip and npm, in `$D4C_CLIENTS` (by default in the user's cache), and a client whose
registry is out of reach is skipped.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import material
from environments import NODE, environment
from PIL import Image

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.packaging import package_bundle
from d4c_onnx.quantization import quantize_bundle_files
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
TEXTS = ["a photo of a cat.", "word, and another. " * 60, "a ship"]
# The least cosine to the bundle's own answer: of given pixels and texts, and of an image that the client resized.
# OpenVINO computes floats in bfloat16 where the processor has it; transformers.js does not resize as pillow does.
LEAST = {
    "fastembed": (0.9999, 0.99),
    "openvino": (0.995, None),
    "optimum": (0.9999, 0.99),
    "transformersjs": (0.9999, 0.85),
}


def _run(client: str, folder: Path, request: Path) -> dict[str, Any]:
    """What a client's script prints about a package."""
    place = environment(client)
    if client in NODE:
        command = ["node", HERE / f"{client}.mjs", place, folder, request]
    else:
        command = [place / "bin" / "python", HERE / f"{client}_client.py", folder, request]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(params=["vit", "rn"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A mini at w4a8."""
    folder = tmp_path_factory.getbasetemp() / "clients" / request.param
    if not folder.exists():
        source, calibration = material(request, request.param)
        section = load_recipe(None, ["quantization.bits=w4a8", "quantization.rounding=nearest"]).quantization
        quantize_bundle_files(source, calibration, folder, section, recipe_dump={"seed": 0, "quantization": {}})
    return open_bundle(folder)


def _photo() -> Image.Image:
    """A picture that has to be resized and cropped."""
    y, x = np.mgrid[0:1:150j, 0:1:200j]
    bands = [np.sin(9 * x) ** 2, np.cos(7 * y) ** 2, (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1]
    return Image.fromarray((np.stack(bands, -1) * 255).astype(np.uint8))


@pytest.mark.parametrize("client", LEAST)
def test_a_client_says_what_the_bundle_says(client: str, bundle: Bundle, tmp_path: Path) -> None:
    report = package_bundle(bundle.path, client, tmp_path / "package")
    photo, asked = tmp_path / "photo.png", tmp_path / "request.json"
    _photo().save(photo)
    pixels = preprocess_image(_photo(), bundle.manifest.preprocess)[None]
    ids = TextTokenizer(bundle.tokenizer)(TEXTS)
    given = {"pixels": pixels.ravel().tolist(), "shape": pixels.shape, "input_ids": ids.tolist()}
    asked.write_text(json.dumps({"image": str(photo), "texts": TEXTS, **given}))
    found = _run(client, report.path, asked)
    texts, [image] = EncoderSession(bundle.text_encoder).run(ids), EncoderSession(bundle.image_encoder).run(pixels)
    exact, resized = LEAST[client]
    assert (texts * np.array(found["text_embeds"])).sum(-1).min() > exact
    assert "image_embeds" in found or client == "fastembed"  # which takes no pixels
    assert image @ np.array(found.get("image_embeds", image)) > exact
    if resized is not None:
        assert image @ np.array(found["own_resize"]) > resized
    if "scores" in found:
        ranked = [TEXTS[index] for index in np.argsort(-(texts @ image))]
        assert found["scores"][0]["label"].strip() == ranked[0].strip()


def test_triton_knows_every_field(bundle: Bundle, tmp_path: Path) -> None:
    report = package_bundle(bundle.path, "triton", tmp_path / "package")
    configs = _run("triton", report.path, tmp_path)
    assert len(configs) == 6
    assert all(entry["name"] == name for name, entry in configs.items())
    ensembles = {"embed_image": ["image_pixels", "image_encoder"], "embed_text": ["text_ids", "text_encoder"]}
    for ensemble, steps in ensembles.items():
        assert configs[ensemble]["steps"] == steps
        first, second = (configs[step] for step in steps)
        assert configs[ensemble]["inputs"] == first["inputs"]
        assert first["outputs"] == second["inputs"]
        assert second["outputs"] == configs[ensemble]["outputs"]
