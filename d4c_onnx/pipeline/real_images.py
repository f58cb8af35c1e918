"""Real images as a control: the one place where they enter, as ready arrays."""

from pathlib import Path

import numpy as np

from d4c_onnx.errors import DatasetError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.recipe import Recipe


def draw_real_images(source: Path, recipe: Recipe, preprocess: Preprocess) -> np.ndarray:
    """The control: pixel_values float32 [images + held_out, 3, H, W] of randomly drawn images, none twice."""
    from d4c_onnx.evaluation.datasets import open_images
    from d4c_onnx.runtime.preprocess import preprocess_image

    found = open_images(source)
    count = recipe.synthesis.images + recipe.synthesis.held_out
    if len(found) < count:
        raise DatasetError(
            f"{source}: holds {len(found)} images; images + held_out are {count}. Lower synthesis.images."
        )
    chosen = np.random.default_rng([recipe.seed, 9]).choice(len(found), count, replace=False)
    batches = found.select(chosen).batches(64)
    return np.stack([preprocess_image(image, preprocess) for images in batches for image in images])
