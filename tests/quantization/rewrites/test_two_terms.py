"""What only products of the pooled row read is the sum of two integer terms, with an integer product for each."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import config_of, count, inputs, material, prepared, quantize, values_of
from graphs import check, ops, parse, run, served, snapshot

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.observers import QuantParams, quant_params
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.stored import average_bits, layer_bits
from d4c_onnx.graph.values import name_of, nodes_by_name, nodes_of
from d4c_onnx.manifest import RewriteRecord
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.inside.statistics import fake_quantize, quantized_name
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.two_terms import NAME, add_second_terms, read_by_pooled_row
from d4c_onnx.runtime.inspection import inspect_encoder

GRID = QuantParams(0.02, 77, 8, two_terms=True)
GRAPH = """pooled (float[n, 1, 32] x) => (float[n, 1, 16] y) {
    h = Mul(x, one)
    q = QuantizeLinear(h, s, z)
    [pair] r = DequantizeLinear(q, s, z)
    w_r = DequantizeLinear<axis = 1>(w, w_s, w_z)
    [product] p = MatMul(r, w_r)
    [biased] b = Add(p, bias)
    y = Neg(b)
}"""


def _graph(*edits: tuple[str, str]) -> tuple[ir.Model, dict[str, np.ndarray]]:
    rng, text = np.random.default_rng(0), GRAPH
    for edit in edits:
        assert edit[0] in text
        text = text.replace(*edit)
    held: dict[str, np.ndarray] = {
        "one": np.ones(1, np.float32),
        "w": rng.integers(-64, 64, (32, 16), np.int8),
        "w_s": rng.uniform(0.01, 0.02, 16).astype(np.float32),
        "w_z": np.zeros(16, np.int8),
        "bias": rng.standard_normal(16).astype(np.float32),
        "s": np.array(GRID.scale, np.float32),
        "z": np.array(GRID.zero_point, np.uint8),
    }
    return parse(text, **held), held


def _rows(batch: int) -> np.ndarray:
    low, high = GRID.range
    return np.random.default_rng(batch).uniform(low, high, (batch, 1, 32)).astype(np.float32)


@pytest.mark.parametrize(("low", "high"), [(-1.5, 3.5), (-0.17, 40.0), (-2.0, 2.0)])
def test_two_terms_are_sixteen_bits(low: float, high: float) -> None:
    grid = replace(quant_params(low, high, 8), two_terms=True)
    values = np.random.default_rng(0).uniform(*grid.range, 10_000)
    one, two = replace(grid, two_terms=False).round(values) - values, grid.round(values) - values
    assert np.abs(one).max() > 0.49 * grid.scale
    # half a step of the second grid, but at the very edge of the first one's step, where its last level is cut off
    assert np.abs(two).max() < 1.01 * grid.remainder.scale
    assert np.sqrt(np.square(two).mean()) < 1.01 * grid.remainder.scale / np.sqrt(12)


@pytest.mark.parametrize("batch", [1, 5])
def test_both_products_read_one_weight_in_integer_kernels(batch: int) -> None:
    model, held = _graph()
    before = run(model, _rows(batch), optimize=False)
    assert add_second_terms(model, {"h": GRID}) == (RewriteRecord(NAME, 1),)
    check(model)
    weight = held["w"] * held["w_s"].astype(np.float64)
    exact, rounded = (-(rows @ weight + held["bias"]) for rows in (_rows(batch), GRID.round(_rows(batch))))
    for optimize in (False, True):
        assert np.abs(run(model, _rows(batch), optimize=optimize) - rounded).max() < 1e-5
    assert np.abs(rounded - exact).max() < np.abs(before - exact).max() / 100
    products = [entry for entry in served(model).graph if "MatMul" in entry.op_type]
    assert [entry.op_type for entry in products] == ["MatMulIntegerToFloat"] * 2
    assert len({entry.inputs[1] for entry in products}) == 1


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (("y = Neg(b)", "m = ReduceMean<keepdims = 1>(r)\n y = Add(b, m)"), "ReduceMean"),
        (("y = Neg(b)", "t = Transpose<perm = [0, 2, 1]>(r)\n m = MatMul(r, t)\n y = Add(b, m)"), "Transpose"),
        (("b = Add(p, bias)\n    y = Neg(b)", "y = Add(p, bias)"), "product"),
    ],
)
def test_other_readers_are_refused(edit: tuple[str, str], reason: str) -> None:
    model, _ = _graph(edit)
    before = snapshot(model)
    [record] = add_second_terms(model, {"h": GRID})
    assert record.count == 0
    assert len(record.refused) == 1
    assert record.refused[0].place == "h"
    assert reason in record.refused[0].reason
    assert snapshot(model) == before


def test_grids_of_one_term_stay() -> None:
    model, _ = _graph()
    before = snapshot(model)
    assert add_second_terms(model, {"h": replace(GRID, two_terms=False)}) == (RewriteRecord(NAME, 0),)
    assert snapshot(model) == before


@pytest.mark.parametrize("tower", ["image", "text"])
def test_only_what_the_pooled_row_alone_reads_is_chosen(vit_bundle: Bundle, tower: str) -> None:
    model = load_model(vit_bundle.encoders[tower])
    before = snapshot(model)
    plan = make_plan(model.graph, config_of())
    chosen = read_by_pooled_row(model, plan)
    assert snapshot(model) == before
    last = [layer for layer in plan.layers if layer.data in chosen]
    assert len(chosen) == len(last) == 3  # out, fc1, fc2; q's input is that of k and v, too
    COMPUTE_POOLED_ROW.apply(model)
    assert all(layer.node not in nodes_by_name(model.graph) for layer in last)


def test_towers_without_a_pooled_row_have_none(rn_bundle: Bundle) -> None:
    model = load_model(rn_bundle.image_encoder)
    assert read_by_pooled_row(model, make_plan(model.graph, config_of())) == frozenset()


@pytest.mark.slow
def test_ranges_do_not_clip_and_the_twin_has_both_terms(request: pytest.FixtureRequest) -> None:
    model, plan, _, reader = prepared(request, "vit")
    plan = replace(plan, pooled=read_by_pooled_row(model, plan))
    ranges = collect_ranges(model, plan, reader, config_of())
    assert {name for name, grid in ranges.items() if grid.two_terms} == plan.pooled
    twin = fake_quantize(model, plan, ranges)
    for name in plan.pooled:
        values = values_of(model, reader, name)
        low, high = ranges[name].range
        assert low <= values.min() < values.max() <= high
        # the twin's own input of it, which carries errors from before
        given, rounded = values_of(twin, reader, name), values_of(twin, reader, quantized_name(name))
        assert np.allclose(rounded, ranges[name].round(given), atol=1.01 * ranges[name].remainder.scale)
        assert np.abs(rounded - given).mean() < ranges[name].scale / 100


@pytest.mark.parametrize(
    ("tower", "bits"),
    [
        ("text", "w4a8"),
        ("image", "w8a8"),
        pytest.param("text", "w8a8", marks=pytest.mark.slow),
        pytest.param("image", "w4a8", marks=pytest.mark.slow),
    ],
)
def test_served_towers_have_int8_kernels_for_both_terms(
    request: pytest.FixtureRequest, rng: np.random.Generator, tmp_path: Path, bits: str, tower: str
) -> None:
    bundle, dataset = material(request, "vit")
    path = tmp_path / "q.onnx"
    report, made = quantize(bundle.encoders[tower], dataset, path, f"bits={bits}", "rounding=nearest")
    check(made)
    assert count(report, NAME) == 3
    products = nodes_of(served(made).graph, "com.microsoft:MatMulIntegerToFloat")
    shared = Counter(name_of(entry.inputs[1]) for entry in products)
    assert sorted(shared.values(), reverse=True)[:4] == [2, 2, 2, 1]
    layers = inspect_encoder(path).layers
    assert all(layer.int8 for layer in layers if layer.bits is not None and layer.bits <= 8)
    weights = {layer.weight for layer in layer_bits(made)}
    assert len(weights) == len(layer_bits(made)) == len([layer for layer in layers if layer.shape]) - 3
    assert 4 <= average_bits(report.layers) <= 8.2
    for batch in inputs(bundle, rng)[tower]:
        assert np.abs(run(made, batch) - run(made, batch, optimize=False)).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("target=tensorrt",), ("target=openvino",), ("bits=w6a6",), ("ranges=mse-plain",)])
def test_other_targets_and_settings_have_one_term(
    request: pytest.FixtureRequest, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    bundle, dataset = material(request, "vit")
    report, made = quantize(bundle.image_encoder, dataset, tmp_path / "q.onnx", "rounding=nearest", *keys)
    assert sum(record.count for record in report.rewrites if record.name == NAME) == 0
    assert "Sub" not in ops(made)
