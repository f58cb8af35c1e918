"""What an image is: a tensor to optimise, and a function that renders it as pixel_values.

Source: the published code optimises free pixels in the normalised space, started from N(0, I), and lets them leave
[0, 1]. All other kinds are logits under a sigmoid, which keeps pixels inside by construction, and start near mid grey:
what the optimiser does not touch then stays calm, where the published start leaves full-contrast noise in the image.
`pyramid` sums one tensor per resolution, `fourier` scales the spectrum with 1 / f (as lucid does): in both, one step
moves large shapes as easily as single pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

BOUNDED_START = 0.3  # sigma of the logits; 1 would start at the contrast of the published N(0, I)
_COARSEST = 3  # pixels; a pyramid's smallest level


@dataclass(frozen=True, slots=True)
class Images:
    """A batch of images being made: `values` float32 [B, ...] is the leaf, `render` gives pixel_values of (some of) it.

    pixel_values are float32 [B, 3, H, W].
    """

    values: torch.Tensor
    render: Callable[[torch.Tensor], torch.Tensor]


def start_images(
    kind: str, shape: tuple[int, int, int, int], mean: torch.Tensor, std: torch.Tensor, generator: torch.Generator
) -> Images:
    """Fresh images.

    Args:
        kind: `bounded`, `pixel`, `pyramid` or `fourier`.
        shape: [B, 3, H, W].
        mean, std: float32 [3, 1, 1], the model's normalisation; also names the device.
        generator: CPU generator; its draws do not depend on the device.
    """

    def bounded(logits: torch.Tensor) -> torch.Tensor:
        return (torch.sigmoid(logits) - mean) / std

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(mean.device)

    count, channels, height, width = shape
    if kind == "pixel":
        return Images(noise(*shape), lambda values: values)
    if kind == "bounded":
        return Images(BOUNDED_START * noise(*shape), bounded)
    if kind == "pyramid":
        levels = pyramid_levels(height, width)
        share = BOUNDED_START / len(levels) ** 0.5
        flat = torch.cat([share * noise(count, channels * h * w) for h, w in levels], 1)
        return Images(flat, lambda values: bounded(sum_pyramid(values, levels)))
    spectrum = BOUNDED_START * noise(count, channels, height, width // 2 + 1, 2)
    scale = fourier_scale(height, width).to(mean.device)
    return Images(
        spectrum,
        lambda values: bounded(
            torch.fft.irfft2(torch.view_as_complex(values.contiguous()) * scale, s=(height, width), norm="ortho")
        ),
    )


def pyramid_levels(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes from the full one down, halved while the short side keeps three pixels."""
    levels = [(height, width)]
    while min(levels[-1]) // 2 >= _COARSEST:
        levels.append((levels[-1][0] // 2, levels[-1][1] // 2))
    return levels


def sum_pyramid(flat: torch.Tensor, levels: list[tuple[int, int]]) -> torch.Tensor:
    """Levels [B, 3 * sum(h * w)] enlarged bilinearly to the first one's size and added up: [B, 3, H, W]."""
    parts = flat.split([3 * h * w for h, w in levels], 1)
    total = parts[0].reshape(-1, 3, *levels[0])
    for part, (h, w) in zip(parts[1:], levels[1:], strict=True):
        total = total + F.interpolate(part.reshape(-1, 3, h, w), levels[0], mode="bilinear", align_corners=False)
    return total


def fourier_scale(height: int, width: int) -> torch.Tensor:
    """1 / f for each coefficient of rfft2, float32 [H, W // 2 + 1]; unit coefficients render with unit variance."""
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    scale = 1 / frequency.clamp(min=1 / max(height, width))
    # Complex coefficients of variance 2: a pixel takes twice the real part of each, and once that of the two columns
    # that are their own mirror image.
    weight = torch.full((width // 2 + 1,), 4.0)
    weight[0] = 1
    if width % 2 == 0:
        weight[-1] = 1
    return scale / ((scale.square() * weight).sum() / (height * width)).sqrt()
