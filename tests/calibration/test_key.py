"""The key of a calibration set: everything that decides the images is in it, and nothing else."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from d4c_onnx.calibration.key import CalibrationKey, calibration_key
from d4c_onnx.calibration.method import D4C, METHODS, PUBLISHED, Method
from d4c_onnx.calibration.set_file import SetManifest, read_set_json, set_manifest
from d4c_onnx.files import write_json
from d4c_onnx.recipe import PromptConfig, SynthesisConfig
from d4c_onnx.vocabulary import texts_sha256

OTHER = {
    "loss": "pse",
    "learning_rate": 0.2,
    "temperature": 0.2,
    "scg": False,
    "pae": False,
    "tv_weight": 0.2,
    "whole_image_weight": 0.0,
    "bns_weight": 0.0,
    "image": "pixel",
    "box_area": (0.3, 0.7),
    "background_noise": 0.0,
    "shared_optimizer": True,
    "labels": "random",
    "start": "noise",
    "patches": 3,
}


def _key(config: SynthesisConfig, method: Method | None = None, source: str | None = None) -> CalibrationKey:
    return calibration_key("0" * 64, config, PromptConfig(), ("cat", "dog"), 0, source, method)


@pytest.mark.parametrize("name", [field.name for field in fields(Method)])
def test_every_constant_of_a_method_is_part_of_the_key(name: str) -> None:
    config = SynthesisConfig()
    assert _key(config).id == _key(config, D4C).id
    assert _key(config).id != _key(config, replace(D4C, **{name: OTHER[name]})).id


def test_methods_differ_and_controls_have_no_constants() -> None:
    ids = {name: _key(SynthesisConfig(method=name)).id for name in METHODS}
    assert len(set(ids.values())) == len(METHODS)
    assert _key(SynthesisConfig(method="d4c-published")).method == _key(SynthesisConfig(), PUBLISHED).method
    assert _key(SynthesisConfig(method="pink")).method is None


def test_sets_that_were_made_before_a_recipe_key_went_are_found_again() -> None:
    """Whoever changes these numbers loses users their sets: is it the images that change, or only what a key says?"""
    before = SynthesisConfig(images=128), SynthesisConfig(method="leaves", images=128)  # as the defaults were
    assert tuple(_key(config).id for config in before) == (
        "e008f457ecdb",
        "2261a11b218c",
    )


def test_a_key_is_read_as_it_was_written(tmp_path: Path) -> None:
    file, texts = tmp_path / "manifest.json", ("a cat", "a dog")
    for key in (_key(SynthesisConfig(method="pink")), replace(_key(SynthesisConfig()), texts_sha256="1" * 64)):
        told = SetManifest("tiny", key, {"device": "cpu"}, {"numpy": "2"}, {"prompts.json": "0" * 64})
        write_json(file, told.record())
        assert ("texts_sha256" in file.read_text()) == (key.texts_sha256 is not None)
        found = read_set_json(file, set_manifest)
        assert json.loads(json.dumps(found.record())) == json.loads(json.dumps(told.record()))
        assert (found.key.method_name, found.key.nouns) == (key.method_name, ("cat", "dog"))
    own = calibration_key("0" * 64, SynthesisConfig(), PromptConfig(), ("cat", "dog"), 0, texts=texts)
    assert own.texts_sha256 == texts_sha256(texts)
    assert own.id != _key(SynthesisConfig()).id


def test_what_was_read_counts_and_not_where_it_lay() -> None:
    here, there = (SynthesisConfig(method="real", source=place) for place in ("here", "there"))
    assert _key(here, source="a").id == _key(there, source="a").id != _key(here, source="b").id
