"""Forms that exporters write out in small operators, put together again: exact up to float32 rounding."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from d4c_onnx.foreign.probe import Probe, shape_name, sizes_only
from d4c_onnx.graph.gates import quick_gelu_gates
from d4c_onnx.graph.model import with_shapes
from d4c_onnx.graph.values import (
    array,
    insert_before,
    is_op,
    maker,
    name_of,
    node,
    nodes_of,
    only_reader,
    set_constant,
    take_over,
)

_QUICK = 1.702


def drop_casts(model: ir.Model) -> None:
    """Casts of float32 to float32, which mixed-precision code leaves behind."""
    kinds = {entry.name: entry.type.tensor_type.elem_type for entry in with_shapes(model).graph.value_info}
    for cast in nodes_of(model.graph, "Cast"):
        source = cast.inputs[0]
        wanted = cast.attributes["to"].value
        if source is not None and wanted == ir.DataType.FLOAT and kinds.get(name_of(source)) == int(wanted):
            cast.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)


def fix_shapes(model: ir.Model, probe: Probe) -> None:
    """Reshapes get constant shapes: each entry a number, 0 (the same as before) or the one -1."""
    known: dict[ir.Value, bool] = {}
    open_ones = [
        entry
        for entry in nodes_of(model.graph, "Reshape")
        if array(entry.inputs[1]) is None and sizes_only(entry.inputs[1], known)
    ]
    data = [value for entry in open_ones for value in (entry.inputs[0], entry.outputs[0]) if value is not None]
    seen = probe.look((), data)
    for entry in open_ones:
        before, after = (
            [list(values[shape_name(name_of(value))]) for values in seen]
            for value in (entry.inputs[0], entry.outputs[0])
            if value is not None
        )
        shape = _fixed_shape(before, after)
        if shape is not None:
            name = f"{entry.name}_shape"
            entry.replace_input_with(1, set_constant(model.graph, name, np.array(shape, np.int64)))
            entry.attributes.pop("allowzero", None)


def _fixed_shape(before: list[list[int]], after: list[list[int]]) -> list[int] | None:
    """The entries of a shape that gives all of `after`, of inputs of the shapes `before`."""
    found: list[int] = []
    for axis in range(len(after[0])):
        sizes = [shape[axis] for shape in after]
        if len(set(sizes)) == 1:
            found.append(int(sizes[0]))
        elif all(axis < len(old) and old[axis] == size for old, size in zip(before, sizes, strict=True)):
            found.append(0)
        else:
            found.append(-1)
    return found if found.count(-1) <= 1 else None


def fuse_layer_norms(model: ir.Model) -> None:
    """(x - mean) / sqrt(mean((x - mean)^2) + e) * g + b, over the last axis, as LayerNormalization."""
    for divide in nodes_of(model.graph, "Div"):
        centred, root = (maker(value) for value in divide.inputs)
        source = _centred(centred)
        epsilon = _epsilon(root, divide.inputs[0]) if source is not None else None
        times = only_reader(divide.outputs[0])
        plus = only_reader(times.outputs[0]) if times is not None and is_op(times, "Mul") else None
        if epsilon is None or times is None or plus is None or not is_op(plus, "Add"):
            continue
        gain, shift = (_vector(entry) for entry in (times, plus))
        if gain is None or shift is None:
            continue
        attributes = {"axis": -1, "epsilon": epsilon}
        output = f"{name_of(plus.outputs[0])}_norm"
        fused = node("LayerNormalization", [source, gain, shift], output, attributes=attributes)
        insert_before(model.graph, plus, [fused])
        take_over(plus.outputs[0], fused.outputs[0])


def _centred(subtract: ir.Node | None) -> ir.Value | None:
    """x of x - mean(x) over the last axis."""
    if subtract is None or not is_op(subtract, "Sub"):
        return None
    mean = maker(subtract.inputs[1])
    same = mean is not None and _over_last(mean) and mean.inputs[0] is subtract.inputs[0]
    return subtract.inputs[0] if same else None


def _epsilon(root: ir.Node | None, centred: ir.Value | None) -> float | None:
    """e of sqrt(mean(c^2) + e)."""
    inside = maker(root.inputs[0]) if root is not None and is_op(root, "Sqrt") else None
    if inside is None or not is_op(inside, "Add"):
        return None
    for position in (0, 1):
        mean, epsilon = maker(inside.inputs[position]), array(inside.inputs[1 - position])
        square = maker(mean.inputs[0]) if mean is not None and _over_last(mean) else None
        if square is None or epsilon is None or epsilon.size != 1 or square.inputs[0] is not centred:
            continue
        power = array(square.inputs[1]) if is_op(square, "Pow") else None
        if (power is not None and (power == 2).all()) or (is_op(square, "Mul") and square.inputs[1] is centred):
            return float(epsilon.item())
    return None


def _over_last(mean: ir.Node) -> bool:
    axes = array(mean.inputs[1]) if is_op(mean, "ReduceMean") and len(mean.inputs) > 1 else None
    return axes is not None and axes.tolist() == [-1]


def _vector(entry: ir.Node) -> ir.Value | None:
    """The constant of one axis that a Mul or Add has beside its data."""
    for value in entry.inputs:
        found = array(value)
        if found is not None and found.ndim == 1 and value is not None:
            return value
    return None


def fuse_gelus(model: ir.Model) -> None:
    """x (1 + erf(x / sqrt(2))) / 2, or its approximation by tanh, as Gelu, in whichever order the factors stand."""
    for curve in nodes_of(model.graph, "Erf", "Tanh"):
        exact = is_op(curve, "Erf")
        hidden = _halved_root(maker(curve.inputs[0])) if exact else _cubic(maker(curve.inputs[0]))
        plus = only_reader(curve.outputs[0])
        if hidden is None or plus is None or not is_op(plus, "Add") or not _has(plus, 1.0):
            continue
        last = _last_product(plus, hidden)
        if last is not None:
            kind = {"approximate": "none" if exact else "tanh"}
            fused = node("Gelu", [hidden], f"{name_of(last.outputs[0])}_gelu", attributes=kind)
            insert_before(model.graph, last, [fused])
            take_over(last.outputs[0], fused.outputs[0])


def _halved_root(scaled: ir.Node | None) -> ir.Value | None:
    """x of x / sqrt(2)."""
    divided = is_op(scaled, "Div") and scaled is not None and _has(scaled, 2**0.5)
    times = is_op(scaled, "Mul") and scaled is not None and _has(scaled, 0.5**0.5)
    return _data(scaled) if divided or times else None


def _cubic(scaled: ir.Node | None) -> ir.Value | None:
    """x of sqrt(2 / pi) (x + 0.044715 x^3)."""
    if scaled is None or not is_op(scaled, "Mul") or not _has(scaled, (2 / np.pi) ** 0.5):
        return None
    plus = maker(_data(scaled))
    if plus is None or not is_op(plus, "Add"):
        return None
    for hidden, other in (tuple(plus.inputs), tuple(plus.inputs)[::-1]):
        times = maker(other)
        if hidden is None or times is None or not is_op(times, "Mul") or not _has(times, 0.044715):
            continue
        cube = maker(_data(times))
        if cube is not None and hidden in cube.inputs and _is_cube(cube, hidden):
            return hidden
    return None


def _is_cube(cube: ir.Node, hidden: ir.Value) -> bool:
    """Whether a node makes x^3, of x and a 3, or of x and x x."""
    power = array(cube.inputs[1]) if is_op(cube, "Pow") else None
    square = maker(next((value for value in cube.inputs if value is not hidden), None)) if is_op(cube, "Mul") else None
    squared = square is not None and is_op(square, "Mul") and all(value is hidden for value in square.inputs)
    return squared or (power is not None and bool((power == 3).all()))


def _data(entry: ir.Node | None) -> ir.Value | None:
    """The input that is no constant."""
    return next((value for value in entry.inputs if array(value) is None), None) if entry is not None else None


def _last_product(plus: ir.Node, hidden: ir.Value | None) -> ir.Node | None:
    """The Mul that ends x * (1 + erf) * 0.5."""
    first = only_reader(plus.outputs[0])
    if first is None or not is_op(first, "Mul"):
        return None
    other = next((value for value in first.inputs if value is not plus.outputs[0]), None)
    half = maker(other)
    if half is not None and is_op(half, "Mul") and _has(half, 0.5) and hidden in half.inputs:
        return first
    second = only_reader(first.outputs[0])
    if second is None or not is_op(second, "Mul"):
        return None
    if other is hidden and _has(second, 0.5):
        return second
    return second if _has(first, 0.5) and hidden in second.inputs else None


def _has(entry: ir.Node, number: float) -> bool:
    """Whether one of two inputs is this constant."""
    found = [values for values in map(array, entry.inputs) if values is not None and values.size == 1]
    return any(abs(values.item() - number) < 1e-4 for values in found)


def holds_quick_gelu(graph: ir.Graph) -> bool:
    """Whether a sigmoid gates what it is made of, scaled by 1.702."""
    return any(_has(gate, _QUICK) for gate in quick_gelu_gates(graph))
