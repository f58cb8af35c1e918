"""What others are compared with is asked once, however many are compared with it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from d4c_onnx.bundle import Bundle
from d4c_onnx.progress import OnStep

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


def answers_of(
    bundles: Sequence[Bundle],
    images: int,
    ask: Callable[[Bundle, Callable[[int], None]], T],
    baselines: Baselines[T] | None,
    on_step: OnStep,
) -> Iterator[T]:
    """What each bundle says, one after the other.

    Args:
        images: that each of them is asked.
        ask: a bundle; it tells how many more images were looked at.
        baselines: of earlier calls on the same data, where the first bundle may be known.
        on_step: told `evaluate`, how many images, of how many.
    """
    known: Baselines[T] = Baselines() if baselines is None else baselines
    total, done = images * (len(bundles) - (bundles[0] in known)), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        on_step("evaluate", done, total, {})

    yield known.of(bundles[0], lambda bundle: ask(bundle, count))
    for bundle in bundles[1:]:
        yield ask(bundle, count)
