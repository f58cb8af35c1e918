"""Encoders in pieces, their quantised twins, and the statistics of both, against plain sums and whole runs."""

import numpy as np
import pytest
from encoders import METHODS_IN_SHORT, config_of, material, prepared, values_of
from graphs import Feeds, parse, run, snapshot

from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import constant, nodes_by_name
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.inside.statistics import (
    StatisticsCollector,
    fake_quantize,
    quantized_name,
)
from d4c_onnx.quantization.inside.views import input_view
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rounding import RoundingTask
from d4c_onnx.runtime.session import EncoderSession


def test_statistics_are_plain_sums(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = prepared(request, "vit", batch=3)
    layer = plan.layers[5]  # c_fc of the first block: behind attention, so the errors before it count
    collector = StatisticsCollector(model, plan, ranges, reader)
    found = collector.collect([layer])[layer.node]
    assert len(material(request, "vit")[1].pixel_values) == 8
    x = values_of(model, reader, layer.data).reshape(-1, found.gram.shape[1]).astype(np.float64)
    assert found.count == len(x)
    mean, mean_quantized = found.means()
    assert np.allclose(mean[0], x.mean(0), atol=1e-5)
    assert 0 < np.abs(mean_quantized - mean).max() < 0.2
    gram, _ = found.covariances()
    expected = np.cov(x.T, bias=True)
    assert np.abs(gram[0] - expected).max() < 0.2 * np.abs(expected).max()


def test_twin_rounds_activations_to_their_grid(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = prepared(request, "vit", "bits=w4a4")
    values = values_of(fake_quantize(model, plan, ranges), reader, quantized_name(plan.layers[1].data))
    assert len(np.unique(values)) <= 16


def test_a_twin_shares_its_models_weights_until_they_are_replaced(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = prepared(request, "vit")
    before = snapshot(model)
    layer = plan.layers[2]
    twin = fake_quantize(model, plan, ranges)
    for name, value in model.graph.initializers.items():
        assert twin.graph.initializers[name].const_value is value.const_value
    shared, changed = (SegmentedEncoder(twin, reader) for _ in range(2))
    changed.replace(layer.weight, 2 * constant(model.graph.initializers[layer.weight]))
    for got, doubled in zip(*(part.advance([layer.output]) for part in (shared, changed)), strict=True):
        assert np.allclose(2 * got[layer.output], doubled[layer.output], rtol=1e-4, atol=1e-5)
    assert snapshot(model) == before
    assert np.array_equal(
        constant(twin.graph.initializers[layer.weight]), constant(model.graph.initializers[layer.weight])
    )


@pytest.mark.parametrize("model", ["vit", "rn"])
@pytest.mark.parametrize("weights", ["in memory", "beside the graph"])
def test_segments_end_where_the_whole_encoder_ends(
    model: str, weights: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at every weighted layer, the pieces give the very answer of the whole."""
    bundle, _ = material(request, model)
    height, width = bundle.manifest.preprocess.size
    pixels = np.random.default_rng(0).standard_normal((3, 3, height, width)).astype(np.float32)
    encoder = load_model(bundle.image_encoder)
    before = snapshot(encoder)
    if weights == "beside the graph":  # as those of a large encoder
        monkeypatch.setattr("d4c_onnx.graph.model.weight_bytes", lambda _: 2**32)
    pieces = SegmentedEncoder(encoder, Feeds([pixels[:2], pixels[2:]], "pixel_values"))
    for layer in make_plan(encoder.graph, config_of()).layers:
        assert all(layer.data in values for values in pieces.advance([layer.data]))
    got = np.concatenate([values["image_embeds"] for values in pieces.advance(["image_embeds"])])
    assert np.allclose(got, EncoderSession(bundle.image_encoder).run(pixels), atol=1e-5)
    assert snapshot(encoder) == before


def test_pieces_of_the_twin_run_with_the_weights_that_were_placed(request: pytest.FixtureRequest) -> None:
    """onnxruntime would round a Conv's float weight to int8 between DequantizeLinear and QuantizeLinear."""
    model, plan, ranges, reader = prepared(request, "rn")
    twin = fake_quantize(model, plan, ranges)
    layer = plan.layers[4]
    name, conv = quantized_name(layer.data), nodes_by_name(twin.graph)[layer.node]
    weight, bias = constant(twin.graph.initializers[layer.weight]), constant(conv.inputs[2])
    for batch in list(SegmentedEncoder(twin, reader).advance([name, layer.output])):
        rows = input_view(conv, weight.shape, name).rows(batch[name])[0]
        got = rows @ weight.reshape(len(weight), -1).T + bias
        kept = batch[layer.output].transpose(0, 2, 3, 1).reshape(-1, len(weight))
        assert np.allclose(got, kept, atol=1e-4)


def test_segments_run_what_branches_read() -> None:
    rng = np.random.default_rng(0)
    text = """g (float[n, 8] x) => (float[n, 8] y) {
        h = MatMul(x, w)
        r = Relu(h)
        total = ReduceSum<keepdims = 0>(x)
        positive = Greater(total, nought)
        s = If (positive) <
            then_branch = inside () => (float[n, 8] one) { half = Mul(h, factor)\n one = Neg(half) },
            else_branch = outside () => (float[n, 8] other) { other = Add(r, r) }
        >
        y = MatMul(s, v)
    }"""
    known = {"w": rng.standard_normal((8, 8)), "v": rng.standard_normal((8, 8)), "factor": np.float32(0.5)}
    model = parse(text, nought=np.float32(0), **known)
    x = np.abs(rng.standard_normal((3, 8))).astype(np.float32)
    reader = Feeds([x, -x])
    for stops in (["h", "r", "s", "y"], ["s", "y"], ["r", "y"]):
        pieces = SegmentedEncoder(model, reader)
        for stop in stops:
            answers = [batch[stop] for batch in pieces.advance([stop])]
        np.testing.assert_allclose(answers[0], run(model, x), rtol=1e-5)
        np.testing.assert_allclose(answers[1], run(model, -x), rtol=1e-5)
    plan = make_plan(model.graph, config_of())
    ranges = collect_ranges(model, plan, reader, config_of())
    for name in METHODS_IN_SHORT:
        made = METHODS_IN_SHORT[name].round_weights(RoundingTask(model, plan, ranges, reader))
        assert set(made.weights) == {"w", "v"}
