"""The one exception family. Every message says what was wrong, where, and what to do.

D4CError
├── RecipeError        a recipe file, a --set override or --bits that cannot be used
├── ModelError         a model that cannot be found, loaded or understood
├── CalibrationError   a calibration set that is missing, damaged or of another model
├── GraphError         an ONNX graph that a rewrite cannot handle
├── BundleError        a bundle folder that cannot be read or written
├── DatasetError       an evaluation data set that cannot be read
├── MissingExtra       packages of an extra that was not installed
└── CheckFailed        a requested check ran and failed (exit code 1; all others are 2)
"""

from typing import Protocol


class Report(Protocol):
    """What a command measured."""

    def as_dict(self) -> dict[str, object]:
        """For --json."""


class D4CError(Exception):
    """Base of every error that d4c-onnx raises on purpose."""


class RecipeError(D4CError):
    """A recipe file, an override or a bit-width string cannot be used."""


class ModelError(D4CError):
    """A model cannot be found, loaded or understood."""


class CalibrationError(D4CError):
    """A calibration set is missing, damaged or belongs to another model."""


class GraphError(D4CError):
    """An ONNX graph holds something that a rewrite cannot handle."""


class BundleError(D4CError):
    """A bundle folder cannot be read or written."""


class DatasetError(D4CError):
    """An evaluation data set cannot be read."""


class MissingExtra(D4CError):
    """What was asked for needs packages that an extra of d4c-onnx installs."""


class CheckFailed(D4CError):
    """A requested check (parity, accuracy) ran to its end and failed.

    Attributes:
        report: what was measured, as the caller would have got it; None where there is none.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report
