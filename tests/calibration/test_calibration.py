"""Readers and observers: streaming, rewinding, grouping by length; ranges of least error."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet, D4CCalibrationDataReader, PromptCalibrationDataReader
from d4c_onnx.calibration.observers import RangeObserver, quant_params
from d4c_onnx.errors import CalibrationError
from d4c_onnx.runtime.session import EncoderSession


def _drain(reader) -> list[np.ndarray]:
    batches = []
    while (feed := reader.get_next()) is not None:
        batches.extend(feed.values())
    return batches


def test_image_reader_streams_every_image_once(vit_calibration: tuple[Path, CalibrationSet]) -> None:
    path, made = vit_calibration
    reader = D4CCalibrationDataReader(path, batch=3)
    assert isinstance(reader, CalibrationDataReader)
    first = _drain(reader)
    assert [len(batch) for batch in first] == [3, 3, 2]
    assert np.array_equal(np.concatenate(first), made.pixel_values)
    assert reader.get_next() is None
    reader.rewind()
    assert np.array_equal(np.concatenate(_drain(reader)), made.pixel_values)
    assert len(reader) == 3


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=30), st.integers(1, 5))
def test_prompt_batches_hold_no_padding_and_lose_nothing(rows: list[list[int]], batch: int) -> None:
    batches = _drain(PromptCalibrationDataReader(rows, batch))
    assert sorted(tuple(row) for part in batches for row in part.tolist()) == sorted(tuple(row) for row in rows)
    assert all(1 <= len(part) <= batch and part.dtype == np.int64 for part in batches)


def test_fixed_length_pads() -> None:
    (batch,) = _drain(PromptCalibrationDataReader([[1, 2], [3]], 8, fixed_length=4))
    assert batch.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    (batch,) = _drain(PromptCalibrationDataReader([[0, 2], [3]], 8, fixed_length=3, pad_id=1))
    assert batch.tolist() == [[0, 2, 1], [3, 1, 1]]


def test_empty_sets_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no prompt"):
        PromptCalibrationDataReader([])
    with pytest.raises(CalibrationError, match="not a complete"):
        D4CCalibrationDataReader("/nowhere")


def test_readers_serve_plain_quantize_static(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    """As the README shows: onnxruntime alone, our readers, nothing else of ours."""
    path, made = vit_calibration
    quantize_static(str(vit_bundle.image_encoder), str(tmp_path / "i.onnx"), D4CCalibrationDataReader(path))
    quantize_static(str(vit_bundle.text_encoder), str(tmp_path / "t.onnx"), PromptCalibrationDataReader(path))
    got = EncoderSession(tmp_path / "i.onnx").run(np.array(made.pixel_values[:2]))
    expected = EncoderSession(vit_bundle.image_encoder).run(np.array(made.pixel_values[:2]))
    assert float((got * expected).sum(1).min()) > 0.9
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "t.onnx").graph.node)


@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.sampled_from([4, 6, 8]))
def test_grid_holds_zero_and_covers_the_range(a: float, b: float, num_bits: int) -> None:
    low, high = min(a, b), max(a, b)
    params = quant_params(low, high, num_bits)
    assert 0 <= params.zero_point <= 2**num_bits - 1
    assert params.scale > 0
    bottom, top = params.range
    assert bottom <= 0 <= top
    assert bottom <= low + params.scale
    assert top >= high - params.scale


@example(np.array([1e-45, 0], np.float32), 4)
@given(
    hnp.arrays(np.float32, st.integers(2, 200), elements=st.floats(-50, 50, width=32)),
    st.sampled_from([4, 6, 8]),
)
@settings(deadline=None)
def test_mse_range_is_never_much_worse_than_minmax(values: np.ndarray, num_bits: int) -> None:
    observer = RangeObserver()
    for half in np.array_split(values, 2):
        observer.observe_extremes(half)
    for half in np.array_split(values, 2):
        observer.observe_histogram(half)

    def error(params) -> float:
        integers = np.clip(np.rint(values / params.scale) + params.zero_point, 0, 2**num_bits - 1)
        return float(np.square((integers - params.zero_point) * params.scale - values).sum())

    # a histogram bin is all the search sees of a value
    slack = len(values) * ((observer.high - observer.low) / 2048) ** 2 * 2 ** (8 - num_bits) * 64
    assert error(observer.mse(num_bits)) <= error(observer.minmax(num_bits)) * 1.05 + slack


def test_mse_cuts_an_outlier_at_four_bits(rng: np.random.Generator) -> None:
    values = rng.standard_normal(100_000).astype(np.float32)
    values[0] = 60.0
    observer = RangeObserver()
    observer.observe_extremes(values)
    observer.observe_histogram(values)
    assert observer.mse(4).range[1] < 10 < observer.minmax(4).range[1]


def test_observer_refuses_what_is_not_finite() -> None:
    with pytest.raises(CalibrationError, match="not finite"):
        RangeObserver().observe_extremes(np.array([1.0, np.nan], np.float32))


def test_constant_tensors_get_a_usable_grid() -> None:
    for constant in (0.0, 3.0, -2.0):
        observer = RangeObserver()
        observer.observe_extremes(np.full(5, constant, np.float32))
        observer.observe_histogram(np.full(5, constant, np.float32))
        for params in (observer.minmax(8), observer.mse(8)):
            assert params.scale > 0
            low, high = params.range
            assert low - 1e-6 <= constant <= high + 1e-6
