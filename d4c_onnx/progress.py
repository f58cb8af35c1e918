"""How the library reports progress: one callable, given by whoever shows it."""

from collections.abc import Callable, Mapping

# stage ("synthesize image 3"), steps done, steps in all, values worth showing (losses)
OnStep = Callable[[str, int, int, Mapping[str, float]], None]


def silent(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
    """Show nothing."""
