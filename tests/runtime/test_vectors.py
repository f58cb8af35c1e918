"""What is not finite is an error wherever embeddings are compared."""

import numpy as np
import pytest
from graphs import parse

from d4c_onnx.errors import BundleError
from d4c_onnx.graph.model import to_proto
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
    text = "lookup (int64[b, 4] input_ids) => (float[b, 4, 2] text_embeds) { text_embeds = Gather(table, input_ids) }"
    return to_proto(parse(text, 17, table=np.zeros((3, 2)))).SerializeToString()


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
