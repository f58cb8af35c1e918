"""The story of one encoder: float file in, quantised file out.

load -> rewrite exactly -> ranges (what all widths of weights share: `prepare_encoder`)
     -> round -> the graph that is served -> token table -> write (`write_encoder`, as often as there are widths).
"""

from collections.abc import Mapping
from pathlib import Path

from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.readers import ViewsReader
from d4c_onnx.graph.model import save_model, set_metadata
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.encoder_report import EncoderReport, report_of
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.prepared import PreparedEncoder, prepare_encoder
from d4c_onnx.quantization.rounding import METHODS, RoundingTask
from d4c_onnx.quantization.serving import to_float16, to_qdq
from d4c_onnx.quantization.storage import store_token_table
from d4c_onnx.quantization.targets import Target, target_of
from d4c_onnx.recipe import QuantizationConfig

_IMAGES = 256  # that weights are rounded for: with fewer they are fitted to the few


def quantize_encoder(
    source: Path,
    target_path: Path,
    reader: CalibrationDataReader,
    config: QuantizationConfig,
    *,
    widths: Mapping[str, int] | None = None,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
    verify: bool = False,
    target: Target | None = None,
) -> EncoderReport:
    """Quantise one encoder file.

    Args:
        source: the float encoder.
        target_path: where the quantised one goes (a staged path).
        reader, config, widths, provider, threads, on_step, verify: see `EncoderTask`.
        target: another one than the config names, such as one of other rewrites.

    Raises:
        GraphError: the graph cannot be quantised; with `verify`, a rewrite changed the answers.
        CalibrationError: an activation is not finite.
        RecipeError: keys contradict the target.
    """
    served = target or target_of(config)
    task = EncoderTask(config, served, reader, widths or {}, provider, threads, on_step, verify)
    return _written(prepare_encoder(source, task), target_path, task)


def write_encoder(prepared: PreparedEncoder, target_path: Path, task: EncoderTask) -> EncoderReport:
    """Round to the widths of a task, and write; what was prepared stays as it is, for the next widths.

    Args:
        prepared: of the same encoder, with the same activations; smoothing looked at the widths that it was made for.
        target_path: where the quantised encoder goes (a staged path).
        task: its config may have other widths of weights than the prepared one's, and other `widths`.

    Raises:
        GraphError: the graph cannot be quantised.
    """
    model = prepared.model.clone()  # shares the weights
    exact = prepared.exact.with_widths(model.graph, task)
    return _written(PreparedEncoder(model, exact, prepared.ranges, prepared.outputs), target_path, task)


def _written(prepared: PreparedEncoder, target_path: Path, task: EncoderTask) -> EncoderReport:
    """The prepared model must not be used afterwards."""
    model, exact, ranges, config = prepared.model, prepared.exact, prepared.ranges, task.config
    asked = config.correction, task.provider, task.threads, task.on_step
    images = ViewsReader(task.reader, _IMAGES)
    work = RoundingTask(model, exact.plan, ranges, images, *asked, prepared.outputs.by_node)
    rounded = METHODS[config.rounding_method].round_weights(work)
    task.on_step("write", 0, 1, {})
    metadata = dict(model.metadata_props) | {"quantization": config.bits}
    write = to_float16 if config.weights_only else to_qdq
    quantized, applied = write(model, exact.plan, rounded, ranges, task)
    table = config.table_bits, task.target.token_table, task.group_size, prepared.outputs.of_table
    table_bits = store_token_table(quantized, *table)
    task.target.label(quantized)
    set_metadata(quantized, metadata)
    save_model(quantized, target_path, limit_bytes=0 if config.external_data else None)
    task.on_step("write", 1, 1, {})
    return report_of(quantized, exact, applied, rounded.weights, len(ranges), table_bits, task.target)
