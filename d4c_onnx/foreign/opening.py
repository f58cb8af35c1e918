"""Both towers of what somebody brings, let in and cut out, and what is said about their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import onnx_ir as ir

from d4c_onnx.errors import ModelError
from d4c_onnx.files import sha256
from d4c_onnx.foreign.beside import pixels_beside
from d4c_onnx.foreign.door import let_in
from d4c_onnx.foreign.tower import ForeignTower, cut_tower
from d4c_onnx.manifest import Preprocess
from d4c_onnx.models.model_options import ModelOptions


@dataclass(frozen=True, slots=True)
class ForeignFiles:
    """What somebody brings.

    Attributes:
        image, text: the files; one file twice where it holds both towers.
        image_output, text_output: the embeddings' names; None: told by their form and usual names.
        tokenizer: a tokenizer.json; None: the one beside the text tower.
        context_length: ids of the longest text; None: the graph or a config says it.
        pad_token: fills texts up; None: a config says it, or it does not matter.
    """

    image: Path
    text: Path
    image_output: str | None = None
    text_output: str | None = None
    tokenizer: Path | None = None
    context_length: int | None = None
    pad_token: str | None = None

    def words(self) -> list[str]:
        """The files again, as they stand on a command line."""
        given = ((f"--{entry.name.replace('_', '-')}", getattr(self, entry.name)) for entry in fields(self))
        return [word for option, value in given if value is not None for word in (option, str(value))]


@dataclass(frozen=True, slots=True)
class OpenedTowers:
    """Two towers.

    Attributes:
        image: takes pixels of `preprocess.size`.
        sources: who says each setting of `preprocess`.
        sha256: of the files, weights beside the graphs included.
    """

    image: ForeignTower
    text: ForeignTower
    preprocess: Preprocess
    sources: Mapping[str, str]
    sha256: str


def open_towers(files: ForeignFiles, options: ModelOptions) -> OpenedTowers:
    """Read both towers.

    Args:
        options: what the user says of preprocessing.

    Raises:
        GraphError, ModelError: a file is not what it must be, or nobody says what it cannot say itself.
    """
    whole = let_in(files.image)
    # a copy shares the weights
    other = whole.clone() if files.text == files.image else None
    image = cut_tower(whole, "image", files.image, files.image_output)
    preprocess, sources = pixels_beside(files.image, options, _taken(image))
    text = cut_tower(other or let_in(files.text), "text", files.text, files.text_output)
    digest = _digest(image, text)
    image.main.shape = ir.Shape(["batch", 3, *preprocess.size])
    return OpenedTowers(image, text, preprocess, sources, digest)


def _taken(image: ForeignTower) -> tuple[int, int] | None:
    """Height and width that the graph fixes.

    Raises:
        ModelError: colours are not its second axis.
    """
    sizes = list(image.main.shape or ())
    if len(sizes) == 4 and isinstance(sizes[1], int) and sizes[1] != 3:
        raise ModelError(
            f"{image.original.path}: takes {sizes[1]} channels, not the 3 of [batch, 3, height, width]. Export it so."
        )
    height, width = sizes[2:] if len(sizes) == 4 else (None, None)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _digest(*towers: ForeignTower) -> str:
    whole = hashlib.sha256()
    for tower in towers:
        tensors = [value.const_value for value in tower.model.graph.initializers.values()]
        beside = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
        for path in (tower.original.path, *sorted(beside)):
            whole.update(sha256(path).encode())
    return whole.hexdigest()
