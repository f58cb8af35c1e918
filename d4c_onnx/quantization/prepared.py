"""An encoder before its first weight is rounded: what all widths of weights share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.model import clear_notes, load_model
from d4c_onnx.memory import release_freed
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.exact import RewrittenEncoder, rewrite_exactly
from d4c_onnx.quantization.inside.output_moments import OutputMoments, output_moments
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.rounding import METHODS


@dataclass(frozen=True, slots=True)
class PreparedEncoder:
    """What every width of weights starts from.

    Attributes:
        model: the float encoder after all exact rewrites.
        exact: what was done to it, and its plan.
        ranges: the grid of every activation.
        outputs: what errors of layers do to the embedding, where the rounding asks.
    """

    model: ir.Model
    exact: RewrittenEncoder
    ranges: Mapping[str, QuantParams]
    outputs: OutputMoments


def prepare_encoder(source: Path, task: EncoderTask) -> PreparedEncoder:
    """Everything before the first weight is rounded.

    Raises:
        GraphError, CalibrationError: see `quantize_encoder`.
    """
    task.on_step("fold", 0, 1, {})
    model = load_model(source)
    clear_notes(model)
    exact = rewrite_exactly(model, task)
    release_freed()
    task.on_step("fold", 1, 1, {})
    ranges = collect_ranges(
        model,
        exact.plan,
        task.reader,
        task.config,
        symmetric=task.target.symmetric,
        provider=task.provider,
        threads=task.threads,
        on_step=task.on_step,
    )
    outputs = OutputMoments()
    if METHODS[task.config.rounding_method].uses_outputs:
        outputs = output_moments(model, exact.plan.layers, task.reader, task.on_step)
        exact = replace(exact, rewrites=(*exact.rewrites, outputs.record()))
    release_freed()
    return PreparedEncoder(model, exact, ranges, outputs)
