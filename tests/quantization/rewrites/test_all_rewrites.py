"""Rewrites together: exact on the minis, done once, and said and shown one by one."""

import numpy as np
import onnx_ir as ir
import pytest
from encoders import inputs, material
from graphs import check, run
from rewrite_cases import attention, norm

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.model import load_model
from d4c_onnx.quantization.rewrites.batch_norm import FOLD_BATCH_NORMS
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.gelu import SEPARATE_GELU
from d4c_onnx.quantization.rewrites.identity_pools import DROP_IDENTITY_POOLS
from d4c_onnx.quantization.rewrites.patches import UNFOLD_PATCHES
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.quick_gelu import FOLD_QUICK_GELU
from d4c_onnx.quantization.rewrites.rewrite import Rewrite, apply_all
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


def test_apply_all_says_what_each_did_and_lets_a_check_look() -> None:
    seen: list[tuple[str, int, int]] = []

    def look(name: str, before: ir.Model, after: ir.Model) -> None:
        seen.append((name, len(before.graph), len(after.graph)))

    applied = apply_all((FOLD_BATCH_NORMS, DROP_IDENTITY_POOLS), norm()[0], look)
    assert [(entry.name, entry.count) for entry in applied] == [
        (FOLD_BATCH_NORMS.name, 1),
        (DROP_IDENTITY_POOLS.name, 0),
    ]
    assert seen == [(FOLD_BATCH_NORMS.name, 2, 1), (DROP_IDENTITY_POOLS.name, 1, 1)]
    refused = apply_all((FUSE_ATTENTION,), attention(("MatMul(q_turned, k_turned)", "Add(q_turned, q_turned)")))
    assert [entry.place for entry in refused[0].refused] == ["softmax"]
