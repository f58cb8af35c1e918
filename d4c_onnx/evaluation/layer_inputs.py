"""What images do inside an encoder: the range and the effective rank of what reaches each weighted layer.

Calibration images are good when both look like those of served images: the range decides the activation grid, the
spectrum of second moments decides how a learned rounding spends its freedom.
Source of the effective rank: Roy and Vetterli, "The effective rank", EUSIPCO 2007.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import load_model
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.runtime.session import EncoderSession

ROWS_PER_BATCH = 2048  # of a layer's input; a spectrum of some hundred channels needs no more


@dataclass(frozen=True, slots=True)
class LayerInput:
    """What reached one layer.

    Attributes:
        node, op: the layer.
        channels: width of its input; of a Conv, its input channels.
        low, high: extremes over all images.
        effective_rank: exp of the entropy of the normalised eigenvalues of the second moment; 1 to channels.
    """

    node: str
    op: str
    channels: int
    low: float
    high: float
    effective_rank: float


def layer_inputs(
    encoder: Path,
    images: np.ndarray,
    *,
    provider: str = "cpu",
    threads: int = 0,
    batch: int = 16,
    on_step: OnStep = silent,
) -> list[LayerInput]:
    """Run an FP32 image encoder over images and describe every weighted layer's input.

    Args:
        encoder: the .onnx file.
        images: float32 [N, 3, H, W], normalised.

    Returns:
        One entry per layer, in graph order.

    Raises:
        BundleError: the file cannot be loaded.
    """
    model = load_model(encoder)
    layers = weighted_layers(model.graph)
    fed = {str(value.name) for value in model.graph.inputs}
    names = list(dict.fromkeys(layer.data for layer in layers if layer.data not in fed))
    session = EncoderSession.of_model(model, provider, threads, outputs=names)
    # a convolution's channels come first, a product's last: one value may be read both ways
    views = dict.fromkeys((layer.data, layer.op == "Conv") for layer in layers)
    seen = {view: _Sums() for view in views}
    for start in range(0, len(images), batch):
        part = np.ascontiguousarray(images[start : start + batch])
        values = session.run_all(part) | dict.fromkeys(fed, part)
        for name, convolved in views:
            seen[name, convolved].add(_rows(values[name], convolved))
        on_step("activations", min(start + batch, len(images)), len(images), {})
    found = [(layer, seen[layer.data, layer.op == "Conv"]) for layer in layers]
    return [
        LayerInput(layer.node, layer.op, len(sums.moment), sums.low, sums.high, effective_rank(sums.moment))
        for layer, sums in found
    ]


def effective_rank(moment: np.ndarray) -> float:
    """exp of the entropy of the eigenvalues' shares. moment: float64 [C, C], symmetric, positive semi-definite."""
    values = np.linalg.eigvalsh(moment).clip(min=0)
    total = values.sum()
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


class _Sums:
    """Extremes and the sum of x x^T of one value."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.moment = np.zeros((1, 1))

    def add(self, rows: np.ndarray) -> None:
        self.low, self.high = min(self.low, float(rows.min())), max(self.high, float(rows.max()))
        thinned = rows[:: -(-len(rows) // ROWS_PER_BATCH)].astype(np.float64)
        self.moment = self.moment + thinned.T @ thinned


def _rows(value: np.ndarray, convolved: bool) -> np.ndarray:
    """[..., C] or, before a Conv, [B, C, H, W] to [rows, C]."""
    moved = np.moveaxis(value, 1, -1) if convolved else value
    return moved.reshape(-1, moved.shape[-1])
