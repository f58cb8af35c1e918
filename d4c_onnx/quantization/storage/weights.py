"""Weights of a finished graph into the form that its target wants (`graph.forms` has them)."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.forms import INT8, Form
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.graph.model import opset_of, raise_opset
from d4c_onnx.graph.stored import convert_stored, store_coded, stored_weight
from d4c_onnx.graph.trellis_form import TRELLISES
from d4c_onnx.graph.values import array, constant, dims, maker, name_of, node, prepend, set_constant
from d4c_onnx.quantization.rounding.base import QuantizedWeight, WeightGrid
from d4c_onnx.quantization.rounding.nearest import NearestRounding

BLOCK = 64  # values of a float weight on 8 bits that share a scale
_FROM_INT4 = 21  # the opset that brought the type


def stored_of(model: ir.Model, products: Collection[str]) -> dict[str, ir.Value]:
    """The initialisers that the named products multiply with, by the product's name."""
    found = ((product.name or "", stored_weight(product)) for product in model.graph if product.name in products)
    return {name: stored.initializer for name, stored in found if stored is not None}


def store_narrow(model: ir.Model, held: Mapping[ir.Value, tuple[QuantizedWeight, int]], form: Form) -> int:
    """Store int8 weights in 3 to 5 bits, in place; returns how many initialisers.

    Args:
        held: what initialisers hold: the weight, and the axis of its channels. Those of a wider grid stay; what is not
            named here, because a rewrite made it, lies in [-8, 7].
        form: of 4 bits.

    Raises:
        GraphError: a weight does not fit 4 bits.
    """
    narrow = {}
    for product in model.graph:
        stored = stored_weight(product)
        if stored is None or stored.form is not INT8:
            continue
        weight, axis = held.get(stored.initializer, (None, 0))
        if weight is None or weight.num_bits <= 5:
            narrow[stored.initializer] = (
                stored,
                None if weight is None or weight.path is None else replace(weight.path, axis=axis),
            )
    # what unpacks a weight is put in front of everything: the last one first, so that they come in graph order
    for stored, coded in reversed(narrow.values()):
        if coded is None:
            convert_stored(model.graph, stored, form)
        else:
            store_coded(model.graph, stored, coded)
    used = [form if coded is None else TRELLISES[coded.num_bits] for _, coded in narrow.values()]
    opset = max((own.opset for own in used), default=0)
    if opset_of(model) < opset:
        raise_opset(model, opset)
    return len(narrow)


def store_float16(model: ir.Model, names: Collection[str]) -> None:
    """Store float32 initialisers in 16 bits, in place; a Cast that onnxruntime folds when the file is loaded.

    What float16 cannot hold stays as it is.
    """
    for name in names:
        values = array(model.graph.initializers.get(name))
        if values is not None and np.abs(values).max(initial=0) <= np.finfo(np.float16).max:
            stored = set_constant(model.graph, f"{name}_float16", values.astype(np.float16))
            cast = node("Cast", [stored], f"{name}_float", name=f"{name}_cast", attributes={"to": ir.DataType.FLOAT})
            _exchange(model.graph, name, [cast])


def store_blocks(model: ir.Model, names: Collection[str]) -> None:
    """Store float32 initialisers in 8 bits and a scale for every 64 values, in place; folded when the file is loaded.

    int8 [blocks, 64] -> Cast -> Mul by float32 [blocks, 1] -> Reshape. What runs is the float product. What does not
    fall into blocks has 16 bits.
    """
    graph = model.graph
    for name in names:
        values = constant(graph.initializers[name])
        if values.size % BLOCK:
            store_float16(model, [name])
            continue
        rounded = NearestRounding().round(values.reshape(-1, BLOCK).astype(np.float32), WeightGrid(8))
        stored = set_constant(graph, f"{name}_blocks", rounded.integers)
        scale = set_constant(graph, f"{name}_scale", rounded.scale[:, None])
        shape = set_constant(graph, f"{name}_shape", np.array(values.shape, np.int64))
        nodes = _scaled(name, stored, scale)
        nodes.append(node("Reshape", [nodes[-1].outputs[0], shape], f"{name}_float", name=f"{name}_reshape"))
        _exchange(graph, name, nodes)


def _scaled(name: str, integers: ir.Value, scale: ir.Value) -> list[ir.Node]:
    """integers -> Cast to float32 -> Mul."""
    cast = node("Cast", [integers], f"{name}_integers", attributes={"to": ir.DataType.FLOAT})
    return [cast, node("Mul", [cast.outputs[0], scale], f"{name}_scaled", name=f"{name}_dequantize")]


def _exchange(graph: ir.Graph, name: str, nodes: list[ir.Node]) -> None:
    """Let the readers of an initialiser read what the last of the nodes gives."""
    value = graph.initializers.pop(name)
    value.replace_all_uses_with(nodes[-1].outputs[0])
    prepend(graph, nodes)


def store_scaled(model: ir.Model, weights: Mapping[str, tuple[QuantizedWeight, int]]) -> None:
    """Store float initialisers as integers that are unpacked when the file is loaded, in place.

    integers -> Cast to float32 -> Mul by one scale a channel (-> Cast to float16, where the initialiser was that):
    standard operators of constants, which onnxruntime folds. What runs is the float graph. Where groups share
    multipliers the integers lie in the form of a trellis.

    Args:
        weights: per initialiser its grid, and the axis of its channels; 4-bit ones are stored in INT4.
    """
    graph = model.graph
    fresh: list[ir.Node] = []
    for name, (weight, axis) in weights.items():
        value = graph.initializers[name]
        shape, kept = dims(value) or (), value.dtype
        if weight.path is None:
            integers = channels_back(weight.integers, shape, axis)
            packed = integers.astype(ml_dtypes.int4) if weight.num_bits == 4 else integers
            stored = set_constant(graph, f"{name}_quantized", packed)
        else:
            form = TRELLISES[weight.path.num_bits]
            stored = form.store_coded(graph, f"{name}_quantized", replace(weight.path, axis=axis))
        line = [-1 if position == axis else 1 for position in range(len(shape))]
        scale = set_constant(graph, f"{name}_scale", weight.scale.reshape(line).astype(np.float32))
        nodes = _scaled(name, stored, scale)
        if kept not in (None, ir.DataType.FLOAT):
            last = nodes[-1].outputs[0]
            nodes.append(node("Cast", [last], f"{name}_real", name=f"{name}_cast", attributes={"to": kept}))
        value.replace_all_uses_with(nodes[-1].outputs[0])
        graph.initializers.pop(name_of(value))
        made = maker(stored)
        if made is None:
            fresh += nodes
        else:
            graph.insert_after(made, nodes)
    prepend(graph, fresh)
    if any(weight.num_bits == 4 and weight.path is None for weight, _ in weights.values()):
        raise_opset(model, _FROM_INT4)
