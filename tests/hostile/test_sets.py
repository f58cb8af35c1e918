"""Calibration sets that anybody may have written: what is opened is whole, and what is not ends in one message."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import spoilt_bytes, spoilt_json
from spoilt_values import rehash

from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.calibration.dataset import open_calibration_set, save_calibration_set
from d4c_onnx.calibration.key import calibration_key
from d4c_onnx.calibration.set_file import SetManifest
from d4c_onnx.errors import CalibrationError
from d4c_onnx.recipe_file import load_recipe

NAMES = ("manifest.json", "prompts.json", "losses.json", "pixel_values.npy", "held_out.npy")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set, of all that sets may hold."""
    recipe, target = load_recipe(), tmp_path_factory.mktemp("sets") / "made"
    pixels = np.random.default_rng(0).random((3, 3, 4, 4), np.float32)
    content = CalibrationSet(
        pixels[:2],
        pixels[2:],
        ("cat", "dog", "cat"),
        ("a cat", "a dog"),
        ((1, 2, 3), (1, 2)),
        ("a bird",),
        SetManifest(
            "tiny",
            calibration_key("0" * 64, recipe.synthesis, recipe.text, ("cat", "dog"), 0),
            {"device": "cpu"},
            {"numpy": "2"},
        ),
        ({"loss": [2.0, 1.0]},),
    )
    save_calibration_set(target, content, pixels)
    return target


def _check(folder: Path) -> None:
    """Opened whole, or refused in a message that is short and printable."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    opened, message = None, ""
    try:
        opened = open_calibration_set(folder)
    except CalibrationError as error:
        message = str(error)
    assert len(message) < 1000
    if opened is not None:
        assert opened.pixel_values.dtype == opened.held_out.dtype == np.float32
        assert np.isfinite(opened.pixel_values).all()
        assert np.isfinite(opened.held_out).all()
        assert len(opened.texts) == len(opened.input_ids)
        key = opened.manifest.key
        assert all(isinstance(key.template.format(label), str) for label in opened.labels)
        assert isinstance(key.id + key.weights_sha256 + key.method_name, str)
        assert all(isinstance(noun, str) for noun in key.nouns)
        assert isinstance(key.seed, int)
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


@settings(max_examples=40)
@given(data=st.data(), name=st.sampled_from(NAMES[:3]))
def test_spoilt_json(data: st.DataObject, name: str, made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _copy(made, tmp_path_factory)
    spoilt: Any = data.draw(spoilt_json(json.loads((folder / name).read_bytes())))
    (folder / name).write_text(json.dumps(spoilt))
    rehash(folder)
    _check(folder)
    shutil.rmtree(folder)


@settings(max_examples=40)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_spoilt_bytes(data: st.DataObject, name: str, made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = _copy(made, tmp_path_factory)
    (folder / name).write_bytes(data.draw(spoilt_bytes((folder / name).read_bytes())))
    rehash(folder)
    _check(folder)
    shutil.rmtree(folder)


def _copy(made: Path, factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "spoilt"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(made, folder))


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("held_out.npy", np.full((1, 3, 4, 4), np.nan, np.float32)),
        ("held_out.npy", np.zeros((1, 3, 4, 4), ">f4")),
        ("held_out.npy", np.zeros((1, 3, 8, 8), np.float32)),
        ("held_out.npy", np.zeros((2, 3, 4, 4), np.float32)),  # and one label too few
        ("pixel_values.npy", np.zeros((2, 3, 4), np.float32)),
        ("pixel_values.npy", np.full((2, 3, 4, 4), np.inf, np.float32)),
    ],
)
def test_images_of_another_form_are_refused(made: Path, tmp_path: Path, name: str, array: np.ndarray) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "set"))
    np.save(folder / name, array)
    rehash(folder)
    with pytest.raises(CalibrationError, match=f"{name}|holds out|labels"):
        open_calibration_set(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have names")
@pytest.mark.parametrize("name", NAMES)
def test_pipes_and_devices_are_not_waited_for(made: Path, tmp_path: Path, name: str) -> None:
    for number, make in enumerate((os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero"))):
        folder = Path(shutil.copytree(made, tmp_path / str(number)))
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(CalibrationError, match=f"no file {name}"):
            open_calibration_set(folder)
