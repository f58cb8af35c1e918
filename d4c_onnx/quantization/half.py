"""The FP16 bundle: what a GPU multiplies fastest where no int8 kernel takes QDQ files."""

from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, Bundle
from d4c_onnx.errors import GraphError
from d4c_onnx.files import staged_folder
from d4c_onnx.graph.files import load_graph, save_graph, strip_notes
from d4c_onnx.quantization.bundle import finish_bundle
from d4c_onnx.quantization.deployment import compute_pooled_row_only
from d4c_onnx.quantization.layout import MINIMUM_ORT

GOLDEN_TOLERANCE = 0.01  # max abs difference of an FP16 embedding between machines


def half_bundle_files(bundle: Bundle, target: Path) -> Bundle:
    """Write both encoders of an FP32 bundle in FP16 (inputs and outputs stay as they are); or leave nothing behind.

    onnxruntime's own converter does it; weights and products are float16, embeddings float32.

    Raises:
        GraphError: the converter refused an encoder.
        BundleError: the folder cannot be written.
    """
    with staged_folder(target) as stage:
        for name in (IMAGE_ENCODER, TEXT_ENCODER):
            save_graph(_half(load_graph(bundle.path / name), name), stage / name)
        written = finish_bundle(
            bundle,
            stage,
            GOLDEN_TOLERANCE,
            {
                "minimum_onnxruntime": MINIMUM_ORT[None],
                "seed": bundle.manifest["seed"],
                "bits": "fp16",
                "accuracy_mode_only": False,
                "target": "cuda",
            },
        )
    return Bundle(target, written.manifest)


def _half(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    strip_notes(model)
    compute_pooled_row_only(model)
    try:
        half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    except Exception as error:  # the converter and onnx's shape inference raise kinds of their own
        raise GraphError(f"{name}: onnxruntime's float16 converter refused it ({str(error)[:300]}).") from error
    strip_notes(half)
    return half
