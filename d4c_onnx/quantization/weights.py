"""All weights of an encoder onto their grids, and the biases that take up the mean of what rounding changed."""

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.index import GraphIndex, set_initializer
from d4c_onnx.graph.layers import WeightedLayer, added_constant, channels_back, channels_first
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.corrections import correct_affine, correct_mean
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.reconstruction import reconstruct_weights
from d4c_onnx.quantization.rounding import InputMoments, QuantizedWeight, Rounding, make_rounding
from d4c_onnx.quantization.statistics import InputStatistics, StatisticsCollector
from d4c_onnx.recipe import QuantizationSection


@dataclass(slots=True)
class RoundedWeights:
    """What was chosen: per weight initialiser its grid, per bias initialiser its corrected float values."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)


def round_weights(
    model: onnx.ModelProto,
    plan: Plan,
    ranges: dict[str, QuantParams],
    reader: CalibrationDataReader,
    section: QuantizationSection,
    *,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> RoundedWeights:
    """Round every weight of the plan by the recipe's method; correct biases in closed form where the recipe says so.

    Args:
        model: the float encoder; not changed.
        ranges: of the activations, for x^.
        reader: rewindable calibration data.
    """
    if section.rounding_method == "adaround":
        return RoundedWeights(
            reconstruct_weights(
                model, plan, ranges, reader, section, provider=provider, threads=threads, on_step=on_step
            )
        )
    rounding = make_rounding(section.rounding_method, section.damping)
    index = GraphIndex(model.graph)
    result = RoundedWeights()
    corrects = section.correction != "none"
    if not rounding.uses_data and not corrects:
        for number, layer in enumerate(plan.layers):
            _round_layer(index, layer, plan, rounding, [], result)
            on_step("round", number + 1, len(plan.layers), {})
        return result
    collector = StatisticsCollector(model, plan, ranges, reader, provider, threads)
    stages = _stages(plan) if rounding.sequential else [list(plan.layers)]
    for number, stage in enumerate(stages):
        statistics = collector.collect(stage)
        moments: dict[tuple[str, bool], list[InputMoments]] = {}
        for layer in stage:
            found = statistics[layer.data]
            fresh = layer.weight not in result.weights
            if fresh:
                key = layer.data, corrects and bias_name(index, layer) is not None
                if key not in moments:
                    moments[key] = _moments(found, key[1])
                _round_layer(index, layer, plan, rounding, moments[key], result)
            if corrects:  # a weight that two layers share has its gain from the first; every bias is its layer's own
                _correct(index, layer, found, fresh and section.correction == "affine", result)
            shape = tuple(index.initializers[layer.weight].dims)
            values = channels_back(result.weights[layer.weight].dequantize(), shape, layer.channel_axis)
            collector.replace(layer.weight, values)
            bias = bias_name(index, layer)
            if bias in result.biases:
                collector.replace(str(bias), result.biases[str(bias)])
        on_step("round", number + 1, len(stages), {})
    return result


def bias_name(index: GraphIndex, layer: WeightedLayer) -> str | None:
    """The initialiser that a layer's output gets added: a Conv's or Gemm's third input, or the Add after a MatMul."""
    node = index.producer[layer.output]
    if layer.op != "MatMul":
        name = node.input[2] if len(node.input) > 2 else ""
        return name if name in index.initializers else None
    found = added_constant(index, layer.output)
    return found[1] if found is not None and len(index.consumers[found[1]]) == 1 else None


def _stages(plan: Plan) -> list[list[WeightedLayer]]:
    """Layers that read the same value are rounded together, in graph order."""
    stages: dict[str, list[WeightedLayer]] = {}
    for layer in plan.layers:
        stages.setdefault(layer.data, []).append(layer)
    return list(stages.values())


def _round_layer(
    index: GraphIndex,
    layer: WeightedLayer,
    plan: Plan,
    rounding: Rounding,
    moments: list[InputMoments],
    result: RoundedWeights,
) -> None:
    rows = _rows(index, layer)
    bits = plan.weight_bits[layer.weight]
    if not rounding.uses_data:
        result.weights[layer.weight] = rounding.round(rows, bits)
        return
    parts = [rounding.round(part, bits, own) for part, own in zip(np.split(rows, len(moments)), moments, strict=True)]
    result.weights[layer.weight] = QuantizedWeight(
        np.concatenate([part.integers for part in parts]), np.concatenate([part.scale for part in parts]), bits
    )


def _moments(found: InputStatistics, free_mean: bool) -> list[InputMoments]:
    """Per group; centred where a bias will take up the mean, which the weights then need not carry."""
    return [InputMoments(gram, cross) for gram, cross in zip(*found.moments(free_mean), strict=True)]


def _correct(
    index: GraphIndex, layer: WeightedLayer, found: InputStatistics, affine: bool, result: RoundedWeights
) -> None:
    name = bias_name(index, layer)
    bias = index.array(name) if name else None
    rows = _rows(index, layer)
    if affine:
        result.weights[layer.weight], bias = correct_affine(rows, result.weights[layer.weight], bias, found)
    elif bias is not None:
        bias = correct_mean(rows, result.weights[layer.weight], bias, found)
    if name and bias is not None:
        result.biases[name] = bias


def _rows(index: GraphIndex, layer: WeightedLayer) -> np.ndarray:
    values = index.constant(layer.weight)
    return channels_first(np.asarray(values, np.float32), layer.channel_axis)


def place_biases(model: onnx.ModelProto, biases: dict[str, np.ndarray]) -> None:
    """Write corrected biases into a float encoder, in place."""
    for name, values in biases.items():
        set_initializer(model.graph, name, values)
