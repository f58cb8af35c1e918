"""What is decided before the first image is made: method, device, precision, nouns, units of work, and their key."""

from dataclasses import dataclass

import numpy as np
import torch

from d4c_onnx.calibration.key import CalibrationKey, calibration_key
from d4c_onnx.calibration.method import METHODS, Method
from d4c_onnx.calibration.prompts import draw_labels
from d4c_onnx.errors import RecipeError
from d4c_onnx.recipe import PromptConfig, SynthesisConfig
from d4c_onnx.synthesis.compute import resolve_device, resolve_precision
from d4c_onnx.synthesis.units import Unit, divide


@dataclass(frozen=True, slots=True)
class Plan:
    """One synthesis.

    Attributes:
        config, text: the recipe's.
        method: how images are optimised; none: a control, nothing is.
        nouns: the vocabulary.
        seed: of every draw.
        key: everything that was asked for.
        device, precision: of the tower.
        labels: int64 [images + held_out], the index of the noun that each image is made for; empty for controls.
        units: what is made together; none for controls.
        texts: the user's own, in place of nouns in templates.
    """

    config: SynthesisConfig
    text: PromptConfig
    method: Method | None
    nouns: tuple[str, ...]
    seed: int
    key: CalibrationKey
    device: torch.device
    precision: torch.dtype
    labels: np.ndarray
    units: tuple[Unit, ...]
    texts: tuple[str, ...] | None = None

    @property
    def total(self) -> int:
        """Images, held-out ones included."""
        return self.config.images + self.config.held_out

    @property
    def compute(self) -> dict[str, str]:
        """Device and precision as the set's manifest names them."""
        return {"device": self.device.type, "precision": str(self.precision).removeprefix("torch.")}


def decide(
    weights_sha256: str,
    config: SynthesisConfig,
    text: PromptConfig,
    nouns: tuple[str, ...],
    *,
    seed: int,
    device: str,
    source_sha256: str | None,
    method: Method | None,
    processes: int,
    texts: tuple[str, ...] | None = None,
) -> Plan:
    """Resolve what the recipe leaves open.

    Args:
        method: instead of the one that `config.method` names.
        processes: that share the work.
        texts: the user's own, in place of nouns in templates.

    Raises:
        RecipeError: batches depend on each other where processes share them or an early stop ends them.
        ModelError: cuda was asked for and is not there.
    """
    key = calibration_key(weights_sha256, config, text, nouns, seed, source_sha256, method, texts)
    method = method or METHODS.get(config.method)
    where = resolve_device(device)
    labels = np.zeros(0, np.int64)
    units: tuple[Unit, ...] = ()
    if method:
        _check_independence(config, method, processes)
        labels = draw_labels(config.images + config.held_out, len(nouns), method.labels, seed)
        units = divide(config.images, config.held_out, config.images if method.shared_optimizer else config.batch)
    precision = resolve_precision(config.precision, where)
    return Plan(config, text, method, nouns, seed, key, where, precision, labels, units, texts)


def _check_independence(config: SynthesisConfig, method: Method, processes: int) -> None:
    """Refuse what asks for batches that know nothing of each other where they do."""
    tolerance = config.early_stop_tolerance
    if tolerance is not None and method.shared_optimizer:
        raise RecipeError(
            "synthesis.early_stop_tolerance: needs batches that are finished one by one. This method has one optimiser "
            "for all images: use method: d4c."
        )
    bound = "method" if method.shared_optimizer else "early_stop_tolerance" if tolerance is not None else None
    if processes > 1 and bound:
        raise RecipeError(
            f"synthesis.{bound}: makes batches depend on each other, so several processes cannot share them. "
            "Run one process."
        )
