"""PAE, perturbation-aware enhancement: what an image must survive. Each perturbation is config -> tensor -> tensor.

Source: PAE in arXiv 2511.15411's code. Every one is differentiable, vectorised over the batch, draws per image, and
works in the normalised space; brightness, contrast and saturation act on the de-normalised colours.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Perturbation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def affine(flip: float = 0.5, degrees: float = 15.0, scale: float = 0.05, shift: float = 0.05) -> Perturbation:
    """Random flip (probability), rotation (+- degrees), scale (+- share) and shift (+- share) in one resampling."""

    def apply(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count = len(pixels)
        angle = _uniform(count, -degrees, degrees, generator) * (torch.pi / 180)
        size = 1 + _uniform(count, -scale, scale, generator)
        mirror = 1 - 2 * (torch.rand(count, generator=generator) < flip).float()
        dx, dy = _uniform(count, -2 * shift, 2 * shift, generator), _uniform(count, -2 * shift, 2 * shift, generator)
        cos, sin = angle.cos() / size, angle.sin() / size
        theta = torch.stack([cos * mirror, -sin, dx, sin * mirror, cos, dy], 1).view(-1, 2, 3).to(pixels.device)
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)

    return apply


def color_jitter(mean: torch.Tensor, std: torch.Tensor, strength: float = 0.4) -> Perturbation:
    """Random brightness, contrast and saturation factors in 1 +- strength. mean, std: float32 [3, 1, 1]."""

    def apply(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        factors = _uniform(3 * len(pixels), 1 - strength, 1 + strength, generator).view(3, -1, 1, 1, 1)
        brightness, contrast, saturation = factors.to(pixels.device)
        colors = (pixels * std + mean) * brightness
        center = colors.mean((1, 2, 3), keepdim=True)
        colors = (colors - center) * contrast + center
        grey = colors.mean(1, keepdim=True)
        colors = (colors - grey) * saturation + grey
        return (colors - mean) / std

    return apply


def blur(probability: float = 0.3, sigma: float = 0.8) -> Perturbation:
    """3x3 Gaussian blur of a random part of the batch."""
    taps = torch.exp(-0.5 * (torch.tensor([-1.0, 0.0, 1.0]) / sigma) ** 2)
    taps = taps / taps.sum()

    def apply(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        chosen = (torch.rand(len(pixels), generator=generator) < probability).to(pixels.device).view(-1, 1, 1, 1)
        kernel = torch.outer(taps, taps).to(pixels)[None, None].expand(3, 1, 3, 3)
        smooth = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
        return torch.where(chosen, smooth, pixels)

    return apply


def erase(probability: float = 0.3, side: float = 0.2) -> Perturbation:
    """Set a square of `side` of the image's side to the mean colour, in a random part of the batch."""

    def apply(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        count, _, height, width = pixels.shape
        chosen = torch.rand(count, generator=generator) < probability
        left, top = torch.rand(2, count, generator=generator) * (1 - side)
        x, y = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
        across = (x >= left[:, None]) & (x < left[:, None] + side)
        down = (y >= top[:, None]) & (y < top[:, None] + side)
        hole = (across[:, None, :] & down[:, :, None] & chosen[:, None, None])[:, None]  # [B, 1, H, W]
        return pixels.masked_fill(hole.to(pixels.device), 0.0)

    return apply


def published(mean: torch.Tensor, std: torch.Tensor) -> tuple[Perturbation, ...]:
    """The published list with the published strengths."""
    return (affine(), color_jitter(mean, std), blur(), erase())


def perturb(pixels: torch.Tensor, perturbations: Sequence[Perturbation], generator: torch.Generator) -> torch.Tensor:
    """Apply all in order. pixels: float32 [B, 3, H, W]; draws come from a CPU generator."""
    for perturbation in perturbations:
        pixels = perturbation(pixels, generator)
    return pixels


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(count).uniform_(low, high, generator=generator)
