"""What a calibration set's images do inside the encoder, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from d4c_onnx.bundle import open_bundle
from d4c_onnx.files import claimed, write_text
from d4c_onnx.measure.calibration_fit import check_images_fit
from d4c_onnx.measure.machine import Machine
from d4c_onnx.progress import OnStep, silent

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet


def report_calibration_set(
    folder: str | Path,
    *,
    against: Sequence[str | Path] = (),
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> Path:
    """Write `<set>.html` beside a calibration set in its bundle's folder: one self-contained page to look at.

    It shows the images with their prompts, the loss curves, and what reaches each layer of the FP32 image encoder under
    these images, under Gaussian noise and under other sets.

    Args:
        folder: the set, inside its bundle's folder.
        against: other calibration sets, real images for example.

    Returns:
        The page's path.

    Raises:
        CalibrationError: a folder is no calibration set, or its images have another size.
        BundleError: the set does not lie in a bundle, or the page cannot be written.
    """
    from d4c_onnx.calibration.controls import noise_images
    from d4c_onnx.calibration.dataset import open_calibration_set
    from d4c_onnx.evaluation.layer_inputs import layer_inputs
    from d4c_onnx.evaluation.page import calibration_page
    from d4c_onnx.runtime.preprocess import denormalize

    machine, folder = machine or Machine(), Path(folder)
    bundle, made = open_bundle(folder.parent), open_calibration_set(folder)
    sets = {"these images": made, **{Path(path).name: open_calibration_set(path) for path in against}}
    for other in sets.values():
        check_images_fit(other, bundle)
    images = {name: np.asarray(other.pixel_values) for name, other in sets.items()}
    images["Gaussian noise"] = noise_images("noise", made.pixel_values.shape, bundle.manifest.seed)
    inputs = {
        name: layer_inputs(
            bundle.image_encoder, pixels, provider=machine.provider, threads=machine.threads, on_step=on_step
        )
        for name, pixels in images.items()
    }
    page = calibration_page(
        f"{bundle.model_name}: calibration images",
        _facts(made, bundle.model_name),
        denormalize(images["these images"], bundle.manifest.preprocess),
        [made.manifest.key.template.format(label) for label in made.labels],
        made.losses,
        inputs,
    )
    target = folder.with_name(f"{folder.name}.html")
    with claimed(bundle.path):
        write_text(target, page)
    return target


def _facts(made: CalibrationSet, model: str) -> dict[str, str]:
    """What the page says about a set, by name."""
    key = made.manifest.key
    return {
        "model": model,
        "method": key.method_name,
        "images": f"{len(made.pixel_values)}, and {len(made.held_out)} held out",
        "prompts for the text tower": str(len(made.texts)),
        "seed": str(key.seed),
        "key": key.id,
    }
