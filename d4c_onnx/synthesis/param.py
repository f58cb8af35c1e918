"""What an image is: tensors to optimise, and a function that renders them as pixel_values.

Source: the published code optimises free pixels in the normalised space, started from N(0, I), and lets them leave
[0, 1]. `bounded` keeps them inside by construction and starts near mid grey: what the optimiser does not touch then
stays calm, where the published start leaves full-contrast noise in the image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

BOUNDED_START = 0.3  # sigma of the logits; 1 would start at the contrast of the published N(0, I)


@dataclass(frozen=True, slots=True)
class Images:
    """A batch of images being made: `values` float32 [B, 3, H, W] is the leaf, `render` gives pixel_values of it."""

    values: torch.Tensor
    render: Callable[[torch.Tensor], torch.Tensor]


def start_images(
    kind: str, shape: tuple[int, int, int, int], mean: torch.Tensor, std: torch.Tensor, generator: torch.Generator
) -> Images:
    """Fresh images.

    Args:
        kind: `bounded` or `pixel`.
        shape: [B, 3, H, W].
        mean, std: float32 [3, 1, 1], the model's normalisation; also names the device.
        generator: CPU generator; its draws do not depend on the device.
    """
    noise = torch.randn(shape, generator=generator).to(mean.device)
    if kind == "pixel":
        return Images(noise, lambda values: values)
    return Images(BOUNDED_START * noise, lambda values: (torch.sigmoid(values) - mean) / std)
