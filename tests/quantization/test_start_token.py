"""The start token: pinned where it is an outlier, exact for every prompt."""

import copy
from pathlib import Path

import numpy as np
import onnx

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet, D4CCalibrationDataReader, PromptCalibrationDataReader
from d4c_onnx.graph.files import load_graph
from d4c_onnx.graph.index import GraphIndex, set_initializer
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.folding.places import find_places
from d4c_onnx.quantization.folding.start_token import dead_start_rows, pin_start_token
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.session import EncoderSession

SECTION = load_recipe(None).quantization


def _prompts(calibration: tuple[Path, CalibrationSet]) -> PromptCalibrationDataReader:
    return PromptCalibrationDataReader(calibration[0])


def _outlying_start(path: Path) -> onnx.ModelProto:
    """A text encoder with the massive activation of real CLIPs: one hidden channel of the first MLP, for the start
    token alone, is a hundred times larger than everything else."""
    model = load_graph(path)
    index = GraphIndex(model.graph)
    places = find_places(model.graph, tuple(weighted_layers(model.graph)))
    hidden = next(place for place in places if place.kind == "quick_gelu")
    (weight, axis), (bias, _) = hidden.shrunk
    norm = next(place for place in places if place.consumers[0].weight == weight)
    values = {name: index.array(name).copy() for name in ("positional_embedding", weight, bias, norm.shrunk[0][0])}
    values["positional_embedding"][0, 0] = 1000  # the LayerNorm turns it into the square root of the width, 8
    values[norm.shrunk[0][0]][0] = 1
    assert axis == 1
    values[weight][:, 0] = 0
    values[weight][0, 0] = 60
    values[bias][0] = -250  # no other token gets above zero here
    for name, array in values.items():
        set_initializer(model.graph, name, array)
    return model


def test_pinning_the_start_token_is_exact_and_makes_its_row_dead(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    model = load_graph(vit_bundle.text_encoder)
    plan = make_plan(model.graph, SECTION)
    pinned = copy.deepcopy(model)
    assert pin_start_token(pinned, plan, _prompts(vit_calibration)) == 2 * 3  # keys and values of three blocks
    ids = np.array([row for row in vit_calibration[1].input_ids if len(row) == 8], np.int64)
    other = ids.copy()
    other[:, 0] = 7
    plain, changed = EncoderSession(model.SerializeToString()), EncoderSession(pinned.SerializeToString())
    assert np.abs(changed.run(ids) - plain.run(ids)).max() <= 1e-5
    assert np.array_equal(changed.run(other), changed.run(ids))
    assert np.abs(plain.run(other) - plain.run(ids)).max() > 1e-4


def test_start_token_is_pinned_where_it_is_an_outlier_only(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    keep, auto = (
        load_recipe(None, [f"quantization.start_token={s}", "quantization.bits=w8a8"]).quantization
        for s in ("keep", "auto")
    )
    calm, outlying = load_graph(vit_bundle.text_encoder), _outlying_start(vit_bundle.text_encoder)
    reader = _prompts(vit_calibration)
    assert not dead_start_rows(outlying, make_plan(outlying.graph, keep), reader, keep)
    assert dead_start_rows(outlying, make_plan(outlying.graph, auto), reader, auto)
    images = load_graph(vit_bundle.image_encoder)
    forced = load_recipe(None, ["quantization.start_token=pin"]).quantization
    image_reader = D4CCalibrationDataReader(vit_calibration[0])
    assert not dead_start_rows(images, make_plan(images.graph, forced), image_reader, forced)
    # a prompt that begins otherwise: nothing is constant, nothing is pinned

    class Mixed(PromptCalibrationDataReader):
        def get_next(self):
            feed = super().get_next()
            if feed is not None:
                feed["input_ids"] = feed["input_ids"].copy()
                feed["input_ids"][::2, 0] = 5
            return feed

    assert not dead_start_rows(outlying, make_plan(outlying.graph, forced), Mixed(vit_calibration[0]), forced)
    assert dead_start_rows(calm, make_plan(calm.graph, forced), reader, forced)


def test_pinning_saves_the_answers_of_an_encoder_with_an_outlying_start_token(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    model = _outlying_start(vit_bundle.text_encoder)
    onnx.save(model, tmp_path / "outlying.onnx")
    ids = np.array([row for row in vit_calibration[1].input_ids if len(row) == 8], np.int64)
    expected = EncoderSession(tmp_path / "outlying.onnx").run(ids)
    errors = {}
    for mode in ("keep", "pin"):
        recipe = load_recipe(
            None, ["quantization.bits=w8a8", "quantization.smoothing=none", f"quantization.start_token={mode}"]
        )
        target = tmp_path / f"{mode}.onnx"
        report = quantize_encoder(tmp_path / "outlying.onnx", target, _prompts(vit_calibration), recipe.quantization)
        assert report.start_token_pinned == (mode == "pin")
        errors[mode] = 1 - float((EncoderSession(target).run(ids) * expected).sum(1).mean())
    assert errors["pin"] < errors["keep"] / 2
