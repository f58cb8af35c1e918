"""An encoder in float16: weights and products; inputs and outputs stay as they are. With the rewrites around that."""

import onnx
import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import clear_notes, drop_unused, model_of, with_shapes
from d4c_onnx.graph.values import is_constant, is_op, name_of, readers, values_by_name
from d4c_onnx.manifest import RewriteRecord
from d4c_onnx.quantization.rewrites.batch_norm import FOLD_BATCH_NORMS
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.identity_pools import DROP_IDENTITY_POOLS
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.residuals import FUSE_RESIDUALS
from d4c_onnx.quantization.rewrites.rewrite import apply_all
from d4c_onnx.quantization.rewrites.transposed_products import MOVE_TRANSPOSES

# Around the conversion. Batch norms and pools of a graph whose weights are rounded were dealt with before that: the
# integers belong to what is there now.
_BEFORE, _BEFORE_ROUNDED = (FOLD_BATCH_NORMS, DROP_IDENTITY_POOLS, COMPUTE_POOLED_ROW), (COMPUTE_POOLED_ROW,)
_AFTER = (FUSE_ATTENTION, FUSE_RESIDUALS, MOVE_TRANSPOSES)


def in_float16(model: ir.Model, *, rounded: bool = False) -> tuple[ir.Model, tuple[RewriteRecord, ...]]:
    """The float16 graph of a float one, as it is served; `model` must not be used afterwards.

    Args:
        rounded: its weights are on their grids already.

    Raises:
        GraphError: onnxruntime's converter refused it.
    """
    before = apply_all(_BEFORE_ROUNDED if rounded else _BEFORE, model)
    converted = convert_to_float16(model)
    after = apply_all(_AFTER, converted)
    clear_notes(converted)
    return converted, (*before, *after)


def convert_to_float16(model: ir.Model) -> ir.Model:
    """onnxruntime's own conversion; `model` must not be used afterwards.

    What follows the final projection stays in float32: normalised in float16, embeddings were up to 4e-4 longer or
    shorter than 1. Fusions into onnxruntime's own operators come later: ONNX infers no type behind those, and the
    converter puts Casts around what has no float16 form by those types.

    Returns:
        The float16 graph, with the shapes of its values noted.

    Raises:
        GraphError: the converter refused it.
    """
    tail = _cut_tail(model)
    try:
        proto = with_shapes(model)
        for tensor in model.graph.initializers.values():
            tensor.const_value = None  # its weights are in `proto` now
        found: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True, disable_shape_infer=True)
    except Exception as error:  # the converter and onnx's shape inference raise kinds of their own
        raise GraphError(f"onnxruntime's float16 converter refused the graph ({str(error)[:300]}).") from error
    OnnxModel.graph_topological_sort(found.graph)  # it puts the input's Cast last, which ONNX forbids
    converted = model_of(found)
    if tail is not None:
        _join_tail(converted, tail)
    return converted


def _cut_tail(model: ir.Model) -> ir.Graph | None:
    """Take off what follows the final projection, in place; None, and nothing changed, where nothing does.

    The projection's result becomes the graph's output. The tail's inputs have the names of what it reads.
    """
    graph = model.graph
    values = values_by_name(graph)
    ends = [values[layer.output] for layer in weighted_layers(graph) if layer.last]
    queue = list(ends)
    nodes: dict[ir.Node, None] = {}
    while queue:
        for reader in readers(queue.pop()):
            if reader not in nodes:
                nodes[reader] = None
                queue.extend(reader.outputs)
    ordered = [entry for entry in graph if entry in nodes]
    inside = {value for entry in ordered for value in entry.outputs}
    read = list(dict.fromkeys(value for entry in ordered for value in entry.inputs if value is not None))
    given = [value for value in read if value not in inside and not is_constant(value)]
    cut = [value for value in given if value in ends]
    if not all(value in inside for value in graph.outputs):
        return None
    if not all(_is_shape(value) for value in given if value not in ends):
        return None
    constants = [value for value in read if is_constant(value)]
    view = ir.GraphView(given, graph.outputs, nodes=ordered, initializers=constants, opset_imports=graph.opset_imports)
    tail = view.clone()
    graph.outputs.clear()
    for value in cut:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.extend(cut)
    # shapes that the tail needs are outputs meanwhile, so that nothing drops them
    graph.outputs.extend(value for value in given if value not in ends)
    graph.remove(ordered, safe=True)
    drop_unused(model)
    return tail


def _is_shape(value: ir.Value) -> bool:
    """Whether a value is made of sizes: it is the same in float16."""
    made = value.producer()
    if is_constant(value):
        return value.dtype == ir.DataType.INT64
    if made is None or is_op(made, "Shape"):
        return made is not None
    parts = [part for part in made.inputs if part is not None]
    return is_op(made, "Concat", "Gather", "Unsqueeze", "Slice") and all(_is_shape(part) for part in parts)


def _join_tail(model: ir.Model, tail: ir.Graph) -> None:
    graph = model.graph
    known = values_by_name(graph)
    kept = list(tail.outputs)
    for name, value in list(tail.initializers.items()):
        tail.initializers.pop(name)
        value.name = f"{name}_float32" if name in known else name
        graph.register_initializer(value)
    for value in list(tail.inputs):
        value.replace_all_uses_with(known[name_of(value)])
    nodes = list(tail)
    tail.outputs.clear()
    tail.inputs.clear()
    tail.remove(nodes)
    graph.outputs.clear()
    graph.extend(nodes)
    graph.outputs.extend(kept)
    drop_unused(model)
