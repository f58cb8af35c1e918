"""Average pools of single values: they do nothing in float, but between integers they would be one more rounding.

CLIP's ResNets put an average pool of the block's stride before every downsampling convolution, and in their first
stage that stride is 1.
"""

import onnx_ir as ir

from d4c_onnx.graph.values import integers, is_padded, nodes_of
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _drop(model: ir.Model) -> Result:
    """Let the readers of each 1 x 1 AveragePool of stride 1 read its input."""
    count, refused = 0, []
    for pool in nodes_of(model.graph, "AveragePool"):
        if any(integers(pool, name, 2) != [1, 1] for name in ("kernel_shape", "strides")):
            continue
        if pool.outputs[0].is_graph_output() or is_padded(pool) or pool.inputs[0] is None:
            refused.append(Refusal(pool.name or "", "it pads, or makes an output of the graph"))
            continue
        pool.outputs[0].replace_all_uses_with(pool.inputs[0])
        count += 1
    return Result(count, tuple(refused))


DROP_IDENTITY_POOLS = Rewrite("identity pools dropped", "a float graph", _drop)
