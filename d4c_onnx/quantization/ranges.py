"""Activation ranges: two passes of the float encoder over all calibration samples."""

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams, RangeObserver, quant_params
from d4c_onnx.calibration.readers import first_batches
from d4c_onnx.errors import GraphError
from d4c_onnx.graph.index import opened
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.deployment import target_of
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.recipe import QuantizationSection
from d4c_onnx.runtime.session import EncoderSession


def collect_ranges(
    model: onnx.ModelProto,
    plan: Plan,
    reader: CalibrationDataReader,
    section: QuantizationSection,
    *,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> dict[str, QuantParams]:
    """The grid of every activation.

    Args:
        model: the float encoder.
        plan: which activations, and what counts of them.
        reader: rewindable.
        section: `ranges` (mse or minmax) and the activation width.

    Returns:
        Per value name: scale, zero point, width.
    """
    if section.weights_only:
        _check_float16(model, plan, reader, provider, threads)
        return {}
    activations = [name for name in plan.activations if name not in plan.probabilities]
    wanted = [name for name in activations if name not in {value.name for value in model.graph.input}]
    fed = [name for name in activations if name not in wanted]
    with opened(model, wanted):
        session = EncoderSession.of_model(model, provider, threads)
    observers = {name: RangeObserver() for name in activations}
    passes = 2 if section.ranges == "mse" else 1
    total = _count(reader) * passes
    done = 0
    for number in range(passes):
        reader.rewind()
        while (feed := reader.get_next()) is not None:
            batch = next(iter(feed.values()))
            values = session.run_all(batch)
            for name, observer in observers.items():
                seen = plan.observed(name, batch if name in fed else values[name])
                if not seen.size:  # a prompt of the start token alone
                    continue
                observer.observe_histogram(seen) if number else observer.observe_extremes(seen)
            done += 1
            on_step("calibrate", done, total, {})
    bits, headroom = section.activation_bits, section.headroom
    symmetric = target_of(section).symmetric
    # softmax gives 0 to 1 whatever is fed: scale 1 / 255 and zero point 0 at 8 bits
    known = {name: quant_params(0.0, 1.0, bits, symmetric) for name in plan.activations if name in plan.probabilities}
    if section.ranges == "minmax":
        return known | {name: observer.minmax(bits, headroom, symmetric) for name, observer in observers.items()}
    return known | {
        name: observer.mse(bits, headroom, section.clip_factor, symmetric) for name, observer in observers.items()
    }


def _check_float16(
    model: onnx.ModelProto, plan: Plan, reader: CalibrationDataReader, provider: str, threads: int
) -> None:
    """Look at one sample's products, residual sums and normalised values; a CPU, in float32, never overflows.

    Masks, which may hold the least float32 there is, are not looked at: the conversion confines them.

    Raises:
        GraphError: one is beyond what float16 holds.
    """
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    names = [layer.output for layer in plan.layers] + [
        name for node in norms for name in (node.input[0], node.output[0])
    ]
    given = {value.name for value in (*model.graph.input, *model.graph.output)}
    wanted = [name for name in dict.fromkeys(names) if name not in given]
    with opened(model, wanted):
        session = EncoderSession.of_model(model, provider, threads)
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
