"""Does a calibration set belong to a bundle?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import CalibrationError

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet


def check_set_fits(dataset: CalibrationSet, bundle: Bundle) -> None:
    """Compare a set's model and the size of its images with what the encoder is and takes.

    Raises:
        CalibrationError: they differ.
    """
    check_images_fit(dataset, bundle)
    if dataset.manifest.key.weights_sha256 != bundle.weights_sha256:
        raise CalibrationError(
            f"the calibration set belongs to other weights ({dataset.manifest.model}) than {bundle.path}. "
            "Synthesise one from this model."
        )


def check_images_fit(dataset: CalibrationSet, bundle: Bundle) -> None:
    """Compare the size of a set's images with what the encoder takes.

    Raises:
        CalibrationError: they differ.
    """
    height, width = bundle.manifest.preprocess.size
    if tuple(dataset.pixel_values.shape[2:]) != (height, width):
        found = "x".join(str(size) for size in dataset.pixel_values.shape[2:])
        raise CalibrationError(f"the calibration images are {found}, {bundle.model_name} needs {height}x{width}.")
