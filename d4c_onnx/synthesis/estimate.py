"""How long a synthesis will take here: one step of its own first batch, timed, times what there is to do.

The step's images are thrown away, and its random numbers are its own: whether somebody asked changes no image.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from d4c_onnx.calibration.ahead import Clock
from d4c_onnx.progress import Ahead
from d4c_onnx.recipe import SynthesisConfig
from d4c_onnx.synthesis.foreground import draw_boxes
from d4c_onnx.synthesis.guide import Guide
from d4c_onnx.synthesis.loop import optimize_step
from d4c_onnx.synthesis.param import Images
from d4c_onnx.synthesis.units import Unit


def units_ahead(
    config: SynthesisConfig,
    units: Sequence[Unit],
    start: Images,
    labels: torch.Tensor,
    guide: Guide,
    processes: int = 1,
    clock: Clock = time.perf_counter,
) -> Ahead:
    """Of images that are optimised: a step of the first batch, timed once it is warm.

    Args:
        units: those that no run has finished; at least one.
        start, labels: of the first of them, see `loop.optimize_unit`.
        processes: that share the work.

    Returns:
        At most so many seconds: an early stop leaves some out.
    """
    generator = torch.Generator().manual_seed(0)
    values = start.values.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([values], lr=guide.method.learning_rate)
    chosen = torch.arange(min(len(values), config.batch))
    boxes = draw_boxes(len(values), guide.method.box_area, generator).to(values.device)[chosen]
    seconds = 0.0
    for _ in range(2):
        begun = clock()
        optimize_step(start.render(values[chosen]), boxes, labels[chosen], guide, optimizer, generator)
        seconds = clock() - begun
    images = sum(map(len, units))
    return Ahead(config.method, images, config.steps, seconds / len(chosen) * images * config.steps / processes)
