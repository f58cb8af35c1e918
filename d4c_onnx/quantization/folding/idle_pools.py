"""Average pools of single values: they do nothing in float, but between integers they would be one more rounding.

CLIP's ResNets put an average pool of the block's stride before every downsampling convolution, and in their first
stage that stride is 1.
"""

import onnx

from d4c_onnx.graph.index import GraphIndex, drop_unused, integers_attribute, is_padded


def skip_idle_pools(model: onnx.ModelProto) -> int:
    """Let the readers of each 1 x 1 AveragePool of stride 1 read its input, in place; returns how many pools."""
    graph = model.graph
    index = GraphIndex(graph)
    skipped = 0
    for pool in graph.node:
        idle = pool.op_type == "AveragePool" and all(
            integers_attribute(pool, name, 2) == [1, 1] for name in ("kernel_shape", "strides")
        )
        if not idle or pool.output[0] in index.outputs or is_padded(pool):
            continue
        for reader in index.consumers[pool.output[0]]:
            for position, name in enumerate(reader.input):
                if name == pool.output[0]:
                    reader.input[position] = pool.input[0]
        skipped += 1
    if skipped:
        drop_unused(graph)
    return skipped
