"""Does onnxruntime's graph optimiser change the answers? The same file, optimised and taken literally."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from d4c_onnx.manifest import OptimizerRecord
from d4c_onnx.runtime.session import EncoderSession

# Fused kernels round an activation to the neighbouring step where sums have another order, and a deep encoder carries
# such steps on: the optimised answers are as far from FP32 as the literal ones, in another direction (two independent
# roundings differ by 1.41 times the distance of one). A quantiser that comes or goes changes the distance itself. A few
# images are far off under either rounding and would rule a mean of squares; the mean of logarithms hears all alike.
ALLOWED = 1.25  # times as far, or as near
_CERTAIN = 3.0  # standard errors that chance does not explain
_AT_MOST = 1.5  # times as far is never chance: where samples are few or odd, this is what is let through
_NOTHING = 1e-7  # what float32 does to an embedding


@dataclass(frozen=True, slots=True)
class OptimizerEffect:
    """What the optimiser does to embeddings; differences are root mean squares.

    Attributes:
        optimizer: between the optimised and the literal session of the quantised file.
        literal: between the literal session and FP32: what quantisation does.
        optimized: between the optimised session and FP32: what is served.
        ratio: how many times as far from FP32 what is served is, the geometric mean over the samples.
        certain: how far from 1, as a factor, chance may move this ratio.
    """

    optimizer: float
    literal: float
    optimized: float
    ratio: float
    certain: float

    @property
    def harmless(self) -> bool:
        """Whether what is served is as near to FP32 as what the file says."""
        away = abs(math.log(self.ratio))
        return self.optimizer <= 1e-6 or away <= math.log(ALLOWED) or away <= math.log(self.certain)

    def record(self) -> OptimizerRecord:
        """For the manifest."""
        return OptimizerRecord(**{name: float(f"{value:.3g}") for name, value in asdict(self).items()})


def optimizer_effect(
    quantized: Path,
    reference: Path,
    batches: Sequence[np.ndarray],
    threads: int = 0,
    entries: Mapping[str, str] | None = None,
) -> OptimizerEffect:
    """Run a quantised encoder with and without graph optimisation, and its FP32 original, on a few batches.

    Args:
        quantized, reference: .onnx files of the same input.
        batches: of pixel_values or input_ids; a few dozen samples, or chance decides.
        entries: session config entries that the quantised file is served with.
    """

    def answers(session: EncoderSession) -> np.ndarray:
        return np.concatenate([session.run(batch) for batch in batches])

    fast = answers(EncoderSession(quantized, threads=threads, entries=entries))
    literal = answers(EncoderSession(quantized, threads=threads, optimize=False, literal=True, entries=entries))
    exact = answers(EncoderSession(reference, threads=threads))
    return compare_answers(fast, literal, exact)


def compare_answers(fast: np.ndarray, literal: np.ndarray, exact: np.ndarray) -> OptimizerEffect:
    """Embeddings [N, D] of the optimised session, the literal one, and FP32."""
    changed, said, served = (_rms_each(a - b) for a, b in ((fast, literal), (literal, exact), (fast, exact)))
    logs = np.log((served + _NOTHING) / (said + _NOTHING))
    error = float(logs.std(ddof=1)) / len(logs) ** 0.5 if len(logs) > 1 else 1.0  # a single sample proves little
    ratio, certain = float(np.exp(logs.mean())), min(float(np.exp(_CERTAIN * error)), _AT_MOST)
    return OptimizerEffect(_rms(changed), _rms(said), _rms(served), ratio, certain)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _rms_each(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(difference, dtype=np.float64), axis=-1))
