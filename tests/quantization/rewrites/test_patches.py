"""A convolution whose kernel is its stride is a product of patches."""

import numpy as np
import onnx_ir as ir
import pytest
from encoders import inputs
from graphs import check, ops, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_cases import refuses

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import load_model
from d4c_onnx.quantization.rewrites.patches import UNFOLD_PATCHES
from d4c_onnx.quantization.rewrites.rewrite import Result


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
    refuses(UNFOLD_PATCHES, _patches(weight, None, size, f"kernel_shape = [4, 4], {attributes}"), "not its stride")


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
    refuses(UNFOLD_PATCHES, load_model(rn_bundle.image_encoder), "not its stride")
    refuses(UNFOLD_PATCHES, load_model(vit_bundle.text_encoder))
