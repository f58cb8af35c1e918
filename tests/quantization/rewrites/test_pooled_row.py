"""The last block computes the one row that is pooled, where nothing else needs the others."""

import numpy as np
import pytest
from encoders import inputs
from graphs import check, run_all
from rewrite_cases import refuses

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import name_of, node, nodes_of, set_constant, take_over
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.rewrite import Result


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
    refuses(COMPUTE_POOLED_ROW, load_model(rn_bundle.image_encoder))
    averaged = load_model(vit_bundle.image_encoder)  # a ViT that averages its tokens has no row to spare
    pool = next(nodes_of(averaged.graph, "Gather"))
    axes = set_constant(averaged.graph, "axes", np.array([1], np.int64))
    mean = node("ReduceMean", [pool.inputs[0], axes], "mean", attributes={"keepdims": 0})
    averaged.graph.insert_before(pool, mean)
    take_over(pool.outputs[0], mean.outputs[0])
    averaged.graph.remove(pool, safe=True)
    check(averaged)
    refuses(COMPUTE_POOLED_ROW, averaged)


def test_mixing_tokens_behind_the_attention_is_refused(vit_bundle: Bundle) -> None:
    """A row-dependent constant behind the last attention: the row alone would get the wrong summand."""
    model = load_model(vit_bundle.image_encoder)
    last = list(nodes_of(model.graph, "LayerNormalization"))[-1]
    rows = set_constant(model.graph, "rows", np.arange(37, dtype=np.float32)[:, None] * np.ones((1, 128), np.float32))
    shifted = node("Add", [last.inputs[0], rows], "shifted", name="shift")
    model.graph.insert_before(last, shifted)
    last.replace_input_with(0, shifted.outputs[0])
    check(model)
    refuses(COMPUTE_POOLED_ROW, model, "rows differs from row to row")
