"""A package answers what its bundle answers: golden input through both, and nothing may differ.

Both are run with the optimiser off and quantisers left where they stand, so that each number is what the file says:
edits of the boundary must not change a bit of it. How onnxruntime optimises a file is looked at, too, but fused kernels
may add in another order there, and the golden tolerance is for that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.manifest_file import GOLDEN_FOLDER
from d4c_onnx.packaging.feeds import feed_of, output_of
from d4c_onnx.packaging.package_manifest import PackagedModel
from d4c_onnx.runtime.clip_session import ClipSession
from d4c_onnx.runtime.golden import read_golden
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.vectors import unit


def prove(bundle: Bundle, folder: Path, models: list[PackagedModel]) -> None:
    """Compare each written file with the bundle's own.

    Raises:
        BundleError: a file answers otherwise, or onnxruntime cannot load it: a fault of ours, nothing is written.
    """
    vectors = read_golden(bundle.path)
    session = ClipSession(bundle, verify=False)
    pixels = np.stack([session.pixels(bundle.path / GOLDEN_FOLDER / image.file) for image in vectors.images])
    ids = sorted((text.input_ids for text in vectors.texts), key=len)
    for literal in (True, False):

        def load(path: Path, literal: bool = literal) -> EncoderSession:
            return EncoderSession(path, optimize=not literal, literal=literal, entries=bundle.session_entries)

        own = {tower: load(path) for tower, path in bundle.encoders.items()}
        written = {model.file: load(folder / model.file) for model in models}
        seen = own["image"].run(pixels)
        for number, row in enumerate(dict.fromkeys((ids[0], ids[-1]))):  # a fixed length: rows of one length
            feeds = {"image": pixels, "text": np.array([row], np.int64)}
            expected = {"image": seen, "text": own["text"].run(feeds["text"])}
            for model in models:
                if number and "text" not in model.towers:
                    continue  # its pixels are the same for every row
                answers = written[model.file].run_named(feed_of(model, feeds))
                for tower in model.towers:
                    found = answers[output_of(model, tower)].reshape(expected[tower].shape)
                    _compare(model.file, found, expected[tower], 0.0 if literal else vectors.tolerance[tower])


def _compare(file: str, found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Every number, where nothing may differ; else unit vectors, as golden vectors are compared."""
    wide = found.astype(np.float64)
    apart = np.abs(wide - expected) if tolerance == 0 else np.linalg.norm(unit(wide) - unit(expected), axis=-1)
    difference = float(apart.max())
    if not difference <= tolerance:
        raise BundleError(
            f"{file}: answers otherwise than the bundle's file, by {difference:.2e} where {tolerance:.2e} may be. "
            "Please report this with the bundle's manifest; nothing was written."
        )
