"""Recipes: what is accepted, what is refused, and what the shipped ones say."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d4c_onnx.calibration.method import D4C, METHODS
from d4c_onnx.errors import RecipeError
from d4c_onnx.recipe import QuantizationConfig, SynthesisConfig, parse_bits
from d4c_onnx.recipe_file import load_recipe, recipe_names
from d4c_onnx.recipe_keys import recipe_keys
from d4c_onnx.vocabulary import generic_nouns, read_nouns, templates

pytestmark = pytest.mark.oldest


def test_shipped_recipes_load() -> None:
    assert recipe_names() == ["default", "paper"]
    for name in recipe_names():
        load_recipe(name)


def test_paper_recipe_is_the_published_schedule() -> None:
    config = load_recipe("paper").synthesis
    assert (config.images, config.held_out, config.batch, config.steps) == (128, 0, 16, 3000)
    assert config.precision == "float32"
    published = METHODS[config.method]
    assert (published.learning_rate, published.temperature, published.tv_weight) == (0.01, 0.1, 0.1)
    assert published.shared_optimizer
    assert published.image == "pixel"
    assert published.labels == "random"
    assert published.whole_image_weight == published.bns_weight == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"template": "a {} {x}"}, r"exactly one {}, got 'a {} {x}'"),
        ({"method": "real"}, "belongs to synthesis.method real"),
        ({"source": "photos"}, "belongs to synthesis.method real"),
        ({"method": "d4c-published", "early_stop_tolerance": 0.1}, "one optimiser for all"),
    ],
)
def test_contradictions_are_refused_wherever_a_recipe_comes_from(values: dict[str, object], message: str) -> None:
    """Built in Python, and from a file, where the file and the key are named."""
    with pytest.raises(ValueError, match=re.escape(message)):
        SynthesisConfig(**values)
    key = list(values)[-1] if values != {"method": "real"} else "source"
    overrides = [f"synthesis.{name}={value}" for name, value in values.items()]
    with pytest.raises(RecipeError, match=rf"recipe default, synthesis\.{key}: .*{re.escape(message)}"):
        load_recipe(None, overrides)


def test_real_images_have_a_source() -> None:
    assert SynthesisConfig(method="real", source="photos").source == "photos"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("box_area", (0.7, 0.4)),
        ("box_area", (0.0, 0.4)),
        ("learning_rate", 0.0),
        ("temperature", float("nan")),
        ("tv_weight", -1.0),
        ("image", "pixels"),
        ("loss", "noise"),
        ("labels", "sorted"),
    ],
)
def test_methods_hold_no_values_out_of_range(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"Method\.{name}: "):
        replace(D4C, **{name: value})


def test_overrides_and_types() -> None:
    recipe = load_recipe(None, ["synthesis.steps=7", "quantization.bits=w8a8", "seed=3"])
    assert (recipe.synthesis.steps, recipe.quantization.weight_bits, recipe.seed) == (7, 8, 3)
    assert recipe.quantization.table_bits == 8
    assert recipe.quantization.rounding_method == "yaqa"
    assert load_recipe(None).quantization.table_bits == 4
    assert load_recipe(None).quantization.rounding_method == "yaqa"


@pytest.mark.parametrize(
    "override",
    [
        "synthesis.steps=many",
        "synthesis.stepz=3",
        "steps",
        "=3",
        "synthesis.steps=0",
        "synthesis.learning_rate=0.1",  # a constant of the method
        "quantization.bits=w3a8",
        "seed.x=1",
    ],
)
def test_bad_overrides_are_named(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, [override])
    assert override.partition("=")[0].split(".")[-1] in str(caught.value) or override in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "synthesis: [", "synthesis:\n  unknown: 1\n", "\x00"])
def test_malformed_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml"):
        load_recipe(file)


def test_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="default, paper"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("width", ["w4a16", "w8a16"])
def test_float_activations_are_for_cuda(width: str) -> None:
    config = load_recipe(None, [f"quantization.bits={width}", "quantization.target=cuda"]).quantization
    assert config.weights_only
    assert config.rounding_method == {"w4a16": "yaqa", "w8a16": "nearest"}[width]
    for target in ("cpu", "portable", "tensorrt", "openvino"):
        with pytest.raises(RecipeError, match=rf"{width} keeps activations in float16.*Use {width[:2]}a8"):
            load_recipe(None, [f"quantization.bits={width}", f"quantization.target={target}"])
    with pytest.raises(RecipeError, match=r"quantization\.bits"):
        load_recipe(None, ["quantization.bits=w6a16", "quantization.target=cuda"])
    with pytest.raises(ValueError, match="keeps activations in float16"):
        QuantizationConfig(bits=width)  # built in Python, too, and where the target is the default


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("average_bits", {"bits": "w8a8", "average_bits": 5.0}),
        ("correction", {"rounding": "adaround", "correction": "bias"}),
        ("correction", {"rounding": "adaround-published", "correction": "affine"}),
    ],
)
def test_quantisation_keys_that_contradict_each_other_are_refused(key: str, keys: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=rf"quantization\.{key}: .*Leave it out"):
        load_recipe(None, [f"quantization.{name}={value}" for name, value in keys.items()])


def test_keys_are_few_and_each_says_what_it_does() -> None:
    keys = recipe_keys()
    undecided = {"synthesis.early_stop_tolerance", "quantization.correction"}  # docs/design.md
    assert undecided < {key.name for key in keys}
    assert len(keys) - len(undecided) <= 30
    assert len({key.name for key in keys}) == len(keys)
    for key in keys:
        assert key.help, key.name
        assert key.takes, key.name
        assert load_recipe(None, [f"{key.name}={key.shown_default}"]) == load_recipe(), key.name


def test_published_ranges_end_where_the_values_end() -> None:
    plain = QuantizationConfig(ranges="mse-plain")
    assert (plain.headroom, plain.clip_weight) == (1.0, 1.0)
    assert QuantizationConfig().headroom > 1
    assert QuantizationConfig(bits="w4a4").clip_weight == 1 < QuantizationConfig().clip_weight


@given(st.text(max_size=8))
def test_only_known_bits_parse(text: str) -> None:
    known = {f"w{w}a{a}": (w, a) for w in (4, 6, 8) for a in (4, 6, 8, 16)}
    if text.lower() in known:
        assert parse_bits(text) == known[text.lower()]
    else:
        with pytest.raises(RecipeError, match="w4a8"):
            parse_bits(text)


def test_vocabulary_and_templates() -> None:
    nouns = generic_nouns()
    assert 170 <= len(nouns) <= 200
    assert len(set(nouns)) == len(nouns)
    assert all(template.count("{}") == 1 for template in templates())


@pytest.mark.parametrize("text", ["", "cat\n", "cat\ndog\ncat\n"])
def test_bad_vocabularies_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "nouns.txt"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"nouns\.txt"):
        read_nouns(file)
