"""Real clients load packages from disk, unmodified, each in an environment of its own, and see the golden input.

    pytest -m integration tests/integration

Environments are made once, with pip and npm, in `$D4C_CLIENTS` (by default in the user's cache), and a client whose
registry is out of reach is skipped, as are browsers where there is no Chromium.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from encoders import material, quantized_bundle
from environments import NODE, chromium, environment

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.packaging import package_bundle, verify_package
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime import ClipSession
from d4c_onnx.runtime.golden import read_golden

pytestmark = pytest.mark.integration

HERE = Path(__file__).parent
Record = Callable[[str, object], None]


@dataclass(frozen=True)
class Client:
    """A real client.

    Attributes:
        name: with its version.
        target: of the package that it loads.
        environment: where it is installed.
        answers: what its script prints.
        exact: the least cosine to the bundle's own answers, of given pixels and ids or plain texts.
        resized: of the golden photo when the client resizes it, and of all golden images; None: it takes no images.
        texts: of all golden texts, whatever the client's tokenizer makes of them.
        convolved: of given pixels through a ResNet, whose int8 convolutions some saturate where there is no VNNI.
    """

    name: str
    target: str
    environment: str
    answers: frozenset[str]
    exact: float
    resized: tuple[float, float] | None
    texts: float
    convolved: float = 0.9999


TEXTS, PIXELS = frozenset({"text_embeds"}), frozenset({"text_embeds", "image_embeds"})
RESIZING = frozenset({"text_embeds", "own_resize"})
CLASSIFYING = PIXELS | RESIZING | {"scores"}
# transformers.js does not resize as pillow does.
CLIENTS = {
    "fastembed_client.py": Client("fastembed 0.9.1", "fastembed", "fastembed", RESIZING, 0.9999, (0.99, 0.9), 0.9),
    "qdrant_search_client.py": Client(
        "qdrant-client 1.20.0", "fastembed", "fastembed", RESIZING | {"scores"}, 0.9999, (0.99, 0.9), 0.9
    ),
    "txtai_client.py": Client("txtai 9.14.0", "fastembed", "txtai", TEXTS | {"searched"}, 0.9999, None, 0.9),
    "openvino_client.py": Client("OpenVINO 2026.4.1", "openvino", "openvino", PIXELS, 0.9999, None, 0.9999, 0.995),
    "optimum_client.py": Client("optimum-onnx 0.1.0", "optimum", "optimum", CLASSIFYING, 0.9999, (0.99, 0.9), 0.9),
    "transformersjs_client.mjs": Client(
        "transformers.js 4.3.2, Node", "transformersjs", "node", CLASSIFYING, 0.9999, (0.99, 0.9), 0.9
    ),
    "transformersjs_browser.mjs": Client(
        "transformers.js 4.3.2, Chromium", "transformersjs", "node", CLASSIFYING, 0.9999, (0.99, 0.9), 0.9
    ),
    "triton_server_client.py": Client(
        "Triton 2.51.0", "triton", "triton", RESIZING | {"refused"}, 0.9999, (0.9999, 0.9999), 0.9999
    ),
    "onnxruntime_web_client.mjs": Client(
        "onnxruntime-web 1.30.0, Node", "onnxruntime", "node", PIXELS, 0.9999, None, 0.9999
    ),
}


def _run(script: str, where: str, folder: Path, request: Path) -> dict[str, Any]:
    """What a client's script prints about a package."""
    browser = {"D4C_CHROMIUM": chromium()} if script.endswith("_browser.mjs") else {}
    place = environment(where)
    if where in NODE:
        command = ["node", HERE / script, place, folder, request]
    else:
        command = [place / "bin" / "python", HERE / script, folder, request]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"} | browser
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(params=["vit", "rn"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A mini at w4a8."""
    folder = tmp_path_factory.getbasetemp() / "clients" / request.param
    if not folder.exists():
        source, calibration = material(request, request.param)
        quantized_bundle(source, calibration, folder, "rounding=nearest")
    return open_bundle(folder)


@pytest.fixture
def asked(bundle: Bundle, tmp_path: Path) -> Path:
    """The golden input of a mini."""
    return _request(bundle, tmp_path / "request.json")


def _request(bundle: Bundle, path: Path) -> Path:
    """The golden input: files and texts for clients that prepare by themselves, pixels and ids for others."""
    golden, session = read_golden(bundle.path), ClipSession(bundle, verify=False)
    images = [str(bundle.path / "golden" / one.file) for one in golden.images]
    pixels = np.stack([session.pixels(image) for image in images])
    given = {"pixels": pixels.ravel().tolist(), "shape": pixels.shape}
    texts = {"texts": [one.text for one in golden.texts], "input_ids": [one.input_ids for one in golden.texts]}
    path.write_text(json.dumps({"images": images, **texts, **given, "size": len(golden.images[0].embeds)}))
    return path


def _cosines(found: list[list[float]], golden: tuple[Any, ...]) -> np.ndarray:
    rows, right = np.array(found), np.array([one.embeds for one in golden])
    assert rows.shape == right.shape
    return (rows * right).sum(-1) / np.linalg.norm(rows, axis=-1) / np.linalg.norm(right, axis=-1)


def _asked(script: str, client: Client, bundle: Bundle, asked: Path, folder: Path, record: Record) -> dict[str, Any]:
    """What a client says of a package, which has been found as near to the golden vectors as it must be."""
    golden, report = read_golden(bundle.path), package_bundle(bundle.path, client.target, folder)
    assert verify_package(report.path).ok
    found = _run(script, client.environment, report.path, asked)
    assert set(found) == client.answers
    texts = _cosines(found["text_embeds"], golden.texts)
    measured: dict[str, Any] = {"client": client.name, "model": bundle.model_name, "texts": texts.round(5).tolist()}
    for name in ("image_embeds", "own_resize"):
        if name in found:
            measured[name] = _cosines(found[name], golden.images).round(5).tolist()
    record("cosines", json.dumps(measured))
    plain = [number for number, one in enumerate(golden.texts) if one.text.isascii()]
    assert plain
    assert texts[plain].min() > client.exact
    assert texts.min() > client.texts
    least = client.convolved if bundle.model_name == "mini-rn" else client.exact
    assert min(measured.get("image_embeds", [1.0])) > least
    assert ("own_resize" in client.answers) == (client.resized is not None)
    if client.resized is not None:
        photo, every = client.resized
        assert measured["own_resize"][0] > photo
        assert min(measured["own_resize"]) > every
    return found


@pytest.mark.parametrize("script", CLIENTS)
def test_a_client_says_what_the_bundle_says(
    script: str, bundle: Bundle, asked: Path, tmp_path: Path, record_property: Record
) -> None:
    found = _asked(script, CLIENTS[script], bundle, asked, tmp_path / "package", record_property)
    golden = read_golden(bundle.path)
    if "scores" in found:
        best = np.array(found["text_embeds"]) @ np.array(found["own_resize"][0])
        assert found["scores"][0]["label"].split() == golden.texts[int(best.argmax())].text.split()
    if "refused" in found:
        assert [words.split(" in ensemble ")[0] for words in found["refused"]] == ["400", "400"]
    if "searched" in found:
        assert found["searched"][0]["label"] == golden.texts[0].text


RCLIP = Client("rclip 3.3.0", "rclip", "rclip", RESIZING | {"ranked"}, 0.9999, (0.9999, 0.9), 0.9999)
FRIGATE = Client("Frigate's calls, transformers 4.57.6", "frigate", "optimum", RESIZING, 0.9999, (0.99, 0.9), 0.9)


def _miniature(folder: Path, dimensions: int, side: int) -> Bundle:
    """A CLIP in random weights, in miniature but for what a stack takes of one model only, at w4a8."""
    vision = {"image_size": side, "patch_size": 32, "layers": 2, "width": 64, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    name = f"mini-{dimensions}-at-{side}"
    config = {"embed_dim": dimensions, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    quick = ("synthesis.method=noise", "synthesis.images=4", "synthesis.held_out=2", "quantization.rounding=nearest")
    recipe = load_recipe(None, [*quick, "text.prompts=16", "text.held_out=4", "evaluation.dataset=fidelity"])
    return open_bundle(pipeline.quantize_bundle(name, recipe, output=folder / "to", pretrained="random").bundle)


def test_rclip_searches(tmp_path: Path, record_property: Record) -> None:
    bundle = _miniature(tmp_path, 512, 256)
    asked = _request(bundle, tmp_path / "request.json")
    found = _asked("rclip_client.py", RCLIP, bundle, asked, tmp_path / "package", record_property)
    names = [one.file for one in read_golden(bundle.path).images]
    similarities = np.array(found["text_embeds"]) @ np.array(found["own_resize"]).T
    assert found["ranked"] == [[names[index] for index in row] for row in np.argsort(-similarities)]


def test_what_frigate_calls_finds_its_files(tmp_path: Path, record_property: Record) -> None:
    bundle = _miniature(tmp_path, 768, 224)
    asked = _request(bundle, tmp_path / "request.json")
    _asked("frigate_client.py", FRIGATE, bundle, asked, tmp_path / "package", record_property)


# What each build of onnxruntime-web can load: INT4 with a Cast needs a kernel that these two lack.
WITHOUT_INT4 = {"ort.webgpu.min.mjs", "ort.jspi.min.mjs"}


@pytest.mark.parametrize("layout", ["cast", "nibbles"])
def test_builds_of_onnxruntime_web_in_a_browser(layout: str, bundle: Bundle, asked: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    if layout == "cast":
        shutil.copytree(bundle.path, folder)
    else:
        report = package_bundle(bundle.path, "transformersjs", tmp_path / "package")
        folder.mkdir()
        shutil.copy(report.path / "onnx/vision_model_quantized.onnx", folder / "image_encoder.onnx")
        shutil.copy(report.path / "onnx/text_model_quantized.onnx", folder / "text_encoder.onnx")
    found = _run("onnxruntime_web_browser.mjs", "node", folder, asked)
    refused = {build for build, answer in found.items() if "refused" in answer}
    convolutions = any(signature.opset >= 21 for signature in bundle.manifest.io.values())  # on 4 bits: INT4 and a Cast
    assert refused == (WITHOUT_INT4 if layout == "cast" and convolutions else set()), found
    assert all("Cast(21)" in found[build]["refused"] for build in refused)
    golden = read_golden(bundle.path)
    for build in set(found) - refused:
        assert _cosines(found[build]["image_embeds"], golden.images).min() > 0.9999
        assert _cosines(found[build]["text_embeds"], golden.texts).min() > 0.9999


def test_triton_knows_every_field(bundle: Bundle, tmp_path: Path) -> None:
    report = package_bundle(bundle.path, "triton", tmp_path / "package")
    configs = _run("triton_client.py", "triton", report.path, tmp_path)
    assert len(configs) == 6
    assert all(entry["name"] == name for name, entry in configs.items())
    ensembles = {"embed_image": ["image_pixels", "image_encoder"], "embed_text": ["text_ids", "text_encoder"]}
    for ensemble, steps in ensembles.items():
        assert configs[ensemble]["steps"] == steps
        first, second = (configs[step] for step in steps)
        assert configs[ensemble]["inputs"] == first["inputs"]
        assert first["outputs"] == second["inputs"]
        assert second["outputs"] == configs[ensemble]["outputs"]
