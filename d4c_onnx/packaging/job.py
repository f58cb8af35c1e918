"""One package in the making: what stacks write into it, and what is remembered of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from d4c_onnx.bundle import EXTERNAL_DATA, Bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.files import write_json, write_text
from d4c_onnx.graph.model import load_model, save_model, signature_of
from d4c_onnx.manifest import Preprocess, TokenizerInfo
from d4c_onnx.packaging.combined import combine
from d4c_onnx.packaging.edits import Edit, GuardIds
from d4c_onnx.packaging.package_manifest import PackagedModel


@dataclass(slots=True)
class Job:
    """A package that is written.

    Attributes:
        bundle: where it comes from.
        folder: a staged one.
        target: the stack's name.
        name: what the user calls the model for stacks that know models by name; None: they take the bundle's.
        models: what was written.
        remarks: what the stack will do badly, and what the user has to do.
    """

    bundle: Bundle
    folder: Path
    target: str
    name: str | None = None
    models: list[PackagedModel] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def preprocess(self) -> Preprocess:
        return self.bundle.manifest.preprocess

    @property
    def tokenizer(self) -> TokenizerInfo:
        return self.bundle.manifest.tokenizer

    @property
    def dimensions(self) -> int:
        """Of an embedding."""
        _, size = self.bundle.manifest.io[self.bundle.image_encoder.name].outputs[0].shape
        return int(size)

    def encoder(self, tower: str, file: str, *edits: Edit) -> None:
        """Write a tower, with these changes of its boundary.

        Args:
            tower: image or text.
            file: where, below the package's folder.
        """
        self._save(self._edited(tower, edits), (tower,), file, edits)

    def combined(self, file: str, both: Sequence[Edit] = (), text: Sequence[Edit] = ()) -> None:
        """Write both towers in one file.

        Args:
            both: changes of each tower before they become one.
            text: further ones of the text tower.

        Raises:
            BundleError: the bundle has no similarities to give.
        """
        image, words = self._edited("image", both), self._edited("text", (*both, *text))
        self._save(combine(image, words, self.bundle.manifest.model), ("image", "text"), file, (*both, *text))

    def _edited(self, tower: str, edits: Sequence[Edit]) -> ir.Model:
        model = load_model(self.bundle.encoders[tower])
        for edit in edits:
            edit.apply(model)
        return model

    def _save(self, model: ir.Model, towers: tuple[str, ...], file: str, edits: Sequence[Edit]) -> None:
        path = self._place(file)
        save_model(model, path)
        self.models.append(PackagedModel(file, towers, tuple(edit.words for edit in edits), signature_of(model)))

    def guard(self) -> tuple[Edit, ...]:
        """The guard of ids, for stacks that get long texts wrong; a fixed tower's rows are filled up."""
        info = self.tokenizer
        if info.dynamic_sequence:
            return (GuardIds(info.context_length, info.eot_id),)
        return (GuardIds(info.context_length, info.eot_id, self.pad_id()),)

    def fill(self) -> tuple[Edit, ...]:
        """What lets a tower of a fixed length take shorter rows; nothing where it takes any."""
        return () if self.tokenizer.dynamic_sequence else self.guard()

    def pad_id(self) -> int:
        """What fills rows up.

        Raises:
            BundleError: nobody knows.
        """
        if self.tokenizer.pad_id is None:
            raise self.refusal("fills rows up with padding, and the bundle does not say which id that is")
        return self.tokenizer.pad_id

    def copy(self, source: Path, file: str) -> None:
        """Put a file of the bundle into the package."""
        shutil.copyfile(source, self._place(file))

    def json(self, file: str, value: Mapping[str, object]) -> None:
        """Write a JSON file."""
        write_json(self._place(file), value)

    def text(self, file: str, content: str) -> None:
        """Write a text file."""
        write_text(self._place(file), content)

    def write(self, file: str, write: Callable[[Path], object]) -> None:
        """Write a file in another way."""
        write(self._place(file))

    def _place(self, file: str) -> Path:
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def refusal(self, why: str) -> BundleError:
        """What to raise when the stack cannot serve the bundle: it `why`."""
        return BundleError(f"{self.bundle.path}: cannot be packaged for {self.target}, which {why}.")


def is_external(folder: Path, model: PackagedModel) -> bool:
    """Whether a model's weights lie beside it."""
    return (folder / (model.file + EXTERNAL_DATA)).exists()
