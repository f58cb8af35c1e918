"""Driving onnxruntime's own `quantize_static` with our ranges and our integers.

Weights are placed on their grid in the float graph before, so the integers that `quantize_static` stores are exactly
those the rounding chose; every activation's scale and zero point comes from our observers as an override.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.errors import GraphError
from d4c_onnx.files import temporary_folder
from d4c_onnx.graph.forms import INT8
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.graph.model import (
    EXTERNAL_SUFFIX,
    PROTOBUF_LIMIT_BYTES,
    drop_unused,
    load_model,
    save_model,
    weight_bytes,
)
from d4c_onnx.graph.stored import stored_weight
from d4c_onnx.graph.values import (
    constant,
    dims,
    is_constant,
    is_op,
    maker,
    nodes_by_name,
    nodes_of,
    readers,
    replace_input,
)
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import QuantizedWeight
from d4c_onnx.quantization.targets import Target

# A product's output stays float: the residual stream is never rounded, and onnxruntime's kernel for it
# (MatMulIntegerToFloat) is as fast. A convolution needs an integer output to become a QLinearConv.
_FLOAT_OUTPUTS = ["MatMul", "Gemm"]


def room_for(model: ir.Model) -> contextlib.AbstractContextManager[Path]:
    """A folder for the float graph and the quantised one, for as long as onnxruntime makes one of the other.

    Raises:
        BundleError: there is no room for them.
    """
    return temporary_folder(2 * weight_bytes(model))


def save_placed(model: ir.Model, plan: Plan, weights: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Write the float encoder with every weight on its grid, weights beside the graph.

    Args:
        model: the float encoder; not changed.
        plan: what is quantised.
        weights: per initialiser.
    """
    made: dict[str, Callable[[], np.ndarray]] = {}
    for layer in plan.layers:
        shape = dims(model.graph.initializers[layer.weight]) or ()
        made[layer.weight] = partial(_placed, weights[layer.weight], shape, layer.channel_axis)
    save_model(model, path, limit_bytes=0, replaced=made)


def _placed(weight: QuantizedWeight, shape: tuple[int, ...], axis: int) -> np.ndarray:
    return channels_back(weight.dequantize(), shape, axis)


def quantize_file(
    source: Path,
    plan: Plan,
    weights: Mapping[str, QuantizedWeight],
    ranges: Mapping[str, QuantParams],
    sample: CalibrationDataReader,
    target: Target,
) -> ir.Model:
    """The QDQ graph: int8 weights (4-bit ones still stored as int8), uint8 activations (int8 where they are symmetric).

    Args:
        source: what `save_placed` wrote; files beside it come and go.
        plan: what is quantised.
        weights: per initialiser.
        ranges: per activation; they override what onnxruntime finds in the pass that it insists on.
        sample: one will do for that.
        target: symmetric activations or not, integer biases or not.

    Raises:
        GraphError: onnxruntime refused, or stored other integers than it was given.
    """
    overrides = {layer.weight: _weight_override(weights[layer.weight], layer.channel_axis) for layer in plan.layers}
    overrides |= {name: [_activation_override(params, target.symmetric)] for name, params in ranges.items()}
    written = source.with_name("qdq.onnx")
    large = source.with_name(source.name + EXTERNAL_SUFFIX).stat().st_size > PROTOBUF_LIMIT_BYTES
    try:
        with _quiet_root_logger():
            quantize_static(
                str(source),
                str(written),
                sample,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(plan.op_types),
                nodes_to_quantize=list(plan.nodes),
                per_channel=True,
                activation_type=QuantType.QInt8 if target.symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=large,
                extra_options={
                    "TensorQuantOverrides": overrides,
                    "OpTypesToExcludeOutputQuantization": _FLOAT_OUTPUTS,
                    "WeightSymmetric": True,
                    "ActivationSymmetric": target.symmetric,
                    "QuantizeBias": target.quantize_bias,
                },
            )
    except (ValueError, RuntimeError, NotImplementedError, AttributeError, TypeError, KeyError) as error:
        raise GraphError(f"onnxruntime's quantize_static refused the graph ({str(error)[:300]}).") from error
    quantized = load_model(written)
    quantized.graph.sort()  # quantize_static forgets what the branches of an If read; sorted graphs stay as they are
    if large:  # weights beside the graph are mapped now, so that they stay readable when the folder is gone
        for name, value in quantized.graph.initializers.items():
            value.const_value = ir.Tensor(constant(value), name=name)
    if target.symmetric:
        _drop_idle_pairs(quantized)
    _keep_float(quantized, plan)
    _check_integers(quantized.graph, weights, plan)
    return quantized


def _drop_idle_pairs(model: ir.Model) -> None:
    """Let each Reshape and Transpose read the value before a quantiser, in place.

    A quantiser that otherwise only a ReduceMean reads, or nothing, is removed.

    It has no integer kernel behind it. Moving such an int8 pair through the Reshape, onnxruntime 1.32 makes a
    QuantizeLinear of the wrong type and refuses the file.
    """
    for pair in nodes_of(model.graph, "DequantizeLinear"):
        quantize, real = maker(pair.inputs[0]), pair.outputs[0]
        if quantize is None or not is_op(quantize, "QuantizeLinear") or quantize.inputs[0] is None:
            continue
        reading = readers(real)
        shaping = [reader for reader in reading if is_op(reader, "Reshape", "Transpose", "Flatten")]
        idle = all(reader in shaping or is_op(reader, "ReduceMean") for reader in reading)
        for reader in reading if shaping and idle else shaping:
            replace_input(reader, real, quantize.inputs[0])
    drop_unused(model)


def _keep_float(model: ir.Model, plan: Plan) -> None:
    """Let whoever is not quantised read the float value in front of a quantiser, in place.

    `quantize_static` gives the rounded value to every reader. Behind a post-LayerNorm (BERT) one of them is the
    residual stream, which would be rounded at every block. A value that a quantised node makes stays: its float form
    must have no other reader, or the node has no integer kernel.
    """
    quantised = set(plan.nodes)
    for pair in nodes_of(model.graph, "DequantizeLinear"):
        quantize = maker(pair.inputs[0])
        source = quantize.inputs[0] if quantize is not None and is_op(quantize, "QuantizeLinear") else None
        made = maker(source)
        if source is None or is_constant(source) or (made is not None and made.name in quantised):
            continue
        for reader in readers(pair.outputs[0]):
            if reader.name not in quantised:
                replace_input(reader, pair.outputs[0], source)
    drop_unused(model)


def _activation_override(params: QuantParams, symmetric: bool) -> dict[str, object]:
    scale = np.array(params.scale, np.float32)
    if symmetric:  # zero lies in the middle of the unsigned grid: the same grid, signed, has zero point 0
        return {"quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.array(0, np.int8)}
    return {"quant_type": QuantType.QUInt8, "scale": scale, "zero_point": np.array(params.zero_point, np.uint8)}


def _weight_override(weight: QuantizedWeight, axis: int) -> list[dict[str, object]]:
    channels: list[dict[str, object]] = [
        {"quant_type": QuantType.QInt8, "scale": np.array(scale, np.float32), "zero_point": np.array(0, np.int8)}
        for scale in weight.scale
    ]
    channels[0]["axis"] = axis
    return channels


def _check_integers(graph: ir.Graph, weights: Mapping[str, QuantizedWeight], plan: Plan) -> None:
    nodes = nodes_by_name(graph)
    for layer in plan.layers:
        stored = stored_weight(nodes[layer.node])
        if stored is None or stored.form is not INT8:
            raise GraphError(f"{layer.node}: quantize_static left the weight {layer.weight} in float.")
        expected = channels_back(weights[layer.weight].integers, stored.shape, layer.channel_axis)
        if not np.array_equal(stored.unpack(), expected):
            raise GraphError(f"{layer.node}: quantize_static stored other integers than the rounding chose.")


class _quiet_root_logger:
    """`quantize_static` advises on the root logger to preprocess, which the export has already done."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
