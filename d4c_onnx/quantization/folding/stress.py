"""Stress variants: the same function with inflated outlier channels, to prove that quantisation withstands them.

The inverse of smoothing: in a share of each place's channels the activation grows by a factor and the weights that read
it shrink by the same. In float nothing changes; a per-tensor grid has to reach `factor` times as far.
"""

import copy
import shutil
from pathlib import Path

import numpy as np
import onnx

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, Bundle
from d4c_onnx.graph.files import load_graph, save_graph
from d4c_onnx.graph.index import drop_unused
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.quantization.folding.places import apply_scale, find_places


def inflate(
    model: onnx.ModelProto, factor: float, kinds: tuple[str, ...] = (), share: float = 0.04, seed: int = 0
) -> onnx.ModelProto:
    """A stress variant of a float encoder; the model itself stays as it is.

    Args:
        factor: how much larger the chosen channels become.
        kinds: of `places` (layer_norm, value, quick_gelu, ...); empty: all.
        share: of each place's channels, at least one.
        seed: of the choice.
    """
    stressed = copy.deepcopy(model)
    rng = np.random.default_rng(seed)
    for place in find_places(stressed.graph, tuple(weighted_layers(stressed.graph))):
        if not kinds or place.kind in kinds:
            scale = np.ones(place.width, np.float32)
            scale[rng.choice(place.width, max(1, round(place.width * share)), replace=False)] = 1 / factor
            apply_scale(stressed.graph, place, scale)
    drop_unused(stressed.graph)
    return stressed


def stress_bundle(bundle: Bundle, factor: float, folder: Path) -> Bundle:
    """A copy of an FP32 bundle in a new `folder` with both encoders inflated; calibration sets stay behind.

    The golden vectors still hold: the function is the same.
    """
    shutil.copytree(bundle.path, folder, ignore=shutil.ignore_patterns("calibration-*", "w*a*", "fp16", ".*"))
    for path in (folder / IMAGE_ENCODER, folder / TEXT_ENCODER):
        save_graph(inflate(load_graph(path), factor), path)
    return Bundle(folder, write_manifest(folder, bundle.manifest))
