"""What can still be repaired once the integers are chosen, in closed form: the mean and the gain of every channel.

A layer gave y = W x + b in float and gives W^ x^ + b now. Over the calibration rows the bias that restores the mean is

    b^ = b + W E[x] - W^ E[x^],

and the channel-wise affine a (W^ x^) + b^ of least square error is the regression of y on y^ = W^ x^,

    a = cov(y, y^) / var(y^),      b^ = b + W E[x] - a W^ E[x^].

`a` multiplies the weight's scale, so neither costs anything when the file runs.

Source: bias correction as in Nagel et al., arXiv 1906.04721 (empirical form); the channel-wise gain follows QwT-v2,
folded into the scales.
"""

from dataclasses import replace

import numpy as np

from d4c_onnx.quantization.inside.statistics import InputStatistics
from d4c_onnx.quantization.rounding.base import QuantizedWeight

_GAINS = (0.5, 2.0)  # a regression on a channel that hardly moves must not run away


def correct_mean(weight: np.ndarray, rounded: QuantizedWeight, bias: np.ndarray, found: InputStatistics) -> np.ndarray:
    """The bias that restores the mean output, float32 [channels].

    Args:
        weight: float32 [channels, inputs].
        rounded: the same on its grid.
        bias: float32 [channels].
    """
    mean, mean_quantized = found.means()
    rows = np.split(weight.astype(np.float64), len(mean))
    grid = np.split(rounded.dequantize().astype(np.float64), len(mean))
    shift = [a @ x - b @ y for a, x, b, y in zip(rows, mean, grid, mean_quantized, strict=True)]
    return (bias.astype(np.float64) + np.concatenate(shift)).astype(np.float32)


def correct_affine(
    weight: np.ndarray, rounded: QuantizedWeight, bias: np.ndarray | None, found: InputStatistics
) -> tuple[QuantizedWeight, np.ndarray | None]:
    """The channel-wise affine of least square error; without a bias, the gain alone."""
    grams, crosses = found.moments(centred=bias is not None)
    gains = []
    for rows, grid, gram, cross in zip(
        np.split(weight.astype(np.float64), len(grams)),
        np.split(rounded.dequantize().astype(np.float64), len(grams)),
        grams,
        crosses,
        strict=True,
    ):
        power = np.einsum("ci,ci->c", grid @ gram, grid)
        shared = np.einsum("ci,ci->c", rows @ cross, grid)
        gains.append(np.where(power > 1e-12, shared / np.maximum(power, 1e-12), 1.0))
    gain = np.clip(np.concatenate(gains), *_GAINS)
    scaled = replace(rounded, scale=(rounded.scale * gain).astype(np.float32))
    return scaled, None if bias is None else correct_mean(weight, scaled, bias, found)
