"""Graphs that no exporter of ours wrote: nodes without names, If branches, attention that the finder does not know."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from encoders import config_of, count, material, quantize, quantized_bundle, reasons
from graphs import Feeds, check, ops, parse, run

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.cli.main import group
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.graph.stored import layer_bits
from d4c_onnx.graph.values import (
    constant,
    is_op,
    maker,
    name_of,
    node,
    nodes_of,
    only_reader,
    replace_input,
    set_constant,
    take_over,
    value_named,
)
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession

ATTENTION = "attention as one operator"
NO_PRODUCT = "what the softmax reads is no product of queries and keys"
NO_MIXING = "the softmax is not read by one product with values"


def _written(model: ir.Model, path: Path) -> Path:
    check(model)
    save_model(model, path)
    return path


def _cosine(source: Path, target: Path, dataset: CalibrationSet) -> float:
    images = np.array(dataset.held_out)
    one, other = (EncoderSession(path).run(images) for path in (source, target))
    return float((one * other).sum(1).min())


@pytest.mark.slow
def test_nodes_without_names(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """ONNX asks for no names of nodes; the integers are those of the named graph."""
    bundle, dataset = material(request, "vit")
    proto = onnx.load(bundle.image_encoder)
    for entry in proto.graph.node:
        entry.name = ""
    source = tmp_path / "unnamed.onnx"
    onnx.save(proto, source)
    for path, target in ((source, "unnamed_q"), (bundle.image_encoder, "named_q")):
        report, made = quantize(path, dataset, tmp_path / f"{target}.onnx", "bits=w8a8", tower="image")
        assert len(report.layers) == len({layer.node for layer in report.layers}) == 38
        assert count(report, ATTENTION) == 6
    assert _cosine(source, tmp_path / "unnamed_q.onnx", dataset) > 0.98
    images = np.array(dataset.held_out)
    one, other = (EncoderSession(tmp_path / f"{name}_q.onnx", threads=1).run(images) for name in ("unnamed", "named"))
    assert np.array_equal(one, other)
    layers = inspect_encoder(tmp_path / "unnamed_q.onnx").layers
    assert [layer.bits for layer in layers if layer.shape and not layer.int8] == [16]  # the final projection
    assert all(entry.name for entry in made.graph)


def _divided(model: ir.Model) -> None:
    """Scores are divided by a root, and queries carry it: the same function."""
    root = set_constant(model.graph, "root", np.array(4, np.float32))
    for softmax in nodes_of(model.graph, "Softmax"):
        scores = softmax.inputs[0]
        made = maker(scores)
        assert scores is not None
        assert made is not None
        times = node("Mul", [made.inputs[0], root], f"{scores.name}_times")
        divided = node("Div", [scores, root], f"{scores.name}_divided")
        model.graph.insert_before(made, times)
        model.graph.insert_before(softmax, divided)
        made.replace_input_with(0, times.outputs[0])
        softmax.replace_input_with(0, divided.outputs[0])


def _einsum(model: ir.Model) -> None:
    """Scores by an Einsum."""
    for softmax in nodes_of(model.graph, "Softmax"):
        made = maker(softmax.inputs[0])
        assert made is not None
        equation = {"equation": "bhqd,bhdk->bhqk"}
        other = node("Einsum", made.inputs, f"{made.name}_einsum", attributes=equation)
        model.graph.insert_before(made, other)
        take_over(made.outputs[0], other.outputs[0])
        model.graph.remove(made, safe=True)


def _mixed_by_einsum(model: ir.Model) -> None:
    """Values are mixed by an Einsum."""
    for softmax in nodes_of(model.graph, "Softmax"):
        made = only_reader(softmax.outputs[0])
        assert made is not None
        equation = {"equation": "bhqk,bhkd->bhqd"}
        other = node("Einsum", made.inputs, f"{made.name}_einsum", attributes=equation)
        model.graph.insert_before(made, other)
        take_over(made.outputs[0], other.outputs[0])
        model.graph.remove(made, safe=True)


@pytest.mark.parametrize(
    ("target", "change", "reason"),
    [
        pytest.param(target, change, reason, marks=marks, id=f"{target}-{name}")
        for target, change, reason, name, marks in (
            ("cpu", _divided, NO_PRODUCT, "div", pytest.mark.slow),
            ("cpu", _einsum, NO_PRODUCT, "einsum", ()),
            ("cpu", _mixed_by_einsum, NO_MIXING, "einsum of values", pytest.mark.slow),
            ("cuda", _divided, NO_PRODUCT, "div", pytest.mark.slow),
            ("cuda", _einsum, NO_PRODUCT, "einsum", pytest.mark.slow),
            ("cuda", _mixed_by_einsum, NO_MIXING, "einsum of values", pytest.mark.slow),
        )
    ],
)
def test_attention_that_is_not_known(
    target: str, change: Callable[[ir.Model], None], reason: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Right answers, without the operator; and the report says why."""
    bundle, dataset = material(request, "vit")
    model = load_model(bundle.image_encoder)
    change(model)
    source = _written(model, tmp_path / "image_other.onnx")
    assert _cosine(source, bundle.image_encoder, dataset) > 0.99999
    keys = ("bits=w8a8", f"target={target}", "rounding=nearest")
    report, made = quantize(source, dataset, tmp_path / "q.onnx", *keys, verify=True)
    assert _cosine(source, tmp_path / "q.onnx", dataset) > 0.98
    assert count(report, ATTENTION) == 0
    assert "MultiHeadAttention" not in ops(made)
    said = reasons(report, ATTENTION)
    assert len(said) == 6
    assert all(reason in text for text in said)
    assert any(reason in text for text in reasons(report, "pooled row"))  # the last block computes every row
    assert report.record().rewrites == report.rewrites
    inspected = inspect_encoder(tmp_path / "q.onnx")
    if target == "cpu":
        assert inspected.summary.startswith("37 of 38 weighted products in int8")


def _gated(model: ir.Model) -> None:
    """Behind the second block the residual stream is chosen by the sum of the pixels; one branch reads what is hidden
    in an MLP, the other the stream itself."""
    adds = [entry for entry in nodes_of(model.graph, "Add") if _is_residual(entry)]
    stream = adds[3].outputs[0]
    sigmoid = list(nodes_of(model.graph, "Sigmoid"))[1]
    [gated] = [use.node for use in sigmoid.outputs[0].uses()]
    hidden = next(value for value in gated.inputs if value is not sigmoid.outputs[0])
    assert hidden is not None
    pixels = model.graph.inputs[0]
    zero = set_constant(model.graph, "nought", np.array(0, np.float32))
    last = set_constant(model.graph, "last_axis", np.array([-1], np.int64))
    way = np.random.default_rng(0).standard_normal(128) * 0.02  # not all alike, or the next LayerNorm takes it out
    direction = set_constant(model.graph, "direction", way.astype(np.float32))
    total = node("ReduceSum", [pixels], "gate_total", attributes={"keepdims": 0})
    sign = node("Greater", [total.outputs[0], zero], "gate_sign")

    def branch(name: str, source: ir.Value) -> ir.Graph:
        largest = node("ReduceMax", [source, last], f"{name}_largest")
        little = node("Mul", [largest.outputs[0], direction], f"{name}_little")
        sum_ = node("Add", [stream, little.outputs[0]], f"{name}_sum")
        sum_.outputs[0].type, sum_.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["b", "t", 128])
        return ir.Graph([], [sum_.outputs[0]], nodes=[largest, little, sum_], name=name)

    readers = list(dict.fromkeys(use.node for use in stream.uses()))
    branches = {"then_branch": branch("inside", hidden), "else_branch": branch("outside", stream)}
    choice = node("If", [sign.outputs[0]], "gate_choice", attributes=branches)
    for entry in readers:
        replace_input(entry, stream, choice.outputs[0])
    made = maker(stream)
    assert made is not None
    model.graph.insert_after(made, [total, sign, choice])


def _is_residual(add: ir.Node) -> bool:
    makers = [maker(value) for value in add.inputs]
    return all(entry is not None for entry in makers) and any(is_op(entry, "Add") for entry in makers)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [("bits=w8a8",), ("bits=w4a8",), ("bits=w8a8", "target=portable")])
def test_branches_that_read_inside_a_block(
    keys: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """What a branch reads is still there, under its name, and right."""
    bundle, dataset = material(request, "vit")
    model = load_model(bundle.image_encoder)
    _gated(model)
    source = _written(model, tmp_path / "image_gated.onnx")
    plain = EncoderSession(source).run(np.array(dataset.held_out))
    assert np.abs(plain - EncoderSession(bundle.image_encoder).run(np.array(dataset.held_out))).max() > 1e-6
    report, made = quantize(source, dataset, tmp_path / "q.onnx", *keys, verify=True)
    check(made)
    assert "If" in ops(made)
    assert _cosine(source, tmp_path / "q.onnx", dataset) > 0.98
    assert len(reasons(report, "QuickGELU")) == 1  # the block that the branch looks into; the other five are folded
    assert count(report, "QuickGELU") == 5
    assert len(layer_bits(made)) == 38


@pytest.mark.slow
def test_inspect_shows_what_was_left_alone_and_why(own: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """All three at once: a bundle of a graph without names, with branches, and with attention of another form."""
    exported, dataset = material(request, "vit")
    bundle = Bundle(own, exported.manifest)
    model = load_model(bundle.image_encoder)
    _divided(model)
    _gated(model)
    proto = ir.to_proto(model)
    for entry in proto.graph.node:
        entry.name = ""
    onnx.save(proto, bundle.image_encoder)
    keys = ("bits=w8a8", "rounding=nearest", "smoothing=none")
    made = quantized_bundle(bundle, dataset, tmp_path / "w8a8", *keys, threads=1)
    assert _cosine(bundle.image_encoder, made.image_encoder, dataset) > 0.98
    shown = CliRunner().invoke(group, ["inspect", str(made.path)])
    assert shown.exit_code == 0, shown.output
    refused = [line.strip() for line in shown.output.splitlines() if " not at " in line]
    alone = [line for line in refused if line.startswith(ATTENTION)]
    assert len(alone) == 6
    assert all(NO_PRODUCT in line for line in alone)
    assert len({line.partition(":")[0] for line in alone}) == 6  # each at a place of its own
    assert len([line for line in refused if "QuickGELU" in line]) == 1


CHOICE = """encoder (float[n, 16] x) => (float[n, 8] y) {
    [first] h = MatMul(x, w)
    [act] r = Relu(h)
    total = ReduceSum<keepdims = 0>(x)
    positive = Greater(total, nought)
    [choice] s = If (positive) <
        then_branch = inside () => (float[n, 16] one) { one = Mul(h, two) },
        else_branch = outside () => (float[n, 16] other) { other = Add(r, r) }
    >
    [second] y = MatMul(s, v)
}"""


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "gptaq"])
def test_an_encoder_whose_layers_stand_around_branches(rounding: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = parse(
        CHOICE, w=rng.standard_normal((16, 16)), v=rng.standard_normal((16, 8)), two=np.float32(2), nought=np.float32(0)
    )
    source = _written(model, tmp_path / "float.onnx")
    batches = [sign * np.abs(rng.standard_normal((8, 16))).astype(np.float32) for sign in (1, -1, 1, -1)]
    config = config_of("bits=w8a8", f"rounding={rounding}")
    report = quantize_encoder(source, tmp_path / "q.onnx", Feeds(batches), config, threads=1, verify=True)
    assert [layer.node for layer in report.layers] == ["first", "second"]
    made = load_model(tmp_path / "q.onnx")
    check(made)
    for batch in batches:
        exact, got = run(model, batch), run(made, batch)
        assert np.abs(exact - got).max() < 0.05 * np.abs(exact).max()
    assert constant(value_named(made.graph, "two")) == 2
    assert name_of(made.graph.outputs[0]) == "y"
