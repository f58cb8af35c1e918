"""The smallest files that keep a promise: the search, the ladder, and what a run leaves behind."""

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from encoders import recipe_of
from hypothesis import given
from hypothesis import strategies as st

from d4c_onnx import pipeline
from d4c_onnx.bundle import encoder_size_bytes, open_bundle
from d4c_onnx.cli.main import group
from d4c_onnx.errors import CalibrationError, CheckFailed, RecipeError
from d4c_onnx.files import write_json
from d4c_onnx.quantization.ladder import rungs_of
from d4c_onnx.quantization.promise import search
from d4c_onnx.quantization.sensitivity import LayerCost
from d4c_onnx.results import Promise, PromiseTry

COSTS = [
    LayerCost("image", "first", 100, 8, 0.0),
    LayerCost("image", "a", 400, 4.25, 4.0, 16),
    LayerCost("image", "b", 400, 4.25, 1.0, 16),
    LayerCost("image", "c", 400, 4.25, 2.0, 16),
]
RISING = st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted)


@given(RISING, RISING, st.floats(0, 1))
def test_each_tower_gets_its_lowest_rung(image: list[float], text: list[float], least: float) -> None:
    asked: list[tuple[int, int]] = []

    def cosines(pair: tuple[int, int]) -> tuple[float, float]:
        asked.append(pair)
        return image[pair[0]], text[pair[1]]

    found = search((len(image), len(text)), cosines, least, None, None)
    lowest = [next((number for number, value in enumerate(tower) if value >= least), None) for tower in (image, text)]
    assert found == (None if None in lowest else tuple(lowest))
    assert len(asked) <= 4  # 12 rungs are halved four times
    assert found is None or all(found[tower] in {pair[tower] for pair in asked} for tower in (0, 1))  # was measured


@given(RISING, RISING, st.floats(0, 1), st.floats(0, 2))
def test_top1_is_climbed_to_from_where_cosine_is_kept(
    image: list[float], text: list[float], least: float, most: float
) -> None:
    def lost(pair: tuple[int, int]) -> float:
        return 2 - image[pair[0]] - text[pair[1]]

    rungs = len(image), len(text)
    found = search(rungs, lambda pair: (image[pair[0]], text[pair[1]]), least, lost, most)
    if image[-1] < least or text[-1] < least or lost((rungs[0] - 1, rungs[1] - 1)) > most:
        assert found is None
        return
    assert found is not None
    assert image[found[0]] >= least
    assert text[found[1]] >= least
    assert lost(found) <= most


def test_what_is_not_a_number_keeps_no_promise() -> None:
    nan = float("nan")
    assert search((3, 3), lambda _: (nan, 1.0), 0.1, None, None) is None
    assert search((3, 3), None, None, lambda _: nan, 100.0) is None


def test_rungs_go_from_few_bits_to_8_bits_everywhere() -> None:
    config = recipe_of().quantization
    rungs = rungs_of(COSTS, config)
    widest = [[rung.widths.get(cost.node, 4) for cost in COSTS if cost.bits < 8] for rung in rungs[:-1]]
    assert all(sum(before) < sum(after) for before, after in itertools.pairwise(widest))
    assert len({tuple(own) for own in widest}) == len(widest) > 3
    assert rungs[-1].config.bits == "w8a8"


@pytest.mark.slow
def test_the_smallest_files_are_written_and_the_manifest_says_how(own: Path) -> None:
    recipe = recipe_of("quantization.target_cosine=0.9996")
    report = pipeline.quantize_bundle(str(own), recipe, output=own.parent)
    promise = report.promise
    assert promise is not None
    assert promise.chosen in promise.tries
    assert promise.chosen.cosine_image >= 0.9996
    assert promise.chosen.cosine_text >= 0.9996
    left = [entry for entry in promise.tries if min(entry.cosine_image, entry.cosine_text) < 0.9996]
    assert left  # the ladder was climbed
    versus = report.accuracy.bundles[1].versus_first
    assert versus.cosine_image == pytest.approx(promise.chosen.cosine_image, abs=1e-6)  # the very files
    made = open_bundle(own / "w4a8")
    assert made.manifest.quantization.promise == promise
    assert made.manifest.quantization.weight_bits_average == promise.chosen.weight_bits_average
    assert encoder_size_bytes(made)["total"] == promise.chosen.size_bytes
    assert json.loads(json.dumps(report.as_dict()))["promise"]["kept"] is True
    assert not [path for path in own.iterdir() if path.name.startswith(".stage")]
    assert {path.name for path in made.path.iterdir()} == {
        *("image_encoder.onnx", "text_encoder.onnx", "tokenizer.json", "golden", "manifest.json")
    }


@pytest.mark.slow  # every rung up to 8 bits
def test_a_promise_that_nothing_keeps_writes_nothing(own: Path) -> None:
    (own / "w4a8").mkdir()
    write_json(own / "w4a8" / "manifest.json", {"files": {}})  # as of a bundle that may be replaced
    recipe = recipe_of("quantization.target_cosine=1.0")
    with pytest.raises(CheckFailed, match="NO CONFIGURATION KEEPS") as caught:
        pipeline.quantize_bundle(str(own), recipe, output=own.parent, overwrite=True)
    promise = caught.value.report
    assert isinstance(promise, Promise)
    assert promise.chosen is None
    assert promise.tries[-1].image == "w8" or promise.tries[-1].text == "w8"
    assert promise.as_dict()["kept"] is False
    assert [path.name for path in (own / "w4a8").iterdir()] == ["manifest.json"]
    assert not [path for path in own.iterdir() if path.name.startswith(".stage")]


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (("quantization.max_drop=1",), RecipeError, "quantization.max_drop: is about top-1"),
        (("quantization.target_cosine=0.99", "synthesis.held_out=0"), CalibrationError, "holds nothing out"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_the_work(
    own: Path, keys: tuple[str, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipeline.quantize_bundle(str(own), recipe_of(*keys), output=own.parent)
    assert not list(own.glob("calibration-*"))


@pytest.mark.parametrize("keys", [("bits=w8a8", "target_cosine=0.9"), ("average_bits=5", "max_drop=1")])
def test_widths_are_either_given_or_searched_for(keys: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="bits"):
        recipe_of(*(f"quantization.{key}" for key in keys))


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_says_loudly_that_nothing_keeps_it(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = PromiseTry("w8", "w8", 8.1, 1_000_000, 0.98, 0.99)
    failure = CheckFailed("NO CONFIGURATION KEEPS THE PROMISE.", Promise(0.995, None, (tried,), None))

    def quantize(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr("d4c_onnx.pipeline.quantize_bundle", quantize)
    monkeypatch.setattr("sys.argv", ["d4c-onnx", *(["--json"] if as_json else [])])
    asked = ["quantize", "mini-vit", "--target-cosine", "0.995", "--quiet", *(["--json"] if as_json else [])]
    done = CliRunner().invoke(group, asked)
    assert done.exit_code == 1
    assert "NO CONFIGURATION KEEPS" in done.output
    if as_json:
        assert '"kept": false' in done.stdout
    else:
        assert "cosine >= 0.995" in done.stdout
        assert "0.9800" in done.stdout


@pytest.mark.slow
def test_top1_on_labels(own: Path) -> None:
    keys = ("quantization.max_drop=0.5", "evaluation.dataset=cifar10", "quantization.target_cosine=0.99")
    report = pipeline.quantize_bundle(str(own), recipe_of(*keys), output=own.parent)
    assert report.promise.chosen.top1_lost <= 0.5
    assert report.promise.chosen.cosine_image >= 0.99
    assert report.accuracy.bundles[1].versus_first.top1_lost == pytest.approx(report.promise.chosen.top1_lost, abs=0.05)
