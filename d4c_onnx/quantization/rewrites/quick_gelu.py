"""QuickGELU without the constant in its sigmoid: exact.

With a = 1.702, h sigmoid(a h) = z sigmoid(z) / a for z = a h: the layer before takes a, the layer behind 1 / a, and a
pass over the widest values of a block is gone. What is left is SiLU, for which onnxruntime has one kernel where the
processor has AVX-512.
"""

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.gates import quick_gelu_gates
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.values import constant, is_constant, name_of, only_reader
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.mappings import apply_scale, find_mappings
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _fold(model: ir.Model) -> Result:
    """A QuickGELU whose constant is a vector (a stress variant's) stays; so does one without two layers of its own."""
    count, refused = 0, []
    mapped = {found.absorber.gate: found for found in find_mappings(model.graph, weighted_layers(model.graph))}
    for gate in quick_gelu_gates(model.graph):
        mapping = mapped.get(gate)
        if mapping is None:
            refused.append(Refusal(gate.name or "", "there are not two linear layers of its own around it"))
            continue
        hidden, scale = sorted(gate.inputs, key=is_constant)
        values, sigmoid = constant(scale), only_reader(gate.outputs[0])
        if sigmoid is None or hidden is None or values.size != 1 or not values.item() > 0:
            refused.append(Refusal(gate.name or "", f"{name_of(gate.outputs[0])} is not scaled by one positive number"))
            continue
        apply_scale(model.graph, mapping, np.full(mapping.width, 1 / values.item(), np.float32))
        sigmoid.replace_input_with(0, hidden)
        count += 1
    return Result(count, tuple(refused))


FOLD_QUICK_GELU = Rewrite("QuickGELU made SiLU", "a float graph, before its weights are rounded", _fold)
