"""One optimisation step of the published loop: written straightforwardly, and as this library runs it.

    python benchmarks/synthesis_steps.py mini-vit mini-rn

Equal work on both sides: the published objective (box against prompts and backgrounds, total variation), the published
perturbations, the same number of images, one Adam step. Straightforward means: the model as open_clip gives it, frozen,
in float32; box and background each through a forward of their own; crops, masks and perturbations image by image. The
library's step runs twice, in float32 and in the precision that `synthesis.precision: auto` takes here. The variants
take turns; printed are medians and their ratios. A full-size architecture (random weights) can be named, too.

    python benchmarks/synthesis_steps.py ViT-B-32 --variants default

`default` is a step of the default recipe, its whole-image view included. From the medians follow the seconds of whole
schedules: 24,000 published steps, and the default's. Peak memory is the process's, so name one variant to know its own.
"""

import argparse
import json
import math
import random
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from d4c_onnx.calibration.method import METHODS
from d4c_onnx.models.load import LoadedModel, load_model
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.synthesis.compute import resolve_precision
from d4c_onnx.synthesis.foreground import draw_boxes
from d4c_onnx.synthesis.guide import build_guide, embed_prompts
from d4c_onnx.synthesis.loop import optimize_step
from d4c_onnx.synthesis.param import start_images
from d4c_onnx.vocabulary import generic_nouns

CPU = torch.device("cpu")
VARIANTS = ("straightforward", "float32", "auto", "default")


def straightforward(loaded: LoadedModel, texts: torch.Tensor, batch: int) -> Callable[[], None]:
    """The published step as one would write it down."""
    model = loaded.model.eval().requires_grad_(False)
    height, width = loaded.preprocess.size
    mean, std = loaded.normalization()
    images = torch.randn(batch, 3, height, width, requires_grad=True)
    labels = torch.arange(batch) % len(texts)
    optimizer = torch.optim.Adam([images], lr=0.01)
    drawn = draw_boxes(batch, (0.4, 0.7), torch.Generator().manual_seed(0))
    boxes = (drawn * torch.tensor([width, height, width, height])).round().int().tolist()

    def step() -> None:
        views = []
        for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
            crop = F.interpolate(image[None, :, top:bottom, left:right], (height, width), mode="bilinear")[0]
            views.append(_perturb_one(crop, mean, std))
        box = F.normalize(model.encode_image(torch.stack(views)), dim=-1)
        views = []
        for image, (left, top, right, bottom) in zip(images, boxes, strict=True):
            mask = torch.ones(1, height, width)
            mask[:, top:bottom, left:right] = 0
            views.append(image * mask + 0.1 * torch.randn_like(image))
        background = F.normalize(model.encode_image(torch.stack(views)), dim=-1)
        logits = torch.cat([box @ texts.T, box @ background.T], 1) / 0.1
        smooth = (images[:, :, 1:] - images[:, :, :-1]).square().mean()
        smooth = smooth + (images[:, :, :, 1:] - images[:, :, :, :-1]).square().mean()
        loss = F.cross_entropy(logits, labels) + 0.1 * smooth
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _perturb_one(image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The published perturbations of a single image [3, H, W]."""
    height, width = image.shape[1:]
    angle, size = math.radians(random.uniform(-15, 15)), 1 + random.uniform(-0.05, 0.05)
    mirror = -1 if random.random() < 0.5 else 1
    cos, sin = math.cos(angle) / size, math.sin(angle) / size
    across, down = random.uniform(-0.1, 0.1), random.uniform(-0.1, 0.1)
    theta = torch.tensor([[mirror * cos, -sin, across], [mirror * sin, cos, down]])
    grid = F.affine_grid(theta[None], [1, 3, height, width], align_corners=False)
    image = F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]
    colors = (image * std + mean) * random.uniform(0.6, 1.4)
    colors = (colors - colors.mean()) * random.uniform(0.6, 1.4) + colors.mean()
    grey = colors.mean(0, keepdim=True)
    image = ((colors - grey) * random.uniform(0.6, 1.4) + grey - mean) / std
    if random.random() < 0.3:
        taps = torch.exp(-0.5 * (torch.tensor([-1.0, 0.0, 1.0]) / 0.8) ** 2)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        image = F.conv2d(F.pad(image[None], (1, 1, 1, 1), "reflect"), kernel.expand(3, 1, 3, 3), groups=3)[0]
    if random.random() < 0.3:
        top, left = random.randrange(height - height // 5), random.randrange(width - width // 5)
        mask = torch.ones(1, height, width)
        mask[:, top : top + height // 5, left : left + width // 5] = 0
        image = image * mask
    return image


def ours(loaded: LoadedModel, nouns: tuple[str, ...], batch: int, recipe: str, precision: str) -> Callable[[], None]:
    """A step through the library."""
    config = load_recipe(recipe).synthesis
    method = METHODS[config.method]
    mean, std = loaded.normalization()
    generator = torch.Generator().manual_seed(0)
    images = start_images(method.image, (batch, 3, *loaded.preprocess.size), mean, std, generator)
    values = images.values.requires_grad_(True)
    guide = build_guide(loaded, method, config, nouns, CPU, resolve_precision(precision, CPU))
    labels = torch.arange(batch) % len(nouns)
    optimizer = torch.optim.Adam([values], lr=method.learning_rate)
    boxes = draw_boxes(batch, method.box_area, generator)

    def step() -> None:
        optimize_step(images.render(values), boxes, labels, guide, optimizer, generator)

    return step


def measure(name: str, batch: int, rounds: int, variants: Sequence[str]) -> dict[str, object]:
    """Median seconds of each variant, taking turns."""
    loaded = load_model(name, None if name.startswith("mini") else "random")
    nouns = generic_nouns()
    texts = embed_prompts(loaded, "a photo of a {}.", nouns)
    makers = {
        "straightforward": lambda: straightforward(loaded, texts, batch),
        "float32": lambda: ours(loaded, nouns, batch, "paper", "float32"),
        "auto": lambda: ours(loaded, nouns, batch, "paper", "auto"),
        "default": lambda: ours(loaded, nouns, batch, "default", "auto"),
    }
    steps = {label: makers[label]() for label in variants}
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(rounds + 2):
        for label, step in steps.items():
            start = time.perf_counter()
            step()
            if turn >= 2:  # warm-up
                times[label].append(time.perf_counter() - start)
    medians = {label: float(np.median(values)) for label, values in times.items()}
    default, published = (load_recipe(recipe).synthesis for recipe in ("default", "paper"))
    images = {"straightforward": published, "default": default}
    schedule = {
        label: medians[label] * config.steps * math.ceil((config.images + config.held_out) / batch)
        for label, config in images.items()
        if label in medians
    }
    ratios = {label: round(medians[variants[0]] / value, 2) for label, value in medians.items()}
    return {
        "model": name,
        "batch": batch,
        "threads": torch.get_num_threads(),
        "auto": str(resolve_precision("auto", CPU)),
        "ms": {label: round(1000 * value, 1) for label, value in medians.items()},
        f"faster than {variants[0]}": ratios,
        "whole schedule s": {label: round(value, 1) for label, value in schedule.items()},
        "default s an image": round(medians["default"] * default.steps / batch, 3) if "default" in medians else None,
        "peak memory GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.models:
        print(json.dumps(measure(name, args.batch, args.rounds, args.variants)))


if __name__ == "__main__":
    main()
