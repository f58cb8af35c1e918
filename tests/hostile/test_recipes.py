"""Recipes that anybody may have written: a recipe, or one short message."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutations import spoilt_bytes

from d4c_onnx.errors import RecipeError
from d4c_onnx.recipe import Recipe
from d4c_onnx.recipe_file import load_recipe

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
SCALARS = (
    "2024-13-45",
    "0b_",
    "0o_",
    "0x_",
    "1_" * 10,
    "9" * 5000,
    "[" * 3000,
    "{" * 3000,
    ".inf",
    "-.inf",
    ".nan",
    "1e999",
)
GOOD = (
    b"seed: 1\nsynthesis:\n  images: 8\n  template: a photo of a {}.\nquantization: {bits: w8a8, average_bits: null}\n"
)


def _refused(load: object, *arguments: object) -> str:
    with pytest.raises(RecipeError) as refused:
        load(*arguments)  # type: ignore[operator]
    assert len(str(refused.value)) < 1000
    return str(refused.value)


@pytest.mark.parametrize("scalar", [*SCALARS, BOMB, "!!python/object/apply:os.system [ls]", "&a [*a]", "x" * 10**5])
def test_values_that_yaml_chokes_on(tmp_path: Path, scalar: str) -> None:
    (tmp_path / "r.yaml").write_text(scalar if scalar == BOMB else f"synthesis:\n  steps: {scalar}\n")
    message = _refused(load_recipe, tmp_path / "r.yaml")
    assert ("a recipe has no aliases" in message) == (scalar in (BOMB, "&a [*a]"))  # which would take minutes to read
    _refused(load_recipe, None, [f"synthesis.steps={scalar}"])


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "key",
    [
        "synthesis.early_stop_tolerance",
        "evaluation.max_drop",
        "evaluation.min_cosine",
        "text.random_words",
    ],
)
def test_limits_are_finite(key: str, number: str) -> None:
    assert key in _refused(load_recipe, None, [f"{key}={number}"])


@pytest.mark.parametrize(
    "override",
    [
        "x" * 10**5,
        "x" * 10**5 + "=1",
        "synthesis." + "x" * 10**5 + "=1",
        "synthesis.template=" + "x" * 10**5,
        "seed.x=1",
    ],
)
def test_messages_repeat_little_of_what_they_complain_about(override: str) -> None:
    _refused(load_recipe, None, [override])


@settings(max_examples=25)
@given(spoilt_bytes(GOOD))
@example(b"\xff\xfe")
@example(b"\x00")
def test_spoilt_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "spoilt.yaml"
    path.write_bytes(content)
    message = ""
    try:
        assert isinstance(load_recipe(path), Recipe)
    except RecipeError as error:
        message = str(error)
    assert len(message) < 1000


@settings(max_examples=25)
@given(
    st.sampled_from(("seed", "synthesis.steps", "quantization.bits", "evaluation.dataset", "nothing")),
    st.text(max_size=30),
)
def test_any_override(key: str, value: str) -> None:
    message = ""
    try:
        assert isinstance(load_recipe(None, [f"{key}={value}"]), Recipe)
    except RecipeError as error:
        message = str(error)
    assert len(message) < 1000
