"""Rewrites: exact, told apart from other forms, and refused with a reason where they would not be exact."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from encoders import EOT, SOT, inputs, material
from graphs import check, ops, parse, run, run_all, served, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import clear_notes, load_model, model_of, with_shapes
from d4c_onnx.graph.values import (
    array,
    attribute,
    constant,
    is_op,
    name_of,
    node,
    nodes_by_name,
    nodes_of,
    set_constant,
    take_over,
    value_named,
)
from d4c_onnx.quantization.rewrites.batch_norm import FOLD_BATCH_NORMS
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.gelu import SEPARATE_GELU
from d4c_onnx.quantization.rewrites.identity_pools import DROP_IDENTITY_POOLS
from d4c_onnx.quantization.rewrites.mappings import apply_scale, find_mappings
from d4c_onnx.quantization.rewrites.patches import UNFOLD_PATCHES
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.pools import CONVOLVE_POOLS
from d4c_onnx.quantization.rewrites.quick_gelu import FOLD_QUICK_GELU
from d4c_onnx.quantization.rewrites.residuals import FUSE_RESIDUALS
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite, apply_all
from d4c_onnx.quantization.rewrites.zero_points import OMIT_ZERO_POINTS
from d4c_onnx.runtime.session import EncoderSession

FLOAT_REWRITES = (
    FOLD_BATCH_NORMS,
    DROP_IDENTITY_POOLS,
    FOLD_QUICK_GELU,
    UNFOLD_PATCHES,
    COMPUTE_POOLED_ROW,
    SEPARATE_GELU,
    FUSE_ATTENTION,
    OMIT_ZERO_POINTS,
)


def _refuses(rewrite: Rewrite, model: ir.Model, reason: str = "") -> Result:
    """The model stays as it is, to the byte; where a reason is asked for, it is given."""
    before = snapshot(model)
    result = rewrite.apply(model)
    assert result.count == 0
    assert snapshot(model) == before
    assert not reason or any(reason in refusal.reason for refusal in result.refused), result.refused
    return result


@pytest.mark.parametrize("rewrite", [COMPUTE_POOLED_ROW, FUSE_ATTENTION], ids=["row", "fused"])
@pytest.mark.parametrize("tower", ["image", "text"])
def test_rewrites_keep_the_function(vit_bundle: Bundle, rng: np.random.Generator, tower: str, rewrite: Rewrite) -> None:
    model = load_model(vit_bundle.encoders[tower])
    changed = model.clone()
    result = rewrite.apply(changed)
    assert result.count
    assert not result.refused
    check(changed)
    for batch in inputs(vit_bundle, rng)[tower]:
        np.testing.assert_allclose(run(changed, batch), run(model, batch), atol=2e-6)


@pytest.mark.parametrize("model", ["vit", "rn"])
def test_all_float_rewrites_together_keep_the_function(
    model: str, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    bundle, _ = material(request, model)
    for tower, path in bundle.encoders.items():
        changed = load_model(path)
        apply_all(FLOAT_REWRITES, changed)
        check(changed)
        for batch in inputs(bundle, rng)[tower]:
            np.testing.assert_allclose(run(changed, batch), EncoderSession(path).run(batch), atol=5e-6)
        for rewrite in (FOLD_BATCH_NORMS, FOLD_QUICK_GELU, UNFOLD_PATCHES, SEPARATE_GELU, FUSE_ATTENTION):
            assert rewrite.apply(changed).count == 0, rewrite.name  # done once, nothing is left to do


@pytest.mark.parametrize("tower", ["image", "text"])
def test_last_block_has_one_row(vit_bundle: Bundle, rng: np.random.Generator, tower: str) -> None:
    model = load_model(vit_bundle.encoders[tower])
    before = len(model.graph)
    assert COMPUTE_POOLED_ROW.apply(model) == Result(1)
    assert len(model.graph) < before + 8  # replaced, not added
    names = [name_of(entry.outputs[0]) for entry in nodes_of(model.graph, "Softmax")]
    batch = inputs(vit_bundle, rng)[tower][1]
    queries = [value.shape[2] for value in run_all(model, batch, names).values()]
    assert queries[-1] == 1
    assert all(rows > 1 for rows in queries[:-1])


def test_towers_without_a_pooled_row_are_left_alone(rn_bundle: Bundle, vit_bundle: Bundle) -> None:
    _refuses(COMPUTE_POOLED_ROW, load_model(rn_bundle.image_encoder))
    averaged = load_model(vit_bundle.image_encoder)  # a ViT that averages its tokens has no row to spare
    pool = next(nodes_of(averaged.graph, "Gather"))
    axes = set_constant(averaged.graph, "axes", np.array([1], np.int64))
    mean = node("ReduceMean", [pool.inputs[0], axes], "mean", attributes={"keepdims": 0})
    averaged.graph.insert_before(pool, mean)
    take_over(pool.outputs[0], mean.outputs[0])
    averaged.graph.remove(pool, safe=True)
    check(averaged)
    _refuses(COMPUTE_POOLED_ROW, averaged)


def test_mixing_tokens_behind_the_attention_is_refused(vit_bundle: Bundle) -> None:
    """A row-dependent constant behind the last attention: the row alone would get the wrong summand."""
    model = load_model(vit_bundle.image_encoder)
    last = list(nodes_of(model.graph, "LayerNormalization"))[-1]
    rows = set_constant(model.graph, "rows", np.arange(37, dtype=np.float32)[:, None] * np.ones((1, 128), np.float32))
    shifted = node("Add", [last.inputs[0], rows], "shifted", name="shift")
    model.graph.insert_before(last, shifted)
    last.replace_input_with(0, shifted.outputs[0])
    check(model)
    _refuses(COMPUTE_POOLED_ROW, model, "rows differs from row to row")


def test_causal_masks_are_known_not_given(vit_bundle: Bundle) -> None:
    """All attentions but the last one, whose only query stands at the end token, need no mask."""
    model = load_model(vit_bundle.text_encoder)
    apply_all((COMPUTE_POOLED_ROW, FUSE_ATTENTION), model)
    fused = list(nodes_of(model.graph, "com.microsoft:MultiHeadAttention"))
    assert [attribute(entry, "unidirectional") for entry in fused] == [1] * (len(fused) - 1) + [0]
    assert [len(entry.inputs) for entry in fused] == [3] * (len(fused) - 1) + [6]

    prefix = load_model(vit_bundle.text_encoder)  # the first two tokens see each other: not causal
    [mask] = [
        value
        for name, value in prefix.graph.initializers.items()
        if "mask" in name and (found := array(value)) is not None and found.ndim == 2
    ]
    values = constant(mask).copy()
    values[0, 1] = 0
    set_constant(prefix.graph, name_of(mask), values)
    plain = prefix.clone()
    assert FUSE_ATTENTION.apply(prefix).count == len(fused)
    masks = [attribute(entry, "unidirectional") for entry in nodes_of(prefix.graph, "com.microsoft:MultiHeadAttention")]
    assert not any(masks)
    ids = np.array([[SOT, 320, 321, 322, EOT]], np.int64)
    np.testing.assert_allclose(run(prefix, ids), run(plain, ids), atol=2e-6)


# One attention of two heads of width 4; parts of it are replaced by other forms.
ATTENTION = """attention (float[n, 5, 8] x) => (float[n, 5, 8] y) {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    q_heads = Reshape(q, split)
    k_heads = Reshape(k, split)
    v_heads = Reshape(v, split)
    q_turned = Transpose<perm = [0, 2, 1, 3]>(q_heads)
    k_turned = Transpose<perm = [0, 2, 3, 1]>(k_heads)
    v_turned = Transpose<perm = [0, 2, 1, 3]>(v_heads)
    scores = MatMul(q_turned, k_turned)
    [softmax] share = Softmax<axis = -1>(scores)
    mixed = MatMul(share, v_turned)
    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
    joined = Reshape(turned, join)
    y = MatMul(joined, wo)
}"""


def _attention(*edits: tuple[str, str], **more: object) -> ir.Model:
    rng = np.random.default_rng(0)
    text = ATTENTION
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    weights = {name: rng.standard_normal((8, 8)) * 0.5 for name in ("wq", "wk", "wv", "wo")}
    shapes = {"split": np.array([0, 5, 2, 4]), "join": np.array([0, 5, 8])}
    return parse(text, **{**weights, **shapes, **more})


def test_the_attention_of_the_text_is_one() -> None:
    model = _attention()
    batch = np.random.default_rng(1).standard_normal((3, 5, 8)).astype(np.float32)
    expected = run(model, batch)
    assert FUSE_ATTENTION.apply(model) == Result(1)
    assert ops(model) == ["MatMul"] * 3 + ["MultiHeadAttention", "MatMul"]
    check(model)
    np.testing.assert_allclose(run(model, batch), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("edits", "constants", "reason"),
    [
        (
            [("scores = MatMul(q_turned, k_turned)", "p = MatMul(q_turned, k_turned)\n scores = Div(p, root)")],
            {"root": np.float32(2)},
            "no product of queries and keys",
        ),
        (
            [
                (
                    "scores = MatMul(q_turned, k_turned)",
                    'scores = Einsum<equation = "bhqd,bhdk->bhqk">(q_turned, k_turned)',
                )
            ],
            {},
            "no product of queries and keys",
        ),
        (
            [("mixed = MatMul(share, v_turned)", 'mixed = Einsum<equation = "bhqk,bhkd->bhqd">(share, v_turned)')],
            {},
            "not read by one product",
        ),
        (
            [("mixed = MatMul(share, v_turned)", "half = Mul(share, two)\n mixed = MatMul(half, v_turned)")],
            {"two": np.float32(2)},
            "not read by one product",
        ),
        (
            [
                (
                    "y = MatMul(joined, wo)",
                    "twice = MatMul(share, v_turned)\n z = MatMul(joined, wo)\n s = ReduceSum(twice)\n y = Add(z, s)",
                )
            ],
            {},
            "not read by one product",
        ),
        (
            [
                (
                    "k_turned = Transpose<perm = [0, 2, 3, 1]>(k_heads)",
                    "k_first = Transpose<perm = [0, 2, 1, 3]>(k_heads)\n"
                    " k_turned = Transpose<perm = [0, 1, 3, 2]>(k_first)",
                )
            ],
            {},
            "not split into heads",
        ),
        (
            [
                ("joined = Reshape(turned, join)", "joined = Reshape(turned, join)\n other = Relu(turned)"),
                ("y = MatMul(joined, wo)", "z = MatMul(joined, wo)\n s = ReduceSum(other)\n y = Add(z, s)"),
            ],
            {},
            "not joined",
        ),
        (
            [
                ("perm = [0, 2, 1, 3]>(q_heads)", "perm = [2, 0, 1, 3]>(q_heads)"),
                ("perm = [0, 2, 3, 1]>(k_heads)", "perm = [2, 0, 3, 1]>(k_heads)"),
                ("perm = [0, 2, 1, 3]>(v_heads)", "perm = [2, 0, 1, 3]>(v_heads)"),
                ("perm = [0, 2, 1, 3]>(mixed)", "perm = [1, 2, 0, 3]>(mixed)"),
            ],
            {},
            "another order of axes",
        ),
        (
            [("scores = MatMul(q_turned, k_turned)", "p = MatMul(q_turned, k_turned)\n scores = Add(p, far)")],
            {"far": np.zeros((2, 5, 5))},
            "the axes of its mask are not known",
        ),
    ],
    ids=["div", "einsum", "einsum of values", "scaled", "two readers", "two turns", "two joins", "order", "mask of 3"],
)
def test_attention_of_another_form_is_refused_with_the_reason(
    edits: list[tuple[str, str]], constants: dict, reason: str
) -> None:
    result = _refuses(FUSE_ATTENTION, _attention(*edits, **constants), reason)
    assert [refusal.place for refusal in result.refused] == ["softmax"]


@pytest.mark.parametrize("axes", [2, 3])
def test_gelu_stays_apart_from_its_bias(axes: int) -> None:
    rng = np.random.default_rng(0)
    free = ", ".join(["batch", "tokens"][: axes - 1])
    text = f"""mlp (float[{free}, 8] x) => (float[{free}, 16] y) {{
        [product] p = MatMul(x, weight)
        [add] h = Add(p, bias)
        [gelu] g = Gelu(h)
        [other] y = Add(g, bias)
    }}"""  # the second reader keeps the bias as it was
    model = parse(text, weight=rng.standard_normal((8, 16)), bias=rng.standard_normal(16))
    x = rng.standard_normal((2, 3, 8)[3 - axes :]).astype(np.float32)
    expected = run(model, x)
    assert ("BiasGelu" in ops(served(model))) == (axes == 3)  # or it has no point any more; two axes are a Gemm
    assert SEPARATE_GELU.apply(model) == Result(1)
    check(model)
    assert "Gelu" in ops(served(model))
    assert "BiasGelu" not in ops(served(model))
    np.testing.assert_allclose(run(model, x), expected, atol=1e-6)
    assert SEPARATE_GELU.apply(model) == Result(0)
    by_tanh = parse(text.replace("Gelu(h)", 'Gelu<approximate = "tanh">(h)'), weight=np.ones((8, 16)), bias=np.ones(16))
    _refuses(SEPARATE_GELU, by_tanh, "by tanh")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_quick_gelu_loses_its_constant_exactly(tower: str, vit_bundle: Bundle, rng: np.random.Generator) -> None:
    model = load_model(vit_bundle.encoders[tower])
    blocks, muls = ops(model).count("Sigmoid"), ops(model).count("Mul")
    assert FOLD_QUICK_GELU.apply(model) == Result(blocks)
    assert blocks > 0
    check(model)
    assert ops(model).count("Mul") == muls - blocks
    assert FOLD_QUICK_GELU.apply(model) == Result(0)
    gelus = [entry for entry in served(model).graph if entry.op_type == "QuickGelu"]
    assert [attribute(entry, "alpha") for entry in gelus] == [1.0] * blocks
    for batch in inputs(vit_bundle, rng)[tower]:
        np.testing.assert_allclose(run(model, batch), EncoderSession(vit_bundle.encoders[tower]).run(batch), atol=2e-6)


QUICK_GELU = """mlp (float[n, 8] x) => (float[n, 4] y) {
    [c_fc] p = MatMul(x, first)
    [add] h = Add(bias, p)
    [gate] m = Mul(a, h)
    [sigmoid] s = Sigmoid(m)
    [product] g = Mul(h, s)
    [c_proj] y = MatMul(g, second)
}"""


def _quick_gelu(width: int, constant: float | np.ndarray, text: str = QUICK_GELU, **more: object) -> ir.Model:
    rng = np.random.default_rng(0)
    values = {"first": rng.standard_normal((8, width)), "bias": rng.standard_normal(width)}
    return parse(text, a=np.asarray(constant, np.float32), second=rng.standard_normal((width, 4)), **values, **more)


@given(st.floats(0.05, 20), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_any_positive_constant_folds(constant: float, width: int) -> None:
    model = _quick_gelu(width, constant)
    x = np.random.default_rng(width).standard_normal((5, 8)).astype(np.float32)
    expected = run(model, x)
    assert FOLD_QUICK_GELU.apply(model) == Result(1)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)
    [mapping] = find_mappings(model.graph, weighted_layers(model.graph))
    assert mapping.kind == "activation"  # smoothing can still reach it, at the price of a Mul
    apply_scale(model.graph, mapping, np.random.default_rng(0).uniform(0.1, 10, width).astype(np.float32))
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("constant", "edit", "reason"),
    [
        (np.linspace(1, 2, 16), ("", ""), "one positive number"),  # a stress variant's
        (-1.702, ("", ""), "one positive number"),
        (1.702, ("float[n, 4] y)", "float[n, 4] y, float[n, 16] h)"), "two linear layers"),  # would get 1.702 h
        (1.702, ("y = MatMul(g, second)", "y = MatMul(g, second)\n unread = MatMul(g, second)"), "two linear layers"),
    ],
    ids=["vector", "negative", "an output", "shared weight"],
)
def test_constants_that_do_not_fold_stay(constant: object, edit: tuple[str, str], reason: str) -> None:
    _refuses(FOLD_QUICK_GELU, _quick_gelu(16, constant, QUICK_GELU.replace(*edit)), reason)  # type: ignore[arg-type]


NORM = """norm (float[2, 3, 8, 8] x) => (float[2, 6, 8, 8] y) {
    [conv] u = Conv<pads = [1, 1, 1, 1]>(x, w, c)
    [norm] y = BatchNormalization<epsilon = 0.001>(u, g, b, m, v)
}"""


def _norm(text: str = NORM, bias: bool = True) -> tuple[ir.Model, np.ndarray]:
    rng = np.random.default_rng(1)
    known = {"w": rng.standard_normal((6, 3, 3, 3)), "g": rng.uniform(0.5, 2, 6), "b": rng.standard_normal(6)}
    known |= {"m": rng.standard_normal(6), "v": rng.uniform(0.1, 2, 6), "c": rng.standard_normal(6)}
    if not bias:
        text = text.replace("(x, w, c)", "(x, w)")
        del known["c"]
    return parse(text, **known), rng.standard_normal((2, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_exactly(bias: bool) -> None:
    model, x = _norm(bias=bias)
    expected = run(model, x)
    assert FOLD_BATCH_NORMS.apply(model) == Result(1)
    assert ops(model) == ["Conv"]
    assert [name_of(value) for value in model.graph.outputs] == ["y"]
    check(model)
    np.testing.assert_allclose(run(model, x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([("8] y)", "8] y, float[2, 6, 8, 8] u)")], "something else reads"),  # the convolution's own
        ([("[norm] y", "r = Relu(u)\n [norm] t"), ("m, v)", "m, v)\n y = Add(r, t)")], "something else reads"),
        ([("(u, g", "(r, g"), ("[norm]", "r = Relu(u)\n [norm]")], "not made by a convolution"),
        ([("(u, g, b, m, v)", "(u, g, b, mean, v)"), ("[norm]", "mean = Neg(m)\n [norm]")], "not constants"),
        (
            [("[norm] y", "t = Conv<pads = [1, 1, 1, 1]>(x, w)\n [norm] s"), ("m, v)", "m, v)\n y = Add(s, t)")],
            "a constant of its own",
        ),
    ],
    ids=["output", "reader", "relu between", "computed statistics", "shared weight"],
)
def test_batch_norms_that_do_not_fold_stay(edits: list[tuple[str, str]], reason: str) -> None:
    text = NORM
    for edit in edits:
        assert edit[0] in text
        text = text.replace(*edit)
    _refuses(FOLD_BATCH_NORMS, _norm(text)[0], reason)


def _patches(weight: np.ndarray, bias: np.ndarray | None, size: tuple[int, int], attributes: str) -> ir.Model:
    """What a ViT begins with: pixel_values -> Conv -> [batch, channels, patches] -> [batch, patches, channels]."""
    text = f"""vit (float[batch, {weight.shape[1]}, {size[0]}, {size[1]}] x) => (float[batch, p, c] tokens) {{
        [patches] map = Conv<{attributes}>(x, w{", b" if bias is not None else ""})
        [flat] flat = Reshape(map, shape)
        [turn] tokens = Transpose<perm = [0, 2, 1]>(flat)
    }}"""
    known = {"w": weight, "shape": np.array([0, len(weight), -1])} | ({} if bias is None else {"b": bias})
    return parse(text, **known)


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.booleans())
@settings(max_examples=15, deadline=None)
def test_patches_unfold_exactly(kernel: tuple[int, int], grid: tuple[int, int], with_bias: bool) -> None:
    """Oblong patches and grids included."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 3, *kernel), dtype=np.float32)
    bias = rng.standard_normal(5, dtype=np.float32) if with_bias else None
    size = (kernel[0] * grid[0], kernel[1] * grid[1])
    plain = _patches(weight, bias, size, f"kernel_shape = {list(kernel)}, strides = {list(kernel)}")
    changed = plain.clone()
    assert UNFOLD_PATCHES.apply(changed) == Result(1)
    check(changed)
    [layer] = weighted_layers(changed.graph)
    assert (layer.op, layer.node, layer.weight) == ("MatMul", "patches", "w")
    batch = rng.standard_normal((2, 3, *size), dtype=np.float32)
    np.testing.assert_allclose(run(changed, batch), run(plain, batch), atol=1e-5)


@pytest.mark.parametrize(
    ("size", "attributes"),
    [
        ((8, 8), "strides = [2, 2]"),  # patches overlap
        ((8, 8), "strides = [4, 4], pads = [1, 1, 1, 1]"),
        ((8, 10), "strides = [4, 4]"),  # the last columns belong to no patch
        ((8, 8), 'strides = [4, 4], auto_pad = "SAME_UPPER"'),
    ],
)
def test_other_convolutions_are_no_patches(size: tuple[int, int], attributes: str) -> None:
    weight = np.ones((5, 3, 4, 4), np.float32)
    _refuses(UNFOLD_PATCHES, _patches(weight, None, size, f"kernel_shape = [4, 4], {attributes}"), "not its stride")


def test_a_vit_has_patches_and_a_resnet_has_none(
    vit_bundle: Bundle, rn_bundle: Bundle, rng: np.random.Generator
) -> None:
    model = load_model(vit_bundle.image_encoder)
    changed = model.clone()
    assert UNFOLD_PATCHES.apply(changed) == Result(1)
    assert len(weighted_layers(changed.graph)) == len(weighted_layers(model.graph))
    assert "Conv" not in ops(changed)
    for batch in inputs(vit_bundle, rng)["image"]:
        np.testing.assert_allclose(run(changed, batch), run(model, batch), atol=2e-6)
    _refuses(UNFOLD_PATCHES, load_model(rn_bundle.image_encoder), "not its stride")
    _refuses(UNFOLD_PATCHES, load_model(vit_bundle.text_encoder))


def test_a_pool_of_single_values_is_skipped(rn_bundle: Bundle, rng: np.random.Generator) -> None:
    """The first stage has one; the others average 2 x 2 values and stay."""
    model = load_model(rn_bundle.image_encoder)
    changed = model.clone()
    assert DROP_IDENTITY_POOLS.apply(changed) == Result(1)
    pools = [ops(entry).count("AveragePool") for entry in (model, changed)]
    assert pools[1] == pools[0] - 1 > 0
    batch = inputs(rn_bundle, rng)["image"][1]
    np.testing.assert_allclose(run(changed, batch), run(model, batch), atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "[pool] y = AveragePool<kernel_shape = [1, 1]>(x)",  # the graph's output
        "[pool] p = AveragePool<kernel_shape = [1, 1], pads = [1, 1, 1, 1]>(x)\n y = Relu(p)",
    ],
)
def test_pools_that_make_an_output_or_pad_stay(text: str) -> None:
    _refuses(DROP_IDENTITY_POOLS, parse(f"g (float[n, 2, 4, 4] x) => (float[n, 2, a, b] y) {{ {text} }}"), "pads")


POOL = """pool (float[1, 3, 6, 6] x) => (float[1, 4, a, b] out) {
    w_real = DequantizeLinear(w, w_scale, w_zero)
    y = Conv(x, w_real)
    y_q = QuantizeLinear(y, in_scale, in_zero)
    y_d = DequantizeLinear(y_q, in_scale, in_zero)
    [pool] mean = AveragePool<WINDOW>(y_d)
    mean_q = QuantizeLinear(mean, out_scale, out_zero)
    out = DequantizeLinear(mean_q, out_scale, out_zero)
}"""


def _pool(rng: np.random.Generator, window: str, ratio: float = 1.0) -> ir.Model:
    known = {
        "w": rng.integers(-60, 60, (4, 3, 1, 1), np.int8),
        "w_scale": np.float32(0.01),
        "w_zero": np.int8(0),
        "in_scale": np.float32(0.02),
        "in_zero": np.uint8(rng.integers(0, 256)),
        "out_scale": np.float32(0.02 * ratio),
        "out_zero": np.uint8(rng.integers(0, 256)),
    }
    return parse(POOL.replace("WINDOW", window), **known)


@given(st.integers(0, 2**31 - 1), st.floats(0.5, 2), st.sampled_from([(2, 2), (2, 3)]))
@settings(max_examples=15, deadline=None)
def test_convolved_pool_averages(seed: int, ratio: float, kernel: tuple[int, int]) -> None:
    """Against the pool itself, integers with scales of their own on both sides: at most one step apart."""
    rng = np.random.default_rng(seed)
    plain = _pool(rng, f"kernel_shape = {list(kernel)}, strides = {list(kernel)}", ratio)
    changed = plain.clone()
    assert CONVOLVE_POOLS.apply(changed) == Result(1)
    check(changed)
    assert "AveragePool" not in ops(changed)
    batch = rng.standard_normal((1, 3, 6, 6), dtype=np.float32)
    step = np.float32(0.02 * ratio)
    steps = [np.rint(run(model, batch, optimize=False) / step) for model in (plain, changed)]
    assert np.abs(steps[0] - steps[1]).max() <= 1
    assert np.mean(steps[0] != steps[1]) < 0.3  # a quarter of the means of four integers are ties


@pytest.mark.parametrize(
    ("window", "edit", "reason"),
    [
        ("kernel_shape = [2, 2], pads = [1, 1, 1, 1]", ("", ""), "pads"),
        ("kernel_shape = [4, 4], strides = [4, 4], ceil_mode = 1", ("", ""), "pads"),
        ("kernel_shape = [2, 2]", ("(y_d)", "(y)"), "between integers"),
        ("kernel_shape = [2, 2]", ("y = Conv(x, w_real)", "y = Sigmoid(x)"), "channels"),
    ],
)
def test_other_pools_stay(window: str, edit: tuple[str, str], reason: str) -> None:
    text = POOL.replace("WINDOW", window)
    assert edit[0] in text
    known = {"w": np.ones((4, 3, 1, 1), np.int8), "w_scale": np.float32(0.01), "w_zero": np.int8(0)}
    grids = {
        f"{side}_{part}": kind(1)
        for side in ("in", "out")
        for part, kind in (("scale", np.float32), ("zero", np.uint8))
    }
    _refuses(CONVOLVE_POOLS, parse(text.replace(*edit), **known, **grids), reason)


ZERO_POINTS = """zeros (float[n, 6] x) => (float[n, 4] y) {
    [weight] r = DequantizeLinear<axis = 1>(w, s, z)
    [layer] y = MatMul(x, r)
}"""


@pytest.mark.parametrize(
    ("zero", "edit", "left_out"),
    [
        (np.zeros(4, np.int8), ("", ""), True),
        (np.array([0, 1, 0, 0], np.int8), ("", ""), False),  # not symmetric
        (
            np.zeros(4, np.int8),
            ("y = MatMul(x, r)", "t = Relu(r)\n u = MatMul(x, t)\n v = MatMul(x, r)\n y = Add(u, v)"),
            False,
        ),  # something else than products reads it
    ],
)
def test_zero_points_of_products_are_left_out(zero: np.ndarray, edit: tuple[str, str], left_out: bool) -> None:
    weight = np.random.default_rng(0).integers(-8, 8, (6, 4), np.int8)
    model = parse(ZERO_POINTS.replace(*edit), w=weight, s=np.full(4, 0.1), z=zero)
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    expected = run(model, x, optimize=False)
    assert OMIT_ZERO_POINTS.apply(model) == Result(int(left_out))
    assert len(nodes_by_name(model.graph)["weight"].inputs) == (2 if left_out else 3)
    assert np.array_equal(run(model, x, optimize=False), expected)


def _noted(model: ir.Model) -> ir.Model:
    """With the shapes of all values, as a float16 graph comes from its converter."""
    return model_of(with_shapes(model))


@pytest.mark.parametrize(("model", "tower", "sums"), [("vit", "image", 12), ("vit", "text", 5), ("rn", "text", 5)])
def test_fused_residuals_keep_the_function(
    model: str, tower: str, sums: int, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    bundle, _ = material(request, model)
    changed = _noted(load_model(bundle.encoders[tower]))
    before = ops(changed).count("LayerNormalization")
    assert FUSE_RESIDUALS.apply(changed).count == sums
    assert ops(changed).count("LayerNormalization") == before - sums
    clear_notes(changed)
    check(changed)
    for batch in inputs(bundle, rng)[tower]:
        exact = EncoderSession(bundle.encoders[tower]).run(batch)
        np.testing.assert_allclose(run(changed, batch), exact, atol=2e-6)
    assert FUSE_RESIDUALS.apply(changed).count == 0


PRODUCT = "product = MatMul(x, weight)"


@pytest.mark.parametrize(
    ("reason", "shape", "lines"),
    [
        ("", "n, 3, 8", f"x2 = Neg(x)\n {PRODUCT}\n y2 = Add(bias, product)\n sum = Add(x2, y2)"),
        ("", "n, 3, 8", f"x2 = Neg(x)\n {PRODUCT}\n sum = Add(product, x2)"),
        # no residual: a bias alone
        ("one shape", "n, 3, 8", f"{PRODUCT}\n sum = Add(product, bias)"),
        # position added to tokens, a row for all of the batch, four axes: onnxruntime's operator takes none of them
        ("one shape", "n, 3, 8", f"{PRODUCT}\n rows = Neg(position)\n sum = Add(product, rows)"),
        ("one shape", "n, 3, 8", "x2 = Neg(x)\n product = MatMul(row, weight)\n sum = Add(x2, product)"),
        ("one shape", "n, 3, 3, 8", f"x2 = Neg(x)\n {PRODUCT}\n sum = Add(x2, product)"),
        ("no summand is a product", "n, 3, 8", "x2 = Neg(x)\n sum = Add(x2, x)"),
    ],
)
def test_only_residuals_are_fused(reason: str, shape: str, lines: str) -> None:
    text = f"""one (float[{shape}] x) => (float[{shape}] y) {{
        {lines}
        [norm] y = LayerNormalization(sum, scale, bias)
    }}"""
    known = {"weight": np.eye(8), "position": np.ones((3, 8)), "row": np.ones((1, 3, 8)), "scale": np.ones(8)}
    model = _noted(parse(text, **known, bias=np.full(8, 0.5)))
    size = [int(part) if part.isdigit() else 2 for part in shape.split(", ")]
    batch = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    exact = run(model, batch)
    result = FUSE_RESIDUALS.apply(model)
    assert result.count == (not reason)
    assert [reason in refusal.reason for refusal in result.refused] == [True] * bool(reason)
    np.testing.assert_allclose(run(model, batch), exact, atol=1e-6)


def test_sums_of_unknown_shape_are_not_fused() -> None:
    text = f"""one (float[n, 3, 8] x) => (float[n, 3, 8] y) {{
        x2 = Neg(x)\n {PRODUCT}\n sum = Add(product, x2)
        [norm] y = LayerNormalization(sum, scale, bias)
    }}"""
    model = parse(text, weight=np.eye(8), scale=np.ones(8), bias=np.ones(8))
    _refuses(FUSE_RESIDUALS, model, "not known to have one shape")


def test_apply_all_says_what_each_did_and_lets_a_check_look() -> None:
    seen: list[tuple[str, int, int]] = []

    def look(name: str, before: ir.Model, after: ir.Model) -> None:
        seen.append((name, len(before.graph), len(after.graph)))

    applied = apply_all((FOLD_BATCH_NORMS, DROP_IDENTITY_POOLS), _norm()[0], look)
    assert [(entry.name, entry.count) for entry in applied] == [
        (FOLD_BATCH_NORMS.name, 1),
        (DROP_IDENTITY_POOLS.name, 0),
    ]
    assert seen == [(FOLD_BATCH_NORMS.name, 2, 1), (DROP_IDENTITY_POOLS.name, 1, 1)]
    refused = apply_all((FUSE_ATTENTION,), _attention(("MatMul(q_turned, k_turned)", "Add(q_turned, q_turned)")))
    assert [entry.place for entry in refused[0].refused] == ["softmax"]


# Readers inside the branches of an If: what a rewrite changes must not be needed there, or be right there, too.
CHOICE = """
    total = ReduceSum<keepdims = 0>(x)
    positive = Greater(total, nought)
    chosen = If (positive) <
        then_branch = inside () => (float[a] one) { one = READ },
        else_branch = outside () => (float[a] other) { other = OTHER }
    >
    result = Add(y, chosen)
"""


def _choosing(text: str, read: str, other: str) -> str:
    """A graph's text whose result is its y, and a value that one of two branches reads out of the graph around it."""
    body, brace, _ = text.rpartition("}")
    body = body.replace("] y)", "] result)", 1)
    return f"{body}{CHOICE.replace('READ', read).replace('OTHER', other)}{brace}"


@pytest.mark.parametrize(
    ("rewrite", "make", "count"),
    [
        (
            FOLD_QUICK_GELU,
            lambda: _quick_gelu(
                16, 1.702, _choosing(QUICK_GELU, "ReduceMax(h)", "ReduceMax(nought)"), nought=np.float32(0)
            ),
            0,
        ),
        (
            FOLD_QUICK_GELU,
            lambda: _quick_gelu(
                16, 1.702, _choosing(QUICK_GELU, "ReduceMax(g)", "ReduceMax(nought)"), nought=np.float32(0)
            ),
            0,
        ),
        (
            FOLD_QUICK_GELU,
            lambda: _quick_gelu(
                16, 1.702, _choosing(QUICK_GELU, "ReduceMax(first)", "ReduceMax(y)"), nought=np.float32(0)
            ),
            0,
        ),
        (
            FUSE_ATTENTION,
            lambda: _attention(
                (ATTENTION, _choosing(ATTENTION, "ReduceMax(share)", "ReduceMax(mixed)")), nought=np.float32(0)
            ),
            0,
        ),
        (
            FUSE_ATTENTION,
            lambda: _attention(
                (ATTENTION, _choosing(ATTENTION, "ReduceMax(joined)", "ReduceMax(v)")), nought=np.float32(0)
            ),
            1,
        ),
    ],
    ids=["hidden", "activation", "weight", "inside an attention", "around an attention"],
)
def test_what_branches_read_stays_right(rewrite: Rewrite, make: Callable[[], ir.Model], count: int) -> None:
    model = make()
    plain = model.clone()
    x = np.abs(np.random.default_rng(3).standard_normal((2, 5, 8))).astype(np.float32)
    if model.graph.inputs[0].shape is not None and len(model.graph.inputs[0].shape) == 2:
        x = x[0]
    if count:
        assert rewrite.apply(model).count == count
    else:
        assert _refuses(rewrite, model).refused
    check(model)
    for sign in (1, -1):
        np.testing.assert_allclose(run(model, sign * x), run(plain, sign * x), atol=1e-5)


@pytest.mark.parametrize(
    ("rewrite", "text", "known", "shape"),
    [
        (
            DROP_IDENTITY_POOLS,
            """g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) {
                p = AveragePool<kernel_shape = [1, 1]>(x)
                y = Relu(p)
            }""",
            {},
            (1, 2, 4, 4),
        ),
        (FOLD_BATCH_NORMS, NORM, {"w": np.ones((6, 3, 3, 3)), **{name: np.ones(6) for name in "gbmvc"}}, (2, 3, 8, 8)),
    ],
    ids=["pools", "batch norm"],
)
def test_values_that_rewrites_replace_are_replaced_in_branches(
    rewrite: Rewrite, text: str, known: dict, shape: tuple[int, ...]
) -> None:
    read = "ReduceMax(p)" if rewrite is DROP_IDENTITY_POOLS else "ReduceMax(y)"
    text = _choosing(text, read, "ReduceMax(x)")
    model = parse(text, **known, nought=np.float32(0))
    plain = model.clone()
    assert rewrite.apply(model).count == 1
    check(model)
    x = np.abs(np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    for sign in (1, -1):
        np.testing.assert_allclose(run(model, sign * x), run(plain, sign * x), atol=1e-5)


BRANCHED_MIX = ATTENTION.replace(
    "    mixed = MatMul(share, v_turned)\n    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)\n"
    "    joined = Reshape(turned, join)\n",
    """    total = ReduceSum<keepdims = 0>(x)
    positive = Greater(total, nought)
    joined = If (positive) <
        then_branch = inside () => (float[n, 5, 8] one) {
            mixed = MatMul(share, v_turned)
            turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
            one = Reshape(turned, join)
        },
        else_branch = outside () => (float[n, 5, 8] other) { other = Neg(x) }
    >
""",
)


def test_attention_that_goes_on_in_a_branch_is_refused() -> None:
    """The softmax stands outside, and its only reader inside: no operator can stand in for both."""
    model = _attention((ATTENTION, BRANCHED_MIX), nought=np.float32(0))
    assert "If" in ops(model)
    plain = model.clone()
    _refuses(FUSE_ATTENTION, model)
    x = np.random.default_rng(3).standard_normal((2, 5, 8)).astype(np.float32)
    for sign in (1, -1):
        np.testing.assert_allclose(run(model, sign * x), run(plain, sign * x), atol=1e-5)


def test_patches_that_go_on_in_a_branch_are_refused() -> None:
    text = """vit (float[n, 3, 8, 8] x) => (float[n, p, c] tokens) {
        map = Conv<strides = [4, 4]>(x, w)
        total = ReduceSum<keepdims = 0>(x)
        positive = Greater(total, nought)
        tokens = If (positive) <
            then_branch = inside () => (float[n, p, c] a) {
                flat = Reshape(map, shape)
                a = Transpose<perm = [0, 2, 1]>(flat)
            },
            else_branch = outside () => (float[n, p, c] b) { b = Reshape(x, other) }
        >
    }"""
    known = {"shape": np.array([0, 5, -1]), "other": np.array([0, 4, 48]), "nought": np.float32(0)}
    model = parse(text, w=np.random.default_rng(0).standard_normal((5, 3, 4, 4)), **known)
    _refuses(UNFOLD_PATCHES, model)
    assert any(is_op(entry, "If") for entry in model.graph)
    assert value_named(model.graph, "map").producer() is not None
