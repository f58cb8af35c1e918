"""ReLU6 between convolutions: an integer grid that ends where it cuts stands for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import config_of
from graphs import check, ops, parse

from d4c_onnx.calibration.readers import OneBatchReader
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.graph.values import nodes_by_name, set_constant
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.plan import cut_at, make_plan
from d4c_onnx.runtime.kernels import count_kernels
from d4c_onnx.runtime.session import EncoderSession

BATCH = np.random.default_rng(1).standard_normal((16, 3, 16, 16)).astype(np.float32)


def mobile_net() -> ir.Model:
    """A stem, a depthwise and a pointwise convolution; before each ReLU6 values reach far beyond both its ends."""
    rng = np.random.default_rng(0)
    return parse(
        """net (float[batch, 3, 16, 16] pixel_values) => (float[batch, 12] image_embeds) {
        [stem] a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (pixel_values, w1)
        [cut1] b = Clip(a, zero, six)
        [depth] c = Conv <pads = [1, 1, 1, 1], group = 16> (b, w2)
        [cut2] d = Clip(c, zero, six)
        [point] e = Conv(d, w3)
        [cut3] f = Clip(e, zero, six)
        [pool] g = ReduceMean <keepdims = 0> (f, axes)
        [head] image_embeds = MatMul(g, w4)
        }""",
        w1=rng.standard_normal((16, 3, 3, 3)) * 4,
        w2=rng.standard_normal((16, 1, 3, 3)) * 4,
        w3=rng.standard_normal((32, 16, 1, 1)) * 2,
        w4=rng.standard_normal((32, 12)),
        zero=np.float32(0),
        six=np.float32(6),
        axes=np.array([2, 3]),
    )


def cosine(target: Path, source: Path) -> float:
    one, other = (EncoderSession(path, threads=1).run(BATCH) for path in (source, target))
    return float(((one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)).mean())


def test_grids_end_where_it_cuts_and_no_node_is_left(tmp_path: Path) -> None:
    model, config = mobile_net(), config_of("bits=w8a8")
    check(model)
    plan = make_plan(model.graph, config)
    assert {"cut1", "cut2", "cut3"} <= set(plan.nodes)
    assert not {"a", "c", "e"} & set(plan.activations)  # nobody rounds what is cut
    reader = OneBatchReader(BATCH, "pixel_values")
    ranges = collect_ranges(model, plan, reader, config)
    assert all(ranges[name].zero_point == 0 for name in "bdf")
    assert all(4 < ranges[name].range[1] < 6.0001 for name in "bdf")  # no headroom beyond 6
    save_model(model, tmp_path / "float.onnx")
    quantize_encoder(tmp_path / "float.onnx", tmp_path / "q.onnx", reader, config, threads=1)
    assert "Clip" not in ops(load_model(tmp_path / "q.onnx"))
    assert count_kernels(tmp_path / "q.onnx")["QLinearConv"] == 3
    assert cosine(tmp_path / "q.onnx", tmp_path / "float.onnx") > 0.999
    assert "Clip" in ops(model)  # the source is as it was


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_symmetric_grids_keep_the_node(target: str, tmp_path: Path) -> None:
    save_model(mobile_net(), tmp_path / "float.onnx")
    reader = OneBatchReader(BATCH, "pixel_values")
    keys = ("bits=w8a8", f"target={target}")
    quantize_encoder(tmp_path / "float.onnx", tmp_path / "q.onnx", reader, config_of(*keys), threads=1)
    assert ("Clip" in ops(load_model(tmp_path / "q.onnx"))) == (target == "tensorrt")


def _from_below(model: ir.Model) -> None:
    set_constant(model.graph, "zero", np.array(-1, np.float32))


def _computed(model: ir.Model) -> None:
    nodes = nodes_by_name(model.graph)
    for cut in ("cut1", "cut2", "cut3"):
        nodes[cut].replace_input_with(2, nodes["stem"].inputs[0])


def _read_twice(model: ir.Model) -> None:
    nodes = nodes_by_name(model.graph)
    nodes["point"].replace_input_with(0, nodes["depth"].outputs[0])
    nodes["depth"].replace_input_with(0, nodes["stem"].outputs[0])


@pytest.mark.parametrize("change", [_from_below, _computed, _read_twice])
def test_near_misses_are_no_relu6(change: Callable[[ir.Model], None]) -> None:
    model = mobile_net()
    change(model)
    nodes = nodes_by_name(model.graph)
    assert cut_at(nodes["cut1"]) is None
    assert cut_at(nodes["stem"]) is None
    plan = make_plan(model.graph, config_of("bits=w8a8"))
    assert "cut1" not in plan.nodes
    assert "a" in plan.activations
