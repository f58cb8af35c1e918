"""Zero points of symmetric weights that products read, left out.

ONNX takes an absent one as 0. Given one zero per channel, onnxruntime's product corrects each channel for it.
"""

import onnx_ir as ir

from d4c_onnx.graph.stored import stored_weight
from d4c_onnx.graph.values import array, is_op, nodes_of, readers
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _omit(model: ir.Model) -> Result:
    count = 0
    for product in nodes_of(model.graph, "MatMul"):
        stored = stored_weight(product)
        found = stored.dequantize if stored is not None else None
        if found is None or not is_op(found, "DequantizeLinear") or len(found.inputs) < 3:
            continue
        zero = array(found.inputs[2])
        if zero is not None and not zero.any() and all(is_op(reader, "MatMul") for reader in readers(found.outputs[0])):
            found.resize_inputs(2)
            count += 1
    return Result(count)


OMIT_ZERO_POINTS = Rewrite("zero points of products' weights left out", "a QDQ graph of symmetric weights", _omit)
