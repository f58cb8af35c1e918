"""The lowest operator set that expresses a graph, so that old runtimes load its file.

What an operator takes in which release is asked of onnx itself: its checker knows the number of inputs and the names of
attributes, its shape inference knows types. `graph.model.raise_opset` is the way up.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from d4c_onnx.graph.model import opset_of, shell_of, to_proto
from d4c_onnx.graph.values import CONTRIB, STANDARD

LEAST = 17  # LayerNormalization came with it; what our operators meant below it was never looked at
_IR_VERSIONS = ((21, 10), (19, 9), (0, 8))  # from which opset on, which IR version; onnxruntime 1.16 ends at 9


def lower_opset(model: ir.Model) -> int:
    """Relabel a graph with the lowest opset from `LEAST` on that expresses it, and that opset's IR, in place.

    No node changes: up to 23 the operators that our graphs hold only gained types, inputs and attributes, and a graph
    that uses one of those stays at the opset that brought it. A domain without nodes is no longer declared.

    Returns:
        The opset.
    """
    if not any(node.domain == CONTRIB for node in model.graph.all_nodes()):
        model.graph.opset_imports.pop(CONTRIB, None)
    shell, highest = shell_of(to_proto(model)), opset_of(model)
    version = next((lower for lower in range(LEAST, highest) if _expresses(shell, lower)), highest)
    model.graph.opset_imports[""] = version
    model.ir_version = min(model.ir_version, next(least for since, least in _IR_VERSIONS if version >= since))
    return version


def _expresses(shell: onnx.ModelProto, version: int) -> bool:
    """Whether every node is one of that opset, with inputs, attributes and types that it knows."""
    for entry in shell.opset_import:
        if entry.domain in STANDARD:
            entry.version = version
    try:
        onnx.checker.check_model(shell)
        onnx.shape_inference.infer_shapes(shell, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True
