"""What onnxruntime's own tools make of the same FP32 encoder: the peers that a speed claim must beat."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from d4c_onnx.calibration.readers import OneBatchReader
from d4c_onnx.errors import BundleError
from d4c_onnx.runtime.session import EncoderSession


def build_peers(source: Path, folder: Path, input_name: str, feed: np.ndarray) -> dict[str, Path | str]:
    """Quantise one FP32 encoder with each of onnxruntime's tools, in the form that is fastest and most exact for each:
    static with one symmetric scale a channel, MatMulNBits in blocks of 32 with int8 products.

    Args:
        source: the encoder.
        folder: where the files go.
        input_name, feed: a batch for calibration.

    Returns:
        Per tool the file, or the message it failed with.
    """

    def static(target: Path, weights: QuantType) -> None:
        quantize_static(
            source,
            target,
            OneBatchReader(feed, input_name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=weights,
            extra_options={"WeightSymmetric": True},
        )

    def blocks(target: Path) -> None:
        tool = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True, accuracy_level=4)
        tool.process()
        tool.model.save_model_to_file(str(target))

    tools: dict[str, Callable[[Path], None]] = {
        "quantize_dynamic int8": lambda target: quantize_dynamic(source, target, weight_type=QuantType.QInt8),
        "quantize_static W8A8": lambda target: static(target, QuantType.QInt8),
        "quantize_static QInt4": lambda target: static(target, QuantType.QInt4),
        "MatMulNBits 4 bit": blocks,
    }
    made: dict[str, Path | str] = {}
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the tools advise on the root logger
    try:
        for label, build in tools.items():
            target = folder / f"{label.replace(' ', '-')}-{source.name}"
            try:
                build(target)
                made[label] = target
            except Exception as error:  # each tool raises its own kinds; a peer that fails is a result, too
                made[label] = " ".join(str(error).split())[:200] or type(error).__name__
    finally:
        root.setLevel(level)
    return made


def loads(path: Path, provider: str = "cpu") -> str:
    """Empty when onnxruntime loads the file, else the reason why not."""
    try:
        EncoderSession(path, provider)
    except BundleError as error:
        return str(error)
    return ""
