"""--effort: a preset of recipe keys, and how long the images will take, said before they are made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from d4c_onnx.progress import Ahead, OnAhead

F = TypeVar("F", bound=Callable[..., Any])


class Effort:
    """What was asked for, and what it comes to."""

    def __init__(self, name: str | None, quiet: bool) -> None:
        self._name, self._quiet = name, quiet
        self._ahead: Ahead | None = None

    def keys(self) -> dict[str, object]:
        """The recipe's keys that it sets; --set and other options win over them."""
        from d4c_onnx.recipe import EFFORTS

        return EFFORTS[self._name] if self._name else {}

    @property
    def on_ahead(self) -> OnAhead | None:
        """Whom the library tells how long it will take; None: nobody asked."""
        return self._tell if self._name else None

    def as_dict(self) -> dict[str, object]:
        """For --json: nothing, where it was not asked for."""
        if not self._name:
            return {}
        found = self._ahead
        seconds = None if found is None or found.seconds is None else round(found.seconds, 1)
        return {
            "effort": {
                "name": self._name,
                "keys": self.keys(),
                "images_to_make": None if found is None else found.images,
                "finished": found is not None and found.finished,
                "estimated_seconds": seconds,
            }
        }

    def refuse(self, calibration: object) -> None:
        """Raises: click.UsageError: beside a set that is given, there is nothing to make."""
        if self._name and calibration:
            raise click.UsageError(
                "--effort is about a set that is made, --calibration names one. Leave one of them out."
            )

    def _tell(self, ahead: Ahead) -> None:
        self._ahead = ahead
        if self._quiet:
            return
        chosen = ", ".join(f"{key}={value}" for key, value in self.keys().items()) or "the recipe as it is"
        click.echo(f"effort {self._name} ({chosen}): {_words(ahead)}", err=True)


def effort_option(function: F) -> F:
    """How much work images are worth, as one `effort`."""

    @functools.wraps(function)
    def command(effort: str | None, **found: Any) -> Any:
        return function(effort=Effort(effort, found["quiet"]), **found)

    option = click.option(
        "--effort",
        type=click.Choice(["quick", "default", "best"]),
        help="A preset of recipe keys: quick, pictures without a model; default; best, more images and steps. Says how "
        "many seconds the images will take, before they are made.",
    )
    return cast(F, option(command))


def _words(ahead: Ahead) -> str:
    if ahead.finished:
        return "the calibration images are there already, none is made"
    steps = f", {ahead.steps} steps each" if ahead.steps else ""
    made = f"{ahead.images} {ahead.method} images{steps}"
    if ahead.seconds is None:
        return made
    what = "a step of the first batch" if ahead.steps else "a picture"
    spent = f"about {ahead.seconds:.0f} s here (an estimate, by {what})" if ahead.seconds else "in a moment"
    return f"{made}, {spent}"
