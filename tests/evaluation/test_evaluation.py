"""Evaluation: intervals against first principles, data sets, zero-shot and fidelity on real files."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.errors import CalibrationError, DatasetError
from d4c_onnx.evaluation.datasets import CIFAR10, LabelledImages, content_sha256, open_dataset, open_images
from d4c_onnx.evaluation.fidelity import evaluate_fidelity
from d4c_onnx.evaluation.intervals import paired_difference
from d4c_onnx.evaluation.zero_shot import evaluate_zero_shot


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_interval_holds_the_difference_and_is_antisymmetric(pairs: list[tuple[bool, bool]]) -> None:
    a, b = (np.array(side) for side in zip(*pairs, strict=True))
    forward, back = paired_difference(a, b), paired_difference(b, a)
    assert forward.points == pytest.approx(100 * (a.mean() - b.mean()))
    assert forward.low <= forward.points <= forward.high
    assert forward.low < forward.high
    assert forward.low == pytest.approx(-back.high)


def test_interval_covers_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        cell = rng.choice(4, size=1000, p=[0.8, 0.03, 0.02, 0.15])
        found = paired_difference((cell == 0) | (cell == 1), (cell == 0) | (cell == 2))
        covered += found.low <= 1.0 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_embedded_set_is_complete() -> None:
    dataset = open_dataset("cifar10")
    assert len(dataset) == 10_000
    assert dataset.classes == CIFAR10
    assert np.array_equal(np.bincount(dataset.labels), np.full(10, 1000))
    assert [image.size for image in next(dataset.batches(2))] == [(32, 32)] * 2


def _small(count: int = 300) -> LabelledImages:
    full = open_dataset("cifar10")
    return full.select(range(count))


def test_zero_shot_of_equal_bundles_is_equal(vit_bundle: Bundle) -> None:
    result = evaluate_zero_shot([vit_bundle, vit_bundle], _small(), batch=64)
    first, second = result.bundles
    assert 50 < first.top1 < 100
    assert first.top5 > first.top1
    versus = second.versus_first
    assert versus.top1_difference.points == 0
    assert versus.agreement == 100
    assert versus.cosine_image == pytest.approx(1, abs=1e-6)
    assert versus.similarity_rmse < 1e-6


def test_zero_shot_equals_torch(vit_bundle: Bundle, mini_vit) -> None:
    """The same answers as the plain open_clip way, in torch, with open_clip's own transform."""
    import open_clip
    import torch
    import torch.nn.functional as F

    from d4c_onnx.vocabulary import templates

    dataset = _small(200)
    transform = open_clip.image_transform(48, is_train=False)
    with torch.no_grad():
        prompts = [torch.from_numpy(mini_vit.tokenize([t.format(c) for t in templates()])) for c in dataset.classes]
        texts = torch.stack(
            [F.normalize(mini_vit.model.encode_text(p, normalize=True).mean(0), dim=-1) for p in prompts]
        )
        pixels = torch.stack([transform(image) for batch in dataset.batches(50) for image in batch])
        expected = (mini_vit.model.encode_image(pixels, normalize=True) @ texts.T).argmax(1).numpy()
    result = evaluate_zero_shot([vit_bundle], dataset)
    assert result.bundles[0].top1 == pytest.approx(100 * (expected == dataset.labels).mean(), abs=0.51)


def test_fidelity_is_label_free(vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]) -> None:
    result = evaluate_fidelity([vit_bundle, vit_bundle], vit_calibration[1])
    assert result.kind == "fidelity"
    assert "top1" not in json.dumps(result.as_dict())
    assert result.bundles[1].versus_first.agreement == 100


def test_fidelity_needs_something_held_out(vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]) -> None:
    import dataclasses

    empty = dataclasses.replace(vit_calibration[1], held_out_texts=())
    with pytest.raises(CalibrationError, match="held_out"):
        evaluate_fidelity([vit_bundle], empty)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, labels: list[object], image: bytes | None = None) -> Path:
    rows = [{"bytes": image or _png(), "path": None} for _ in labels]
    pq.write_table(pa.table({"image": rows, "label": labels}), path)
    return path


def test_user_parquet(tmp_path: Path) -> None:
    path = _write(tmp_path / "own.parquet", [0, 1, 1])
    with pytest.raises(DatasetError, match=r"own\.parquet\.classes\.txt"):
        open_dataset(str(path))
    (tmp_path / "own.parquet.classes.txt").write_text("cat\ndog\n")
    dataset = open_dataset(str(path))
    assert (len(dataset), dataset.classes) == (3, ("cat", "dog"))


def test_class_names_have_a_length(tmp_path: Path) -> None:
    """A tokenizer is at a word of a megabyte for minutes."""
    path = _write(tmp_path / "own.parquet", [0, 1])
    told = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "x" * 10**6]}}}})}
    pq.write_table(pq.read_table(path).replace_schema_metadata(told), path)
    for _ in range(2):
        with pytest.raises(DatasetError, match="a class name has 1,000,000 characters"):
            open_dataset(str(path))
        (tmp_path / "own.parquet.classes.txt").write_text("cat\n" + "x" * 10**6)


@pytest.mark.parametrize(("name", "content"), [("x.parquet", b"no"), ("x.csv", b"a,b")])
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=name):
        open_dataset(str(tmp_path / name))


def test_bad_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DatasetError, match="from 0 to 7"):
        open_dataset(str(_write(tmp_path / "a.parquet", [0, 7])))
    dataset = open_dataset(str(_write(tmp_path / "a.parquet", [0, 1], b"not an image")))
    with pytest.raises(DatasetError, match="row 0"):
        list(next(dataset.batches(2)))


def test_labels_are_integers_and_images_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.classes.txt").write_text("\ufeffcat\ndog\n", "utf-8")
    with pytest.raises(DatasetError, match="labels are double"):
        open_dataset(str(_write(tmp_path / "a.parquet", [0.0, 1.9])))
    assert open_dataset(str(_write(tmp_path / "a.parquet", [0, 1]))).classes == ("cat", "dog")
    pq.write_table(pa.table({"image": [{"bytes": "text"}], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="found string"):
        open_dataset(str(tmp_path / "a.parquet"))
    (tmp_path / "a.parquet.classes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match="UTF-8"):
        open_dataset(str(_write(tmp_path / "a.parquet", [0])))


def test_a_folder_of_images_holds_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(open_images(tmp_path)) == 1
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "broken.png").write_bytes(_png()[:40])
    images = open_images(tmp_path)
    assert [len(list(batch)) for batch in images.select([0]).batches(2)] == [1]
    with pytest.raises(DatasetError, match=r"deeper/broken\.png: not an image"):
        list(next(images.select([1]).batches(2)))
    assert len(content_sha256(tmp_path)) == 64


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"\xff.png")]
    for name in names:
        try:
            Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
        except OSError:  # macOS
            pytest.skip("the file system has no such names")
    found = open_images(tmp_path)
    assert len([image for batch in found.batches(1) for image in batch]) == 2
    before = content_sha256(tmp_path)
    (tmp_path / names[0]).rename(tmp_path / "caf.png")
    assert content_sha256(tmp_path) != before
