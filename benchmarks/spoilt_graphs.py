"""ONNX graphs spoilt in ways that bytes drawn at random do not find: each a change of a valid file into another one.

`WRONG` are those after which no answer is right: a command that runs the graph and ends with exit code 0 has failed.
"""

import random
from collections.abc import Callable

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Change = Callable[[ModelProto, random.Random], None]


def _input_renamed(model: ModelProto, draw: random.Random) -> None:
    old, new = model.graph.input[0].name, draw.choice(("x", "", "input ids", "\x1b[31m", "é" * 200, "../../x"))
    model.graph.input[0].name = new
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _input_added(model: ModelProto, draw: random.Random) -> None:
    name = "attention_mask"
    model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", draw.choice((1, "n"))]))
    if draw.random() < 0.5:  # and it is needed
        model.graph.node.append(helper.make_node("Cast", [name], ["mask"], to=TensorProto.FLOAT))
        model.graph.output.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1]))


def _batch_fixed(model: ModelProto, draw: random.Random) -> None:
    size = draw.choice((1, 2, 7))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size


def _size_changed(model: ModelProto, draw: random.Random) -> None:
    axes = model.graph.input[0].type.tensor_type.shape.dim
    axes[draw.randrange(1, len(axes))].dim_value = draw.choice((1, 5, 2**40))


def _size_below_nothing(model: ModelProto, draw: random.Random) -> None:
    axes = model.graph.input[0].type.tensor_type.shape.dim
    axes[draw.randrange(len(axes))].dim_value = draw.choice((-1, -(2**40)))  # runtimes read it as any size


def _axis_lost(model: ModelProto, draw: random.Random) -> None:
    axes = draw.choice((model.graph.input[0], model.graph.output[0])).type.tensor_type.shape.dim
    del axes[draw.randrange(len(axes)) :]


def _type_changed(model: ModelProto, draw: random.Random) -> None:
    kinds = (TensorProto.DOUBLE, TensorProto.STRING, TensorProto.FLOAT16, TensorProto.UINT8, 0)
    model.graph.input[0].type.tensor_type.elem_type = draw.choice(kinds)


def _output_renamed(model: ModelProto, draw: random.Random) -> None:
    old, new = model.graph.output[0].name, draw.choice(("y", "", "x" * 5000))
    model.graph.output[0].name = new
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name == old:
                node.output[place] = new


def _output_added(model: ModelProto, draw: random.Random) -> None:
    names = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.append(helper.make_tensor_value_info(draw.choice(names), TensorProto.FLOAT, None))


def _not_a_number(model: ModelProto, draw: random.Random) -> None:
    _put(model, draw, float("nan"))


def _infinite(model: ModelProto, draw: random.Random) -> None:
    _put(model, draw, draw.choice((float("inf"), float("-inf"), 3e38)))


def _put(model: ModelProto, draw: random.Random, number: float) -> None:
    tensor = draw.choice([entry for entry in model.graph.initializer if entry.data_type == TensorProto.FLOAT])
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[: draw.choice((1, values.size))] = number
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _node_names_doubled(model: ModelProto, draw: random.Random) -> None:
    name = draw.choice(("same", "", "\x1b[2J", "x" * 10_000))
    for node in model.graph.node:
        node.name = name


def _value_made_twice(model: ModelProto, draw: random.Random) -> None:
    one, other = (draw.choice(model.graph.node) for _ in range(2))
    other.output[0] = one.output[0]


def _initializers_doubled(model: ModelProto, draw: random.Random) -> None:
    model.graph.initializer.append(draw.choice(model.graph.initializer))


def _initializer_cut(model: ModelProto, draw: random.Random) -> None:
    tensor = draw.choice(model.graph.initializer)
    tensor.raw_data = tensor.raw_data[: draw.randrange(max(1, len(tensor.raw_data)))]


def _initializer_sized(model: ModelProto, draw: random.Random) -> None:
    tensor = draw.choice(model.graph.initializer)
    del tensor.dims[:]
    tensor.dims.extend(draw.choice(((2**40,), (-1,), (0,), (2**31, 2**31), (1,) * 50)))


def _weights_elsewhere(model: ModelProto, draw: random.Random) -> None:
    tensor = draw.choice(model.graph.initializer)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {
        "location": draw.choice(
            ("../set/held_out.npy", "/etc/passwd", "none.data", "", ".", "golden", "manifest.json")
        ),
        "offset": draw.choice(("0", "-1", "x", "9" * 30)),
        "length": draw.choice(("4", "-4", "9" * 30)),
    }.items():
        tensor.external_data.add(key=key, value=value)


def _node_dropped(model: ModelProto, draw: random.Random) -> None:
    del model.graph.node[draw.randrange(len(model.graph.node))]


def _nodes_turned(model: ModelProto, draw: random.Random) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _operator_changed(model: ModelProto, draw: random.Random) -> None:
    node = draw.choice(model.graph.node)
    node.op_type = draw.choice(("Nothing", "", "Relu", "If", "Loop", "QLinearConv", "Gather"))
    node.domain = draw.choice(("", "", "com.microsoft", "x"))


def _attribute_changed(model: ModelProto, draw: random.Random) -> None:
    node = draw.choice([node for node in model.graph.node if node.attribute] or list(model.graph.node))
    name = node.attribute[0].name if node.attribute else "axis"
    del node.attribute[:]
    values: tuple[object, ...] = (-(2**63), 2**62, 99, 0.5, "x", [1, 2, 3], [], b"\xff")
    value = draw.choice(values)
    if value != []:
        node.attribute.append(helper.make_attribute(name, value))


def _input_moved(model: ModelProto, draw: random.Random) -> None:
    node = draw.choice([node for node in model.graph.node if node.input])
    names = [name for node in model.graph.node for name in node.output] + [one.name for one in model.graph.initializer]
    node.input[draw.randrange(len(node.input))] = draw.choice((*names, "", "nowhere"))


def _circle(model: ModelProto, draw: random.Random) -> None:
    node = draw.choice([node for node in model.graph.node if node.input])
    node.input[0] = node.output[0]


def _versions(model: ModelProto, draw: random.Random) -> None:
    model.ir_version = draw.choice((0, 3, 8, 99, 2**40))
    model.opset_import[0].version = draw.choice((0, 1, 7, 18, 99, 2**40, -1))


def _nested(model: ModelProto, draw: random.Random) -> None:
    inner = helper.make_graph([], "inner", [], [])
    for _ in range(draw.choice((2, 25))):
        node = NodeProto(op_type="If", input=["nowhere"], output=["v"])
        node.attribute.append(helper.make_attribute("then_branch", inner))
        inner = helper.make_graph([node], "outer", [], [])
    model.graph.node.extend(inner.node)


def _emptied(model: ModelProto, draw: random.Random) -> None:
    model.graph.ClearField(draw.choice(("node", "initializer", "input", "output")))


WRONG: dict[str, Change] = {
    "input renamed": _input_renamed,
    "input added": _input_added,
    "batch fixed": _batch_fixed,
    "size changed": _size_changed,
    "type changed": _type_changed,
    "output renamed": _output_renamed,
    "output added": _output_added,
    "not a number": _not_a_number,
    "emptied": _emptied,
}
CHANGES: dict[str, Change] = WRONG | {
    "axis lost": _axis_lost,
    "size below nothing": _size_below_nothing,
    "infinite": _infinite,
    "node names doubled": _node_names_doubled,
    "value made twice": _value_made_twice,
    "initializers doubled": _initializers_doubled,
    "initializer cut": _initializer_cut,
    "initializer sized": _initializer_sized,
    "weights elsewhere": _weights_elsewhere,
    "node dropped": _node_dropped,
    "nodes turned": _nodes_turned,
    "operator changed": _operator_changed,
    "attribute changed": _attribute_changed,
    "input moved": _input_moved,
    "circle": _circle,
    "versions": _versions,
    "nested": _nested,
}


def changed(content: bytes, name: str, draw: random.Random) -> bytes:
    """A graph's file with one of `CHANGES` made to it."""
    model = onnx.load_model_from_string(content)
    CHANGES[name](model, draw)
    return model.SerializeToString()
