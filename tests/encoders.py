"""The towers of the minis, quantised as a test wants them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import (
    CalibrationSet,
    D4CCalibrationDataReader,
    PromptCalibrationDataReader,
    open_calibration_set,
)
from d4c_onnx.graph.model import load_model
from d4c_onnx.quantization import EncoderReport, quantize_bundle_files, quantize_encoder
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rounding import METHODS
from d4c_onnx.quantization.rounding.reconstruction import Reconstruction
from d4c_onnx.quantization.rounding.schedule import AdaRoundSchedule
from d4c_onnx.recipe import QuantizationConfig, Recipe
from d4c_onnx.recipe_file import load_recipe

SOT, EOT = 49406, 49407
NOISE = (
    "synthesis.method=noise",
    "synthesis.images=8",
    "synthesis.held_out=4",
    "text.prompts=8",
    "text.held_out=4",
    "quantization.rounding=nearest",
    "evaluation.dataset=fidelity",
)
"""Keys of a recipe whose whole way takes a second."""
METHODS_IN_SHORT = {**METHODS, "adaround": Reconstruction(AdaRoundSchedule(3, 0.01))}
del METHODS_IN_SHORT["adaround-published"]  # the same method, for longer
BOTH = ["text", pytest.param("image", marks=pytest.mark.slow)]
"""Towers: the smaller one in the tests that a person waits for."""


def material(request: pytest.FixtureRequest, mini: str) -> tuple[Bundle, CalibrationSet]:
    """The FP32 bundle of mini-`vit` or mini-`rn`, and its calibration set."""
    made = request.getfixturevalue(f"{mini}_calibration")
    return request.getfixturevalue(f"{mini}_bundle"), made[1] if mini == "vit" else open_calibration_set(made)


def recipe_of(*keys: str) -> Recipe:
    """A recipe whose whole way takes a second, and further keys."""
    return load_recipe(None, [*NOISE, *keys])


def config_of(*keys: str) -> QuantizationConfig:
    """`bits=w8a8` and so on, as a recipe would have them."""
    return load_recipe(None, [f"quantization.{key}" for key in keys]).quantization


def reader_of(tower: str, dataset: CalibrationSet) -> D4CCalibrationDataReader | PromptCalibrationDataReader:
    """The calibration data of a tower."""
    return D4CCalibrationDataReader(dataset) if tower == "image" else PromptCalibrationDataReader(dataset)


def quantize(
    source: Path, dataset: CalibrationSet, path: Path, *keys: str, **options: Any
) -> tuple[EncoderReport, ir.Model]:
    """One encoder file, the recipe's keys and `quantize_encoder`'s own options; the report and what was written."""
    tower = options.pop("tower", None) or ("text" if source.name.startswith("text") else "image")
    reader = reader_of(tower, dataset)
    report = quantize_encoder(source, path, reader, config_of(*keys), **{"threads": 1, **options})
    return report, load_model(path)


def quantized_bundle(bundle: Bundle, dataset: CalibrationSet, folder: Path, *keys: str, **options: Any) -> Bundle:
    """Both encoders as a bundle, the recipe's keys and `quantize_bundle_files`' own options."""
    recipe = load_recipe(None, [f"quantization.{key}" for key in keys])
    return quantize_bundle_files(bundle, dataset, folder, recipe, **options)


def prepared(request: pytest.FixtureRequest, mini: str, *keys: str, tower: str = "image", batch: int = 8) -> Any:
    """Model, plan, ranges and calibration data of a tower, as the rounding gets them."""
    bundle, dataset = material(request, mini)
    model, config = load_model(bundle.encoders[tower]), config_of(*keys)
    reader = D4CCalibrationDataReader(dataset, batch) if tower == "image" else reader_of(tower, dataset)
    plan = make_plan(model.graph, config)
    return model, plan, collect_ranges(model, plan, reader, config), reader


def values_of(model: ir.Model, reader: Any, name: str) -> np.ndarray:
    """A value of a model for all calibration data."""
    return np.concatenate([batch[name] for batch in SegmentedEncoder(model, reader).advance([name])])


def problem(seed: int, channels: int = 12, inputs: int = 40, rows: int = 400) -> Any:
    """A layer with correlated inputs, as real ones are: a generator, its weight, and its inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    return rng, rng.standard_normal((channels, inputs)).astype(np.float32), x


def texts(lengths: list[int], rng: np.random.Generator) -> np.ndarray:
    """Prompts whose end tokens stand at different places, padded with zeros: int64 [batch, length]."""
    rows = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = [SOT, *rng.integers(300, 400, length - 2), EOT]
    return rows


def inputs(bundle: Bundle, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """A few batches for each tower, of several sizes and lengths."""
    height, width = bundle.manifest.preprocess.size
    images = [rng.standard_normal((batch, 3, height, width), dtype=np.float32) for batch in (1, 3)]
    return {"image": images, "text": [texts([5], rng), texts([4, 9, 7], rng), texts([3, 77], rng)]}


def prompts_of_one_length(dataset: CalibrationSet) -> np.ndarray:
    """The calibration prompts of the commonest length, int64 [batch, length]."""
    lengths = [len(row) for row in dataset.input_ids]
    common = max(set(lengths), key=lengths.count)
    return np.array([row for row in dataset.input_ids if len(row) == common], np.int64)


def count(report: EncoderReport, name: str) -> int:
    """How many places the rewrites changed whose names hold these words."""
    found = [applied.count for applied in report.rewrites if name in applied.name]
    assert found, f"no rewrite {name} among {[applied.name for applied in report.rewrites]}"
    return sum(found)


def reasons(report: EncoderReport, name: str) -> list[str]:
    """Why those rewrites left places alone."""
    return [r.reason for applied in report.rewrites if name in applied.name for r in applied.refused]
