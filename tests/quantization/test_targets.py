"""Targets: what a recipe may ask of them, what they say of themselves, and that their files answer alike."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from encoders import BOTH, count, inputs, material, prompts_of_one_length, quantize, reasons
from graphs import ops, run, served, stored_weights

from d4c_onnx.graph.forms import CAST, FORMS, NATIVE
from d4c_onnx.graph.model import load_model, opset_of
from d4c_onnx.graph.stored import average_bits, layer_bits, stored_weight
from d4c_onnx.graph.values import array, attribute, nodes_of
from d4c_onnx.packaging.stacks.openvino import shifts_bits_out
from d4c_onnx.quantization import EncoderReport
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.pools import CONVOLVE_POOLS
from d4c_onnx.quantization.rewrites.rewrite import Rewrite
from d4c_onnx.quantization.storage.token_table import TokenTable
from d4c_onnx.quantization.targets import TARGETS, Target, target_of
from d4c_onnx.recipe import QuantizationConfig
from d4c_onnx.runtime.session import EncoderSession

Made = Callable[..., tuple[EncoderReport, ir.Model]]
SOON = ("cpu", "portable")
"""Targets whose larger tower is looked at in the tests that a person waits for."""


def _target(**keys: Any) -> Target:
    return target_of(QuantizationConfig(**keys))


@pytest.mark.parametrize("name", TARGETS)
def test_targets_are_made_of_rewrites_and_forms(name: str) -> None:
    target = TARGETS[name]
    rewrites = (*target.float_rewrites, *target.served_rewrites)
    assert all(isinstance(rewrite, Rewrite) for rewrite in rewrites)
    names = [rewrite.name for rewrite in rewrites]
    assert len(set(names)) == len(names)
    assert target.int4.num_bits == 4
    assert target.note
    assert target.float16 == (name == "cuda")


def test_keys_overrule_the_target() -> None:
    assert _target() == TARGETS["cpu"]
    for name, target in TARGETS.items():
        for chosen in (True, False):
            made = _target(target=name, bits="w8a8", reduce_range=chosen)
            assert made.reduce_range == chosen
            assert replace(made, reduce_range=target.reduce_range, note=target.note) == target


def test_notes_say_what_runs() -> None:
    assert "standard operators only" in _target(target="portable").note
    for name in ("cpu", "portable"):
        assert "4-bit" not in _target(target=name).note  # their layouts run on int8 kernels
    for name in ("tensorrt", "openvino"):
        assert "4-bit layers of this file in float" in _target(target=name).note
        assert "4-bit" not in _target(target=name, bits="w8a8").note
    assert "in float" in _target(target="tensorrt", bits="w8a8").note
    assert "unpacked to float16" in _target(target="cuda", bits="w4a16").note


@pytest.fixture(scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tower of mini-vit for a target, each once: w4a8, rounded to nearest, unsmoothed."""
    bundle, dataset = material(request, "vit")
    folder = tmp_path_factory.mktemp("made")
    known: dict[tuple[str, str, str], tuple[EncoderReport, ir.Model]] = {}

    def make(tower: str, target: str, form: str = "") -> tuple[EncoderReport, ir.Model]:
        key = (tower, target, form)
        if key not in known:
            chosen = TARGETS[target]
            chosen = replace(chosen, int4=FORMS[form]) if form else chosen
            # not every form has groups: a form by itself is looked at without
            keys = ("rounding=nearest", "smoothing=none", *(("group=0",) if form else ()))
            path = folder / f"{len(known)}.onnx"
            known[key] = quantize(bundle.encoders[tower], dataset, path, *keys, target=chosen)
        return known[key]

    return make


@pytest.mark.parametrize("tower", BOTH)
def test_layouts_answer_alike(tower: str, made: Made, request: pytest.FixtureRequest) -> None:
    bundle, _ = material(request, "vit")
    models = {name: made(tower, "portable", name)[1] for name in ("cast", "native", "nibbles")}
    for batch in inputs(bundle, np.random.default_rng(0))[tower]:
        literal = {name: run(model, batch, optimize=False) for name, model in models.items()}
        np.testing.assert_array_equal(literal["native"], literal["cast"])
        np.testing.assert_array_equal(literal["nibbles"], literal["cast"])
        np.testing.assert_array_equal(run(models["nibbles"], batch), run(models["cast"], batch))


@pytest.mark.parametrize("tower", BOTH)
def test_layouts_in_the_file(tower: str, made: Made) -> None:
    files = {name: made(tower, "portable", name) for name in ("cast", "native", "nibbles")}
    needed = {name: report.minimum_onnxruntime for name, (report, _) in files.items()}
    assert needed == {"cast": "1.23", "native": "1.20", "nibbles": "1.15"}
    models = {name: model for name, (_, model) in files.items()}
    bits = {name: [(layer.shape, layer.bits) for layer in layer_bits(model)] for name, model in models.items()}
    assert bits["cast"] == bits["native"] == bits["nibbles"]
    assert average_bits(layer_bits(models["nibbles"])) < 4.5
    assert opset_of(models["nibbles"]) == 18 < 21 == opset_of(models["cast"])
    assert models["nibbles"].ir_version == 8
    kinds = {name: {value.dtype for value in model.graph.initializers.values()} for name, model in models.items()}
    assert [ir.DataType.INT4 in kinds[name] for name in ("cast", "native", "nibbles")] == [True, True, False]
    assert ops(models["native"]).count("Cast") < ops(models["cast"]).count("Cast")
    for name, model in models.items():
        forms = {stored.form for stored in stored_weights(model)}
        assert {form.name for form in forms if form is not None} == {name, "int8"}


@pytest.mark.parametrize(
    ("tower", "target"),
    [
        pytest.param(tower, target, marks=pytest.mark.slow if tower == "image" and target not in SOON else ())
        for tower in ("image", "text")
        for target in TARGETS
    ],
)
def test_every_target_answers_as_fp32_does(tower: str, target: str, made: Made, request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, "vit")
    report, model = made(tower, target)
    assert tower == "text" or report.token_table_bits is None
    fed = np.array(dataset.held_out) if tower == "image" else prompts_of_one_length(dataset)
    exact = EncoderSession(bundle.encoders[tower]).run(fed)
    assert (run(model, fed) * exact).sum(-1).min() > 0.9
    assert (run(model, fed, optimize=False) * run(model, fed)).sum(-1).min() > 0.995


@pytest.mark.parametrize("form", ["cast", "native", "nibbles"])
@pytest.mark.parametrize("tower", BOTH)
def test_portable_has_standard_operators_only(tower: str, form: str, made: Made) -> None:
    report, model = made(tower, "portable", form)
    assert {node.domain for node in model.graph} == {""}
    assert FUSE_ATTENTION.name not in [applied.name for applied in report.rewrites]


def test_no_bit_is_shifted_out(made: Made) -> None:
    """OpenVINO divides instead of shifting, and rounds to nearest: 26 >> 4 is 2 there."""
    _, model = made("text", "portable")
    assert ops(model).count("BitShift") == 2  # of the token table: its values, its multipliers
    assert not shifts_bits_out(model)


@pytest.mark.parametrize(("tower", "blocks"), [("image", 6), ("text", 3)])
def test_cpu_target_fuses_attention(tower: str, blocks: int, made: Made, request: pytest.FixtureRequest) -> None:
    bundle, _ = material(request, "vit")
    report, model = made(tower, "cpu")
    running = [node for node in served(model).graph if node.op_type == "QuickGelu"]
    assert [attribute(node, "alpha") for node in running] == [1.0] * blocks  # folded: no constant left
    assert count(report, "attention as one operator") == ops(model).count("MultiHeadAttention") == blocks
    assert count(report, "pooled row") == 1
    assert count(report, "QuickGELU") == blocks
    assert reasons(report, "attention as one operator") == []
    for batch in inputs(bundle, np.random.default_rng(1))[tower]:
        plain = run(made(tower, "portable")[1], batch)
        assert (run(model, batch) * plain).sum(-1).min() > 0.999  # an activation may round to the neighbouring step


@pytest.mark.parametrize("tower", BOTH)
def test_weights_of_products_have_no_zero_points(tower: str, made: Made) -> None:
    """One per channel slows onnxruntime's int8 product down; compilers are given them all the same."""
    for target, inputs_of in (("cpu", 2), ("portable", 2), ("openvino", 3), ("tensorrt", 3)):
        _, model = made(tower, target)
        found = [stored_weight(product) for product in nodes_of(model.graph, "MatMul")]
        weights = [stored.dequantize for stored in found if stored is not None and stored.num_bits <= 8]
        assert len(weights) > 10
        assert {len(node.inputs) for node in weights if node is not None} == {inputs_of}


@pytest.mark.parametrize(
    ("model", "bits"),
    [
        ("vit", "w8a8"),
        pytest.param("rn", "w8a8", marks=pytest.mark.slow),
        pytest.param("rn", "w4a8", marks=pytest.mark.slow),
    ],
)
def test_tensorrt_files_are_symmetric(model: str, bits: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, dataset = material(request, model)
    for path in bundle.encoders.values():
        keys = (f"bits={bits}", "target=tensorrt", "rounding=nearest", "smoothing=none")
        _, quantized = quantize(path, dataset, tmp_path / "q.onnx", *keys)
        pairs = list(nodes_of(quantized.graph, "QuantizeLinear", "DequantizeLinear"))
        assert pairs
        for node in pairs:
            zero = array(node.inputs[2])
            assert zero is not None
            assert zero.dtype.name in ("int8", "int4")  # no uint8, and no int32 biases
            assert not zero.any()
        # what its parser lists as not supported: integer tables, and the bit operations that unpack them
        assert not set(ops(quantized)) & {"BitShift", "BitwiseAnd"}
        read = [gather.inputs[0] for gather in nodes_of(quantized.graph, "Gather")]
        assert all(value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) for value in read if value is not None)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("cpu", ir.DataType.UINT8),
        ("portable", ir.DataType.UINT8),
        ("openvino", ir.DataType.UINT8),
        ("cuda", ir.DataType.INT4),
        ("tensorrt", ir.DataType.FLOAT),
    ],
)
def test_the_token_table_has_the_form_of_its_target(target: str, kind: ir.DataType, made: Made) -> None:
    report, model = made("text", target)
    [table] = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.size >= 49408 * 32
    ]
    assert table.dtype == kind
    bits = {TokenTable.FLOAT: None, TokenTable.FOLDED: 4, TokenTable.PACKED: 4.25 if TARGETS[target].grouped else 4}
    assert report.token_table_bits == bits[TARGETS[target].token_table]


@pytest.mark.slow
def test_pools_become_depthwise_convolutions(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, dataset = material(request, "rn")
    rewrites = tuple(rewrite for rewrite in TARGETS["cpu"].served_rewrites if rewrite is not CONVOLVE_POOLS)
    keys = ("rounding=nearest", "smoothing=none")
    with_pools = replace(TARGETS["cpu"], served_rewrites=rewrites)
    _, before = quantize(bundle.image_encoder, dataset, tmp_path / "pools.onnx", *keys, target=with_pools)
    report, after = quantize(bundle.image_encoder, dataset, tmp_path / "q.onnx", *keys)
    pools = ops(before).count("AveragePool")
    assert pools == ops(load_model(bundle.image_encoder)).count("AveragePool") - 1  # one averages single values
    assert "AveragePool" not in ops(after)
    assert count(report, "depthwise") == pools
    products = stored_weights(after)
    depthwise = [stored for stored in products if stored.shape[1:] == (1, 2, 2)]
    assert len(depthwise) == pools
    assert {stored.num_bits for stored in depthwise} == {4}
    running = ops(served(after))
    assert "QLinearAveragePool" not in running
    assert running.count("QLinearConv") == ops(after).count("Conv")
    for batch in inputs(bundle, np.random.default_rng(0))["image"]:
        one, other = (run(model, batch, optimize=False) for model in (before, after))
        np.testing.assert_allclose(other, one, atol=2e-3)  # a mean halfway between two steps may go either way
        assert (one * other).sum(-1).min() > 0.9999


def test_a_target_of_other_forms_needs_no_code(made: Made) -> None:
    """What the benchmarks do: a tuple of rewrites and a form."""
    native, cast = (made("text", "portable", form)[1] for form in (NATIVE.name, CAST.name))
    assert [layer.node for layer in layer_bits(native)] == [layer.node for layer in layer_bits(cast)]
