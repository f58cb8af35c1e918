"""The start token: pinned where it is an outlier, exact for every prompt."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import config_of, material, prompts_of_one_length, quantize, reader_of
from graphs import Feeds, check, parse, run

from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.graph.values import constant, name_of, set_constant
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rewrites.mappings import find_mappings
from d4c_onnx.quantization.rewrites.rewrite import Result
from d4c_onnx.quantization.rewrites.start_token import dead_start_rows, pin_start_token
from d4c_onnx.runtime.session import EncoderSession

SECTION = config_of("bits=w8a8")


def _outlying_start(path: Path) -> ir.Model:
    """A text encoder with the massive activation of real CLIPs: one hidden channel of the first MLP, for the start
    token alone, is a hundred times larger than everything else."""
    model = load_model(path)
    mappings = find_mappings(model.graph, weighted_layers(model.graph))
    hidden = next(mapping for mapping in mappings if mapping.kind == "quick_gelu")
    (weight, axis), (bias, _) = hidden.absorber.shrunk
    norm = next(mapping for mapping in mappings if mapping.consumers[0].weight == name_of(weight))
    changed = (model.graph.initializers["positional_embedding"], weight, bias, norm.absorber.shrunk[0][0])
    position, rows, offsets, gain = values = [constant(value).copy() for value in changed]
    position[0, 0] = 1000  # the LayerNorm turns it into the square root of the width, 8
    gain[0] = 1
    assert axis == 1
    rows[:, 0] = 0
    rows[0, 0] = 60
    offsets[0] = -250  # no other token gets above zero here
    for value, array in zip(changed, values, strict=True):
        set_constant(model.graph, name_of(value), array)
    return model


def test_pinning_the_start_token_is_exact_and_makes_its_row_dead(request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, "vit")
    model = load_model(bundle.text_encoder)
    pinned = model.clone()
    result = pin_start_token(pinned, reader_of("text", dataset))
    assert result.count == 2 * 3  # keys and values of three blocks
    assert not result.refused
    check(pinned)
    ids = prompts_of_one_length(dataset)
    other = ids.copy()
    other[:, 0] = 7
    assert np.abs(run(pinned, ids) - run(model, ids)).max() <= 1e-5
    assert np.array_equal(run(pinned, other), run(pinned, ids))
    assert np.abs(run(model, other) - run(model, ids)).max() > 1e-4


def test_start_token_is_pinned_where_it_is_an_outlier_only(request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, "vit")
    prompts = reader_of("text", dataset)
    calm, outlying = load_model(bundle.text_encoder), _outlying_start(bundle.text_encoder)
    assert not dead_start_rows(calm, make_plan(calm.graph, SECTION), prompts)
    plan = make_plan(outlying.graph, SECTION)
    dead = dead_start_rows(outlying, plan, prompts)
    assert dead
    assert dead <= {layer.data for layer in plan.layers}
    images = load_model(bundle.image_encoder)
    pictures = reader_of("image", dataset)
    assert not dead_start_rows(images, make_plan(images.graph, SECTION), pictures)
    assert pin_start_token(images, pictures).count == 0
    mixed = prompts_of_one_length(dataset)
    mixed[::2, 0] = 5  # prompts that begin otherwise: nothing is constant, nothing is pinned
    feeds = Feeds([mixed], "input_ids")
    assert not dead_start_rows(outlying, plan, feeds)
    result = pin_start_token(outlying, feeds)
    assert result.count == 0
    assert [refusal.reason for refusal in result.refused] == ["prompts begin with different tokens"]


def test_a_tower_whose_attention_is_not_known_is_not_pinned() -> None:
    text = """tower (int64[n, m] x) => (float[n, m, 4] y) {
        h = Gather(table, x)
        q = MatMul(h, w)
        [odd] s = Softmax(q)
        y = MatMul(s, w2)
    }"""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((9, 4))
    model = parse(text, table=table, w=rng.standard_normal((4, 4)), w2=rng.standard_normal((4, 4)))
    result = pin_start_token(model, Feeds([np.array([[1, 2, 3], [1, 5, 7]], np.int64)]))
    assert result.count == 0
    assert [refusal.place for refusal in result.refused] == ["odd"]


@pytest.mark.slow
def test_pinning_saves_the_answers_of_an_encoder_with_an_outlying_start_token(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, dataset = material(request, "vit")
    source = tmp_path / "text_outlying.onnx"
    save_model(_outlying_start(bundle.text_encoder), source)
    ids = prompts_of_one_length(dataset)
    expected = EncoderSession(source).run(ids)
    errors = {}
    # outlier channels that leave the integers would save it, too
    monkeypatch.setattr("d4c_onnx.quantization.exact.split_outliers", lambda *_, **__: (Result(), {}))
    for mode in ("pinned", "kept"):
        if mode == "kept":
            monkeypatch.setattr("d4c_onnx.quantization.exact.dead_start_rows", lambda *_, **__: frozenset())
        target = tmp_path / f"{mode}.onnx"
        report, made = quantize(source, dataset, target, "bits=w8a8", "smoothing=none")
        check(made)
        assert report.start_token_pinned == (mode == "pinned")
        assert any(applied.name == "start token pinned" for applied in report.rewrites) == (mode == "pinned")
        errors[mode] = 1 - float((EncoderSession(target).run(ids) * expected).sum(1).mean())
    assert errors["pinned"] < errors["kept"] / 2
