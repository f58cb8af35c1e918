"""What an error of a layer's output does to the embedding, where that can be known: it takes torch, for gradients."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import WeightedLayer
from d4c_onnx.graph.token_table import find_token_table
from d4c_onnx.manifest import Refusal, RewriteRecord
from d4c_onnx.progress import OnStep, silent


@dataclass(frozen=True, slots=True)
class OutputMoments:
    """Second moments of the embedding's gradients by the outputs of layers.

    Attributes:
        by_node: see `gradients.gradient_moments`.
        of_table: the same by the rows that are looked up in the token table; None without one.
        refused: why there are none.
    """

    by_node: Mapping[str, np.ndarray] = field(default_factory=dict)
    of_table: np.ndarray | None = None
    refused: tuple[Refusal, ...] = ()

    def record(self) -> RewriteRecord:
        """For the manifest: how many layers are rounded by them."""
        return RewriteRecord("rounding by the embedding's gradients", len(self.by_node), self.refused)


def output_moments(
    model: ir.Model, layers: Sequence[WeightedLayer], reader: CalibrationDataReader, on_step: OnStep = silent
) -> OutputMoments:
    """Of every layer that the embedding depends on; see `gradients.gradient_moments`."""
    # torch is loaded here and by reconstruction, and nowhere else in quantisation
    try:
        from d4c_onnx.quantization.inside.gradients import gradient_moments
    except ModuleNotFoundError:
        return OutputMoments(refused=(Refusal("torch", "is not installed: pip install 'd4c-onnx[export]'"),))
    gather = find_token_table(model.graph)
    try:
        found = gradient_moments(model, layers, reader, on_step, () if gather is None else (gather,))
    except GraphError as error:
        return OutputMoments(refused=(Refusal("gradients", str(error)),))
    of_table = None if gather is None else found.pop(gather.name or "", None)
    return OutputMoments(found, of_table)
