"""An encoder in float16: weights and products; inputs and outputs stay as they are."""

import onnx
from onnx import TensorProto, helper
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.files import strip_notes
from d4c_onnx.graph.index import GraphIndex, drop_unused, replace_nodes
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.shapes import note_shapes
from d4c_onnx.quantization.deployment.attention import fuse_attention
from d4c_onnx.quantization.deployment.residuals import fuse_residuals
from d4c_onnx.quantization.deployment.targets import Target


def convert_to_half(model: onnx.ModelProto, form: Target) -> tuple[onnx.ModelProto, int]:
    """onnxruntime's own conversion, and the target's fused operators; `model` must not be used afterwards.

    What follows the final projection stays in float32: normalised in float16, embeddings were up to 4e-4 longer or
    shorter than 1. The fusions come last: ONNX infers no type behind onnxruntime's own operators, and the converter
    puts Casts around what has no float16 form by those types.

    Returns:
        The float16 graph, and how many attentions are one kernel.

    Raises:
        GraphError: the converter refused it.
    """
    tail = _cut_tail(model.graph)
    try:
        note_shapes(model)
        half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, disable_shape_infer=True)
    except Exception as error:  # the converter and onnx's shape inference raise kinds of their own
        raise GraphError(f"onnxruntime's float16 converter refused the graph ({str(error)[:300]}).") from error
    OnnxModel.graph_topological_sort(half.graph)  # it puts the input's Cast last, which ONNX forbids
    _join_tail(half.graph, tail)
    fused = fuse_attention(half) if form.fused_attention else 0
    if form.fused_residuals:
        fuse_residuals(half)
    strip_notes(half)
    return half, fused


def _cut_tail(graph: onnx.GraphProto) -> onnx.GraphProto:
    """Take off what follows the final projection, in place: nodes, constants and outputs; empty where nothing does.

    The projection's result becomes the graph's output.
    """
    index = GraphIndex(graph)
    ends = [layer.output for layer in weighted_layers(graph) if layer.last]
    queue, names = list(ends), set()
    while queue:
        for node in index.consumers.get(queue.pop(), []):
            if node.name not in names:
                names.add(node.name)
                queue.extend(node.output)
    nodes = [node for node in graph.node if node.name in names]
    inside = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input if name} - inside
    cut = sorted(read & set(ends))
    tail = onnx.GraphProto()
    whole = all(value.name in inside for value in graph.output)
    if not whole or not all(name in index.initializers or _is_shape(index, name) for name in read.difference(cut)):
        return tail
    tail.node.extend(nodes)
    tail.output.extend(graph.output)
    tail.initializer.extend(index.initializers[name] for name in sorted(read & index.initializers.keys()))
    del graph.output[:]
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in cut)
    replace_nodes(graph, [node for node in graph.node if node.name not in names])
    return tail


def _is_shape(index: GraphIndex, name: str) -> bool:
    """Whether a value is made of sizes: it is the same in float16."""
    if name in index.initializers:
        return index.initializers[name].data_type == TensorProto.INT64
    maker = index.producer.get(name)
    if maker is None or maker.op_type == "Shape":
        return maker is not None
    made = maker.op_type in ("Concat", "Gather", "Unsqueeze", "Slice")
    return made and all(_is_shape(index, part) for part in maker.input)


def _join_tail(graph: onnx.GraphProto, tail: onnx.GraphProto) -> None:
    if not tail.node:
        return
    known = {tensor.name for tensor in graph.initializer}
    own = {tensor.name: f"{tensor.name}_float32" for tensor in tail.initializer if tensor.name in known}
    for tensor in tail.initializer:
        tensor.name = own.get(tensor.name, tensor.name)
    for node in tail.node:
        for position, name in enumerate(node.input):
            node.input[position] = own.get(name, name)
    graph.initializer.extend(tail.initializer)
    graph.node.extend(tail.node)
    del graph.output[:]
    graph.output.extend(tail.output)
    drop_unused(graph)
