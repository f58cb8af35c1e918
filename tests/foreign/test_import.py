"""ONNX files that others exported: in by the door, the same answers, and quantised like any bundle."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from exports import CONTEXT, END, PIXELS, Export, export_open_clip, export_transformers, open_clip_model
from exports import transformers_model as hugging_face_model

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.calibration import open_calibration_set
from d4c_onnx.cli.main import group
from d4c_onnx.foreign import ForeignFiles
from d4c_onnx.graph.attention import find_attentions, is_causal
from d4c_onnx.graph.layers import linear_source
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import is_constant
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer

pytest.importorskip("transformers")

FEW = ("synthesis.images=4", "synthesis.held_out=2", "text.prompts=8", "text.held_out=4", "quantization.bits=w8a8")
KINDS = {
    "open_clip, script": (export_open_clip, lambda: open_clip_model(quick_gelu=False), False, 14),
    "open_clip, dynamo": (export_open_clip, open_clip_model, True, 18),
    "transformers, script": (export_transformers, lambda: hugging_face_model("eager"), False, 13),
    "transformers, dynamo": (export_transformers, hugging_face_model, True, 20),
}


SLOW = ("open_clip, dynamo", "transformers, dynamo")  # seconds each, by torch's newer exporter


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in KINDS]
)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def files(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Export:
    write, model, dynamo, opset = KINDS[kind]
    return write(tmp_path_factory.mktemp("export"), model(), dynamo, opset)


@pytest.fixture(scope="module")
def bundle(files: Export, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("imported")
    return pipeline.import_bundle(ForeignFiles(files.image, files.text), output, load_recipe(), name="theirs")


def test_a_bundle_answers_as_the_files_did(kind: str, files: Export, bundle: Bundle, rng: np.random.Generator) -> None:
    manifest = bundle.manifest
    assert manifest.model.pretrained == "onnx"
    assert manifest.preprocess.mean == tuple(PIXELS["mean"])
    assert manifest.model.sources["mean"] == "preprocess_cfg.json beside the weights"
    assert [entry.name for io in manifest.io.values() for entry in (*io.inputs, *io.outputs)] == [
        *("pixel_values", "image_embeds", "input_ids", "text_embeds")
    ]
    images = rng.standard_normal((3, 3, 32, 32), dtype=np.float32)
    theirs, ours = EncoderSession(files.image), EncoderSession(bundle.image_encoder)
    assert np.allclose(theirs.run(images), ours.run(images), atol=1e-5)
    ids = TextTokenizer(bundle.tokenizer)(["a photo of a cat.", "red"])
    theirs, ours = EncoderSession(files.text), EncoderSession(bundle.text_encoder)
    padding = kind.startswith("transformers") and {"attention_mask": np.array([[1] * 8, [1] * 3 + [0] * 5])}
    feed = {theirs.input_name: ids.astype(np.int64 if padding else np.int32), **(padding or {})}
    assert ids.shape == ((2, 8) if padding else (2, CONTEXT))
    assert np.allclose(theirs.run_named(feed)[theirs.output_names[0]], ours.run(ids), atol=1e-5)
    assert manifest.tokenizer.dynamic_sequence == bool(padding)
    assert manifest.tokenizer.causal
    assert manifest.tokenizer.pad_id == END


def test_a_bundle_is_quantised_without_torch_weights(bundle: Bundle) -> None:
    keys = [word for key in FEW for word in ("--set", key)]
    done = CliRunner().invoke(group, ["quantize", str(bundle.path), "--quiet", *keys])
    assert done.exit_code == 0, done.output
    assert "calibrated with 4 leaves images (imported files have no torch weights" in done.output
    quantized = open_bundle(bundle.path / "w8a8")
    made = quantized.manifest.quantization
    assert made is not None
    assert made.accuracy is not None
    versus = made.accuracy.bundles[1].versus_first
    assert versus is not None
    assert min(versus.cosine_image, versus.cosine_text) > 0.99
    assert made.recipe["synthesis"]["method"] == "leaves"
    for name in ("image_encoder.onnx", "text_encoder.onnx"):
        assert "2 attentions in one float kernel each" in inspect_encoder(quantized.path / name).summary
    dataset = open_calibration_set(bundle.path / f"calibration-{made.calibration}")
    assert dataset.pixel_values.shape == (4, 3, 32, 32)
    assert all(row[0] == 97 for row in dataset.input_ids)


def test_the_command_line(files: Export, tmp_path: Path) -> None:
    command = ["import", "--image", str(files.image), "--text", str(files.text), "-o", str(tmp_path), "--quiet"]
    done = CliRunner().invoke(group, [*command, "--json", "--name", "one"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["bundle"] == str(tmp_path / "one")
    assert max(said["parity_max_abs_difference"].values()) < 1e-5
    again = CliRunner().invoke(group, [*command, "--name", "one"])
    assert again.exit_code == 2
    assert "--overwrite" in again.output


def test_attention_norms_and_gelu_are_found(kind: str, bundle: Bundle) -> None:
    assert bundle.manifest.model.quick_gelu == (kind == "open_clip, dynamo")
    for tower, path in bundle.encoders.items():
        graph = load_model(path).graph
        found, refused = find_attentions(graph)
        assert [attention.heads for attention in found] == [2, 2]
        assert not refused
        assert all(is_causal(attention.mask) if tower == "text" else attention.mask is None for attention in found)
        assert all(linear_source(value) for attention in found for value in (attention.query, attention.value))
        kinds = [node.op_type for node in graph]
        assert not {"Erf", "Pow", "ReduceMean", "IsNaN", "Constant"} & set(kinds)
        assert kinds.count("LayerNormalization") == (6 if tower == "image" else 5)
        assert kinds.count("Gelu") + kinds.count("Sigmoid") == 2
        shapes = [node.inputs[1] for node in graph if node.op_type == "Reshape"]
        assert all(is_constant(shape) for shape in shapes)
