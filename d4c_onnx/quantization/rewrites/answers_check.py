"""Proof by running: each rewrite's graph is checked by ONNX's own checker and answers as the one before it."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.model import to_proto
from d4c_onnx.quantization.rewrites.rewrite import Verify
from d4c_onnx.runtime.session import EncoderSession

_TOLERANCE = 1e-5  # of unit vectors, in float32, whose sums may come in another order


def same_answers(batches: Sequence[np.ndarray], tolerance: float = _TOLERANCE) -> Verify:
    """A check for `apply_all`.

    Args:
        batches: of the encoder's input.
        tolerance: max abs difference of an embedding. Between quantisers a sum of another order can move a value by one
            step of its grid: allow for that where the graph holds any.

    Raises:
        GraphError: (the check) the graph breaks ONNX's rules, or answers otherwise than the one before.
    """

    def check(name: str, before: ir.Model, after: ir.Model) -> None:
        try:
            onnx.checker.check_model(to_proto(after))
        except onnx.checker.ValidationError as error:
            raise GraphError(f"{name}: the rewritten graph breaks ONNX's rules ({str(error)[:300]}).") from error
        old, new = (EncoderSession.of_model(model, threads=1, literal=True) for model in (before, after))
        for batch in batches:
            difference = float(np.abs(old.run(batch) - new.run(batch)).max(initial=0))
            if not difference <= tolerance:
                raise GraphError(f"{name}: answers differ by {difference:.2e} from those before, at most {tolerance}.")

    return check
