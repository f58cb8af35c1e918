"""A ViT that looks at smaller pictures: timm resamples its positions, as fine-tuning at another resolution does it.

A picture of half the side has a quarter of the patches, and a gradient through the tower takes a quarter of the time.
"""

from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import nn

from d4c_onnx.models.towers import ImageTower


def shrink_input(tower: ImageTower, most: int) -> tuple[int, int] | None:
    """Let a tower of more than `most` patches a side look at pictures of at most that many, in place.

    Returns:
        Height and width in pixels that it takes now; None where it stays as it is: it has no more patches than that,
        or is no ViT of open_clip or timm.
    """
    visual: Any = tower.visual
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        return _shrink_timm(trunk, most)
    grid, patch = getattr(visual, "grid_size", None), getattr(visual, "patch_size", None)
    positions = getattr(visual, "positional_embedding", None)
    if not (grid and patch and isinstance(positions, nn.Parameter)) or max(grid) <= most:
        return None
    smaller = _smaller(grid, most)
    before = len(positions) - grid[0] * grid[1]  # the class token's
    resampled = resample_abs_pos_embed(positions[None], smaller, grid, before)[0]
    visual.positional_embedding = nn.Parameter(resampled, requires_grad=False)
    visual.grid_size = smaller[0], smaller[1]
    return smaller[0] * patch[0], smaller[1] * patch[1]


def _shrink_timm(trunk: Any, most: int) -> tuple[int, int] | None:
    """timm's own way, where the model is a ViT that has one; windows, and patches that a conv net makes, are others."""
    embed = getattr(trunk, "patch_embed", None)
    grid, patch = getattr(embed, "grid_size", None), getattr(embed, "patch_size", None)
    plain = isinstance(getattr(embed, "proj", None), nn.Conv2d) and hasattr(trunk, "set_input_size")
    whole = isinstance(getattr(trunk, "pos_embed", None), nn.Parameter) and hasattr(trunk, "blocks")
    if not (plain and whole and grid and patch) or max(grid) <= most:
        return None
    height, width = (side * size for side, size in zip(_smaller(grid, most), patch, strict=True))
    trunk.set_input_size((height, width))
    return height, width


def _smaller(grid: tuple[int, int], most: int) -> list[int]:
    """As many patches a side as are allowed, in the same shape."""
    return [max(1, round(side * most / max(grid))) for side in grid]
