"""Ranges and effective ranks are those of the values that reach the layers; the page is complete and self-contained."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from graphs import parse

from d4c_onnx.evaluation.layer_inputs import LayerInput, effective_rank, layer_inputs
from d4c_onnx.evaluation.page import calibration_page
from d4c_onnx.graph.model import save_model


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.diag([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.diag([1.0, 1e-9, 1e-9])) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.zeros((3, 3))) == 0


def _conv_then_linear(path: Path) -> np.ndarray:
    """Conv 1x1 (3 -> 4), mean over space, MatMul (4 -> 2). Returns the Conv's weight."""
    rng = np.random.default_rng(0)
    conv, linear = rng.normal(size=(4, 3, 1, 1)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
    text = """g (float[batch, 3, 6, 5] pixel_values) => (float[batch, 2] image_embeds) {
        [stem] features = Conv(pixel_values, conv)
        pooled = GlobalAveragePool(features)
        flat = Flatten(pooled)
        [projection] image_embeds = MatMul(flat, linear)
    }"""
    save_model(parse(text, conv=conv, linear=linear), path)
    return conv


def test_layers_see_what_numpy_computes(tmp_path: Path) -> None:
    conv = _conv_then_linear(tmp_path / "g.onnx")
    images = np.random.default_rng(1).normal(size=(9, 3, 6, 5)).astype(np.float32)
    stem, projection = layer_inputs(tmp_path / "g.onnx", images, batch=4)
    assert (stem.node, stem.op, stem.channels) == ("stem", "Conv", 3)
    assert (stem.low, stem.high) == (images.min(), images.max())
    rows = images.transpose(0, 2, 3, 1).reshape(-1, 3).astype(np.float64)
    assert stem.effective_rank == pytest.approx(effective_rank(rows.T @ rows), rel=1e-6)
    pooled = np.einsum("oc,nchw->no", conv[:, :, 0, 0], images) / 30
    assert projection.channels == 4
    assert projection.high == pytest.approx(pooled.max(), rel=1e-4)
    assert projection.effective_rank <= 3 + 1e-3  # four channels made of three colours


def test_a_value_is_read_by_channels_or_by_its_last_axis(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = """g (float[batch, 3, 6, 5] pixel_values) => (float[batch, 4, 6, 5] one, float[batch, 3, 6, 2] other) {
        raised = Exp(pixel_values)
        [stem] one = Conv(raised, conv)
        [product] other = MatMul(raised, linear)
    }"""
    save_model(parse(text, conv=rng.normal(size=(4, 3, 1, 1)), linear=rng.normal(size=(5, 2))), tmp_path / "g.onnx")
    images = rng.normal(size=(9, 3, 6, 5)).astype(np.float32)
    found = {layer.node: layer for layer in layer_inputs(tmp_path / "g.onnx", images, batch=4)}
    assert {name: layer.channels for name, layer in found.items()} == {"stem": 3, "product": 5}
    rows = np.exp(images).reshape(-1, 5).astype(np.float64)
    assert found["product"].effective_rank == pytest.approx(effective_rank(rows.T @ rows), rel=1e-6)


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.lines = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        values = dict(attributes)
        assert tag != "script"
        if tag == "img":
            self.sources.append(values["src"])
        self.lines += tag == "polyline"


def test_page_is_self_contained_and_escaped() -> None:
    layers = [LayerInput("block/0", "MatMul", 8, -1.5, 2.5, 3.25)]
    losses = [{"loss": [3.0, 2.0, 1.0], "tv": [1.0, 1.0, 1.0]}, {"loss": [3.0, 2.5, 1.5], "tv": [0.0, 0.0, 0.0]}]
    images = np.random.default_rng(0).random((3, 3, 8, 8), np.float32)
    text = calibration_page("m", {"seed": "0"}, images, ["a <b> & c", "d"], losses, {"a": layers, "noise": layers})
    page = _Page(text)
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert page.lines == 4
    assert "a &lt;b&gt; &amp; c" in text
    assert "-1.5 .. 2.5" in text
    assert not re.search(r"https?://", text)
