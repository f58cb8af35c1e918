"""Narrow activations confined to their grid: a 6-bit scale alone would let uint8 run on to 255."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.values import insert_before, name_of, node, nodes_of, set_constant


def clip_activations(model: ir.Model, ranges: Mapping[str, QuantParams]) -> int:
    """Put a Clip before each QuantizeLinear whose value has a range narrower than 8 bits, in place; how many."""
    narrow = {name: params for name, params in ranges.items() if params.num_bits < 8}
    count = 0
    for quantize in nodes_of(model.graph, "QuantizeLinear"):
        value = quantize.inputs[0]
        if value is None or name_of(value) not in narrow:
            continue
        name = name_of(value)
        low, high = (
            set_constant(model.graph, f"{name}_{suffix}", np.array(limit, np.float32))
            for suffix, limit in zip(("low", "high"), narrow[name].range, strict=True)
        )
        clip = node("Clip", [value, low, high], f"{name}_clipped", name=f"{name}_clip")
        insert_before(model.graph, quantize, [clip])
        quantize.replace_input_with(0, clip.outputs[0])
        count += 1
    return count
