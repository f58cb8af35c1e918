"""Rounding by reconstruction: region after region, from the input to the output, each on the data that reaches it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from d4c_onnx.graph.layers import channels_back, channels_first
from d4c_onnx.graph.values import constant, dims, is_constant, name_of
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.inside.statistics import fake_quantize
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import QuantizedWeight, RoundedWeights, Rounding, RoundingTask, WeightGrid
from d4c_onnx.quantization.rounding.bias_room import least_scales, with_room
from d4c_onnx.quantization.rounding.regions import Region, find_regions
from d4c_onnx.quantization.rounding.schedule import PUBLISHED, SHORT, AdaRoundSchedule


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """AdaRound, by layer in transformers and by bottleneck in ResNets. It needs torch.

    Attributes:
        schedule: how long it learns.
        uses_outputs: see `Rounding`.
    """

    schedule: AdaRoundSchedule
    uses_outputs: bool = False

    def round_weights(self, task: RoundingTask) -> RoundedWeights:
        """See `Rounding`. One region's input and output over all samples are in memory at a time."""
        # torch is loaded here and nowhere else in this room
        from d4c_onnx.quantization.rounding.adaround import reconstruct

        exact = SegmentedEncoder(task.model, task.reader, task.provider, task.threads)
        twin = fake_quantize(task.model, task.plan, task.ranges)
        rounded = SegmentedEncoder(twin, task.reader, task.provider, task.threads)
        regions = find_regions(rounded.graph, task.plan.layers)
        chosen: dict[str, QuantizedWeight] = {}
        least = least_scales(task)
        for number, region in enumerate(regions):
            weights = _weights(task, region, chosen)
            if not weights:  # layers before share them all
                task.on_step("round", number + 1, len(regions), {})
                continue
            read = {value for node in region.nodes for value in node.inputs if is_constant(value) and value is not None}
            fixed = {
                name_of(value): rounded.constant(name_of(value)) for value in read if name_of(value) not in weights
            }
            inputs, samples = _gather(rounded.advance([region.input]), region, region.input, task.plan)
            outputs, _ = _gather(exact.advance([region.output]), region, region.output, task.plan)
            made = reconstruct(
                region.nodes,
                fixed,
                weights,
                (region.input, inputs),
                (region.output, outputs),
                self.schedule,
                # the published batch counts images; rows come from all tokens of so many of them
                batch=max(1, self.schedule.batch * len(inputs) // samples),
                seed=number,
            )
            made = {
                name: with_room(weights[name][0], weight, WeightGrid(weight.num_bits), least.get(name))
                for name, weight in made.items()
            }
            chosen |= made
            for name, weight in made.items():
                _, shape, axis, _ = weights[name]
                rounded.replace(name, channels_back(weight.dequantize(), shape, axis))
            task.on_step("round", number + 1, len(regions), {})
        return RoundedWeights(chosen)


ADAROUND: Rounding = Reconstruction(SHORT)
ADAROUND_PUBLISHED: Rounding = Reconstruction(PUBLISHED)


def _weights(
    task: RoundingTask, region: Region, chosen: dict[str, QuantizedWeight]
) -> dict[str, tuple[np.ndarray, tuple[int, ...], int, int]]:
    """By initialiser: rows [channels, inputs], the initialiser's shape, its channel axis, bits; of those to round."""
    found = {}
    for layer in region.layers:
        if layer.weight not in chosen:
            value = task.model.graph.initializers[layer.weight]
            rows, bits = channels_first(constant(value), layer.channel_axis), task.plan.weight_bits[layer.weight]
            # gradients decide on one weight at a time: two fit beside each other whatever they decide
            bits = 7 if bits == 8 and task.plan.reduce_range else bits
            found[layer.weight] = rows, dims(value) or (), layer.channel_axis, bits
    return found


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
