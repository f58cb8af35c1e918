"""Units of work: how a set is divided, what the store keeps, and what a rerun may take from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d4c_onnx.calibration.key import CalibrationKey
from d4c_onnx.errors import BundleError
from d4c_onnx.synthesis.process_group import ProcessGroup
from d4c_onnx.synthesis.units import UnitStore, divide, open_unit_store

COMPUTE = {"device": "cpu", "precision": "float32"}


@given(st.integers(1, 60), st.integers(0, 20), st.integers(1, 70))
def test_units_cover_every_image_once_and_mix_no_kinds(images: int, held_out: int, size: int) -> None:
    units = divide(images, held_out, size)
    assert [number for unit in units for number in range(unit.start, unit.stop)] == list(range(images + held_out))
    assert [unit.number for unit in units] == list(range(len(units)))
    assert all(1 <= len(unit) <= size for unit in units)
    assert all(unit.held_out == (unit.start >= images) for unit in units)
    assert units[: -(-images // size)] == divide(images, 0, size)  # whatever is held out


@given(st.integers(1, 5), st.integers(1, 20))
def test_every_unit_has_one_process(size: int, count: int) -> None:
    group = [ProcessGroup(rank, size) for rank in range(size)]
    assert all(sum(one.owns(number) for one in group) == 1 for number in range(count))


def _filled(target: Path, key: str = "a", **compute: str) -> UnitStore:
    asked = CalibrationKey(1, "0" * 64, 0, {}, None, {}, (), id=key)
    return open_unit_store(target, asked, COMPUTE | compute)


def test_a_finished_unit_is_read_back_and_needs_no_checkpoint(tmp_path: Path) -> None:
    first, second = divide(3, 0, 2)
    store = _filled(tmp_path / "set")
    images, losses = np.random.default_rng(0).random((2, 3, 4, 4), np.float32), {"loss": [2.0, 1.0], "tv": [0.1, 0.2]}
    store.checkpoint(first).write_bytes(b"state")
    store.save(first, images, losses)
    assert store.finished(first)
    assert not store.finished(second)
    assert not store.checkpoint(first).exists()
    made = store.load(first)
    assert made.unit == first
    assert made.losses == losses
    np.testing.assert_array_equal(made.images, images)
    store.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "compute"), [("b", {}), ("a", {"precision": "bfloat16"}), ("a", {"device": "cuda"})])
def test_only_the_same_work_is_resumed(tmp_path: Path, key: str, compute: dict[str, str]) -> None:
    [unit] = divide(1, 0, 1)
    _filled(tmp_path / "set").save(unit, np.zeros((1, 3, 2, 2), np.float32), {"loss": [1.0]})
    assert _filled(tmp_path / "set").finished(unit)
    assert not _filled(tmp_path / "set", key, **compute).finished(unit)
    assert not _filled(tmp_path / "set").finished(unit)  # and what was there is gone


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"[" * 5000, b"\x80\x04cos\nsystem\n."])
def test_a_damaged_unit_is_none_and_a_damaged_key_says_nothing(tmp_path: Path, content: bytes) -> None:
    unit, other = divide(2, 0, 1)
    store = _filled(tmp_path / "set")
    store.save(unit, np.zeros((1, 3, 2, 2), np.float32), {"loss": [1.0]})
    assert store.load(unit) is not None
    assert store.load(other) is None
    (store.folder / "unit-0000.npz").write_bytes(content)
    assert store.load(unit) is None
    store.save(unit, np.zeros((2, 3, 2, 2), np.float32), {"loss": [1.0]})  # of as many images as it has not
    assert store.load(unit) is None
    (store.folder / "key.json").write_bytes(content)
    assert not _filled(tmp_path / "set").finished(unit)


def test_another_number_of_threads_is_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [unit] = divide(1, 0, 1)
    _filled(tmp_path / "set").save(unit, np.zeros((1, 3, 2, 2), np.float32), {"loss": [1.0]})
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert not _filled(tmp_path / "set").finished(unit)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="file"):
        _filled(tmp_path / "file" / "set")
