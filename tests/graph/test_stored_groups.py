"""Groups of inputs that share multipliers: stored as parts, multiplied as products, in any form that holds them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, ops, parse, run, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_cases import GENERAL, PRODUCT, layer_of, scramble

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.forms import CAST, FORMS, INT8, NATIVE, NIBBLES, Form
from d4c_onnx.graph.packing import Grouped
from d4c_onnx.graph.stored import convert_stored, layer_bits, stored_weight


@st.composite
def grouped(draw: st.DrawFn) -> Grouped:
    """A matrix in groups of an even size, channels first or last."""
    channels, groups, half = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng, axis = np.random.default_rng(draw(st.integers(0, 99))), draw(st.sampled_from([0, 1]))
    rows = rng.integers(-8, 8, (channels, groups * half * 2), np.int8)
    integers = rows if axis == 0 else np.ascontiguousarray(rows.T)
    return Grouped(integers, rng.integers(1, 16, (channels, groups)).astype(np.uint8), axis)


def _same_groups(one: Grouped | None, other: Grouped) -> bool:
    if one is None or one.axis != other.axis or one.integers.dtype != np.int8 or one.multipliers.dtype != np.uint8:
        return False
    return np.array_equal(one.integers, other.integers) and np.array_equal(one.multipliers, other.multipliers)


@given(grouped())
def test_products_are_those_of_plain_arithmetic(values: Grouped) -> None:
    rows = values.integers if values.axis == 0 else values.integers.T
    each = np.repeat(values.multipliers, rows.shape[1] // values.multipliers.shape[1], axis=1)
    products = rows.astype(int) * each
    assert values.products.dtype == np.int8
    assert np.array_equal(values.products, products if values.axis == 0 else products.T)


@pytest.mark.parametrize("form", [CAST, NIBBLES], ids=["cast", "nibbles"])
@given(values=grouped())
@settings(max_examples=40, deadline=None)
def test_every_form_of_groups_gives_back_what_it_stored(form: Form, values: Grouped) -> None:
    """By `groups` and `unpack`, and by onnxruntime itself; an odd count of multipliers included."""
    shape = ", ".join(str(size) for size in values.integers.shape)
    model = parse(f"g (int8[1] x) => (int8[{shape}] y) {{ t = Identity(x)\n y = Add(t, w) }}", w=values.integers)
    integers = form.store_groups(model.graph, "stored", values)
    found = form.find(integers)
    assert found is not None
    assert found.const_value is not None
    assert found.const_value.nbytes == values.integers.size // 2
    assert form.shape(integers) == values.integers.shape
    assert form.multipliers(integers) == values.multipliers.size
    assert np.array_equal(form.unpack(integers), values.products)
    assert not any(other.find(integers) is not None for other in FORMS.values() if other is not form)
    assert _same_groups(form.groups(integers), values)
    model.graph.outputs[0].producer().replace_input_with(1, integers)  # type: ignore[union-attr]
    check(model)
    assert np.array_equal(run(model, np.zeros(1, np.int8), optimize=False), values.products)


def _grouped_model(kind: str) -> tuple[ir.Model, np.ndarray, Grouped]:
    """A graph whose only weight is products of groups, still int8, and a batch for it."""
    rng, axis = np.random.default_rng(3), 1 if kind == "product" else 0
    multipliers = rng.integers(1, 9, (5, 3)).astype(np.uint8)
    integers = rng.integers(-8, 8, (12, 5) if axis else (5, 12), np.int8)
    values, scale = Grouped(integers, multipliers, axis), rng.uniform(0.1, 1, 5)
    if kind == "product":
        text = PRODUCT.replace("INPUTS", "12").replace("CHANNELS", "5")
        known = {"x_scale": np.float32(0.02), "x_zero": np.uint8(117)}
    else:
        text, known = GENERAL.replace("n, 5", "n, 12").replace("n, 3", "n, 5"), {}
    model = parse(text, w=values.products, w_scale=scale, **known)
    return model, rng.standard_normal((4, 12), np.float32), values


@pytest.mark.parametrize("kind", ["product", "general"])
@pytest.mark.parametrize("order", [(CAST, NIBBLES, INT8), (NIBBLES, CAST, INT8)], ids=["cast", "nibbles"])
def test_groups_move_between_forms_and_change_no_number(order: tuple[Form, ...], kind: str) -> None:
    model, batch, values = _grouped_model(kind)
    first, expected, served = model.clone(), run(model, batch, optimize=False), run(model, batch)
    for form in order:
        stored = stored_weight(layer_of(model))
        assert stored is not None
        groups = values if stored.form is INT8 else None  # once stored, they are found again
        convert_stored(model.graph, stored, form, groups)
        check(model)
        again = stored_weight(layer_of(model))
        assert again is not None
        assert again.form is form
        assert np.array_equal(again.unpack(), values.products)
        assert again.shape == values.integers.shape
        assert [layer.bits for layer in layer_bits(model)] == [4 + 4 / 4 if form is not INT8 else 8]
        assert again.integers is not None
        assert form is INT8 or _same_groups(form.groups(again.integers), values)
        assert np.array_equal(run(model, batch, optimize=False), expected)
        assert np.array_equal(run(model, batch), served)
    assert ops(model) == ops(first)  # nothing is left of the forms on the way
    assert set(model.graph.initializers) == set(first.graph.initializers)


@pytest.mark.parametrize("form", [CAST, NIBBLES], ids=["cast", "nibbles"])
@pytest.mark.parametrize("kind", ["product", "general"])
def test_groups_are_recognised_whatever_the_names(form: Form, kind: str) -> None:
    model, batch, values = _grouped_model(kind)
    stored = stored_weight(layer_of(model))
    assert stored is not None
    convert_stored(model.graph, stored, form, values)
    answers = run(model, batch)
    scramble(model)
    assert np.array_equal(run(model, batch), answers)
    [product] = [entry for entry in model.graph if entry.op_type in ("MatMul", "Gemm")]
    again = stored_weight(product)
    assert again is not None
    assert again.form is form
    assert np.array_equal(again.unpack(), values.products)


def test_groups_that_are_not_those_of_the_file_are_refused() -> None:
    model, _, values = _grouped_model("product")
    before, stored = snapshot(model), stored_weight(layer_of(model))
    assert stored is not None
    with pytest.raises(GraphError, match="other integers"):
        convert_stored(model.graph, stored, CAST, Grouped(values.integers, values.multipliers[:, ::-1], 1))
    with pytest.raises(GraphError, match="do not fit"):  # products, and a form that has no multipliers
        convert_stored(model.graph, stored, NATIVE, values)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("blocks", "multipliers", "to"),
    [
        ((3, 4, 5), (3, 4, 5), 3),  # one for each weight
        ((3, 4, 5), (1, 1, 1), 3),  # one for all
        ((3, 4, 5), (3, 1, 1), 3),  # one for a group of all channels
        ((12, 5), (1, 5), 3),  # no groups
        ((3, 4, 5), (3, 1, 5), 6),  # of int32
    ],
)
def test_other_products_of_constants_are_no_groups(
    blocks: tuple[int, ...], multipliers: tuple[int, ...], to: int
) -> None:
    text = f"""near (float[n, 12] x) => (float[n, 5] y) {{
        a = Cast<to = {to}>(q)
        b = Cast<to = {to}>(m)
        p = Mul(a, b)
        i = Reshape(p, shape)
        r = DequantizeLinear<axis = 1>(i, s)
        y = MatMul(x, r)
    }}"""
    integers, small = np.ones(blocks, ml_dtypes.int4), np.ones(multipliers, ml_dtypes.uint4)
    model = parse(text, shape=np.array([12, 5]), s=np.ones(5), x=np.ones(1))
    for name, values in (("q", integers), ("m", small)):
        replaced = ir.Value(name=name, const_value=ir.Tensor(values, name=name))
        model.graph.register_initializer(replaced)
        first = next(entry for entry in model.graph if entry.op_type == "Cast" and not entry.inputs[0].is_initializer())
        first.replace_input_with(0, replaced)
    assert layer_bits(model) == []
