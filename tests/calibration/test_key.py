"""The key of a calibration set: everything that decides the images is in it, and nothing else."""

from dataclasses import fields, replace

import pytest

from d4c_onnx.calibration.key import calibration_key
from d4c_onnx.calibration.method import D4C, METHODS, PUBLISHED, Method
from d4c_onnx.recipe import PromptSection, SynthesisSection

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
}


def _key(section: SynthesisSection, method: Method | None = None, source: str | None = None) -> dict[str, object]:
    return calibration_key("0" * 64, section, PromptSection(), ("cat", "dog"), 0, source, method)


@pytest.mark.parametrize("name", [field.name for field in fields(Method)])
def test_every_constant_of_a_method_is_part_of_the_key(name: str) -> None:
    section = SynthesisSection()
    assert _key(section)["id"] == _key(section, D4C)["id"]
    assert _key(section)["id"] != _key(section, replace(D4C, **{name: OTHER[name]}))["id"]


def test_methods_differ_and_controls_have_no_constants() -> None:
    ids = {name: _key(SynthesisSection(method=name))["id"] for name in METHODS}
    assert len(set(ids.values())) == len(METHODS)
    assert _key(SynthesisSection(method="d4c-published"))["method"] == _key(SynthesisSection(), PUBLISHED)["method"]
    assert _key(SynthesisSection(method="pink"))["method"] is None


def test_sets_that_were_made_before_a_recipe_key_went_are_found_again() -> None:
    """Whoever changes these numbers loses users their sets: is it the images that change, or only what a key says?"""
    assert (_key(SynthesisSection())["id"], _key(SynthesisSection(method="leaves"))["id"]) == (
        "e008f457ecdb",
        "2261a11b218c",
    )


def test_what_was_read_counts_and_not_where_it_lay() -> None:
    here, there = (SynthesisSection(method="real", source=place) for place in ("here", "there"))
    assert _key(here, source="a")["id"] == _key(there, source="a")["id"] != _key(here, source="b")["id"]
