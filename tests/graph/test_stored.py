"""Forms of stored weights: what is stored is found and unpacked again, in any form, by its structure alone."""

from itertools import permutations
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, ops, parse, run, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stored_cases import CONVOLUTION, GENERAL, PRODUCT, UNPACKED, layer_of, scramble

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.forms import CAST, FORMS, INT8, NATIVE, NIBBLES, Form
from d4c_onnx.graph.model import save_model
from d4c_onnx.graph.packing import pack_int4, unpack_int4, unpack_uint4
from d4c_onnx.graph.stored import average_bits, convert_stored, find_stored, layer_bits, stored_weight
from d4c_onnx.graph.values import array, constant, nodes_by_name, nodes_of, value_named
from d4c_onnx.runtime.inspection import inspect_encoder

INTEGERS = hnp.arrays(np.int8, hnp.array_shapes(max_dims=4, max_side=7), elements=st.integers(-8, 7))
MATRICES = hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(-8, 7))
# neither the form of other tools' files nor those of paths, which are no integers
SIGNED = [name for name in FORMS if name != "uint8" and "trellis" not in name]
PAIRS = list(permutations(SIGNED, 2))

KINDS = ("product", "convolution", "unpacked", "general")


def _model(kind: str, seed: int = 0) -> tuple[ir.Model, np.ndarray]:
    """A graph whose only weight is `w`, int8, and a batch for it."""
    rng = np.random.default_rng(seed)
    if kind == "product":
        values = rng.integers(-8, 8, (7, 5), np.int8)
        text = PRODUCT.replace("INPUTS", "7").replace("CHANNELS", "5")
        known = {"x_scale": np.float32(0.02), "x_zero": np.uint8(117), "w_scale": rng.uniform(0.1, 1, 5)}
        return parse(text, w=values, **known), rng.standard_normal((4, 7), np.float32)
    if kind == "convolution":
        known = {"w_scale": rng.uniform(0.1, 1, 4), "w_zero": np.zeros(4, np.int8)}
        return parse(CONVOLUTION, w=rng.integers(-8, 8, (4, 3, 3, 3), np.int8), **known), rng.standard_normal(
            (2, 3, 5, 5), np.float32
        )
    shape = (5, 3) if kind == "unpacked" else (3, 5)
    text = UNPACKED if kind == "unpacked" else GENERAL
    model = parse(text, w=rng.integers(-8, 8, shape, np.int8), w_scale=rng.uniform(0.1, 1, 3))
    return model, rng.standard_normal((4, 5), np.float32)


def _convert(model: ir.Model, form: Form) -> None:
    stored = stored_weight(layer_of(model))
    assert stored is not None
    convert_stored(model.graph, stored, form)


@given(INTEGERS)
def test_int4_packing_round_trip_and_onnx_agrees(values: np.ndarray) -> None:
    raw = pack_int4(values)
    assert len(raw) == (values.size + 1) // 2
    assert np.array_equal(unpack_int4(raw, values.shape), values)
    own = ir.serde.serialize_tensor(ir.Tensor(values.astype(ml_dtypes.int4), name="w"))
    assert own.raw_data == raw


@given(hnp.arrays(np.uint8, hnp.array_shapes(max_dims=3, max_side=7), elements=st.integers(0, 15)))
def test_unsigned_packing_round_trip_and_onnx_agrees(values: np.ndarray) -> None:
    raw = pack_int4(values)
    assert np.array_equal(unpack_uint4(raw, values.shape), values)
    own = ir.serde.serialize_tensor(ir.Tensor(values.astype(ml_dtypes.uint4), name="m"))
    assert own.raw_data == raw


@pytest.mark.parametrize("name", SIGNED)
@given(values=INTEGERS)
@settings(max_examples=20, deadline=None)
def test_every_form_gives_back_what_it_stored(name: str, values: np.ndarray) -> None:
    """By `unpack`, and by onnxruntime itself, odd counts of values included."""
    form = FORMS[name]
    shape = ", ".join(str(size) for size in values.shape)
    model = parse(f"g (int8[1] x) => (int8[{shape}] y) {{ t = Identity(x)\n y = Add(t, w) }}", w=values)
    integers = form.store(model.graph, "stored", values)
    found = form.find(integers)
    assert found is not None
    assert found.is_initializer()
    unpacked = form.unpack(integers)
    assert unpacked.dtype == np.int8
    assert np.array_equal(unpacked, values)
    tensor = found.const_value
    assert tensor is not None
    assert tensor.nbytes == (values.size + 1) // 2 if form.num_bits == 4 else values.size
    others = [other for other in FORMS.values() if other is not form]
    assert not any(other.find(integers) is not None for other in others)  # a value lies in one form
    if form is NATIVE:  # onnxruntime adds no int4: DequantizeLinear is all that reads one
        return
    adds = next(entry for entry in model.graph if entry.op_type == "Add")
    adds.replace_input_with(1, integers)
    assert np.array_equal(run(model, np.zeros(1, np.int8), optimize=False), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_another_form_changes_no_number(before: str, after: str, kind: str) -> None:
    model, batch = _model(kind)
    _convert(model, FORMS[before])
    check(model)
    stored = stored_weight(layer_of(model))
    assert stored is not None
    assert stored.form is FORMS[before]
    expected, integers, scale = run(model, batch, optimize=False), stored.unpack(), constant(stored.scale)
    _convert(model, FORMS[after])
    check(model)
    again = stored_weight(layer_of(model))
    assert again is not None
    assert again.form is FORMS[after]
    assert again.num_bits == FORMS[after].num_bits
    assert again.shape == stored.shape == integers.shape
    assert np.array_equal(again.unpack(), integers)
    assert np.array_equal(constant(again.scale), scale)
    assert np.array_equal(run(model, batch, optimize=False), expected)
    assert [layer.bits for layer in layer_bits(model)] == [FORMS[after].num_bits]


@pytest.mark.parametrize("kind", KINDS)
def test_forms_that_onnxruntime_unpacks_run_on_the_same_kernels(kind: str) -> None:
    answers = {}
    for form in (INT8, CAST, NIBBLES):
        model, batch = _model(kind, seed=1)
        _convert(model, form)
        answers[form.name] = run(model, batch)
    assert np.array_equal(answers["cast"], answers["int8"])
    assert np.array_equal(answers["nibbles"], answers["int8"])


@given(MATRICES, st.permutations(SIGNED))
@settings(max_examples=20, deadline=None)
def test_a_chain_of_conversions_ends_where_it_began(values: np.ndarray, names: list[str]) -> None:
    text = PRODUCT.replace("INPUTS", str(values.shape[0])).replace("CHANNELS", str(values.shape[1]))
    scale = np.linspace(0.5, 1, values.shape[1])
    model = parse(text, w=values, x_scale=np.float32(0.02), x_zero=np.uint8(3), w_scale=scale)
    first = model.clone()
    for name in (*names, "int8"):
        _convert(model, FORMS[name])
        check(model)
    assert len(model.graph) == len(first.graph)  # nothing is left of the forms on the way
    assert set(model.graph.initializers) == set(first.graph.initializers)
    assert np.array_equal(constant(value_named(model.graph, "w")), values)
    batch = np.random.default_rng(0).standard_normal((2, values.shape[0])).astype(np.float32)
    assert np.array_equal(run(model, batch, optimize=False), run(first, batch, optimize=False))


def test_the_form_it_has_already_is_left_alone() -> None:
    model, _ = _model("convolution")
    before = snapshot(model)
    _convert(model, INT8)
    assert snapshot(model) == before


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_zero_points_take_the_type_of_the_integers(before: str, after: str) -> None:
    model, _ = _model("convolution")
    for name in (before, after):
        _convert(model, FORMS[name])
    zero = array(nodes_by_name(model.graph)["weight"].inputs[2])
    assert zero is not None
    assert zero.dtype == (ml_dtypes.int4 if after == "native" else np.int8)
    assert not zero.astype(np.int8).any()


def test_a_shared_weight_moves_for_all_its_readers() -> None:
    text = """shared (float[n, 4] x) => (float[n, 4] y) {
        [one] r = DequantizeLinear(w, s)
        [other] t = DequantizeLinear(w, u)
        [first] h = MatMul(x, r)
        [second] y = MatMul(h, t)
    }"""
    values = np.random.default_rng(0).integers(-8, 8, (4, 4), np.int8)
    model = parse(text, w=values, s=np.float32(0.5), u=np.float32(0.25))
    x = np.ones((1, 4), np.float32)
    expected = run(model, x, optimize=False)
    for form in (NIBBLES, CAST, NATIVE):
        stored = stored_weight(nodes_by_name(model.graph)["first"])
        assert stored is not None
        convert_stored(model.graph, stored, form)
        assert [(layer.node, layer.bits) for layer in layer_bits(model)] == [("first", 4)]  # counted once
        assert np.array_equal(run(model, x, optimize=False), expected)


@pytest.mark.parametrize(
    ("text", "constants"),
    [
        ("y = MatMul(x, x)", {}),  # of two activations
        ("r = Relu(w)\n y = MatMul(x, r)", {"w": np.ones((4, 4))}),  # computed from a constant, no stored weight
        ("y = MatMul(x, w)", {"w": np.ones(4)}),  # of one axis
        (
            "t = Gather(w, i)\n r = Cast<to = 1>(t)\n u = Mul(r, s)\n y = MatMul(x, u)",
            {"w": np.ones((9, 4), np.int8), "i": np.arange(4), "s": np.float32(1)},
        ),  # a table that is no table of nibbles
    ],
)
def test_what_is_no_stored_weight_is_not_taken_for_one(text: str, constants: dict) -> None:
    model = parse(f"g (float[4, 4] x) => (float[a, b] y) {{ {text} }}", **constants)
    assert layer_bits(model) == []


def test_float_weights_have_their_own_width() -> None:
    text = """widths (float[n, 4] x) => (float[n, 4] y) {
        h = MatMul(x, w)
        c = Cast<to = 10>(h)
        p = MatMul(c, v)
        y = Cast<to = 1>(p)
    }"""
    model = parse(text, w=np.ones((4, 4)), v=np.ones((4, 4), np.float16))
    assert [layer.bits for layer in layer_bits(model)] == [32, 16]
    assert average_bits(layer_bits(model)) == 24
    found = find_stored(value_named(model.graph, "v"))
    assert found is not None
    assert found.form is None
    assert np.array_equal(found.unpack(), np.ones((4, 4), np.float16))


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("kind", KINDS)
def test_recognition_does_not_depend_on_names(name: str, kind: str, tmp_path: Path) -> None:
    model, batch = _model(kind)
    _convert(model, FORMS[name])
    before, answers = layer_bits(model), run(model, batch)
    save_model(model, tmp_path / "named.onnx")
    integers = stored_weight(layer_of(model)).unpack()  # type: ignore[union-attr]
    scramble(model)
    check(model)
    save_model(model, tmp_path / "scrambled.onnx")
    assert not {"weight", "layer", "w"} & {*(str(node.name) for node in model.graph), *model.graph.initializers}
    assert np.array_equal(run(model, batch), answers)
    assert [(layer.op, layer.shape, layer.bits) for layer in layer_bits(model)] == [
        (layer.op, layer.shape, layer.bits) for layer in before
    ]
    [product] = [node for node in model.graph if node.op_type in ("MatMul", "Conv", "Gemm")]
    stored = stored_weight(product)
    assert stored is not None
    assert np.array_equal(stored.unpack(), integers)
    named, scrambled = (inspect_encoder(tmp_path / f"{file}.onnx") for file in ("named", "scrambled"))
    assert scrambled.summary == named.summary
    for one, other in zip(named.layers, scrambled.layers, strict=True):
        assert (one.kernel, one.int8, one.bits, one.activation, one.activation_range, one.weight_scales) == (
            other.kernel,
            other.int8,
            other.bits,
            other.activation,
            other.activation_range,
            other.weight_scales,
        )


def test_an_integer_product_of_onnxruntime_is_a_layer_too() -> None:
    text = """fused (uint8[n, 6] x) => (float[n, 4] y) {
        [layer] y = com.microsoft.MatMulIntegerToFloat(x, w, x_scale, w_scale, x_zero)
    }"""
    values = np.random.default_rng(0).integers(-8, 8, (6, 4), np.int8)
    known = {"x_scale": np.float32(0.1), "x_zero": np.uint8(12), "w_scale": np.linspace(0.1, 1, 4)}
    model = parse(text, w=values, **known)
    x = np.random.default_rng(1).integers(0, 255, (3, 6), np.uint8)
    expected = run(model, x)
    for form in (CAST, NIBBLES):
        _convert(model, form)
        [layer] = layer_bits(model)
        assert (layer.shape, layer.bits) == ((6, 4), 4)
        assert np.array_equal(run(model, x), expected)


def test_native_int4_is_plain_for_compilers() -> None:
    model, _ = _model("product")
    _convert(model, NATIVE)
    assert ops(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    assert model.graph.initializers["w"].dtype == ir.DataType.INT4


def test_what_a_form_cannot_hold_is_not_cut_to_fit() -> None:
    """Other tools store weights unsigned, or wider than four bits: no number is changed, the conversion is refused."""
    for integers, zero in (
        (np.full((4, 5), 100, np.uint8), np.uint8(128)),
        (np.full((4, 5), 100, np.int8), np.int8(0)),
    ):
        text = """one (float[n, 4] x) => (float[n, 5] y) {
            real = DequantizeLinear(w, scale, zero)
            [product] y = MatMul(x, real)
        }"""
        model = parse(text, w=integers, scale=np.float32(0.1), zero=zero)
        [product] = nodes_of(model.graph, "MatMul")
        stored = stored_weight(product)
        assert stored is not None
        assert (stored.num_bits, stored.form.name) == (8, integers.dtype.name)
        before = snapshot(model)
        with pytest.raises(GraphError, match="do not fit"):
            convert_stored(model.graph, stored, CAST)
        assert snapshot(model) == before
