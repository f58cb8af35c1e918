"""Does onnxruntime's graph optimiser change the answers? The same file, optimised and taken literally."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from d4c_onnx.runtime.session import EncoderSession

# What the optimiser may move, as a share of what quantisation moved. Fused kernels round an activation to the
# neighbouring step where sums have another order: up to 0.56 on mini-rn at W8A8, where everything between convolutions
# is integer, 0.05 at W4A8. An independent rounding of everything would be 1.4.
ALLOWED = 1.0


@dataclass(frozen=True, slots=True)
class OptimizerEffect:
    """Root mean square differences of embeddings.

    Attributes:
        optimizer: between the optimised and the literal session of the quantised file.
        quantization: between the literal session and FP32.
    """

    optimizer: float
    quantization: float

    @property
    def harmless(self) -> bool:
        """Whether the optimiser stays within the rounding of the quantised activations."""
        return self.optimizer <= ALLOWED * self.quantization or self.optimizer <= 1e-6

    def as_dict(self) -> dict[str, float]:
        """For the manifest."""
        return {name: float(f"{value:.3g}") for name, value in asdict(self).items()}


def optimizer_effect(quantized: Path, reference: Path, batch: np.ndarray, threads: int = 0) -> OptimizerEffect:
    """Run a quantised encoder with and without graph optimisation, and its FP32 original, on one batch.

    Args:
        quantized, reference: .onnx files of the same input.
        batch: pixel_values or input_ids.
    """
    fast = EncoderSession(quantized, threads=threads).run(batch)
    literal = EncoderSession(quantized, threads=threads, optimize=False, literal=True).run(batch)
    exact = EncoderSession(reference, threads=threads).run(batch)
    return OptimizerEffect(_rms(fast - literal), _rms(literal - exact))


def _rms(difference: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
