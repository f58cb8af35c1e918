"""How the library reports progress, and what is ahead: a callable each, given by whoever shows it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

# stage ("synthesize image 3"), steps done, steps in all, values worth showing (losses)
OnStep = Callable[[str, int, int, Mapping[str, float]], None]


def silent(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
    """Show nothing."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a synthesis has before it.

    Attributes:
        method: how images come into being.
        images: that are to be made, held-out ones included; 0 where the set is finished.
        steps: of the optimiser, on each image; 0 where nothing is optimised.
        seconds: an estimate; None where reading images is all there is to do.
    """

    method: str
    images: int
    steps: int
    seconds: float | None

    @property
    def finished(self) -> bool:
        """Whether the set is there already."""
        return self.images == 0


OnAhead = Callable[[Ahead], None]
