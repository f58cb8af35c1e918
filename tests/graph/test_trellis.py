"""Weights as paths through a trellis: nibbles and multipliers in the file, levels where kernels multiply."""

import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, ops, parse, run, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_cases import GENERAL, PRODUCT, layer_of, scramble

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.forms import CAST, FORMS, INT8, NATIVE, NIBBLES
from d4c_onnx.graph.stored import convert_stored, layer_bits, store_coded, stored_weight
from d4c_onnx.graph.trellis import PATH_BITS, RATES, Coded, level_numbers
from d4c_onnx.graph.trellis_form import TRELLISES
from d4c_onnx.packaging.stacks.openvino import shifts_bits_out


@st.composite
def coded(draw: st.DrawFn) -> Coded:
    """A matrix in groups of an even size, of codes in planes of a multiple of 8, channels first or last."""
    channels, groups, parts = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng, axis, bits = np.random.default_rng(draw(st.integers(0, 99))), draw(st.integers(0, 1)), draw(st.integers(3, 5))
    codes = rng.integers(0, 2**bits, (channels, groups * parts * (2 if bits == 4 else 8))).astype(np.uint8)
    return Coded(codes, rng.integers(0, 16, (channels, groups)).astype(np.uint8), axis, bits)


def _same(one: Coded, other: Coded) -> bool:
    kinds = {array.dtype for array in (one.codes, one.multipliers)} == {np.dtype(np.uint8)}
    alike = np.array_equal(one.codes, other.codes) and np.array_equal(one.multipliers, other.multipliers)
    return kinds and alike and (one.axis, one.num_bits) == (other.axis, other.num_bits)


@pytest.mark.parametrize(("bits", "last"), [(3, 17), (4, 33), (5, 65)])
def test_levels_lie_evenly_and_are_safe_for_sums_of_two_in_16_bits(bits: int, last: int) -> None:
    levels = RATES[bits].levels
    assert levels.dtype == np.int8
    assert levels.shape == (16, last + 1)
    assert not levels[0].any()
    assert np.array_equal(levels, -levels[:, ::-1])
    assert np.abs(levels.astype(int)).max() == 64
    assert 255 * 2 * 64 < 2**15
    distance = np.diff(levels.astype(float), axis=1)
    assert np.ptp(distance, axis=1).max() <= 1  # what rounding to integers does
    assert np.allclose(distance.mean(1), np.arange(16) * 128 / (15 * last), atol=0.06)
    places, path = level_numbers(bits)
    assert len(np.unique(places + path)) == last + 1


@given(coded())
def test_a_path_is_walked_as_its_definition_says(values: Coded) -> None:
    """One channel after the other, one nibble after the other, each with the two bits before it."""
    size = values.codes.shape[1] // values.multipliers.shape[1]
    expected = np.empty(values.codes.shape, np.int8)
    for channel, codes in enumerate(values.codes.tolist()):
        newer = older = 0
        for place, code in enumerate(codes):
            level = 2 * code + newer + 2 * older
            expected[channel, place] = RATES[values.num_bits].levels[values.multipliers[channel, place // size], level]
            newer, older = code % 2, newer
    assert values.levels.dtype == np.int8
    assert np.array_equal(values.levels, expected.T if values.axis else expected)


@given(coded())
@settings(max_examples=60, deadline=None)
def test_the_form_gives_back_what_it_stored(values: Coded) -> None:
    """By `coded` and `unpack`, and by onnxruntime itself; an odd count of multipliers included."""
    model = parse(
        f"g (int8[1] x) => (int8[{values.shape[0]}, {values.shape[1]}] y) {{ t = Identity(x)\n y = Add(t, w) }}",
        w=values.levels,
    )
    form = TRELLISES[values.num_bits]
    before = set(model.graph.initializers)
    integers = form.store_coded(model.graph, "stored", values)
    assert form.find(integers) is not None
    codes = [value for name, value in model.graph.initializers.items() if name not in before and name[-1] in "pq"]
    assert sum(value.const_value.nbytes for value in codes) == values.codes.size * values.num_bits / 8
    assert form.shape(integers) == values.shape
    assert form.multipliers(integers) == values.multipliers.size
    assert np.array_equal(form.unpack(integers), values.levels)
    assert not any(other.find(integers) is not None for other in FORMS.values() if other is not form)
    assert _same(form.coded(integers), values)
    model.graph.outputs[0].producer().replace_input_with(1, integers)  # type: ignore[union-attr]
    check(model)
    for optimize in (False, True):
        assert np.array_equal(run(model, np.zeros(1, np.int8), optimize=optimize), values.levels)


def _model(kind: str, bits: int = 4) -> tuple[ir.Model, np.ndarray, Coded]:
    """A graph whose only weight is a path's levels, still int8, and a batch for it."""
    rng, axis, inputs = np.random.default_rng(3), 1 if kind == "product" else 0, 12 if bits == 4 else 24
    multipliers = rng.integers(1, 16, (5, 3)).astype(np.uint8)
    values = Coded(rng.integers(0, 2**bits, (5, inputs)).astype(np.uint8), multipliers, axis, bits)
    if kind == "product":
        text = PRODUCT.replace("INPUTS", str(inputs)).replace("CHANNELS", "5")
        known = {"x_scale": np.float32(0.02), "x_zero": np.uint8(117)}
    else:
        text, known = GENERAL.replace("n, 5", f"n, {inputs}").replace("n, 3", "n, 5"), {}
    model = parse(text, w=values.levels, w_scale=rng.uniform(0.1, 1, 5), **known)
    return model, rng.standard_normal((4, inputs), np.float32), values


@pytest.mark.parametrize("width", TRELLISES)
@pytest.mark.parametrize("kind", ["product", "general"])
def test_a_path_changes_no_number_and_can_be_unpacked_for_good(kind: str, width: int) -> None:
    model, batch, values = _model(kind, width)
    first, expected, served = model.clone(), run(model, batch, optimize=False), run(model, batch)
    for form, bits in ((TRELLISES[width], width + 4 * 3 / values.codes.shape[1]), (INT8, 8)):
        stored = stored_weight(layer_of(model))
        assert stored is not None
        if form is not INT8:
            store_coded(model.graph, stored, values)
        else:
            convert_stored(model.graph, stored, form)
        check(model)
        again = stored_weight(layer_of(model))
        assert again is not None
        assert again.form is form
        assert np.array_equal(again.unpack(), values.levels)
        assert again.shape == values.shape
        assert [layer.bits for layer in layer_bits(model)] == [bits]
        assert np.array_equal(run(model, batch, optimize=False), expected)
        assert np.array_equal(run(model, batch), served)
    assert ops(model) == ops(first)  # nothing is left of the form on the way
    assert set(model.graph.initializers) == set(first.graph.initializers)


@pytest.mark.parametrize("width", TRELLISES)
def test_no_bit_is_shifted_out(width: int) -> None:
    """OpenVINO divides instead of shifting, and rounds to nearest: 26 >> 4 is 2 there."""
    model, _, values = _model("product", width)
    stored = stored_weight(layer_of(model))
    assert stored is not None
    store_coded(model.graph, stored, values)
    assert ops(model).count("BitShift") == {3: 2, 4: 0, 5: 1}[width]
    assert not shifts_bits_out(model)


@pytest.mark.parametrize("width", TRELLISES)
@pytest.mark.parametrize("kind", ["product", "general"])
def test_a_path_is_recognised_whatever_the_names(kind: str, width: int) -> None:
    model, batch, values = _model(kind, width)
    stored = stored_weight(layer_of(model))
    assert stored is not None
    store_coded(model.graph, stored, values)
    answers = run(model, batch)
    scramble(model)
    assert np.array_equal(run(model, batch), answers)
    [product] = [entry for entry in model.graph if entry.op_type in ("MatMul", "Gemm")]
    again = stored_weight(product)
    assert again is not None
    assert again.form is TRELLISES[width]
    assert np.array_equal(again.unpack(), values.levels)


def test_other_paths_and_other_forms_are_refused() -> None:
    model, _, values = _model("product")
    before, stored = snapshot(model), stored_weight(layer_of(model))
    assert stored is not None
    with pytest.raises(GraphError, match="other integers"):
        store_coded(model.graph, stored, Coded(values.codes, values.multipliers[:, ::-1], 1))
    for narrow in (CAST, NIBBLES, NATIVE):
        with pytest.raises(GraphError, match="do not fit"):
            convert_stored(model.graph, stored, narrow)
    for form in TRELLISES.values():
        with pytest.raises(GraphError, match="do not fit"):
            convert_stored(model.graph, stored, form)
        with pytest.raises(GraphError, match="no path"):  # even small ones
            form.store(model.graph.clone(), "small", np.ones((4, 4), np.int8))
    assert snapshot(model) == before


def _spoilt(model: ir.Model, kind: str) -> None:
    """One thing of a stored path that is another."""
    graph = model.graph
    made = {entry.op_type: entry for entry in graph}  # those of the weight come last
    names = {"bits": "~b", "places": "~m", "levels": "~l", "numbers": "~n", "paths": "~o", "coefficients": "~c2"}
    names |= {"from": "~s", "to": "~e", "axes": "~x", "padding": "~z"}
    if kind in names:
        tensor = graph.initializers[names[kind]].const_value
        assert tensor is not None
        changed = tensor.numpy().copy()
        changed[-1] -= 1
        graph.initializers[names[kind]].const_value = ir.Tensor(changed, name=names[kind])
    elif kind == "perm":
        made["Transpose"].attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 3])
    elif kind == "value":
        one = ir.Value(name="one", const_value=ir.Tensor(np.uint8(PATH_BITS), name="one"))
        graph.register_initializer(one)
        made["Pad"].resize_inputs(3)
        made["Pad"].replace_input_with(2, one)
    elif kind == "mode":
        made["Pad"].attributes["mode"] = ir.AttrString("mode", "edge")
    elif kind in ("rows", "few"):  # of bytes, and of multipliers
        stored = made["Concat" if kind == "rows" else "Cast"].inputs[0]
        assert stored is not None
        assert stored.const_value is not None
        stored.const_value = ir.Tensor(stored.const_value.numpy()[..., :-1], name=stored.name)
    elif kind == "zero":
        zero = ir.Value(name="zero", const_value=ir.Tensor(np.uint8(1), name="zero"))
        graph.register_initializer(zero)
        made["MatMulInteger"].resize_inputs(3)
        made["MatMulInteger"].replace_input_with(2, zero)
    elif kind == "axis":
        made["Gather"].attributes["axis"] = ir.AttrInt64("axis", 1)
    elif kind == "before":  # not under the mask
        made["Slice"].replace_input_with(0, made["Concat"].inputs[0])
    else:
        inputs = made["Concat"].inputs
        columns = [inputs[place] for place in ((1, 0, 2, 3) if kind == "order" else (0, 2, 2, 3))]
        for place, column in enumerate(columns):
            made["Concat"].replace_input_with(place, column)


SPOILT = ["bits", "places", "levels", "numbers", "paths", "coefficients", "from", "to", "axes", "padding"]
SPOILT += ["perm", "value", "mode", "before", "order", "path", "rows", "few", "zero", "axis"]


@pytest.mark.parametrize("kind", SPOILT)
def test_what_only_looks_like_a_path_is_none(kind: str) -> None:
    model, _, values = _model("product")
    stored = stored_weight(layer_of(model))
    assert stored is not None
    store_coded(model.graph, stored, values)
    _spoilt(model, kind)
    assert layer_bits(model) == []


def _spoilt_planes(model: ir.Model, kind: str) -> None:
    """One thing of a path in planes that is another."""
    made = {entry.op_type: entry for entry in model.graph}  # of one operator, the last one
    names = {"shifts": "~h4", "mask": "~k4", "levels": "~l3r", "numbers": "~n3r", "paths": "~o3r", "product": "~c3r4"}
    if kind in names:
        value = model.graph.initializers[names[kind]]
        assert value.const_value is not None
        changed = value.const_value.numpy().copy()
        changed[-1] -= 1
        value.const_value = ir.Tensor(changed, name=value.name)
    elif kind == "direction":
        made["BitShift"].attributes["direction"] = ir.AttrString("direction", "LEFT")
    elif kind == "type":
        stored = made["BitwiseAnd"].inputs[0]
        assert stored is not None
        assert stored.const_value is not None
        stored.const_value = ir.Tensor(stored.const_value.numpy().astype(np.int32), name=stored.name)
        stored.dtype = ir.DataType.INT32
    elif kind == "once":  # the multipliers
        made["Concat"].resize_inputs(4)
    else:  # another multiplier
        made["Concat"].replace_input_with(4, made["Concat"].inputs[0])


@pytest.mark.parametrize(
    "kind", ["shifts", "mask", "levels", "numbers", "paths", "product", "direction", "type", "once", "other"]
)
def test_what_only_looks_like_planes_is_none(kind: str) -> None:
    model, _, values = _model("product", 3)
    stored = stored_weight(layer_of(model))
    assert stored is not None
    store_coded(model.graph, stored, values)
    assert [layer.bits for layer in layer_bits(model)] == [3.5]
    _spoilt_planes(model, kind)
    assert layer_bits(model) == []
