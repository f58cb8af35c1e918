"""What the tower's activations say about an image: BatchNorm statistics (BNS) and patch similarity (PSE).

Both are published data-free baselines; the first joins D4C's losses on ResNets. Forward hooks keep what one forward
pass shows them for the rows of the whole image, and are emptied when they are read. Without SCG, PAE perturbs the whole
image, and the statistics are those of what it makes of it.

BNS, Source: ZeroQ (arXiv 2001.00281), DeepInversion (arXiv 1912.08795), for ResNets. The published distance is in the
layers' own units; here each channel counts in units of its stored variance: the squared Wasserstein-2 distance of two
Gaussians, ((mean - stored)^2 + (sigma - stored sigma)^2) / stored variance, averaged over channels and layers.

PSE, Source: PSAQ-ViT (arXiv 2203.02250): noise looks the same everywhere, so the cosine similarities between the
patches of one image pile up; a picture with an object and a background spreads them. Maximised is the differential
entropy of their kernel density estimate, per image and block, from the attention outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d4c_onnx.errors import RecipeError

_GRID = 64  # points of the density estimate over similarities in -1..1
_PATCHES = 64  # similarities are quadratic in patches; evenly spaced ones are enough for a density


def keeps_statistics(tower: nn.Module) -> bool:
    """Whether the tower has BatchNorms that remember the training images' means and variances."""
    return any(isinstance(module, nn.BatchNorm2d) and module.track_running_stats for module in tower.modules())


class TowerHooks:
    """Forward hooks on a tower for the named terms.

    Args:
        tower: the image tower.
        names: of `bns` and `pse`, what will be asked for.

    Raises:
        RecipeError: the tower has nothing of that kind.
    """

    def __init__(self, tower: nn.Module, names: frozenset[str]) -> None:
        self._names = sorted(names)
        self._norms: list[tuple[nn.BatchNorm2d, torch.Tensor]] = []
        self._attended: list[torch.Tensor] = []
        self._prefix = 0  # tokens in front of the patches
        if "bns" in names:
            norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
            if not norms:
                raise RecipeError("synthesis, bns: this image tower has no BatchNorm. Use pse, or d4c without bns.")
            for norm in norms:
                norm.register_forward_pre_hook(self._see_norm)
        if "pse" in names:
            visual: Any = getattr(tower, "visual", tower)
            blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
            if blocks is None:
                raise RecipeError("synthesis, pse: this image tower is no open_clip ViT. Use bns, or d4c.")
            height, width = visual.grid_size
            self._prefix = len(visual.positional_embedding) - int(height) * int(width)
            for block in blocks:
                block.attn.register_forward_hook(self._see_attention)

    def read(self, rows: slice) -> dict[str, torch.Tensor]:
        """The terms of the last forward pass, each a float32 scalar, over these rows (whole images) of its batch."""
        values = {name: (self._bns if name == "bns" else self._pse)(rows) for name in self._names}
        self.clear()
        return values

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._norms.clear()
        self._attended.clear()

    def _see_norm(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        self._norms.append((module, inputs[0]))

    def _see_attention(self, _: nn.Module, __: object, output: tuple[torch.Tensor, None]) -> None:
        self._attended.append(output[0])

    def _bns(self, rows: slice) -> torch.Tensor:
        return torch.stack([norm_distance(norm, x[rows].float()) for norm, x in self._norms]).mean()

    def _pse(self, rows: slice) -> torch.Tensor:
        """Minus the mean entropy: losses fall."""
        patches = [x[rows, self._prefix :] for x in self._attended]
        return -torch.stack([patch_entropy(x[:, :: -(-x.shape[1] // _PATCHES)].float()) for x in patches]).mean()


def norm_distance(norm: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Wasserstein distance of a batch to a BatchNorm's stored Gaussians, a scalar.

    Args:
        x: the layer's input, float32 [B, C, H, W].
    """
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise RecipeError("synthesis, bns: a BatchNorm of this model keeps no running statistics.")
    # A dead channel's variance is next to zero; it must not count more than all others together.
    unit = variance + 0.01 * variance.mean() + norm.eps
    sigma = (x.var((0, 2, 3), unbiased=False) + norm.eps).sqrt()
    moved = (x.mean((0, 2, 3)) - mean).square() + (sigma - (variance + norm.eps).sqrt()).square()
    return (moved / unit).mean()


def patch_entropy(patches: torch.Tensor) -> torch.Tensor:
    """Mean differential entropy (nats) of the cosine similarities within each image.

    Args:
        patches: float32 [B, P, W].
    """
    unit = F.normalize(patches, dim=-1)
    similar = (unit @ unit.transpose(1, 2)).flatten(1)  # [B, P * P]
    # Silverman's rule; the floor keeps the gradient finite where all patches are equal
    width = (1.06 * similar.std(1) * similar.shape[1] ** -0.2).clamp(min=0.02)[:, None, None]
    grid = torch.linspace(-1, 1, _GRID, device=patches.device)[None, :, None]
    density = torch.exp(-0.5 * ((grid - similar[:, None]) / width).square()).mean(2)  # [B, grid]
    density = density / density.sum(1, keepdim=True)
    entropy = -(density * density.clamp(min=1e-12).log()).sum(1) + torch.tensor(2 / (_GRID - 1)).log()
    return entropy.mean()
