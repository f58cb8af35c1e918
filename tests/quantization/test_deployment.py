"""The deployed graph answers as the plain one, for every target and layout."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet, open_calibration_set
from d4c_onnx.graph.bits import average_bits, layer_bits
from d4c_onnx.graph.files import load_graph, opset_of
from d4c_onnx.graph.index import GraphIndex, attribute
from d4c_onnx.quantization import quantize_bundle_files
from d4c_onnx.quantization.deployment import (
    TARGETS,
    compute_pooled_row_only,
    convolve_pools,
    fuse_attention,
    separate_gelu,
)
from d4c_onnx.quantization.layout import store_int4
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession, optimized_graph

SOT, EOT = 49406, 49407


def _texts(lengths: list[int], rng: np.random.Generator) -> np.ndarray:
    """Prompts whose end tokens stand at different places, padded with zeros."""
    rows = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = [SOT, *rng.integers(300, 400, length - 2), EOT]
    return rows


def _feeds(bundle: Bundle, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    height, width = bundle.manifest.preprocess.size
    images = [rng.standard_normal((batch, 3, height, width), dtype=np.float32) for batch in (1, 3)]
    return {"image": images, "text": [_texts([5], rng), _texts([4, 9, 7], rng), _texts([3, 77], rng)]}


def _run(model: onnx.ModelProto, batch: np.ndarray, optimize: bool = True) -> np.ndarray:
    return EncoderSession(model.SerializeToString(), optimize=optimize, literal=not optimize).run(batch)


def _quantized(
    bundle: Bundle, data: CalibrationSet, target: Path, *keys: str, bits: str = "w4a8", rounding: str = "nearest"
) -> Bundle:
    recipe = load_recipe(
        None,
        [
            f"quantization.bits={bits}",
            f"quantization.rounding={rounding}",
            "quantization.smoothing=none",
            *(f"quantization.{key}" for key in keys),
        ],
    )
    return quantize_bundle_files(
        bundle, data, target, recipe.quantization, recipe_dump=recipe.model_dump(mode="json"), threads=1
    )


@pytest.mark.parametrize(
    "rewrite",
    [compute_pooled_row_only, fuse_attention, partial(fuse_attention, standard=True)],
    ids=["row", "fused", "standard"],
)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_rewrites_keep_the_function(vit_bundle: Bundle, rng: np.random.Generator, tower: str, rewrite) -> None:
    model = load_graph(vit_bundle.encoders[tower])
    changed = load_graph(vit_bundle.encoders[tower])
    assert rewrite(changed)
    onnx.checker.check_model(changed)
    for batch in _feeds(vit_bundle, rng)[tower]:
        np.testing.assert_allclose(_run(changed, batch), _run(model, batch), atol=2e-6)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_last_block_has_one_row(vit_bundle: Bundle, rng: np.random.Generator, tower: str) -> None:
    model = load_graph(vit_bundle.encoders[tower])
    before = len(model.graph.node)
    compute_pooled_row_only(model)
    softmax = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert len(model.graph.node) < before + 8  # replaced, not added
    del model.graph.output[:]
    for node in softmax:
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
    batch = _feeds(vit_bundle, rng)[tower][1]
    queries = [value.shape[2] for value in EncoderSession(model.SerializeToString()).run_all(batch).values()]
    assert queries[-1] == 1
    assert all(rows > 1 for rows in queries[:-1])


@pytest.mark.parametrize("axes", [2, 3])
def test_gelu_stays_apart_from_its_bias(axes: int) -> None:
    rng = np.random.default_rng(0)
    free = ["batch", "tokens"][: axes - 1]
    values = {"weight": rng.standard_normal((8, 16)), "bias": rng.standard_normal(16)}
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["p"], name="product"),
        helper.make_node("Add", ["p", "bias"], ["h"], name="add"),
        helper.make_node("Gelu", ["h"], ["g"], name="gelu"),
        helper.make_node("Add", ["g", "bias"], ["y"], name="other"),  # keeps the bias as it was
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*free, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*free, 16])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    x = rng.standard_normal((2, 3, 8)[3 - axes :]).astype(np.float32)
    expected = _run(model, x)

    def kernels() -> list[str]:
        return [node.op_type for node in optimized_graph(model.SerializeToString()).graph.node]

    assert ("BiasGelu" in kernels()) == (axes == 3)  # or this rewrite has no point any more; two axes are a Gemm
    assert separate_gelu(model) == 1
    onnx.checker.check_model(model)
    assert "Gelu" in kernels()
    assert "BiasGelu" not in kernels()
    np.testing.assert_allclose(_run(model, x), expected, atol=1e-6)
    assert separate_gelu(model) == 0
    model.graph.node[2].attribute.append(helper.make_attribute("approximate", "tanh"))
    model.graph.node[1].input[1] = "bias"
    assert separate_gelu(model) == 0


def test_rewrites_leave_other_forms_alone(rn_bundle: Bundle, vit_bundle: Bundle) -> None:
    resnet = load_graph(rn_bundle.image_encoder)
    before = resnet.SerializeToString()
    assert not compute_pooled_row_only(resnet)
    assert resnet.SerializeToString() == before
    averaged = load_graph(vit_bundle.image_encoder)  # a ViT that averages its tokens has no row to spare
    pool = next(node for node in averaged.graph.node if node.op_type == "Gather")
    position = averaged.graph.node[:].index(pool)
    averaged.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    mean = helper.make_node("ReduceMean", [pool.input[0], "axes"], [pool.output[0]], name=pool.name, keepdims=0)
    averaged.graph.node[position].CopyFrom(mean)
    before = averaged.SerializeToString()
    assert not compute_pooled_row_only(averaged)
    assert averaged.SerializeToString() == before


def test_mixing_tokens_behind_the_attention_is_refused(vit_bundle: Bundle) -> None:
    """A row-dependent constant behind the last attention: the row alone would get the wrong summand."""
    model = load_graph(vit_bundle.image_encoder)
    last = [node for node in model.graph.node if node.op_type == "LayerNormalization"][-1]
    rows = np.arange(37, dtype=np.float32)[:, None] * np.ones((1, 128), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(rows, "rows"))
    position = model.graph.node[:].index(last)
    model.graph.node.insert(position, helper.make_node("Add", [last.input[0], "rows"], ["shifted"], name="shift"))
    model.graph.node[position + 1].input[0] = "shifted"
    before = model.SerializeToString()
    assert not compute_pooled_row_only(model)
    assert model.SerializeToString() == before


@pytest.fixture(scope="module")
def made(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Bundle]:
    """mini-vit quantised with the given keys, each once."""
    folder = tmp_path_factory.mktemp("made")
    bundles: dict[tuple[str, ...], Bundle] = {}

    def make(*keys: str) -> Bundle:
        if keys not in bundles:
            bundles[keys] = _quantized(vit_bundle, vit_calibration[1], folder / str(len(bundles)), *keys)
        return bundles[keys]

    return make


@pytest.fixture(scope="module")
def layouts(made: Callable[..., Bundle]) -> dict[str, Bundle]:
    return {name: made(f"int4_layout={name}", "target=portable") for name in ("cast", "native", "nibbles")}


def test_layouts_answer_alike(layouts: dict[str, Bundle], rng: np.random.Generator) -> None:
    for tower, batches in _feeds(layouts["cast"], rng).items():
        models = {name: load_graph(bundle.encoders[tower]) for name, bundle in layouts.items()}
        for batch in batches:
            literal = {name: _run(model, batch, optimize=False) for name, model in models.items()}
            np.testing.assert_array_equal(literal["native"], literal["cast"])
            np.testing.assert_array_equal(literal["nibbles"], literal["cast"])
            np.testing.assert_array_equal(_run(models["nibbles"], batch), _run(models["cast"], batch))


def test_layouts_in_the_file(layouts: dict[str, Bundle]) -> None:
    assert {name: bundle.manifest.quantization.minimum_onnxruntime for name, bundle in layouts.items()} == {
        "cast": "1.23",
        "native": "1.20",
        "nibbles": "1.20",
    }
    for tower in ("image", "text"):
        models = {name: load_graph(bundle.encoders[tower]) for name, bundle in layouts.items()}
        bits = {name: [(layer.shape, layer.bits) for layer in layer_bits(model)] for name, model in models.items()}
        assert bits["cast"] == bits["native"] == bits["nibbles"]
        assert average_bits(layer_bits(models["nibbles"])) < 4.3
        assert opset_of(models["nibbles"]) < 21 <= opset_of(models["cast"])
        kinds = {name: {tensor.data_type for tensor in model.graph.initializer} for name, model in models.items()}
        assert TensorProto.INT4 in kinds["cast"]
        assert TensorProto.INT4 in kinds["native"]
        assert TensorProto.INT4 not in kinds["nibbles"]
        ops = {name: [node.op_type for node in model.graph.node] for name, model in models.items()}
        assert ops["native"].count("Cast") < ops["cast"].count("Cast")


@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(0, 2**31 - 1))
@settings(max_examples=25, deadline=None)
def test_nibbles_unpack_any_shape(shape: list[int], seed: int) -> None:
    """Odd element counts included: onnxruntime gives back exactly the integers that were stored."""
    values = np.random.default_rng(seed).integers(-8, 8, shape, np.int8)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "one",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT8, shape)],
        [numpy_helper.from_array(values, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert store_int4(model, ["w"], "nibbles") == 1
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], values)


@pytest.mark.parametrize(("model", "bits"), [("vit", "w8a8"), ("rn", "w8a8"), ("rn", "w4a8")])
def test_tensorrt_files_are_symmetric(model: str, bits: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle: Bundle = request.getfixturevalue(f"{model}_bundle")
    made = request.getfixturevalue(f"{model}_calibration")
    data = made[1] if model == "vit" else open_calibration_set(made)
    quantized = _quantized(bundle, data, tmp_path / bits, "target=tensorrt", bits=bits)
    for path in quantized.encoders.values():
        graph = load_graph(path).graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        assert pairs
        for node in pairs:
            zero = constants[node.input[2]]
            assert zero.data_type in (TensorProto.INT8, TensorProto.INT4)  # no uint8, and no int32 biases
            assert not numpy_helper.to_array(zero).any()
        # what its parser lists as not supported: integer tables, and the bit operations that unpack them
        assert not {node.op_type for node in graph.node} & {"BitShift", "BitwiseAnd"}
        read = {node.input[0] for node in graph.node if node.op_type == "Gather"} & set(constants)
        assert all(constants[name].data_type not in (TensorProto.INT8, TensorProto.UINT8) for name in read)
    assert quantized.manifest.quantization.target == "tensorrt"


def test_portable_has_standard_operators_only(layouts: dict[str, Bundle], vit_bundle: Bundle) -> None:
    for bundle in layouts.values():
        for path in bundle.encoders.values():
            assert {node.domain for node in load_graph(path).graph.node} == {""}
    assert not TARGETS["portable"].fused_attention


def test_form_of_the_file_by_keys(made: Callable[..., Bundle]) -> None:
    """Signed activations, zero points for weights and a float table, where the target has it otherwise."""
    plain = made("int4_layout=cast", "fused_biases=false")
    other = made("symmetric=true", "weight_zero_points=true", "token_table=float")
    for tower, batches in _feeds(other, np.random.default_rng(1)).items():
        model = load_graph(other.encoders[tower])
        index = GraphIndex(model.graph)
        quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        assert quantizers
        for node in quantizers:
            zero = index.constant(node.input[2])
            assert zero.dtype == np.int8
            assert not zero.any()
        for layer in layer_bits(model):
            node = next(node for node in model.graph.node if node.name == layer.node)
            assert not index.constant(index.producer[node.input[1]].input[2]).any()
        tables = [
            index.initializers[node.input[0]] for node in index.consumers["input_ids"] if node.op_type == "Gather"
        ]
        assert [table.data_type for table in tables] == [TensorProto.FLOAT] * (tower == "text")
        for batch in batches:
            one, twin = (EncoderSession(entry.encoders[tower]).run(batch) for entry in (plain, other))
            assert (one * twin).sum(-1).min() > 0.98


def test_cpu_target_fuses_attention(made: Callable[..., Bundle], layouts: dict[str, Bundle]) -> None:
    fused = made("int4_layout=cast", "fused_biases=false")
    running = [node for node in optimized_graph(fused.image_encoder).graph.node if node.op_type == "QuickGelu"]
    assert [attribute(node, "alpha") for node in running] == [1.0] * 6  # folded: no constant left
    assert fused.manifest.quantization.encoders["image_encoder.onnx"].applied("fused_attention") == 6
    assert fused.manifest.quantization.encoders["image_encoder.onnx"].applied("pooled_row_only") == 1
    rng = np.random.default_rng(1)
    for tower, batches in _feeds(fused, rng).items():
        for batch in batches:
            one, other = (EncoderSession(entry.encoders[tower]).run(batch) for entry in (fused, layouts["cast"]))
            assert (one * other).sum(-1).min() > 0.999  # an activation may round to the neighbouring step


def test_standard_attention_is_portable(made: Callable[..., Bundle], layouts: dict[str, Bundle]) -> None:
    one = made("int4_layout=nibbles", "target=portable", "standard_attention=true")
    assert one.manifest.quantization.minimum_onnxruntime == "1.24"  # nibbles alone: 1.20
    assert "standard operators only" in one.manifest.quantization.target_note
    for tower, batches in _feeds(one, np.random.default_rng(1)).items():
        apart, model = (load_graph(bundle.encoders[tower]) for bundle in (layouts["nibbles"], one))
        onnx.checker.check_model(model)
        assert (opset_of(model), model.ir_version) == (23, 11)
        assert {node.domain for node in model.graph.node} == {""}
        operators = [node for node in model.graph.node if node.op_type == "Attention"]
        blocks = {"image": 6, "text": 3}[tower]
        record = one.manifest.quantization.encoders[one.encoders[tower].name]
        assert record.applied("fused_attention") == len(operators) == blocks
        causal = [attribute(node, "is_causal") for node in operators]
        assert causal == ([1] * (blocks - 1) + [0] if tower == "text" else [0] * blocks)
        products = [inspect_encoder(bundle.encoders[tower]).layers for bundle in (layouts["nibbles"], one)]
        assert [sum(layer.int8 for layer in layers) for layers in products] == [len(layer_bits(apart))] * 2
        for batch in batches:
            assert (_run(model, batch) * _run(apart, batch)).sum(-1).min() > 0.999


@pytest.mark.parametrize("layout", ["cast", "nibbles"])
def test_fused_biases_keep_answers_and_bits(layout: str, made: Callable[..., Bundle]) -> None:
    plain, fused = (made(f"int4_layout={layout}", f"fused_biases={fuse}") for fuse in ("false", "true"))
    rng = np.random.default_rng(1)
    for tower, batches in _feeds(fused, rng).items():
        before, after = (load_graph(entry.encoders[tower]) for entry in (plain, fused))
        onnx.checker.check_model(after)
        products = [node.op_type for node in after.graph.node].count("MatMulIntegerToFloat")
        assert fused.manifest.quantization.encoders[fused.encoders[tower].name].applied("fused_biases") == products
        adds = [sum(node.op_type == "Add" for node in model.graph.node) for model in (before, after)]
        assert adds[0] - adds[1] == products
        assert products == {"image": 24, "text": 12}[tower]  # q, out_proj, c_fc and c_proj of each block have biases
        one, other = (
            [(layer.node, layer.shape, layer.bits) for layer in layer_bits(model)] for model in (before, after)
        )
        assert one == other
        for batch in batches:
            assert (_run(after, batch) * _run(before, batch)).sum(-1).min() > 0.999
        if layout == "cast":
            seen, same = (inspect_encoder(entry.encoders[tower]) for entry in (plain, fused))
            assert seen.summary == same.summary
            for layer, twin in zip(seen.layers, same.layers, strict=True):
                assert replace(twin, op=layer.op) == layer


@pytest.mark.parametrize(("layout", "biases"), [("cast", "false"), ("cast", "true"), ("nibbles", "true")])
def test_fused_qkv_keeps_answers_and_bits(layout: str, biases: str, made: Callable[..., Bundle]) -> None:
    keys = (f"int4_layout={layout}", f"fused_biases={biases}")
    apart, fused = made(*keys), made(*keys, "fused_qkv=true")
    rng = np.random.default_rng(1)
    for tower, batches in _feeds(fused, rng).items():
        before, after = (load_graph(entry.encoders[tower]) for entry in (apart, fused))
        onnx.checker.check_model(after)
        # q, k and v of each block; the last block's q reads its one row, so only k and v are left there
        blocks = {"image": 6, "text": 3}[tower]
        count = 3 * blocks - 1
        assert fused.manifest.quantization.encoders[fused.encoders[tower].name].applied("fused_qkv") == count
        one, other = (layer_bits(model) for model in (before, after))
        assert len(one) - len(other) == count - blocks
        assert average_bits(one) == average_bits(other)
        assert sum(layer.elements for layer in one) == sum(layer.elements for layer in other)
        for batch in batches:
            np.testing.assert_array_equal(_run(after, batch), _run(before, batch))
        if layout == "cast":
            seen = inspect_encoder(fused.encoders[tower])
            joined = [layer for layer in seen.layers if layer.node.endswith("_qkv")]
            assert len(joined) == blocks
            assert all(layer.int8 and layer.bits == 4 for layer in joined)


def test_causal_masks_are_known_not_given(vit_bundle: Bundle) -> None:
    """All attentions but the last one, whose only query stands at the end token, need no mask."""
    model = load_graph(vit_bundle.text_encoder)
    compute_pooled_row_only(model)
    fuse_attention(model)
    fused = [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]
    causal = [attribute(node, "unidirectional") for node in fused]
    assert causal == [1] * (len(fused) - 1) + [0]
    assert [len(node.input) for node in fused] == [3] * (len(fused) - 1) + [6]

    prefix = load_graph(vit_bundle.text_encoder)  # the first two tokens see each other: not causal
    mask = next(tensor for tensor in prefix.graph.initializer if "mask" in tensor.name and len(tensor.dims) == 2)
    values = numpy_helper.to_array(mask).copy()
    values[0, 1] = 0
    mask.CopyFrom(numpy_helper.from_array(values, mask.name))
    plain = copy.deepcopy(prefix)
    fuse_attention(prefix)
    fused = [node for node in prefix.graph.node if node.op_type == "MultiHeadAttention"]
    assert not any(attribute(node, "unidirectional") for node in fused)
    ids = np.array([[SOT, 320, 321, 322, EOT]], np.int64)
    np.testing.assert_allclose(_run(prefix, ids), _run(plain, ids), atol=2e-6)


def test_pools_become_depthwise_convolutions(rn_bundle: Bundle, rn_calibration: Path, tmp_path: Path) -> None:
    data = open_calibration_set(rn_calibration)
    pooled = _quantized(rn_bundle, data, tmp_path / "pools", "convolved_pools=false")
    convolved = _quantized(rn_bundle, data, tmp_path / "convolutions")
    before, after = (load_graph(bundle.image_encoder) for bundle in (pooled, convolved))
    pools = sum(node.op_type == "AveragePool" for node in before.graph.node)
    assert pools == sum(node.op_type == "AveragePool" for node in load_graph(rn_bundle.image_encoder).graph.node) - 1
    assert not any(node.op_type == "AveragePool" for node in after.graph.node)
    depthwise = [layer for layer in layer_bits(after) if layer.shape[1:] == (1, 2, 2)]
    assert len(depthwise) == pools
    assert {layer.bits for layer in depthwise} == {4}
    running = [node.op_type for node in optimized_graph(convolved.image_encoder).graph.node]
    assert "QLinearAveragePool" not in running
    assert running.count("QLinearConv") == sum(node.op_type == "Conv" for node in after.graph.node)
    for batch in _feeds(convolved, np.random.default_rng(0))["image"]:
        one, other = (_run(model, batch, optimize=False) for model in (before, after))
        np.testing.assert_allclose(other, one, atol=2e-3)  # a mean halfway between two steps may go either way
        assert (one * other).sum(-1).min() > 0.9999


@given(st.integers(0, 2**31 - 1), st.floats(0.5, 2), st.sampled_from([(2, 2), (2, 3)]))
@settings(max_examples=15, deadline=None)
def test_convolved_pool_averages(seed: int, ratio: float, kernel: tuple[int, int]) -> None:
    """Against the pool itself, integers with scales of their own on both sides: at most one step apart."""
    rng = np.random.default_rng(seed)
    arrays = {
        "w": rng.integers(-60, 60, (4, 3, 1, 1), np.int8),
        "w_scale": np.float32(0.01),
        "w_zero": np.int8(0),
        "in_scale": np.float32(0.02),
        "in_zero": np.uint8(rng.integers(0, 256)),
        "out_scale": np.float32(0.02 * ratio),
        "out_zero": np.uint8(rng.integers(0, 256)),
    }
    nodes = [helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_real"], "w_real")]
    for op, source, made in (
        ("Conv", "x", "y"),
        ("QuantizeLinear", "y", "in_q"),
        ("DequantizeLinear", "in_q", "in_d"),
        ("AveragePool", "in_d", "mean"),
        ("QuantizeLinear", "mean", "out_q"),
        ("DequantizeLinear", "out_q", "out_d"),
    ):
        grid = [f"{made.split('_')[0]}_scale", f"{made.split('_')[0]}_zero"] if "Linear" in op else []
        window = {"kernel_shape": kernel, "strides": kernel} if op == "AveragePool" else {}
        names = [source, *grid, *(["w_real"] if op == "Conv" else [])]
        nodes.append(helper.make_node(op, names, [made], made, **window))
    graph = helper.make_graph(
        nodes,
        "pool",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("out_d", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    changed = copy.deepcopy(plain)
    assert convolve_pools(changed) == [f"pool_4x{kernel[0]}x{kernel[1]}_quantized"]
    batch = rng.standard_normal((1, 3, 6, 6), dtype=np.float32)
    steps = [np.rint(_run(model, batch, optimize=False) / arrays["out_scale"]) for model in (plain, changed)]
    assert np.abs(steps[0] - steps[1]).max() <= 1
    assert np.mean(steps[0] != steps[1]) < 0.3  # a quarter of the means of four integers are ties


def test_weights_of_products_have_no_zero_points(layouts: dict[str, Bundle]) -> None:
    """One per channel slows onnxruntime's int8 product down; compilers are given them all the same."""
    for name, bundle in layouts.items():
        model = load_graph(bundle.image_encoder)
        index = GraphIndex(model.graph)
        for layer in layer_bits(model):
            node = next(node for node in model.graph.node if node.name == layer.node)
            weight = index.producer[node.input[1]]
            assert len(weight.input) == (3 if name == "native" or node.op_type == "Conv" else 2)
