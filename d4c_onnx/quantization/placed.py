"""A float encoder with its weights on their grid, through `quantize_static`, which never sees the whole token table.

It reads the file several times and holds some copies of it at once. What it does not quantise it carries through, and
of a text tower of many languages that is nearly all: 0.8 of 0.9 GB in XLM-R. So the file holds the table's first rows,
the one sample that it is run on looks up no others (its ranges are overridden), and the table is put back behind it.
"""

from collections.abc import Mapping

import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.calibration.readers import OneBatchReader
from d4c_onnx.graph.token_table import find_token_table
from d4c_onnx.graph.values import constant, dims, name_of
from d4c_onnx.memory import release_freed
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.qdq import quantize_file, room_for, save_placed
from d4c_onnx.quantization.rounding.base import QuantizedWeight
from d4c_onnx.quantization.targets import Target

_ROWS = 1024


def quantize_placed(
    model: ir.Model,
    plan: Plan,
    weights: Mapping[str, QuantizedWeight],
    ranges: Mapping[str, QuantParams],
    reader: CalibrationDataReader,
    target: Target,
) -> ir.Model:
    """The QDQ graph; see `qdq.quantize_file`. `model` must not be used afterwards.

    Raises:
        GraphError: onnxruntime refused, or stored other integers than it was given.
    """
    table = _shortened_table(model.graph)
    with room_for(model) as folder:
        placed = folder / "float.onnx"
        save_placed(model, plan, weights, placed)
        for value in model.graph.initializers.values():
            value.const_value = None  # a large encoder needs the room
        release_freed()
        quantized = quantize_file(placed, plan, weights, ranges, _one_sample(reader, table is not None), target)
    if table is not None:
        value = quantized.graph.initializers[str(table.name)]
        value.const_value, value.shape = table, ir.Shape(table.shape.numpy())
    return quantized


def _one_sample(reader: CalibrationDataReader, shortened: bool) -> CalibrationDataReader:
    """The first one; ids beyond a shortened table are others, for it only says that the graph runs."""
    reader.rewind()
    feed = reader.get_next()
    assert feed is not None
    [(name, batch)] = feed.items()
    return OneBatchReader(batch[:1] % _ROWS if shortened else batch[:1], name)


def _shortened_table(graph: ir.Graph) -> ir.Tensor | None:
    """Leave the token table its first rows, in place: the whole one; None where there is none, or a short one."""
    gather = find_token_table(graph)
    table = None if gather is None else gather.inputs[0]
    shape = dims(table) or () if table is not None else ()
    if table is None or len(shape) != 2 or shape[0] <= _ROWS:
        return None
    values = constant(table)
    first = ir.Tensor(values[:_ROWS].copy(), name=name_of(table))
    table.const_value, table.shape = first, ir.Shape(first.shape.numpy())
    return ir.Tensor(values, name=name_of(table))
