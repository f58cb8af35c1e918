"""What rounding keeps between two layers: at most so many bytes in memory, and the same numbers wherever it lies."""

import gc
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from encoders import config_of
from graphs import Feeds, parse

from d4c_onnx.errors import BundleError
from d4c_onnx.graph.model import save_model
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.inside import live
from d4c_onnx.quantization.inside.live import LiveValues
from d4c_onnx.quantization.inside.segments import SegmentedEncoder

TEXT = """net (float[n, 3, 16, 16] x) => (float[n, 4] y) {
    [one] a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, wide, bias)
    b = Relu(a)
    [two] c = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(b, middle, bias)
    d = Add(b, c)
    e = Relu(d)
    [three] f = Conv<kernel_shape = [1, 1]>(e, narrow, bias)
    g = GlobalAveragePool(f)
    h = Flatten(g)
    [last] y = MatMul(h, final)
}"""
SHAPES = {"wide": (8, 3, 3, 3), "middle": (8, 8, 3, 3), "narrow": (8, 8, 1, 1), "final": (8, 4), "bias": (8,)}
MAP = 8 * 16 * 16 * 4  # bytes of one image between two convolutions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where values lie that are not in memory."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def _model(rng: np.random.Generator):
    return parse(TEXT, **{name: rng.standard_normal(shape) for name, shape in SHAPES.items()})


def _batches(rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal((2, 3, 16, 16)).astype(np.float32) for _ in range(6)]


def _files(folder: Path) -> list[Path]:
    return list(folder.rglob("*.npy"))


def test_memory_is_bounded_and_nothing_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    model, batches = _model(rng), _batches(rng)
    whole = SegmentedEncoder(model, Feeds(batches))
    steps = (["a"], ["c", "b"], ["d"], ["f"], ["y"])
    expected = [list(whole.advance(names)) for names in steps[:2]]
    assert whole.held_bytes > 5 * 2 * MAP  # the limit below is less than what there is
    assert not _files(folder)
    expected += [list(whole.advance(names)) for names in steps[2:]]
    limit = 3 * 2 * MAP
    monkeypatch.setattr(live, "HELD_BYTES", limit)
    bounded, seen_on_disk = SegmentedEncoder(model, Feeds(batches)), 0
    for names, wanted in zip(steps, expected, strict=True):
        for found, whole_batch in zip(bounded.advance(names), wanted, strict=True):
            assert all(np.array_equal(found[name], whole_batch[name]) for name in names)
            assert bounded.held_bytes <= limit
            seen_on_disk = max(seen_on_disk, len(_files(folder)))
    assert seen_on_disk >= 3
    assert not _files(folder)  # what no layer reads any more is gone, and so is the folder with the encoder
    del bounded
    gc.collect()
    assert not list(folder.iterdir())


def test_an_encoder_is_the_same_bit_by_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    save_model(_model(rng), tmp_path / "float.onnx")
    batches, made = _batches(rng), []
    for limit in (live.HELD_BYTES, 0):
        monkeypatch.setattr(live, "HELD_BYTES", limit)
        path = tmp_path / f"{limit}.onnx"
        quantize_encoder(tmp_path / "float.onnx", path, Feeds(batches), config_of("bits=w4a8", "rounding=gptaq"))
        made.append(path.read_bytes())
    assert made[0] == made[1]
    assert not list(folder.iterdir())


def test_values_come_back_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "HELD_BYTES", 8)
    values = LiveValues()
    values.append({"small": np.arange(2, dtype=np.int32), "ids": np.arange(9), "dead": np.float32([np.nan, -0.0, 1])})
    assert values.held_bytes == 8
    assert len(_files(folder)) == 2
    values.update(0, {"new": np.ones((2, 0), np.float32), "small": np.zeros(1, np.int8)}, {"new", "small", "ids"})
    back = values.read(0)
    assert {name: (array.dtype, array.shape) for name, array in back.items()} == {
        "ids": (np.dtype(np.int64), (9,)),
        "new": (np.dtype(np.float32), (2, 0)),
        "small": (np.dtype(np.int8), (1,)),
    }
    assert values.held_bytes == 1
    assert len(_files(folder)) == 1


def test_a_full_disk_is_told_with_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    monkeypatch.setattr(live, "HELD_BYTES", 0)
    values, limits = LiveValues(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(BundleError, match=r"temporary: no space left .*TMPDIR"):
            values.append({"a": np.zeros(10_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(BundleError, match=r"temporary: .* are needed there .*TMPDIR"):
        values.append({"a": np.zeros(10_000, np.float32)})
