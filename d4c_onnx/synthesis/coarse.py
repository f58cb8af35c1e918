"""Images looked at in half the resolution: large shapes can be found there at a fraction of the cost.

A CLIP tower takes other sizes than its own when its positional embedding is resized, as for fine-tuning in a higher
resolution (Source: ViT, arXiv 2010.11929, section 3.2). Nothing is trained here, and the images themselves keep their
full resolution: what is made smaller is what the tower sees of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d4c_onnx.errors import RecipeError


@dataclass(frozen=True, slots=True)
class CoarseView:
    """How a tower sees smaller images.

    Attributes:
        size: height and width in pixels.
        parameters: what replaces the tower's own at that size, by name.
    """

    size: tuple[int, int]
    parameters: dict[str, torch.Tensor]

    def shrink(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixel_values [B, 3, H, W] at this size: means over areas, so that no detail folds back into large shapes."""
        return F.interpolate(pixels, self.size, mode="area")


def coarse_view(tower: nn.Module, size: tuple[int, int]) -> CoarseView:
    """About half the size: half the tokens in each direction, a whole number of them.

    Args:
        tower: an image tower with one positional embedding [1 + tokens, width] (open_clip's ViTs and ResNets).
        size: the tower's own height and width in pixels.

    Raises:
        RecipeError: the tower has no such embedding, or too few tokens.
    """
    found = [(name, value) for name, value in tower.named_parameters() if name.endswith("positional_embedding")]
    if len(found) != 1 or found[0][1].ndim != 2:
        raise RecipeError("synthesis.coarse: this image tower cannot take other sizes. Use coarse: 0.")
    [(name, embedding)] = found
    tokens = len(embedding) - 1
    visual: Any = getattr(tower, "visual", tower)
    side = round(tokens**0.5)
    rows, columns = getattr(visual, "grid_size", (side, side))
    halves = ((rows + 1) // 2, (columns + 1) // 2)
    whole = size[0] % max(1, rows) == 0 and size[1] % max(1, columns) == 0
    if rows * columns != tokens or min(halves) < 2 or not whole:
        raise RecipeError(
            f"synthesis.coarse: {tokens} tokens ({rows} x {columns}) at {size[0]} x {size[1]} pixels cannot be halved. "
            "Use coarse: 0."
        )
    grid = embedding.detach()[1:].T.reshape(1, -1, rows, columns)
    resized = F.interpolate(grid, halves, mode="bicubic", antialias=True, align_corners=False)
    parameters = {name: torch.cat([embedding.detach()[:1], resized.flatten(2)[0].T])}
    return CoarseView((halves[0] * (size[0] // rows), halves[1] * (size[1] // columns)), parameters)
