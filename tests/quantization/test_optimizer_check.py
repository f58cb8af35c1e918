"""The optimiser check: rougher and dropped roundings are found, chance is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.errors import CheckFailed
from d4c_onnx.quantization import quantize_bundle_files
from d4c_onnx.quantization.optimizer_check import unseen_images
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime import optimizer
from d4c_onnx.runtime.optimizer import OptimizerEffect, compare_answers


@pytest.mark.parametrize("sizes", [(1,), (8,), (8, 5), (16, 16)])
def test_the_optimizer_is_judged_on_many_images(rng: np.random.Generator, sizes: tuple[int, ...]) -> None:
    """However few the calibration images are; on eight, chance alone once failed a bundle."""
    images = [rng.normal(size=(size, 3, 8, 64)).astype(np.float32) for size in sizes]
    seen = np.concatenate(unseen_images(images))
    assert len(seen) >= 32
    assert len(np.unique(seen.reshape(len(seen), -1), axis=0)) == len(seen)
    given = np.concatenate(images).reshape(sum(sizes), -1)
    assert not any((given == image.ravel()).all(1).any() for image in seen)  # none that the rounding was fitted to


def test_prompts_are_judged_as_they_are() -> None:
    [ids] = unseen_images([np.ones((2, 5), np.int64)])
    assert np.array_equal(ids, np.ones((2, 5)))


def _encoders(seed: int, factor: float) -> OptimizerEffect:
    """Two roundings of the same embeddings, one `factor` times as rough; some samples are far off under both."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(32, 64))
    size = 1e-3 * np.exp(rng.normal(0, 0.8, (32, 1)))  # of a sample's error, shared; each rounding adds its own luck
    literal, fast = (exact + size * np.exp(rng.normal(0, 0.25, (32, 1))) * rng.normal(size=exact.shape) for _ in "lf")
    return compare_answers(exact + factor * (fast - exact), literal, exact)


def test_chance_is_no_change_of_the_answers() -> None:
    assert all(_encoders(seed, 1.0).harmless for seed in range(300))


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_rougher_and_dropped_roundings_are_found(factor: float) -> None:
    assert not any(_encoders(seed, factor).harmless for seed in range(100))
    assert compare_answers(*np.zeros((3, 4, 8))).harmless  # a float tower


@pytest.mark.parametrize("count", [1, 4])
def test_few_samples_excuse_little(rng: np.random.Generator, count: int) -> None:
    exact = rng.normal(size=(count, 64))
    error = 1e-3 * np.exp(rng.normal(0, 1, (count, 1))) * rng.normal(size=exact.shape)
    assert not compare_answers(exact + 3 * error, exact + error, exact).harmless


@pytest.mark.slow
def test_optimizer_that_changes_answers_fails_the_bundle(
    vit_bundle: Bundle,
    vit_calibration: tuple[Path, CalibrationSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Careless(optimizer.EncoderSession):
        """Optimised, a quantised file is five parts in a thousand off."""

        def __init__(self, path: Path, **options: Any) -> None:
            self._off = 5e-3 * (path.parent != vit_bundle.path and options.get("optimize", True))
            super().__init__(path, **options)

        def run(self, batch: np.ndarray) -> np.ndarray:
            return super().run(batch) + np.float32(self._off)

    recipe = load_recipe(None, ["quantization.rounding=nearest", "quantization.smoothing=none"])
    monkeypatch.setattr(optimizer, "EncoderSession", Careless)
    with pytest.raises(CheckFailed, match="graph optimiser"):
        quantize_bundle_files(vit_bundle, vit_calibration[1], tmp_path / "w4a8", recipe, threads=1)
    assert not (tmp_path / "w4a8").exists()
