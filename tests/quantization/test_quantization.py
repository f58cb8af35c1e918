"""Quantisation: real files that onnxruntime runs on int8 kernels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import BOTH, config_of, material, prompts_of_one_length, quantize, quantized_bundle
from graphs import Feeds, check, ops, parse, run, run_all, stored_weights

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import GraphError, RecipeError
from d4c_onnx.graph.forms import CAST, INT8
from d4c_onnx.graph.model import load_model, opset_of
from d4c_onnx.graph.stored import average_bits, convert_stored, layer_bits, stored_weight
from d4c_onnx.graph.trellis import RATES
from d4c_onnx.graph.trellis_form import TRELLIS
from d4c_onnx.graph.values import name_of, nodes_of
from d4c_onnx.manifest import EXACT_PRODUCTS
from d4c_onnx.quantization.calibration_batches import images_at_a_time
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.targets import TARGETS
from d4c_onnx.runtime.kernels import count_kernels
from d4c_onnx.runtime.session import EncoderSession

FULL_RANGE = "reduce_range=false"


def test_plan_gives_the_ends_eight_bits(vit_bundle: Bundle) -> None:
    graph = load_model(vit_bundle.image_encoder).graph
    plan = make_plan(graph, config_of())
    wide = [layer.op for layer in plan.layers if plan.weight_bits[layer.weight] == 8]
    assert wide == ["Conv"]
    assert plan.reduce_range
    assert len(plan.in_float) == 1  # the final projection
    assert not make_plan(graph, config_of(), reduce_range=False).reduce_range
    assert sorted(set(plan.weight_bits.values())) == [4, 8]
    assert set(plan.op_types) == {"Conv", "MatMul"}
    wider = make_plan(graph, config_of(), {plan.layers[3].node: 8}, reduce_range=False)
    assert wider.weight_bits[plan.layers[3].weight] == 8
    assert not make_plan(graph, config_of("bits=w4a16", "target=cuda")).activations
    with pytest.raises(GraphError, match="nothing to quantise"):
        make_plan(parse("g (float[n] x) => (float[n] y) { y = Relu(x) }").graph, config_of())


@pytest.mark.parametrize(
    ("model", "tower"),
    [
        ("vit", "text"),
        pytest.param("vit", "image", marks=pytest.mark.slow),
        pytest.param("rn", "image", marks=pytest.mark.slow),
        pytest.param("rn", "text", marks=pytest.mark.slow),
    ],
)
def test_w4a8_file(model: str, tower: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, model)
    target = tmp_path / "q.onnx"
    report, made = quantize(bundle.encoders[tower], dataset, target)
    check(made)
    casts = model == "rn" and tower == "image"  # convolutions have no groups, and INT4 needs opset 21
    assert opset_of(made) == (21 if casts else 18)
    assert report.minimum_onnxruntime == ("1.23" if casts else "1.20")
    # only the ends keep more bits, the last one 8.5, and channels that left the integers; every other weight has 4, and
    # a 16th of a multiplier; a group's levels are those of its multiplier, and a channel has more than 16
    layers = layer_bits(made)
    assert sum(layer.bits == 8 for layer in layers) <= 2
    narrow = {layer.op: layer.bits for layer in layers if layer.bits < 8}
    assert narrow
    assert all(bits == (4 if op == "Conv" else 4.25) for op, bits in narrow.items())  # convolutions have no groups
    assert {layer.bits for layer in layers if layer.bits >= 8} <= {8, 8.5, 16, 32}
    assert all(layer.shape[0] <= 4 for layer in layers if layer.bits == 32)
    assert report.layers == tuple(layers)
    for node in made.graph:
        stored = stored_weight(node)
        if stored is not None and stored.form is TRELLIS and stored.integers is not None:
            groups = stored.unpack().astype(int).reshape(-1, 16, stored.shape[1])
            steps = TRELLIS.coded(stored.integers).multipliers.T
            assert all(np.isin(groups.swapaxes(1, 2)[steps == m], RATES[4].levels[m]).all() for m in range(16))
            assert max(len(np.unique(groups[:, :, channel])) for channel in range(4)) > 16
    # every weighted layer but those that stay float runs on an int8 kernel
    kernels = count_kernels(target)
    products = sum(op in ("MatMul", "Gemm", "Conv") for op in ops(made))
    integer = sum(stored.num_bits <= 8 for stored in stored_weights(made))
    assert kernels["int8"] == integer
    assert kernels["float"] == products - integer
    assert target.stat().st_size * 6 <= bundle.encoders[tower].stat().st_size


@pytest.mark.slow
def test_average_bits_over_both_files(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, dataset = material(request, "rn")
    layers = []
    for tower, path in bundle.encoders.items():
        report, _ = quantize(path, dataset, tmp_path / f"{tower}.onnx", "rounding=nearest")
        layers.extend(report.layers)
    assert 4 < average_bits(layers) <= 4.3


@pytest.mark.parametrize("tower", BOTH)
def test_cast_answers_exactly_like_int8(tower: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Store the very same integers as int8: the Cast form must not change a bit of the answer."""
    bundle, dataset = material(request, "vit")
    _, made = quantize(bundle.encoders[tower], dataset, tmp_path / "q.onnx", "rounding=nearest", "group=0")
    plain = made.clone()
    for node in list(plain.graph):
        stored = stored_weight(node)
        if stored is not None and stored.form is CAST:
            convert_stored(plain.graph, stored, INT8)
    kinds = [{value.dtype for value in model.graph.initializers.values()} for model in (made, plain)]
    assert [ir.DataType.INT4 in found for found in kinds] == [True, False]
    fed = np.array(dataset.pixel_values) if tower == "image" else prompts_of_one_length(dataset)
    assert np.array_equal(EncoderSession(tmp_path / "q.onnx", threads=1).run(fed), run(plain, fed))


@pytest.mark.parametrize("tower", BOTH)
def test_optimised_and_plain_execution_agree(tower: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, dataset = material(request, "vit")
    quantize(bundle.encoders[tower], dataset, tmp_path / "q.onnx", "rounding=nearest")
    fed = np.array(dataset.pixel_values) if tower == "image" else prompts_of_one_length(dataset)
    fast, plain = (EncoderSession(tmp_path / "q.onnx", optimize=optimize).run(fed) for optimize in (True, False))
    assert float((fast * plain).sum(1).min()) > 0.9995


def test_six_bit_activations_never_leave_their_grid(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, dataset = material(request, "vit")
    report, made = quantize(bundle.image_encoder, dataset, tmp_path / "q.onnx", "bits=w6a6", "rounding=nearest")
    assert {layer.bits for layer in report.layers[:-1]} == {8}  # there is no 6-bit type: stored as int8
    weights = [stored.unpack() for stored in stored_weights(made)]
    assert len(weights) == 38
    for values in weights[1:-1]:  # patches and projection keep 8
        assert values.min() >= -32
        assert values.max() <= 31
    assert any(values.min() < -32 for values in (weights[0], weights[-1]))
    names = [name_of(node.outputs[0]) for node in nodes_of(made.graph, "QuantizeLinear")]
    values = run_all(made, np.array(dataset.pixel_values) * 3, names)  # far beyond what was calibrated
    assert len(names) > 20
    assert max(int(value.max()) for value in values.values()) <= 63


@pytest.mark.parametrize(
    ("extra", "entries"),
    [
        pytest.param((), {}, marks=pytest.mark.slow, id="reduced"),
        pytest.param((FULL_RANGE,), EXACT_PRODUCTS, marks=pytest.mark.slow, id="full"),
    ],
)
def test_full_range_names_the_session_it_needs(
    extra: tuple[str, ...], entries: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle, dataset = material(request, "vit")
    told: dict[str, tuple[int, int]] = {}

    def on_step(stage: str, done: int, total: int, _: object) -> None:
        told[stage] = done, total

    made = quantized_bundle(bundle, dataset, tmp_path / "q", "bits=w8a8", *extra, on_step=on_step)
    assert made.session_entries == entries
    assert list(told) == ["fold", "calibrate", "gradients", "round", "write", "check"]  # whoever waits sees where it is
    assert all(done == total for done, total in told.values())


@pytest.mark.slow
def test_same_input_same_file(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, dataset = material(request, "vit")
    for name in "ab":
        quantize(bundle.text_encoder, dataset, tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.slow
def test_a_bit_budget_is_spent_and_not_exceeded(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, dataset = material(request, "vit")
    made = {}
    for keys in ((), ("average_bits=4.8",), ("average_bits=4.05", "group=0")):
        target = tmp_path / f"{len(made)}"
        arguments = (bundle, dataset, target, "rounding=nearest", *keys)
        if "group=0" in keys:  # the first and last layers alone take more
            with pytest.raises(RecipeError, match="boundary_bits"):
                quantized_bundle(*arguments)
            assert not target.exists()
            continue
        written = quantized_bundle(*arguments)
        models = [load_model(path) for path in written.encoders.values()]
        counted = average_bits([layer for model in models for layer in layer_bits(model)])
        assert written.manifest.quantization.weight_bits_average == pytest.approx(counted, abs=1e-4)
        made[keys] = counted, written.manifest.quantization.encoders
    (base, _), (spent, encoders) = made.values()
    assert base <= 4.5
    assert 4.7 < spent <= 4.8
    wide = {name: sum(5 < row.bits <= 8 for row in report.layers.values()) for name, report in encoders.items()}
    assert sum(wide.values()) > 4


@pytest.mark.parametrize("tower", BOTH)
def test_all_sixteen_codes_are_used(tower: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Counted in the written file: two weights a byte, and together they use all that a nibble can say."""
    bundle, dataset = material(request, "vit")
    _, made = quantize(bundle.encoders[tower], dataset, tmp_path / "q.onnx", "rounding=nearest")
    stored = [found for found in stored_weights(made) if found.form is TRELLIS]
    assert len({found.initializer for found in stored}) == {"image": 36, "text": 18}[tower]
    for found in stored:
        assert found.initializer.const_value is not None
        assert 2 * found.initializer.const_value.nbytes == np.prod(found.shape)
        assert found.integers is not None
        assert set(np.unique(TRELLIS.coded(found.integers).codes)) == set(range(16))


def test_a_large_encoders_images_come_in_small_batches(tmp_path: Path) -> None:
    encoder = tmp_path / "image_encoder.onnx"
    encoder.write_bytes(b"graph")
    assert images_at_a_time(encoder) == 8
    with (tmp_path / "image_encoder.onnx.data").open("wb") as file:
        file.truncate(2**30 + 1)  # weights beside the graph count, too
    assert images_at_a_time(encoder) == 2


def test_large_activations_are_looked_at_a_few_samples_at_a_time(monkeypatch: pytest.MonkeyPatch, rng) -> None:
    """Small weights say nothing about them: a mobile conv net's take gigabytes."""
    text = "g (float[n, 3, 8, 8] x) => (float[n, 8, 8, 8] y) { [conv] z = Conv(x, w)\n y = Relu(z) }"
    model, config = parse(text, w=rng.standard_normal((8, 3, 1, 1))), config_of("bits=w8a8")
    plan = make_plan(model.graph, config)
    reader = Feeds([rng.standard_normal((count, 3, 8, 8)).astype(np.float32) for count in (8, 5)])
    sizes: list[int] = []

    def counted(session: EncoderSession, batch: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(batch))
        return session.run_named({session.input_name: batch})

    monkeypatch.setattr(EncoderSession, "run_all", counted)
    at_once = collect_ranges(model, plan, reader, config)
    assert sizes == [1, *2 * [8, 5]]
    sizes.clear()
    each = 4 * 8 * 8 * 8 * 2  # bytes of both values that a sample makes
    monkeypatch.setattr("d4c_onnx.quantization.inside.ranges.AT_ONCE_BYTES", 3 * each)
    assert collect_ranges(model, plan, reader, config) == at_once
    assert sizes == [1, *2 * [3, 3, 2, 3, 2]]
    sizes.clear()
    monkeypatch.setattr("d4c_onnx.quantization.inside.ranges.AT_ONCE_BYTES", 1)  # a sample is never divided
    assert collect_ranges(model, plan, reader, config) == at_once
    assert sizes == [1] * 27
    sizes.clear()
    fixed = parse(text.replace("float[n, 3", "float[8, 3"), w=rng.standard_normal((8, 3, 1, 1)))
    collect_ranges(fixed, plan, Feeds([rng.standard_normal((8, 3, 8, 8)).astype(np.float32)]), config)
    assert sizes == [8, 8]


@pytest.mark.parametrize(
    ("model", "target"),
    [
        pytest.param("vit", "cpu", marks=pytest.mark.slow),
        pytest.param("vit", "portable", marks=pytest.mark.slow),
        pytest.param("rn", "cpu", marks=pytest.mark.slow),
        pytest.param("rn", "portable", marks=pytest.mark.slow),
    ],
)
def test_every_rewrite_is_proved_by_running(
    model: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """`verify` runs both graphs of each step, on two calibration batches, and has ONNX's checker look at them."""
    bundle, dataset = material(request, model)
    for tower, path in bundle.encoders.items():
        keys = ("bits=w8a8", f"target={target}", "rounding=nearest", "smoothing=none")
        report, made = quantize(path, dataset, tmp_path / "q.onnx", *keys, verify=True)
        chosen = TARGETS[target]
        names = [rewrite.name for rewrite in (*chosen.float_rewrites, *chosen.served_rewrites)]
        assert [applied.name for applied in report.rewrites if applied.name in names] == names
        assert sum(applied.count for applied in report.rewrites) > 0
        fed = np.array(dataset.held_out) if tower == "image" else prompts_of_one_length(dataset)
        exact, got = (EncoderSession(file).run(fed) for file in (path, tmp_path / "q.onnx"))
        assert (exact * got).sum(-1).min() > 0.98
        domains = {node.domain for node in made.graph}
        assert domains <= {"", "com.microsoft"} if target == "cpu" else domains == {""}


def test_a_rewrite_that_changes_the_answers_is_caught(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite

    def halve(model: ir.Model) -> Result:
        norm = next(nodes_of(model.graph, "LayerNormalization"))
        scale = norm.inputs[1]
        assert scale is not None
        assert scale.const_value is not None
        scale.const_value = ir.Tensor(scale.const_value.numpy() * np.float32(0.5), name=scale.name)
        return Result(1)

    def tear(model: ir.Model) -> Result:
        next(nodes_of(model.graph, "LayerNormalization")).op_type = "Nonsense"
        return Result(1)

    bundle, dataset = material(request, "vit")
    for function, message in ((halve, "answers differ"), (tear, "breaks ONNX's rules")):
        other = replace(TARGETS["cpu"], float_rewrites=(Rewrite("careless", "nothing", function),))
        with pytest.raises(GraphError, match=f"careless.*{message}"):
            quantize(bundle.image_encoder, dataset, tmp_path / "q.onnx", "bits=w8a8", target=other, verify=True)


@pytest.mark.slow
def test_raised_layers_of_the_last_block_keep_their_eight_bits(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The pooled row's products are named anew: the bit budget's choice must reach them all the same."""
    bundle, dataset = material(request, "vit")
    plan = make_plan(load_model(bundle.image_encoder).graph, config_of())
    widths = {layer.node: 8 for layer in plan.layers[-6:]}
    keys = ("rounding=nearest", "smoothing=none")
    report, _ = quantize(bundle.image_encoder, dataset, tmp_path / "q.onnx", *keys, widths=widths)
    assert sum(layer.bits == 8 for layer in report.layers) == 1 + 6
    images = np.array(dataset.held_out)
    exact, got = (EncoderSession(file).run(images) for file in (bundle.image_encoder, tmp_path / "q.onnx"))
    assert (exact * got).sum(1).min() > 0.99
