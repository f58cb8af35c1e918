"""Export: parity with torch at any batch and length, the I/O contract, and nothing left behind on failure."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from graphs import ops
from open_clip import SimpleTokenizer

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import BundleError, CheckFailed
from d4c_onnx.export import export_fp32, parity
from d4c_onnx.export.tokenizer_file import write_checked_tokenizer
from d4c_onnx.graph.attention import find_attentions
from d4c_onnx.graph.model import load_model as load_onnx
from d4c_onnx.graph.values import is_op, maker, nodes_of
from d4c_onnx.models.load import LoadedModel, load_model
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer


@pytest.mark.oldest
@pytest.mark.parametrize("tower", ["vit", "rn"])
def test_parity_at_other_batches_and_lengths(tower: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"{tower}_bundle")
    loaded = request.getfixturevalue(f"mini_{tower}")
    pixels = torch.randn(5, 3, *loaded.preprocess.size)
    with torch.no_grad():
        expected = loaded.model.encode_image(pixels, normalize=True).numpy()
    assert np.abs(EncoderSession(bundle.image_encoder).run(pixels.numpy()) - expected).max() <= 1e-4
    ids = loaded.tokenize(["a cat", "a photo of the small frog.", "x " * 100])
    with torch.no_grad():
        expected = loaded.model.encode_text(torch.from_numpy(ids), normalize=True).numpy()
    session = EncoderSession(bundle.text_encoder)
    assert np.abs(session.run(ids) - expected).max() <= 1e-4
    assert np.abs(session.run(ids[:1, :4]) - expected[:1]).max() <= 1e-4
    assert max(bundle.manifest.parity_max_abs_difference.values()) <= 1e-4


def test_io_contract(vit_bundle: Bundle) -> None:
    image, text = (onnx.load(path) for path in vit_bundle.encoders.values())
    onnx.checker.check_model(image, full_check=True)
    onnx.checker.check_model(text, full_check=True)
    written = json.loads((vit_bundle.path / "manifest.json").read_text())
    assert written["io"]["image_encoder.onnx"] == {
        "inputs": [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 48, 48]}],
        "outputs": [{"name": "image_embeds", "dtype": "float32", "shape": ["batch", 128]}],
        "opset": 18,
    }
    assert written["io"]["text_encoder.onnx"] == {
        "inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}],
        "outputs": [{"name": "text_embeds", "dtype": "float32", "shape": ["batch", 128]}],
        "opset": 18,
    }
    properties = {entry.key: entry.value for entry in image.metadata_props}
    assert properties["name"] == "mini-vit"
    assert json.loads(properties["preprocess"]) == written["preprocess"]
    assert json.loads(properties["tokenizer"]) == written["tokenizer"]
    assert properties["weights_sha256"] == vit_bundle.weights_sha256
    assert not any(node.metadata_props for node in image.graph.node)


def test_attention_is_one_matmul_per_projection(vit_bundle: Bundle) -> None:
    model = load_onnx(vit_bundle.image_encoder)
    assert ops(model).count("MatMul") == 6 * 8 + 1  # q, k, v, scores, mix, out, c_fc, c_proj; projection
    assert not {"Slice", "Split"} & set(ops(model))
    found, refused = find_attentions(model.graph)
    assert (len(found), refused) == (6, [])
    assert {(attention.heads, attention.width, attention.mask) for attention in found} == {(4, 128, None)}


def test_end_token_is_found_whatever_the_precision(vit_bundle: Bundle) -> None:
    """Runtimes may compute floats in bfloat16 (OpenVINO does), where the start and the end token are one number."""
    graph = load_onnx(vit_bundle.text_encoder).graph
    [sought] = [node.inputs[0] for node in nodes_of(graph, "ArgMax")]
    cast = maker(sought)
    assert cast is not None
    assert is_op(cast, "Cast")
    assert is_op(maker(cast.inputs[0]), "Equal")  # zeros and ones, compared as integers
    assert not [node for node in nodes_of(graph, "Cast") if node.inputs[0] is graph.inputs[0]]


@pytest.mark.slow
def test_raw_export_is_recorded_and_not_normalised(tmp_path: Path, tiny_models: tuple[str, str]) -> None:
    told: list[tuple[str, int, int]] = []
    loaded = load_model(tiny_models[0], "random")
    bundle = export_fp32(loaded, tmp_path / "raw", seed=0, raw=True, on_step=lambda *step: told.append(step[:3]))
    assert told == [("export", done, 4) for done in range(5)]
    assert bundle.manifest.model.normalized is False
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    norms = np.linalg.norm(EncoderSession(bundle.image_encoder).run(pixels), axis=1)
    assert np.abs(norms - 1).min() > 0.01


class Whispering(SimpleTokenizer):
    """Of the kind that is known, and yet with a way of its own."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace("“", "softly "))


def test_a_tokenizer_that_would_answer_otherwise_is_not_written(tmp_path: Path, mini_vit: LoadedModel) -> None:
    other = replace(mini_vit, tokenizer=Whispering(context_length=mini_vit.context_length))
    told = write_checked_tokenizer(other, tmp_path / "tokenizer.json", fixed=False)
    assert not told.has_file
    assert told.clean is None
    assert "first for 'A “curly”" in told.cleaning
    with pytest.raises(BundleError, match=r"has no tokenizer\.json.*other ids than open_clip"):
        TextTokenizer(tmp_path / "tokenizer.json", told)
    masked = replace(mini_vit, tokenizer=SimpleTokenizer(context_length=77, reduction_mask="random"))
    assert write_checked_tokenizer(masked, tmp_path / "tokenizer.json", fixed=True).has_file


def test_failed_parity_leaves_nothing_behind(
    tmp_path: Path, tiny_models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parity.EncoderSession.run

    def off(self: EncoderSession, batch: np.ndarray) -> np.ndarray:
        result = real(self, batch).copy()
        result[0, 0] += 2e-4
        return result

    monkeypatch.setattr(parity.EncoderSession, "run", off)
    with pytest.raises(CheckFailed, match="differ by"):
        export_fp32(load_model(tiny_models[0], "random"), tmp_path / "tiny", seed=0)
    assert os.listdir(tmp_path) == []
