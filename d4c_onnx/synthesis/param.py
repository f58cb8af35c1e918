"""What an image is: a tensor to optimise, and a function that renders it as pixel_values.

Source: the published code optimises free pixels in the normalised space (`pixel`), started from N(0, I), and lets them
leave [0, 1]. `fourier` optimises the spectrum of logits, scaled with 1 / f (as lucid does): one step moves large shapes
as easily as single pixels. A sigmoid keeps pixels inside by construction. Logits start near mid grey: what nothing
touches then stays calm, where the published start leaves full-contrast noise in the image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

_START = 0.3  # sigma of the logits; 1 would start at the contrast of the published N(0, I)
_CONTRAST = 0.9  # of pictures to start from: a sigmoid does not reach 0 and 1, and hardly moves beside them


@dataclass(frozen=True, slots=True)
class Images:
    """A batch of images being made: `values` float32 [B, ...] is the leaf, `render` gives pixel_values of (some of) it.

    pixel_values are float32 [B, 3, H, W].
    """

    values: torch.Tensor
    render: Callable[[torch.Tensor], torch.Tensor]


def start_images(
    kind: str,
    shape: tuple[int, int, int, int],
    mean: torch.Tensor,
    std: torch.Tensor,
    generator: torch.Generator,
    pictures: torch.Tensor | None = None,
) -> Images:
    """Fresh images: noise, unless `pictures` are given.

    Args:
        kind: `fourier` or `pixel`.
        shape: [B, 3, H, W].
        mean, std: float32 [3, 1, 1], the model's normalisation; also names the device.
        generator: CPU generator; its draws do not depend on the device.
        pictures: float32 [B, 3, H, W] in 0..1, what to start from.
    """

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(mean.device)

    count, channels, height, width = shape
    if kind == "pixel":
        start = noise(*shape) if pictures is None else (pictures.to(mean.device) - mean) / std
        return Images(start, lambda values: values)
    scale = fourier_scale(height, width).to(mean.device)

    def render(values: torch.Tensor) -> torch.Tensor:
        spectrum = torch.view_as_complex(values.contiguous()) * scale
        return (torch.sigmoid(torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")) - mean) / std

    if pictures is None:
        return Images(_START * noise(count, channels, height, width // 2 + 1, 2), render)
    logits = torch.logit(0.5 + _CONTRAST * (pictures.to(mean.device) - 0.5))
    return Images(torch.view_as_real(torch.fft.rfft2(logits, norm="ortho") / scale).contiguous(), render)


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
