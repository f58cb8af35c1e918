"""What others are compared with is asked once, however many are compared with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from d4c_onnx.bundle import Bundle

T = TypeVar("T")


class Baselines(Generic[T]):
    """Answers of bundles on one data set, by folder: a search compares dozens of trials with the same FP32 bundle."""

    def __init__(self) -> None:
        self._known: dict[Path, T] = {}

    def __contains__(self, bundle: Bundle) -> bool:
        return bundle.path in self._known

    def of(self, bundle: Bundle, ask: Callable[[Bundle], T]) -> T:
        """A bundle's answers, asked for where they are not known."""
        if bundle not in self:
            self._known[bundle.path] = ask(bundle)
        return self._known[bundle.path]
