"""Stress variants: the same function with inflated outlier channels, to prove that quantisation withstands them.

The inverse of smoothing: in a share of each mapping's channels the activation grows by a factor and the weights that
read it shrink by the same. In float nothing changes; a per-tensor grid has to reach `factor` times as far.
"""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, Bundle
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import drop_unused, load_model, save_model
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.quantization.rewrites.mappings import apply_scale, find_mappings


def inflate(
    model: ir.Model, factor: float, kinds: tuple[str, ...] = (), share: float = 0.04, seed: int = 0
) -> ir.Model:
    """A stress variant of a float encoder; the model itself stays as it is.

    Args:
        factor: how much larger the chosen channels become.
        kinds: of `mappings` (layer_norm, value, quick_gelu, ...); empty: all.
        share: of each mapping's channels, at least one.
        seed: of the choice.
    """
    stressed = model.clone()
    rng = np.random.default_rng(seed)
    for mapping in find_mappings(stressed.graph, weighted_layers(stressed.graph)):
        if not kinds or mapping.kind in kinds:
            scale = np.ones(mapping.width, np.float32)
            scale[rng.choice(mapping.width, max(1, round(mapping.width * share)), replace=False)] = 1 / factor
            apply_scale(stressed.graph, mapping, scale)
    drop_unused(stressed)
    return stressed


def stress_bundle(bundle: Bundle, factor: float, folder: Path) -> Bundle:
    """A copy of an FP32 bundle in a new `folder` with both encoders inflated; calibration sets stay behind.

    The golden vectors still hold: the function is the same.
    """
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("calibration-*", "w*a*", "fp16", ".*"))
    for path in (folder / IMAGE_ENCODER, folder / TEXT_ENCODER):
        save_model(inflate(load_model(path), factor), path)
    return Bundle(folder, write_manifest(folder, bundle.manifest))
