"""How long images that ask no model will take here. Never torch."""

import time
from collections.abc import Callable

from d4c_onnx.dead_leaves import dead_leaves
from d4c_onnx.progress import Ahead
from d4c_onnx.recipe import SynthesisConfig

Clock = Callable[[], float]


def control_ahead(config: SynthesisConfig, size: tuple[int, int], clock: Clock = time.perf_counter) -> Ahead:
    """Of images that ask no model: one picture, timed.

    Args:
        size: height and width of an image.
    """
    images = config.images + config.held_out
    seconds = None if config.method == "real" else 0.0
    if config.method == "leaves":
        begun = clock()
        dead_leaves(1, size, seed=0)
        seconds = (clock() - begun) * images
    return Ahead(config.method, images, 0, seconds)
