"""Does onnxruntime's graph optimiser change the answers? The same file, optimised and taken literally."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from d4c_onnx.runtime.session import EncoderSession

# Fused kernels round an activation to the neighbouring step where sums have another order, and a deep encoder carries
# such steps on: the optimised answers are as far from FP32 as the literal ones, in another direction (two independent
# roundings differ by 1.41 times the distance of one). A quantiser that comes or goes changes the distance itself.
ALLOWED = 1.25


@dataclass(frozen=True, slots=True)
class OptimizerEffect:
    """Root mean square differences of embeddings.

    Attributes:
        optimizer: between the optimised and the literal session of the quantised file.
        literal: between the literal session and FP32: what quantisation does.
        optimized: between the optimised session and FP32: what is served.
    """

    optimizer: float
    literal: float
    optimized: float

    @property
    def harmless(self) -> bool:
        """Whether what is served is as near to FP32 as what the file says."""
        return self.optimizer <= 1e-6 or self.literal / ALLOWED <= self.optimized <= self.literal * ALLOWED

    def as_dict(self) -> dict[str, float]:
        """For the manifest."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items()}


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
    literal = answers(EncoderSession(quantized, threads=threads, optimize=False, literal=True))
    exact = answers(EncoderSession(reference, threads=threads))
    return OptimizerEffect(_rms(fast - literal), _rms(literal - exact), _rms(fast - exact))


def _rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
