"""Driving onnxruntime's own `quantize_static` with our ranges and our integers.

Weights are placed on their grid in the float graph before, so the integers that `quantize_static` stores are exactly
those the rounding chose; every activation's scale and zero point comes from our observers as an override.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.calibration.readers import OneBatchReader
from d4c_onnx.errors import GraphError
from d4c_onnx.graph.files import EXTERNAL_SUFFIX, PROTOBUF_LIMIT_BYTES, load_graph, save_graph
from d4c_onnx.graph.index import GraphIndex, drop_unused
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.quantization.deployment import Target
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding import QuantizedWeight

# A product's output stays float: the residual stream is never rounded, and onnxruntime's kernel for it
# (MatMulIntegerToFloat) is as fast. A convolution needs an integer output to become a QLinearConv.
_FLOAT_OUTPUTS = ["MatMul", "Gemm"]


def save_placed(model: onnx.ModelProto, plan: Plan, weights: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Write the float encoder with every weight on its grid, weights beside the graph.

    Args:
        model: the float encoder; not changed.
        plan: what is quantised.
        weights: per initialiser.
    """
    axes = {layer.weight: layer.channel_axis for layer in plan.layers}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}

    def placed(name: str) -> np.ndarray | None:
        return channels_back(weights[name].dequantize(), shapes[name], axes[name]) if name in axes else None

    save_graph(model, path, limit_bytes=0, replaced=placed)


def quantize_file(
    source: Path,
    plan: Plan,
    weights: Mapping[str, QuantizedWeight],
    ranges: Mapping[str, QuantParams],
    reader: CalibrationDataReader,
    form: Target,
) -> onnx.ModelProto:
    """The QDQ graph: int8 weights (4-bit ones still stored as int8), uint8 activations (int8 where they are symmetric).

    Args:
        source: what `save_placed` wrote; files beside it come and go.
        plan: what is quantised.
        weights: per initialiser.
        ranges: per activation.
        reader: onnxruntime insists on a calibration pass of its own; one sample will do, its results are overridden.
        form: symmetric activations or not, integer biases or not.

    Raises:
        GraphError: onnxruntime refused, or stored other integers than it was given.
    """
    overrides = {layer.weight: _weight_override(weights[layer.weight], layer.channel_axis) for layer in plan.layers}
    for name, params in ranges.items():
        overrides[name] = [_activation_override(params, form.symmetric)]
    target = source.with_name("qdq.onnx")
    large = source.with_name(source.name + EXTERNAL_SUFFIX).stat().st_size > PROTOBUF_LIMIT_BYTES
    try:
        with _quiet_root_logger():
            quantize_static(
                str(source),
                str(target),
                _one_sample(reader),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(plan.op_types),
                nodes_to_quantize=list(plan.nodes),
                per_channel=True,
                activation_type=QuantType.QInt8 if form.symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
                extra_options={
                    "TensorQuantOverrides": overrides,
                    "OpTypesToExcludeOutputQuantization": _FLOAT_OUTPUTS,
                    "WeightSymmetric": True,
                    "ActivationSymmetric": form.symmetric,
                    "QuantizeBias": form.quantize_bias,
                },
            )
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError, KeyError) as error:
        raise GraphError(f"onnxruntime's quantize_static refused the graph ({str(error)[:300]}).") from error
    quantized = load_graph(target)
    if form.symmetric:
        _drop_idle_pairs(quantized.graph)
    _check_integers(quantized.graph, weights, plan)
    return quantized


def _one_sample(reader: CalibrationDataReader) -> CalibrationDataReader:
    reader.rewind()
    feed = reader.get_next()
    assert feed is not None
    [(name, batch)] = feed.items()
    return OneBatchReader(batch[:1], name)


def _drop_idle_pairs(graph: onnx.GraphProto) -> None:
    """Let each Reshape and Transpose read the value before a quantiser, in place.

    A quantiser that otherwise only a ReduceMean reads, or nothing, is removed.

    It has no integer kernel behind it. Moving such an int8 pair through the Reshape, onnxruntime 1.32 makes a
    QuantizeLinear of the wrong type and refuses the file.
    """
    index = GraphIndex(graph)
    for node in graph.node:
        readers = index.consumers.get(node.output[0], []) if node.op_type == "DequantizeLinear" else []
        maker = index.producer.get(node.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            continue
        shaping = [reader for reader in readers if reader.op_type in ("Reshape", "Transpose", "Flatten")]
        idle = all(reader in shaping or reader.op_type == "ReduceMean" for reader in readers)
        for reader in readers if shaping and idle else shaping:
            reader.input[0] = maker.input[0]
    drop_unused(graph)


def _activation_override(params: QuantParams, symmetric: bool) -> dict[str, Any]:
    scale = np.array(params.scale, np.float32)
    if symmetric:  # zero lies in the middle of the unsigned grid: the same grid, signed, has zero point 0
        return {"quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.array(0, np.int8)}
    return {"quant_type": QuantType.QUInt8, "scale": scale, "zero_point": np.array(params.zero_point, np.uint8)}


def _weight_override(weight: QuantizedWeight, axis: int) -> list[dict[str, Any]]:
    channels: list[dict[str, Any]] = [
        {"quant_type": QuantType.QInt8, "scale": np.array(scale, np.float32), "zero_point": np.array(0, np.int8)}
        for scale in weight.scale
    ]
    channels[0]["axis"] = axis
    return channels


def _check_integers(graph: onnx.GraphProto, weights: Mapping[str, QuantizedWeight], plan: Plan) -> None:
    index = GraphIndex(graph)
    for layer in plan.layers:
        stored = index.array(f"{layer.weight}_quantized")
        if stored is None:
            raise GraphError(f"{layer.node}: quantize_static left the weight {layer.weight} in float.")
        expected = channels_back(weights[layer.weight].integers, stored.shape, layer.channel_axis)
        if not np.array_equal(stored, expected):
            raise GraphError(f"{layer.node}: quantize_static stored other integers than the rounding chose.")


class _quiet_root_logger:
    """`quantize_static` advises on the root logger to preprocess, which the export has already done."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
