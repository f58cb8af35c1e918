"""Rounding by reconstruction: region after region, from the input to the output, each on the data that reaches it."""

from collections.abc import Iterable

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.graph.layers import channels_back, channels_first
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.regions import Region, find_regions
from d4c_onnx.quantization.rounding import QuantizedWeight
from d4c_onnx.quantization.segments import SegmentedEncoder
from d4c_onnx.quantization.statistics import fake_quantize
from d4c_onnx.recipe import QuantizationSection


def reconstruct_weights(
    model: onnx.ModelProto,
    plan: Plan,
    ranges: dict[str, QuantParams],
    reader: CalibrationDataReader,
    section: QuantizationSection,
    *,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> dict[str, QuantizedWeight]:
    """Round every weight of the plan by AdaRound.

    One region's input and output over all samples are in memory at a time.

    Raises:
        GraphError: a region holds an operator that cannot be differentiated here.
    """
    # torch is loaded here and nowhere else in this room
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    twin = fake_quantize(model, plan, ranges)
    index = GraphIndex(twin.graph)
    regions = find_regions(twin.graph, plan.layers)
    exact = SegmentedEncoder(model, reader, provider, threads)
    rounded = SegmentedEncoder(twin, reader, provider, threads)
    chosen: dict[str, QuantizedWeight] = {}
    for number, region in enumerate(regions):
        inputs, samples = _gather(rounded.advance([region.input]), region, region.input, plan)
        outputs, _ = _gather(exact.advance([region.output]), region, region.output, plan)
        read = {name for node in region.nodes for name in node.input if name in index.initializers}
        weights = {
            layer.weight: (
                channels_first(index.constant(layer.weight), layer.channel_axis),
                tuple(index.initializers[layer.weight].dims),
                layer.channel_axis,
                plan.weight_bits[layer.weight],
            )
            for layer in region.layers
            if layer.weight not in chosen
        }
        made = reconstruct(
            region.nodes,
            {name: rounded.constant(name) for name in read - set(weights)},
            weights,
            (region.input, inputs),
            (region.output, outputs),
            steps=section.adaround_steps,
            learning_rate=section.adaround_learning_rate,
            # the published batch counts images; rows come from all tokens of so many of them
            batch=max(1, section.adaround_batch * len(inputs) // samples),
            seed=number,
        )
        chosen |= made
        for name, weight in made.items():
            _, shape, axis, _ = weights[name]
            rounded.replace(name, channels_back(weight.dequantize(), shape, axis))
        on_step("round", number + 1, len(regions), {})
    return chosen


def _gather(batches: Iterable[dict[str, np.ndarray]], region: Region, name: str, plan: Plan) -> tuple[np.ndarray, int]:
    """A value over all samples: images for convolutions, rows for products; and how many samples there were."""
    first = region.layers[0]
    parts, samples = [], 0
    for batch in batches:
        values = batch[name]
        samples += len(values)
        if first.op != "Conv":
            values = plan.observed(first.data, values).reshape(-1, values.shape[-1])
        parts.append(values)
    return np.concatenate(parts), samples
