"""How the tower is computed during synthesis: device, precision, memory layout; not what is asked of images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from d4c_onnx.bfloat16 import multiplies_bfloat16
from d4c_onnx.errors import ModelError


def resolve_device(device: str) -> torch.device:
    """cpu, cuda or auto to a torch device.

    Raises:
        ModelError: cuda was asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`synthesis.precision` to a dtype; auto is bfloat16 where the hardware multiplies it, else float32."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def prepare_tower(
    tower: nn.Module, device: torch.device, precision: torch.dtype, size: tuple[int, int] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tower as a frozen function: pixel_values float32 [B, 3, H, W] -> embeds float32 [B, D].

    Args:
        tower: see the guide.
        device, precision: of its products.
        size: height and width that it takes, where that is not the images' own.

    Weights get no gradient (only images are optimised), convolutional towers work channels-last, and products run in
    `precision` under autocast; LayerNorms, softmax and losses stay in float32.
    """
    tower = tower.to(device).requires_grad_(False)
    # A ViT's single patch convolution gains nothing from the layout; a stack of convolutions does.
    convolutional = sum(isinstance(module, nn.Conv2d) for module in tower.modules()) > 1
    if convolutional:
        tower = tower.to(memory_format=torch.channels_last)

    def encode(pixel_values: torch.Tensor) -> torch.Tensor:
        if size is not None:
            pixel_values = F.interpolate(pixel_values, size, mode="bilinear", antialias=True, align_corners=False)
        if convolutional:
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            embeds: torch.Tensor = tower(pixel_values)
        return embeds.float()

    return encode
