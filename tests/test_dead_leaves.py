"""Dead leaves: the same pictures for the same seed, inside [0, 1], with the spectrum of photographs."""

import itertools

import numpy as np
import pytest

from d4c_onnx.dead_leaves import dead_leaves


def _amplitude_slope(images: np.ndarray) -> float:
    """Log amplitude over log frequency, between shapes and single pixels. images: [N, 3, H, W]."""
    grey = images.mean(1)
    height, width = grey.shape[1:]
    window = np.hanning(height)[:, None] * np.hanning(width)  # else the border is an edge of its own
    spectrum = np.fft.fft2((grey - grey.mean((1, 2), keepdims=True)) * window)
    power = (np.abs(spectrum) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    edges = np.geomspace(2.5 / min(height, width), 0.4, 8)
    bands = [(frequency >= low) & (frequency < high) for low, high in itertools.pairwise(edges)]
    x = [np.log(frequency[band].mean()) for band in bands]
    y = [np.log(power[band].mean()) / 2 for band in bands]
    return float(np.polyfit(x, y, 1)[0])


def test_a_picture_depends_on_seed_and_number_alone() -> None:
    made = dead_leaves(4, (40, 40), 3)
    assert made.dtype == np.float32
    assert np.array_equal(made, dead_leaves(4, (40, 40), 3))
    assert np.array_equal(made[:2], dead_leaves(2, (40, 40), 3))
    assert not np.array_equal(made, dead_leaves(4, (40, 40), 4))
    assert all(not np.array_equal(made[0], other) for other in made[1:])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (32, 32), (33, 47), (113, 24), (224, 224), (378, 448)])
def test_every_size_is_finite_and_inside(size: tuple[int, int]) -> None:
    made = dead_leaves(2, size, 0)
    assert made.shape == (2, 3, *size)
    assert np.isfinite(made).all()
    assert made.min() >= 0
    assert made.max() <= 1


def test_no_picture_is_empty() -> None:
    assert dead_leaves(16, (32, 32), 0).std((2, 3)).min() > 0.05


@pytest.mark.parametrize("side", [32, 64, 224])
def test_the_spectrum_is_that_of_photographs(side: int) -> None:
    """Photographs' amplitude falls with about 1 / f, pixel noise's with nothing."""
    assert -1.6 < _amplitude_slope(dead_leaves(12, (side, side), 0)) < -0.8
    assert _amplitude_slope(np.random.default_rng(0).random((12, 3, side, side))) > -0.3
