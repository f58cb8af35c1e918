"""GELU apart from the bias before it.

Release 1.32 of onnxruntime computes GELU alone in one pass where the processor has AVX-512; its kernel for both
(BiasGelu) takes three, and a buffer of its own. The fusion asks for a bias of one axis, so these get two: [1, width]
adds the same. GELU by tanh is left alone: fused with its bias (FastGelu) it is as fast or faster.
"""

import onnx_ir as ir

from d4c_onnx.graph.values import array, attribute, is_op, maker, name_of, nodes_of, only_reader, set_constant
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _separate(model: ir.Model) -> Result:
    count, refused = 0, []
    for gelu in nodes_of(model.graph, "Gelu"):
        add = maker(gelu.inputs[0])
        if attribute(gelu, "approximate", "none") != "none":
            refused.append(Refusal(gelu.name or "", "GELU by tanh is as fast with its bias"))
            continue
        if add is None or not is_op(add, "Add") or only_reader(add.outputs[0]) is None:
            continue
        for position, value in enumerate(add.inputs):
            bias = array(value)
            if bias is not None and bias.ndim == 1 and value is not None:
                own = set_constant(model.graph, f"{name_of(value)}_apart", bias.reshape(1, -1))
                add.replace_input_with(position, own)
                count += 1
    return Result(count, tuple(refused))


SEPARATE_GELU = Rewrite("GELU kept apart from its bias", "GELU as one operator", _separate)
