"""Images that ask no model: real ones as ready arrays, which enter here alone, and how long drawn ones will take."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from d4c_onnx.errors import DatasetError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.progress import Ahead
from d4c_onnx.recipe import Recipe


def draw_real_images(source: Path, recipe: Recipe, preprocess: Preprocess) -> np.ndarray:
    """The control: pixel_values float32 [images + held_out, 3, H, W] of randomly drawn images, none twice."""
    from d4c_onnx.evaluation.datasets import open_images
    from d4c_onnx.runtime.preprocess import preprocess_image

    found = open_images(source)
    count = recipe.synthesis.images + recipe.synthesis.held_out
    if len(found) < count:
        raise DatasetError(
            f"{source}: holds {len(found)} images; images + held_out are {count}. Bring more, or add "
            "--set synthesis.images=N."
        )
    chosen = np.random.default_rng([recipe.seed, 9]).choice(len(found), count, replace=False)
    batches = found.select(chosen).batches(64)
    upright = recipe.evaluation.exif_rotation
    return np.stack([preprocess_image(image, preprocess, upright) for images in batches for image in images])


def work_ahead(recipe: Recipe, preprocess: Preprocess) -> Ahead:
    """How long images that ask no model will take."""
    from d4c_onnx.calibration.ahead import control_ahead

    return control_ahead(recipe.synthesis, preprocess.size)
