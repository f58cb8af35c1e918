"""How long images that ask no model will take here. Never torch."""

import time
from collections.abc import Callable

from d4c_onnx.dead_leaves import dead_leaves
from d4c_onnx.progress import Ahead
from d4c_onnx.recipe import SynthesisSection

Clock = Callable[[], float]


def control_ahead(section: SynthesisSection, size: tuple[int, int], clock: Clock = time.perf_counter) -> Ahead:
    """Of images that ask no model: one picture, timed.

    Args:
        size: height and width of an image.
    """
    images = section.images + section.held_out
    seconds = None if section.method == "real" else 0.0
    if section.method == "leaves":
        begun = clock()
        dead_leaves(1, size, seed=0)
        seconds = (clock() - begun) * images
    return Ahead(section.method, images, 0, seconds)
