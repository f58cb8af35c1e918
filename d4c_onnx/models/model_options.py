"""What a user says of weights that do not say it themselves. No torch: commands make it from their options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import INTERPOLATIONS, LARGEST_SIDE, MEAN_LIMITS, RESIZE_MODES, STD_LIMITS
from d4c_onnx.models.settings import ModelSettings, Source

LOCAL = "local-dir:"  # open_clip's prefix of a model that is a folder
_PLACES = ("--config", "--tokenizer")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """How a model is to be taken; None: not said.

    Attributes:
        like: a published tag that the weights are like: of the architecture, or `MODEL:TAG` of another one.
        mean, std: of values in 0..1, one for each of the three channels.
        interpolation, resize_mode: as in the manifest's `preprocess`.
        image_size: height and width in pixels.
        quick_gelu: whether the towers run QuickGELU.
        strict: refuse weights whose positions would have to be resampled.
        config: a file that describes the architecture, as open_clip's configs do.
        tokenizer: a folder that holds the tokenizer's files.

    Raises:
        ModelError: a value that no preprocessing can have.
    """

    like: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    resize_mode: str | None = None
    image_size: tuple[int, int] | None = None
    quick_gelu: bool | None = None
    strict: bool = False
    config: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for name, values, (least, most) in (("--mean", self.mean, MEAN_LIMITS), ("--std", self.std, STD_LIMITS)):
            if values is not None and not (len(values) == 3 and all(least <= value <= most for value in values)):
                limits = f"from {least:g} to {most:g}"
                raise ModelError(f"{name} {values}: takes three numbers {limits}, one for each channel.")
        for name, word, known in (
            ("--interpolation", self.interpolation, INTERPOLATIONS),
            ("--resize-mode", self.resize_mode, RESIZE_MODES),
        ):
            if word not in (None, *known):
                raise ModelError(f"{name} {word}: takes one of {', '.join(known)}.")
        if self.image_size is not None and not all(1 <= side <= LARGEST_SIDE for side in self.image_size):
            raise ModelError(f"--image-size {self.image_size}: takes pixels from 1 to {LARGEST_SIDE}.")

    def said(self) -> dict[str, object]:
        """What was said of the weights, by option; `strict`, and where files lie, say nothing of them."""
        given = {f"--{entry.name.replace('_', '-')}": getattr(self, entry.name) for entry in fields(self)}
        if self.quick_gelu is False:
            given["--no-quick-gelu"] = given.pop("--quick-gelu")
        silent = ("--strict", *_PLACES)
        return {name: value for name, value in given.items() if value is not None and name not in silent}

    def places(self) -> dict[str, Path]:
        """Where files lie, by option."""
        given = {"--config": self.config, "--tokenizer": self.tokenizer}
        return {name: value for name, value in given.items() if value is not None}

    def words(self) -> list[str]:
        """The options again, as they stand on a command line."""
        words = ["--strict"] if self.strict else []
        for name, value in [*self.said().items(), *self.places().items()]:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [name] if isinstance(value, bool) else [name, shown]
        return words

    def stated(self) -> list[Source]:
        """What was said outright, an option each."""
        every = [
            ("--mean", ModelSettings(mean=self.mean)),
            ("--std", ModelSettings(std=self.std)),
            ("--interpolation", ModelSettings(interpolation=self.interpolation)),
            ("--resize-mode", ModelSettings(resize_mode=self.resize_mode)),
            ("--image-size", ModelSettings(size=self.image_size)),
            ("--quick-gelu" if self.quick_gelu else "--no-quick-gelu", ModelSettings(quick_gelu=self.quick_gelu)),
        ]
        return [(option, said) for option, said in every if said.given()]


def is_local(model: str) -> bool:
    """Whether a model is named as a folder."""
    return model.startswith(LOCAL) or Path(model).is_dir()
