"""The loop: it owns the optimiser, the views, and the checkpoints; everything else is given to it as values.

A *unit* is a set of images under one Adam. By default each batch is a unit of its own; as published, all calibration
images are one unit, whose minibatches step one Adam in turn (images outside the minibatch drift on stale momentum).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F

from d4c_onnx.files import write_file
from d4c_onnx.recipe import SynthesisConfig
from d4c_onnx.synthesis.foreground import crop_boxes, cut_boxes, draw_boxes
from d4c_onnx.synthesis.guide import Guide
from d4c_onnx.synthesis.objectives import Seen
from d4c_onnx.synthesis.param import Images
from d4c_onnx.synthesis.perturb import perturb

# Steps between two checkpoints inside a unit, and what an interrupted run loses at most: a fifteenth of the published
# 3,000 passes. Each is a file of three times the images' size (Adam's two moments), too much for every few steps.
CHECKPOINT_STEPS = 200

StepReport = Callable[[int, dict[str, float]], None]


class _State(TypedDict):
    """What a checkpoint holds."""

    step: int
    values: torch.Tensor
    optimizer: dict[str, Any]  # torch's own
    generator: torch.Tensor
    history: dict[str, list[float]]


def optimize_unit(
    images: Images,
    labels: torch.Tensor,
    guide: Guide,
    config: SynthesisConfig,
    generator: torch.Generator,
    checkpoint: Path,
    on_step: StepReport,
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Optimise one unit, resuming from `checkpoint` when it exists.

    Args:
        images: the unit's leaf and its renderer.
        labels: int64 [N], the prompt that each image is made for.
        generator: CPU generator, freshly seeded for this unit.
        checkpoint: state file, written every `CHECKPOINT_STEPS` passes and removed by the caller.
        on_step: called after each pass with the pass's number and its loss terms.

    Returns:
        The rendered images, float32 [N, 3, H, W], on the CPU, and the loss terms by name, one value per pass.
    """
    values = images.values.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([values], lr=guide.method.learning_rate)
    boxes = draw_boxes(len(values), guide.method.box_area, generator).to(values.device)
    first, history = _resume(checkpoint, values, optimizer, generator)
    for step in range(first, config.steps):
        for chosen in _minibatches(len(values), config.batch, generator):
            pixels = images.render(values[chosen])
            shown = optimize_step(pixels, boxes[chosen], labels[chosen], guide, optimizer, generator)
        for name, value in shown.items():
            history.setdefault(name, []).append(value)
        on_step(step + 1, shown)
        if (step + 1) % CHECKPOINT_STEPS == 0 and step + 1 < config.steps:
            _save(checkpoint, step + 1, values, optimizer, generator, history)
    with torch.no_grad():
        return images.render(values).detach().float().cpu(), history


def optimize_step(
    pixels: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    guide: Guide,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, float]:
    """One step of Adam on rendered pixels [B, 3, H, W]; the loss terms."""
    loss, shown = guide.objective(_encode_views(pixels, boxes, labels, guide, generator))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": float(loss.detach()), **shown}


def _minibatches(count: int, batch: int, generator: torch.Generator) -> list[torch.Tensor]:
    """A random order of a unit larger than a batch; the whole unit otherwise."""
    if count <= batch:
        return [torch.arange(count)]
    return list(torch.randperm(count, generator=generator).split(batch))


def _encode_views(
    pixels: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, guide: Guide, generator: torch.Generator
) -> Seen:
    """Render the views the objective needs, and encode them in one forward pass."""
    wanted = sorted(guide.objective.views)
    perturbed = "box" if guide.method.scg else "whole"
    views: dict[str, torch.Tensor] = {}
    for name in wanted:
        if name == "box":
            views[name] = crop_boxes(pixels, boxes)
        elif name == "background":
            noise = torch.randn(pixels.shape, generator=generator).to(pixels.device) * guide.method.background_noise
            views[name] = cut_boxes(pixels, boxes, noise)
        else:
            views[name] = pixels
        if name == perturbed:
            views[name] = perturb(views[name], guide.perturbations, generator)
    count = len(pixels)
    embeds = F.normalize(guide.encode(torch.cat([views[name] for name in wanted])), dim=-1)
    whole = wanted.index("whole") * count if "whole" in wanted else 0
    return Seen(
        pixels,
        dict(zip(wanted, embeds.split(count), strict=True)),
        guide.texts,
        labels,
        guide.hooks.read(slice(whole, whole + count)),
    )


def _save(
    path: Path,
    step: int,
    values: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    history: dict[str, list[float]],
) -> None:
    state: _State = {
        "step": step,
        "values": values.detach().cpu(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "history": history,
    }
    write_file(path, lambda file: torch.save(state, file))


def _resume(
    path: Path, values: torch.Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> tuple[int, dict[str, list[float]]]:
    """The step that a checkpoint was written at, and the losses until then; what it is not, or damaged, begins anew."""
    fresh = optimizer.state_dict(), generator.get_state()
    try:
        state: _State = torch.load(path, weights_only=True, map_location="cpu")
        kept, step, history = state["values"], int(state["step"]), state["history"]
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        with torch.no_grad():
            values.copy_(kept)
    except Exception:  # torch raises what the file makes it raise
        optimizer.load_state_dict(fresh[0])
        generator.set_state(fresh[1])
        return 0, {}
    return step, history
