"""Views of calibration images: what a weight is rounded for when there are few images."""

import numpy as np
import pytest
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.image_views import views
from d4c_onnx.calibration.readers import OneBatchReader, ViewsReader


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 12, 10)).astype(np.float32)


def _all(reader: CalibrationDataReader) -> np.ndarray:
    reader.rewind()
    return np.concatenate([batch for feed in iter(reader.get_next, None) for batch in feed.values()])


def test_a_view_is_a_part_of_its_own_image() -> None:
    flat = np.arange(4, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 12, 10), np.float32)
    assert np.allclose(views(flat, 0), flat, atol=1e-5)
    ramp = np.broadcast_to(np.linspace(-1, 1, 10, dtype=np.float32), (64, 3, 12, 10))
    seen = views(ramp, 0)
    assert seen.shape == ramp.shape
    assert seen.dtype == np.float32
    assert -1.1 < seen.min() < seen.max() < 1.1
    rises = seen[:, 0, 0, -1] - seen[:, 0, 0, 0]
    assert (rises > 0).any()
    assert (rises < 0).any()  # mirrored
    assert np.abs(rises).min() < 1.5 < np.abs(rises).max()  # of small parts and large ones


def test_views_are_the_same_for_a_seed() -> None:
    images = _images(3)
    assert np.array_equal(views(images, (1, 2)), views(images, (1, 2)))
    assert not np.array_equal(views(images, (1, 2)), views(images, (2, 2)))


@pytest.mark.parametrize(("count", "at_least", "total"), [(3, 8, 9), (3, 3, 3), (4, 1, 4), (3, 4, 6), (3, 256, 12)])
def test_few_images_come_again_as_views(count: int, at_least: int, total: int) -> None:
    images = _images(count)
    reader = ViewsReader(OneBatchReader(images, "pixel_values"), at_least)
    first, second = _all(reader), _all(reader)
    assert len(first) == total
    assert np.array_equal(first, second)
    assert np.array_equal(first[:count], images)
    rounds = first.reshape(-1, count, 3, 12, 10)
    assert all(not np.array_equal(rounds[0], other) for other in rounds[1:])
    assert len(reader) == len(rounds)


def test_texts_have_no_views() -> None:
    ids = np.array([[1, 2, 3]])
    assert np.array_equal(_all(ViewsReader(OneBatchReader(ids, "input_ids"), 256)), ids)
