"""What a recipe asks of a target: taken, refused where it contradicts it, and said in the note."""

from dataclasses import fields
from typing import Any

import pytest

from d4c_onnx.errors import RecipeError
from d4c_onnx.quantization.deployment import TARGETS, Target, target_of
from d4c_onnx.recipe import QuantizationSection


def _form(**keys: Any) -> Target:
    return target_of(QuantizationSection(**keys))


def test_keys_overrule_the_target() -> None:
    for key in sorted({field.name for field in fields(Target)} - {"int4_layout", "half", "note"}):
        target = "cpu" if key == "standard_attention" else "cuda"
        before = getattr(TARGETS[target], key)
        chosen = "float" if key == "token_table" else not before
        assert QuantizationSection.model_fields[key].default is None
        assert getattr(_form(target=target, **{key: chosen}), key) == chosen != before


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("fused_qkv", {"int4_layout": "native", "fused_qkv": True}),
        ("fused_biases", {"target": "openvino", "bits": "w8a8", "fused_biases": True}),
        ("convolved_pools", {"target": "tensorrt", "convolved_pools": True}),
        ("fused_qkv", {"weight_zero_points": True, "fused_qkv": True}),
        ("symmetric", {"target": "cuda", "bits": "w4a16", "symmetric": True}),
        ("symmetric", {"target": "tensorrt", "symmetric": False}),
        ("token_table", {"target": "tensorrt", "token_table": "packed"}),
        ("fused_attention", {"target": "tensorrt", "fused_attention": True}),
        ("fused_attention", {"target": "portable", "attention": "int8", "fused_attention": True}),
        ("fused_residuals", {"fused_residuals": True}),
        ("convolved_pools", {"int4_layout": "native", "convolved_pools": True}),
        ("fused_biases", {"symmetric": True, "fused_biases": True}),
        ("fused_biases", {"target": "tensorrt", "int4_layout": "cast", "fused_biases": True}),
        ("standard_attention", {"fused_attention": True, "standard_attention": True}),
        ("standard_attention", {"attention": "int8", "standard_attention": True}),
        ("standard_attention", {"target": "cuda", "standard_attention": True}),
        ("standard_attention", {"target": "openvino", "standard_attention": True}),
        ("embedding_bits", {"token_table": "float", "embedding_bits": 4}),
    ],
)
def test_keys_that_contradict_the_target_are_refused(key: str, keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"quantization\.{key}.*Leave"):
        _form(**keys)
    _form(**{name: value for name, value in keys.items() if name != key})


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_what_a_target_does_anyway_may_be_said(target: str) -> None:
    for bits in ("w4a8", "w8a8", *(["w4a16"] if target == "cuda" else [])):
        plain = _form(target=target, bits=bits)
        for field in fields(Target):
            if field.name not in ("half", "note"):
                keys = {field.name: getattr(TARGETS[target], field.name)}
                assert _form(target=target, bits=bits, **keys) == plain


def test_notes_say_what_runs() -> None:
    for key, standard in (("fused_qkv", True), ("fused_biases", False), ("fused_attention", False)):
        assert ("standard operators only" in _form(target="portable", **{key: True}).note) == standard
    assert _form().note == TARGETS["cpu"].note
    for target in ("cpu", "portable", "tensorrt", "openvino"):
        assert "4-bit layers of this file in float" in _form(target=target, int4_layout="native").note
        assert "4-bit" not in _form(target=target, bits="w8a8").note
    assert all(
        "in float" in _form(**keys).note for keys in ({"symmetric": True}, {"target": "tensorrt", "bits": "w8a8"})
    )
