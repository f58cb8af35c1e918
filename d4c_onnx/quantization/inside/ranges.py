"""Activation ranges: two passes of the float encoder over all calibration samples."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams, RangeObserver
from d4c_onnx.calibration.readers import first_batches
from d4c_onnx.errors import GraphError
from d4c_onnx.graph.attention import values_mixed
from d4c_onnx.graph.values import is_constant, is_op, name_of
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.plan import Plan, cut_at
from d4c_onnx.recipe import QuantizationConfig
from d4c_onnx.runtime.session import EncoderSession

# Of activations that are looked at together. Those of eight images of 256 pixels take 1.25 GB in MobileCLIP2-S0, whose
# weights take 45 MB; onnxruntime has as much again on its way.
AT_ONCE_BYTES = 2**29


def collect_ranges(
    model: ir.Model,
    plan: Plan,
    reader: CalibrationDataReader,
    config: QuantizationConfig,
    *,
    symmetric: bool = False,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> dict[str, QuantParams]:
    """The grid of every activation.

    Args:
        model: the float encoder.
        plan: which activations, and what counts of them.
        reader: rewindable.
        config: `ranges` and the activation width.
        symmetric: whether grids have zero point 0 in their middle.

    Returns:
        Per value name: scale, zero point, width, terms.
    """
    if config.weights_only:
        _check_float16(model, plan, reader, provider, threads)
        return {}
    given = {name_of(value) for value in model.graph.inputs}
    # On images that are not those of the calibration heads may focus where none did: the values, whose averages an
    # attention's output is, are outputs that could have been.
    mixed = {name: value for name, value in values_mixed(model.graph).items() if name in plan.activations}
    wanted = [name for name in dict.fromkeys((*plan.activations, *mixed.values())) if name not in given]
    fed = [name for name in plan.activations if name in given]
    session = EncoderSession.of_model(model, provider, threads, outputs=wanted)
    observers = _observers(model.graph, plan)

    def observe(values: dict[str, np.ndarray], histogram: bool) -> None:
        for name, observer in observers.items():
            for source in (name, mixed[name]) if name in mixed else (name,):
                seen = plan.observed(name, values[source])
                if seen.size:  # empty: a prompt of the start token alone
                    observer.observe_histogram(seen) if histogram else observer.observe_extremes(seen)

    passes = 1 if config.ranges == "minmax" else 2
    total = _count(reader) * passes
    done, share = 0, 0.0
    for number in range(passes):
        reader.rewind()
        while (feed := reader.get_next()) is not None:
            whole = next(iter(feed.values()))
            share = share or _bytes_per_element(model.graph, session, whole)
            for batch in np.array_split(whole, _parts(whole, share)):
                # nothing holds the values when the next run needs their room
                observe(session.run_all(batch) | dict.fromkeys(fed, batch), histogram=number > 0)
            done += 1
            on_step("calibrate", done, total, {})
    return {name: _grid(observer, config, symmetric, name in plan.pooled) for name, observer in observers.items()}


def _grid(observer: RangeObserver, config: QuantizationConfig, symmetric: bool, two_terms: bool) -> QuantParams:
    bits, headroom = config.activation_bits, config.headroom
    if two_terms:  # the second one is for what the first one rounds off, not for what it clips
        return replace(observer.minmax(bits, headroom, symmetric), two_terms=True)
    if config.ranges == "minmax":
        return observer.minmax(bits, headroom, symmetric)
    return observer.mse(bits, headroom, config.clip_weight, symmetric)


def _observers(graph: ir.Graph, plan: Plan) -> dict[str, RangeObserver]:
    cuts = {name_of(node.outputs[0]): cut for node in graph if (cut := cut_at(node)) is not None}
    return {name: RangeObserver(most=cuts.get(name, np.inf)) for name in plan.activations}


def _bytes_per_element(graph: ir.Graph, session: EncoderSession, batch: np.ndarray) -> float:
    """How much all activations take for each value of the input, by a run of one sample; 0: batches stay whole."""
    shape = graph.inputs[0].shape
    if shape is None or isinstance(shape[0], int):
        return 0
    return sum(values.nbytes for values in session.run_all(batch[:1]).values()) / max(1, batch[:1].size)


def _parts(batch: np.ndarray, bytes_per_element: float) -> int:
    """How many parts a batch has to be looked at in."""
    return int(min(len(batch), max(1, -(-batch.size * bytes_per_element // AT_ONCE_BYTES))))


def _check_float16(model: ir.Model, plan: Plan, reader: CalibrationDataReader, provider: str, threads: int) -> None:
    """Look at one sample's products, residual sums and normalised values; a CPU, in float32, never overflows.

    Masks, which may hold the least float32 there is, are not looked at: the conversion confines them.

    Raises:
        GraphError: one is beyond what float16 holds.
    """
    norms = [node for node in model.graph if is_op(node, "LayerNormalization")]
    around = [
        value for node in norms for value in (node.inputs[0], node.outputs[0]) if value and not is_constant(value)
    ]
    names = [layer.output for layer in plan.layers] + [name_of(value) for value in around]
    given = {name_of(value) for value in (*model.graph.inputs, *model.graph.outputs)}
    wanted = [name for name in dict.fromkeys(names) if name not in given]
    session = EncoderSession.of_model(model, provider, threads, outputs=wanted)
    batch = first_batches(reader, 1)[0]
    for name, values in session.run_all(batch[:1]).items():
        largest = np.abs(values).max(initial=0)
        if not largest <= np.finfo(np.float16).max:  # so that what is not a number fails, too
            raise GraphError(
                f"{name}: reaches {largest:.3g}, float16 holds 65504: these activations cannot stay in float16. "
                "Use 8-bit ones (w4a8, w8a8) on a CPU."
            )


def _count(reader: CalibrationDataReader) -> int:
    reader.rewind()
    count = 0
    while reader.get_next() is not None:
        count += 1
    return count
