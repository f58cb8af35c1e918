"""What was written of one encoder, for the manifest."""

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from d4c_onnx.graph.model import opset_of
from d4c_onnx.graph.stored import LayerBits, layer_bits
from d4c_onnx.graph.trellis_form import TRELLIS
from d4c_onnx.manifest import EncoderRecord, LayerRecord, RewriteRecord
from d4c_onnx.quantization.exact import RewrittenEncoder
from d4c_onnx.quantization.rounding import QuantizedWeight
from d4c_onnx.quantization.storage import TokenTable
from d4c_onnx.quantization.targets import Target

MINIMUM_ORT = "1.20"  # the oldest release that was tried, for files without 4-bit weights
# Of files in the lowest opset, from which on: the oldest release that was tried, and those that brought the opset.
_RELEASES = ((21, "1.20"), (20, "1.17"), (0, "1.15"))


@dataclass(frozen=True, slots=True)
class EncoderReport:
    """What was written.

    Attributes:
        layers: each weighted layer with its true bits.
        token_table_bits: None without a token table, or where it stays float.
        activations: how many are quantised.
        smoothed: alpha per smoothed mapping, by the node that makes the activation.
        start_token_pinned: whether the start token's keys and values are constants of the file.
        rewrites: what each did, and what it left alone and why.
        minimum_onnxruntime: the oldest release that loads the file.
    """

    layers: tuple[LayerBits, ...]
    token_table_bits: float | None
    activations: int
    smoothed: dict[str, float]
    start_token_pinned: bool
    rewrites: tuple[RewriteRecord, ...]
    minimum_onnxruntime: str

    def record(self) -> EncoderRecord:
        """For the manifest."""
        return EncoderRecord(
            layers={layer.node: LayerRecord(layer.op, layer.bits, layer.elements) for layer in self.layers},
            token_table_bits=self.token_table_bits,
            quantized_activations=self.activations,
            smoothing_alpha=self.smoothed,
            start_token_pinned=self.start_token_pinned,
            minimum_onnxruntime=self.minimum_onnxruntime,
            rewrites=self.rewrites,
        )


def report_of(
    quantized: ir.Model,
    exact: RewrittenEncoder,
    applied: tuple[RewriteRecord, ...],
    weights: Mapping[str, QuantizedWeight],
    activations: int,
    table_bits: float | None,
    target: Target,
) -> EncoderReport:
    """The report of a finished graph.

    Args:
        exact: what was done to the float graph.
        applied: the rewrites for serving.
        activations: how many are quantised.
    """
    return EncoderReport(
        tuple(layer_bits(quantized)),
        table_bits,
        activations,
        exact.smoothed,
        bool(exact.plan.dead_rows),
        (*exact.rewrites, *applied),
        _minimum_onnxruntime(weights, table_bits, target, opset_of(quantized)),
    )


def _minimum_onnxruntime(
    weights: Mapping[str, QuantizedWeight], table_bits: float | None, target: Target, opset: int
) -> str:
    """The oldest release that loads the file's opset and every form of storage in it."""
    needed = [next(release for since, release in _RELEASES if opset >= since) if target.lowest_opset else MINIMUM_ORT]
    narrow = [weight for weight in weights.values() if weight.num_bits <= 5]
    needed += [(target.int4 if weight.path is None else TRELLIS).minimum_onnxruntime for weight in narrow]
    if table_bits == 4 and target.token_table is TokenTable.FOLDED:
        needed.append(target.int4.minimum_onnxruntime)
    return max(needed)
