"""The views of an image that SCG needs: its foreground box at full size, and its background with the box cut out.

Vectorised over the batch: one grid_sample, one mask. Source: SCG in arXiv 2511.15411's code, where one box per image
is drawn once, with an area of U(0.4, 0.7) of the image.
"""

import torch
import torch.nn.functional as F


def draw_boxes(count: int, area: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    """Boxes float32 [count, 4] as (left, top, right, bottom) in 0..1; area uniform, aspect ratio within 3/4 .. 4/3."""
    share = torch.empty(count).uniform_(*area, generator=generator)
    aspect = torch.exp(torch.empty(count).uniform_(-0.2877, 0.2877, generator=generator))  # log(4/3) = 0.2877
    width = (share * aspect).sqrt().clamp(max=1)
    height = (share / width).clamp(max=1)
    left = torch.rand(count, generator=generator) * (1 - width)
    top = torch.rand(count, generator=generator) * (1 - height)
    return torch.stack([left, top, left + width, top + height], 1)


def crop_boxes(pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Each image's box, resized bilinearly to the image's own size. pixels: [B, 3, H, W]."""
    left, top, right, bottom = (boxes * 2 - 1).unbind(1)  # grid_sample's coordinates run from -1 to 1
    zero = torch.zeros_like(left)
    theta = torch.stack(
        [(right - left) / 2, zero, (right + left) / 2, zero, (bottom - top) / 2, (bottom + top) / 2], 1
    ).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def cut_boxes(pixels: torch.Tensor, boxes: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The background: zero (the mean colour) inside the box, then noise over all. noise: like pixels."""
    height, width = pixels.shape[2:]
    x = (torch.arange(width, device=pixels.device) + 0.5) / width
    y = (torch.arange(height, device=pixels.device) + 0.5) / height
    left, top, right, bottom = boxes[:, :, None].unbind(1)  # each [B, 1]
    inside_x, inside_y = (x >= left) & (x < right), (y >= top) & (y < bottom)
    inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]  # [B, 1, H, W]
    return pixels.masked_fill(inside, 0.0) + noise
