"""Does onnxruntime's optimiser keep the answers of the files that were written?"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.readers import first_batches
from d4c_onnx.errors import CheckFailed
from d4c_onnx.manifest import Session
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.runtime.optimizer import OptimizerEffect, optimizer_effect

# Eight images once looked like an optimiser that took a quarter of the error away (mini-rn, w6a6); thirty-two do not.
_SAMPLES = 32


def check_optimizer(
    bundle: Bundle,
    stage: Path,
    readers: Mapping[str, CalibrationDataReader],
    session: Session,
    *,
    threads: int = 0,
    on_step: OnStep = silent,
) -> dict[str, OptimizerEffect]:
    """See that onnxruntime's graph optimiser keeps the answers of two written encoders.

    Args:
        bundle: in FP32.
        stage: the folder that holds the encoders.
        readers: per encoder file, of calibration data.
        session: what the files are served with.
        threads, on_step: as elsewhere.

    Returns:
        The optimiser's effect by file.

    Raises:
        CheckFailed: it changes the answers beyond the rounding of quantised activations.
    """
    effects: dict[str, OptimizerEffect] = {}
    for name, reader in readers.items():
        on_step("check", len(effects), len(readers), {})
        batches = unseen_images(first_batches(reader, _SAMPLES))
        effect = effects[name] = optimizer_effect(
            stage / name, bundle.path / name, batches, threads, session.config_entries
        )
        if not effect.harmless:
            raise CheckFailed(
                f"{name}: onnxruntime's graph optimiser changes the answers: with it they are {effect.ratio:.2f} times "
                f"as far from FP32 as without ({effect.literal:.2e} rms). Nothing was written; please report the model."
            )
    on_step("check", len(effects), len(readers), {})
    return effects


def unseen_images(batches: list[np.ndarray]) -> list[np.ndarray]:
    """Images that the rounding was not fitted to: mirrored, and where they are few, shifted several times, too.

    On few images that it was fitted to, it undoes the very steps that activations were rounded by; every other rounding
    of them, such as that of fused kernels, then looks like a change. And on eight images, chance alone can move one of
    the two differences by a quarter.
    """
    if not batches or batches[0].ndim != 4:  # token ids
        return batches
    rounds = -(-_SAMPLES // sum(len(batch) for batch in batches))
    shifts = [number * batches[0].shape[-1] // rounds for number in range(rounds)]
    return [np.roll(batch[..., ::-1], shift, axis=-1) for shift in shifts for batch in batches]
