"""Rounding layer by layer: all weights of an encoder, and the biases that take up the mean of what rounding changed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.layers import WeightedLayer, added_constant, channels_back, channels_first
from d4c_onnx.graph.values import array, constant, dims, is_constant, name_of, nodes_by_name, readers
from d4c_onnx.quantization.inside.statistics import InputStatistics, StatisticsCollector
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import (
    InputMoments,
    LayerRounding,
    QuantizedWeight,
    RoundedWeights,
    Rounding,
    RoundingTask,
    WeightGrid,
    joined,
)
from d4c_onnx.quantization.rounding.bias_room import least_scales, with_room
from d4c_onnx.quantization.rounding.corrections import correct_affine, correct_mean
from d4c_onnx.quantization.rounding.grids import grid_of
from d4c_onnx.quantization.rounding.nearest import NearestRounding


@dataclass(frozen=True, slots=True)
class Layerwise:
    """A rounding of single layers, applied from the first layer to the last.

    Attributes:
        make: a fresh `LayerRounding`, which may keep factors between calls.
        uses_outputs: see `Rounding`.
    """

    make: Callable[[], LayerRounding]
    uses_outputs: bool = False

    def round_weights(self, task: RoundingTask) -> RoundedWeights:
        """See `Rounding`; biases are corrected in closed form where the task says so."""
        return _Layers(task, self.make()).run()


NEAREST: Rounding = Layerwise(NearestRounding)


class _Layers:
    """One run over all layers of a task."""

    def __init__(self, task: RoundingTask, rounding: LayerRounding) -> None:
        self._task, self._rounding = task, rounding
        self._graph = task.model.graph
        self._nodes = nodes_by_name(self._graph)
        self._corrects = task.correction != "none"
        self._least = least_scales(task)
        self._result = RoundedWeights()

    def run(self) -> RoundedWeights:
        plan = self._task.plan
        if not self._rounding.uses_data and not self._corrects:
            for number, layer in enumerate(plan.layers):
                self._round(layer, [])
                self._task.on_step("round", number + 1, len(plan.layers), {})
            return self._result
        task = self._task
        collector = StatisticsCollector(task.model, plan, task.ranges, task.reader, task.provider, task.threads)
        stages = _stages(plan) if self._rounding.sequential else [list(plan.layers)]
        for number, stage in enumerate(stages):
            self._round_stage(stage, collector, more=number + 1 < len(stages))
            task.on_step("round", number + 1, len(stages), {})
        return self._result

    def _round_stage(self, stage: list[WeightedLayer], collector: StatisticsCollector, more: bool) -> None:
        statistics = collector.collect(stage)
        moments: dict[tuple[int, bool], list[InputMoments]] = {}  # of layers that see the same rows
        weights, biases = self._result.weights, self._result.biases
        for layer in stage:
            found, fresh = statistics[layer.node], layer.weight not in weights
            bias = self._bias(layer)
            if fresh:
                key = id(found), self._corrects and bias is not None
                if key not in moments:
                    moments[key] = _moments(found, key[1])
                self._round(layer, moments[key])
            if self._corrects and not self._is_stack(
                layer
            ):  # a weight that two layers share has its gain from the first; biases are a layer's own
                self._correct(layer, bias, found, fresh and self._task.correction == "affine")
            if not more:  # nobody will look at the twin again
                continue
            shape = dims(self._graph.initializers[layer.weight]) or ()
            collector.replace(
                layer.weight, channels_back(weights[layer.weight].dequantize(), shape, layer.channel_axis)
            )
            if bias is not None and name_of(bias) in biases:
                collector.replace(name_of(bias), biases[name_of(bias)])

    def _round(self, layer: WeightedLayer, moments: list[InputMoments]) -> None:
        rows, grid = self._rows(layer), grid_of(self._task.plan, layer, self._graph, self._nodes[layer.node])
        rounded = self._on_grid(layer, rows, grid, moments)
        self._result.weights[layer.weight] = with_room(rows, rounded, grid, self._least.get(layer.weight))

    def _on_grid(
        self, layer: WeightedLayer, rows: np.ndarray, grid: WeightGrid, moments: list[InputMoments]
    ) -> QuantizedWeight:
        rounding = NearestRounding() if self._is_stack(layer) else self._rounding
        outputs = self._task.outputs.get(layer.node)
        if not rounding.uses_data or len(moments) == 1:
            return rounding.round(rows, grid, moments[0] if rounding.uses_data else None, outputs)
        # a convolution in groups: each has an input, and moments, of its own
        split = zip(np.split(rows, len(moments)), moments, _of_groups(outputs, len(moments)), strict=True)
        return joined([rounding.round(part, grid, own, known) for part, own, known in split])

    def _correct(self, layer: WeightedLayer, value: ir.Value | None, found: InputStatistics, affine: bool) -> None:
        weights, bias, rows = self._result.weights, array(value), self._rows(layer)
        if affine:
            weights[layer.weight], bias = correct_affine(rows, weights[layer.weight], bias, found)
        elif bias is not None:
            bias = correct_mean(rows, weights[layer.weight], bias, found)
        if value is not None and bias is not None:
            self._result.biases[name_of(value)] = bias

    def _is_stack(self, layer: WeightedLayer) -> bool:
        """Whether a product has a matrix for every sample or head, so that one channel sums rows of several kinds."""
        return layer.op != "Conv" and len(dims(self._graph.initializers[layer.weight]) or ()) > 2

    def _bias(self, layer: WeightedLayer) -> ir.Value | None:
        return bias_of(self._nodes[layer.node])

    def _rows(self, layer: WeightedLayer) -> np.ndarray:
        values = constant(self._graph.initializers[layer.weight])
        return channels_first(np.asarray(values, np.float32), layer.channel_axis)


def _of_groups(outputs: np.ndarray | None, groups: int) -> list[np.ndarray] | list[None]:
    """Each group's own blocks; there are at least as many blocks as groups."""
    return [None] * groups if outputs is None else np.split(outputs, groups)


def bias_of(node: ir.Node) -> ir.Value | None:
    """The initialiser that a layer's output gets added: a Conv's or Gemm's third input, or the Add after a MatMul."""
    if node.op_type != "MatMul":
        value = node.inputs[2] if len(node.inputs) > 2 else None
        return value if is_constant(value) else None
    found = added_constant(node.outputs[0])
    return found[1] if found is not None and len(readers(found[1])) == 1 else None


def _stages(plan: Plan) -> list[list[WeightedLayer]]:
    """Layers that read the same value are rounded together, in graph order."""
    stages: dict[str, list[WeightedLayer]] = {}
    for layer in plan.layers:
        stages.setdefault(layer.data, []).append(layer)
    return list(stages.values())


def _moments(found: InputStatistics, free_mean: bool) -> list[InputMoments]:
    """Per group; centred where a bias will take up the mean, which the weights then need not carry."""
    return [InputMoments(gram, cross) for gram, cross in zip(*found.moments(free_mean), strict=True)]
