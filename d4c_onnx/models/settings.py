"""What somebody says of the pixels that weights were trained with, and of their GELU: all of it, some, or nothing."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Settings of a model; None: not said.

    Attributes:
        mean, std, interpolation, resize_mode, fill_color, size: as in the manifest's `preprocess`.
        quick_gelu: whether a tower runs QuickGELU.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str | None = None
    resize_mode: str | None = None
    fill_color: int | None = None
    quick_gelu: bool | None = None
    size: tuple[int, int] | None = None

    def given(self) -> dict[str, object]:
        """What is said, by name."""
        every = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    def over(self, other: "ModelSettings") -> "ModelSettings":
        """These, and of the rest what the other one says."""
        pairs = ((getattr(self, entry.name), getattr(other, entry.name)) for entry in fields(self))
        return ModelSettings(*(second if first is None else first for first, second in pairs))

    def only(self, names: Collection[str]) -> "ModelSettings":
        """Those of these names."""
        return replace(self, **dict.fromkeys(self.given().keys() - set(names)))


Source = tuple[str, ModelSettings]  # who, and what they say
