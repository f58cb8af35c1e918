"""Early stopping: when are the images enough?

What calibration takes from images are ranges and second moments of what reaches each layer. After each finished batch
the image tower looks at it once, without gradients. Per weighted layer two things are kept over all images so far: the
range of its inputs, and the spectrum of their second moments (the Hessian of a rounding's square error), sketched by a
fixed random projection, since only its shape is asked for. When another batch changes neither, more images would hardly
change the quantised encoder.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_SKETCH = 32  # dimensions that second moments are projected to
_ROWS = 4096  # input rows of a layer that count at most, evenly spaced


@dataclass(slots=True)
class _Layer:
    """Sums over all images seen: extremes, the projection [inputs, sketch], and the sketched moments."""

    projection: torch.Tensor
    moments: torch.Tensor
    low: float = 0.0  # a grid holds zero anyway
    high: float = 0.0

    def see(self, rows: torch.Tensor) -> None:
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        with torch.autocast(rows.device.type, enabled=False):  # the tower may be running under it
            some = rows[:: -(-len(rows) // _ROWS)] @ self.projection
            self.moments += some.T @ some

    def summary(self) -> tuple[float, torch.Tensor]:
        """The width of the range, and the eigenvalues as shares of their sum."""
        values = torch.linalg.eigvalsh(self.moments.double()).clamp(min=0)
        return self.high - self.low, values / values.sum().clamp(min=1e-30)


class InputStatistics:
    """Ranges and spectra of what reaches the layers of a tower, over all batches shown to it."""

    def __init__(self, tower: nn.Module) -> None:
        self._modules = {
            name: module for name, module in tower.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }
        self._layers: dict[str, _Layer] = {}
        self._before: dict[str, tuple[float, torch.Tensor]] = {}

    def update(self, encode: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor) -> float:
        """Show a finished batch [B, 3, H, W] to the tower.

        Returns:
            By how much it changed the statistics: the mean over layers of the larger of two shares, that of the range's
            width and that of the spectrum (half its L1 distance). Infinite for the first batch.
        """
        handles = [
            module.register_forward_pre_hook(lambda module, inputs, name=name: self._see(name, module, inputs[0]))
            for name, module in self._modules.items()
        ]
        try:
            with torch.no_grad():
                encode(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        now = {name: layer.summary() for name, layer in self._layers.items()}
        before, self._before = self._before, now
        return _change(before, now) if before else float("inf")

    def _see(self, name: str, module: nn.Module, values: torch.Tensor) -> None:
        values = values.detach().float()
        rows = values.movedim(1, -1) if isinstance(module, nn.Conv2d) else values  # channels last
        rows = rows.reshape(-1, rows.shape[-1])
        if name not in self._layers:
            generator = torch.Generator().manual_seed(len(self._layers))
            width = rows.shape[1]
            projection = torch.randn(width, min(width, _SKETCH), generator=generator).to(rows.device) / width**0.5
            self._layers[name] = _Layer(projection, projection.new_zeros(projection.shape[1], projection.shape[1]))
        self._layers[name].see(rows)


def _change(before: dict[str, tuple[float, torch.Tensor]], now: dict[str, tuple[float, torch.Tensor]]) -> float:
    shares = []
    for name, (width, spectrum) in now.items():
        old_width, old_spectrum = before[name]
        wider = (width - old_width) / max(width, 1e-30)
        shares.append(max(wider, float((spectrum - old_spectrum).abs().sum()) / 2))
    return sum(shares) / len(shares)
