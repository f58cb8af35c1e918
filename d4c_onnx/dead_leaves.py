"""Dead leaves: pictures of textured shapes that cover each other, made of random numbers alone.

Photographs are full of things in front of other things, of all sizes. Shapes that cover each other, with radii of
density r^-3, have the statistics that follow from it: edges, calm regions beside busy ones, amplitudes that fall with
about 1 / f (Lee, Mumford and Huang, Int. J. Computer Vision 41, 2001). What networks learn from such pictures alone
serves on photographs (Baradad et al., arXiv 2106.05963); here a network that has learned is shown them. Never torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_SMALLEST, _LARGEST = 1 / 50, 1 / 2.2  # radii, as shares of the image's shorter side
_COVER = 4.0  # summed area of all leaves, in images: exp(-4) of the pixels show what lies behind them all
_LEAF_AREA = 2.35  # mean over the shapes below, in squared radii
_STRETCH = 2.0  # at most, and its inverse at least
_FIELDS = 3  # 1 / f textures that the leaves of one image share
_FINEST = 112  # a shorter side below this is drawn at a multiple of it, at least this, and averaged: no jagged leaves
_CHUNK = 1 << 17  # pixels of the windows that are filled at once: arrays stay in the cache


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Where the leaves of one image lie, the one on top first; the last is the ground, which lies everywhere.

    Attributes:
        center: float32 [2, N], y and x in pixels.
        frame: float32 [2, 2, N]: an offset from the center, y and x, to u and v, in which a leaf has radius 1.
        reach: float32 [N]: no pixel of a leaf is further from its center along an axis.
        shape: int [N], which of `_SHAPES`.
    """

    center: np.ndarray
    frame: np.ndarray
    reach: np.ndarray
    shape: np.ndarray


@dataclass(frozen=True, slots=True)
class _Surfaces:
    """What the leaves of one image look like.

    Attributes:
        color: float32 [3, N].
        contrast: float32 [3, N], of the texture; 0 where a leaf is flat.
        texture: int [N]. 0: a ramp, 1: a grating, from 2 on: one of the fields.
        wave: float32 [3, N]: ramp and grating are made of y * wave[0] + x * wave[1] + wave[2].
    """

    color: np.ndarray
    contrast: np.ndarray
    texture: np.ndarray
    wave: np.ndarray


def _disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u * u + v * v < 1


def _rectangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) < 0.9


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (v > -0.6) & (v + 1.7 * np.abs(u) < 1)


def _three_lobes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    distance = np.sqrt(u * u + v * v) + 1e-6
    cosine = u / distance
    return distance < 0.75 + 0.25 * cosine * (4 * cosine * cosine - 3)  # cos(3 phi)


def _five_lobes(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    distance = np.sqrt(u * u + v * v) + 1e-6
    cosine = u / distance
    square = cosine * cosine
    return distance < 0.75 + 0.25 * cosine * ((16 * square - 20) * square + 5)  # cos(5 phi)


# Whether (u, v) is inside, how far it reaches, and how often it is drawn
_SHAPES = (
    (_disc, 1.0, 0.25),
    (_rectangle, 0.9 * 2**0.5, 0.25),
    (_triangle, 1.12, 0.25),
    (_three_lobes, 1.0, 0.125),
    (_five_lobes, 1.0, 0.125),
)


def dead_leaves(count: int, size: tuple[int, int], seed: int, first: int = 0) -> np.ndarray:
    """Pictures, float32 [count, 3, H, W] in 0..1; a picture depends on seed and number, not on how many there are.

    Args:
        size: height and width in pixels.
        first: number of the first picture.
    """
    images = np.empty((count, 3, *size), np.float32)
    for number, image in enumerate(images, first):
        image[:] = _picture(np.random.default_rng([seed, 7, number]), *size)
    return images


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """One image, float32 [3, H, W] in 0..1."""
    factor = -(-_FINEST // min(height, width))
    size = factor * height, factor * width
    leaves = _draw_leaves(rng, *size)
    surfaces, fields = _draw_surfaces(rng, leaves), _draw_fields(rng, *size)
    image = _paint(surfaces, _on_top(leaves, *size), fields)
    rows, columns = (np.linspace(-0.5, 0.5, side, dtype=np.float32) for side in size)
    slope = rng.normal(0, 0.15, 2).astype(np.float32)
    image += 0.03 * fields[0] + slope[0] * rows[:, None] + slope[1] * columns  # light
    image = image.reshape(3, height, factor, width, factor).mean((2, 4))
    return np.clip(_soften(image, rng.uniform(0, 0.25)), 0, 1)


def _draw_leaves(rng: np.random.Generator, height: int, width: int) -> _Leaves:
    shorter = min(height, width)
    least, most = 1 / (shorter * _LARGEST) ** 2, 1 / (shorter * _SMALLEST) ** 2
    mean_square = np.log(most / least) / (most - least)
    count = 1 + int(np.ceil(_COVER * height * width / (_LEAF_AREA * mean_square)))
    radius = 1 / np.sqrt(rng.uniform(least, most, count))  # of density r^-3
    radius[-1] = shorter
    center = rng.uniform(0, 1, (2, count)) * [[height], [width]] - 0.5
    stretch = np.exp(rng.normal(0, 0.4, count)).clip(1 / _STRETCH, _STRETCH)
    angle = rng.uniform(0, 2 * np.pi, count)
    sine, cosine = np.sin(angle), np.cos(angle)
    frame = np.array([[sine / stretch, cosine / stretch], [cosine * stretch, -sine * stretch]]) / radius
    shape = rng.choice(len(_SHAPES), count, p=[often for _, _, often in _SHAPES])
    reach = radius * np.maximum(stretch, 1 / stretch) * np.array([reach for _, reach, _ in _SHAPES])[shape]
    return _Leaves(center.astype(np.float32), frame.astype(np.float32), reach.astype(np.float32), shape)


def _draw_surfaces(rng: np.random.Generator, leaves: _Leaves) -> _Surfaces:
    count = len(leaves.shape)
    grey = np.clip(rng.beta(0.8, 0.8, count) + rng.normal(0, 0.12, (3, count)), 0, 1)
    color = np.where(rng.random(count) < 0.5, rng.beta(0.8, 0.8, (3, count)), grey)
    contrast = rng.gamma(1.5, 0.06, count) * rng.uniform(0.5, 1.5, (3, count)) * (rng.random(count) < 0.75)
    kind = rng.integers(0, 3, count)
    texture = np.where(kind == 2, 2 + rng.integers(0, _FIELDS, count), kind)
    direction, frequency = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.1, 1.2, count)
    grating = frequency * np.array([np.sin(direction), np.cos(direction)])
    slope = np.where(texture == 0, leaves.frame[0], grating)
    offset = np.where(texture == 0, -(slope * leaves.center).sum(0), rng.uniform(0, 2 * np.pi, count))
    wave = np.concatenate([slope, offset[None]])
    return _Surfaces(color.astype(np.float32), contrast.astype(np.float32), texture, wave.astype(np.float32))


def _draw_fields(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise whose amplitude falls with a power of the frequency: float32 [_FIELDS, H, W] of unit variance."""
    frequency = frequencies(height, width)
    power = rng.uniform(0.6, 1.8, (_FIELDS, 1, 1))
    spectrum = rng.standard_normal((_FIELDS, *frequency.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    fields = np.fft.irfft2(spectrum * (frequency**-power).astype(np.float32), s=(height, width))
    return (fields / (fields.std((1, 2), keepdims=True) + 1e-12)).astype(np.float32)


def _on_top(leaves: _Leaves, height: int, width: int) -> np.ndarray:
    """The leaf that each pixel shows: int [H, W]."""
    ground = len(leaves.shape) - 1
    top = np.full(height * width, ground)
    for inside, chosen, sides in _windows(leaves, height, width):
        starts, offsets = [], []
        for side, length, center in zip(sides, (height, width), leaves.center[:, chosen], strict=True):
            start = np.clip(np.ceil(center - side / 2).astype(int), 0, length - side)
            starts.append(start)
            offsets.append(np.arange(side, dtype=np.float32) + (start - center)[:, None])
        y, x = offsets[0][:, :, None], offsets[1][:, None, :]
        frame = leaves.frame[:, :, chosen, None, None]
        shown = inside(frame[0, 0] * y + frame[0, 1] * x, frame[1, 0] * y + frame[1, 1] * x)
        leaf, place = np.divmod(np.flatnonzero(shown), sides[0] * sides[1])
        row, column = np.divmod(place, sides[1])
        np.minimum.at(top, (starts[0][leaf] + row) * width + starts[1][leaf] + column, chosen[leaf])
    return top.reshape(height, width)


def _windows(leaves: _Leaves, height: int, width: int) -> Iterator[tuple]:
    """Leaves of one shape and of about one size: the shape, which ones, and height and width of a window for each."""
    size = np.ceil(2 * np.log2(leaves.reach[:-1])).astype(int)
    for shape, (inside, _, _) in enumerate(_SHAPES):
        for level in np.unique(size[leaves.shape[:-1] == shape]):
            chosen = np.flatnonzero((leaves.shape[:-1] == shape) & (size == level))
            side = 2 * int(np.ceil(2 ** (level / 2))) + 1
            sides = min(side, height), min(side, width)
            step = max(1, _CHUNK // (sides[0] * sides[1]))
            for start in range(0, len(chosen), step):
                yield inside, chosen[start : start + step], sides


def _paint(surfaces: _Surfaces, top: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Color and texture of the leaf that is on top, float32 [3, H, W]. top: int [H, W]. fields: [_FIELDS, H, W]."""
    rows, columns = np.ogrid[: top.shape[0], : top.shape[1]]
    wave, texture = surfaces.wave, surfaces.texture[top]
    value = wave[0][top] * rows.astype(np.float32) + wave[1][top] * columns.astype(np.float32) + wave[2][top]
    value = np.where(texture == 1, np.sin(value), value)
    value = np.where(texture > 1, fields[np.maximum(texture - 2, 0), rows, columns], value)
    return surfaces.color[:, top] + surfaces.contrast[:, top] * value


def _soften(image: np.ndarray, weight: float) -> np.ndarray:
    """Mix each pixel with its neighbours, twice: a blur of variance 4 * weight in pixels. image: float32 [3, H, W]."""
    for axis in (1, 2, 1, 2):
        before = np.concatenate([image.take([0], axis), image.take(range(image.shape[axis] - 1), axis)], axis)
        after = np.concatenate([image.take(range(1, image.shape[axis]), axis), image.take([-1], axis)], axis)
        image = image + np.float32(weight) * (before + after - 2 * image)
    return image


def frequencies(height: int, width: int) -> np.ndarray:
    """Of every coefficient of `rfft2`, in cycles a pixel, float64 [H, W // 2 + 1]; the mean's counts as infinite."""
    found = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    found[0, 0] = np.inf
    return found
