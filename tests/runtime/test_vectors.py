"""What is not finite is an error wherever embeddings are compared."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from d4c_onnx.errors import BundleError
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.vectors import unit


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_embeddings_that_are_no_numbers_are_an_error(value: float) -> None:
    vectors = np.ones((3, 4), np.float32)
    np.testing.assert_allclose(np.linalg.norm(unit(vectors), axis=1), 1, rtol=1e-6)
    vectors[1, 2] = value
    with pytest.raises(BundleError, match="NaN or infinity"):
        unit(vectors)


def _lookup() -> bytes:
    """A graph that takes int64 [batch, 4] and looks three rows up."""
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 4])
    out = helper.make_tensor_value_info("text_embeds", TensorProto.FLOAT, None)
    table = helper.make_tensor("table", TensorProto.FLOAT, [3, 2], [0.0] * 6)
    node = helper.make_node("Gather", ["table", "input_ids"], ["text_embeds"])
    graph = helper.make_graph([node], "lookup", [ids], [out], [table])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((1, 5), np.int64),  # the manifest may say another size than the graph
        np.zeros((1, 4), np.float32),
        np.full((1, 4), 7, np.int64),  # and golden ids a token that there is not
        np.zeros(4, np.int64),
    ],
    ids=["size", "type", "id", "rank"],
)
def test_what_a_graph_does_not_take_is_an_error_of_ours(batch: np.ndarray) -> None:
    session = EncoderSession(_lookup())
    assert session.run(np.zeros((1, 4), np.int64)).shape == (1, 4, 2)
    for run in (session.run, session.run_all):
        with pytest.raises(BundleError, match="cannot run it"):
            run(batch)
    with pytest.raises(BundleError, match="cannot run it"):
        session.run_named({"pixel_values": batch})
