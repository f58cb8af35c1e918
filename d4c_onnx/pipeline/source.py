"""What a command starts from: an FP32 bundle, exported first where there is none, and the torch model behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle, is_bundle, open_bundle
from d4c_onnx.errors import BundleError, ModelError
from d4c_onnx.files import refuse_existing
from d4c_onnx.pipeline.exporting import bundle_folder, export_loaded, load
from d4c_onnx.progress import OnStep
from d4c_onnx.recipe import Recipe

if TYPE_CHECKING:
    from d4c_onnx.models.load import LoadedModel


@dataclass(slots=True)
class LazyModel:
    """The torch model of a bundle, which is loaded when images have to be synthesised from it.

    Attributes:
        bundle: in FP32.
        pretrained: as the user gave it.
        loaded: the model, once it is in memory.
    """

    bundle: Bundle
    pretrained: str | None
    loaded: LoadedModel | None = None

    def load(self, on_step: OnStep) -> LoadedModel:
        """The model, compared with the bundle by the SHA-256 of its weights.

        Raises:
            ModelError: it cannot be loaded, or is another one.
        """
        if self.loaded is None:
            model = self.bundle.manifest.model
            known = model.pretrained
            if Path(known).suffix and not self.pretrained:
                raise ModelError(
                    f"{self.bundle.path}: synthesis needs the weights again. Add --pretrained PATH/{known}."
                )
            pretrained = None if known in ("embedded", "hub") else self.pretrained or known
            self.loaded = load(model.name, pretrained, self.bundle.manifest.seed, on_step)
            if self.loaded.weights_sha256 != self.bundle.weights_sha256:
                raise ModelError(
                    f"{self.bundle.path}: was exported from other weights. Export it again with --overwrite."
                )
        return self.loaded


def source_folder(source: str, output: str | Path) -> Path:
    """Where the FP32 bundle is, or will be: `source` is a bundle's path or a model's name."""
    return Path(source) if is_bundle(Path(source)) else bundle_folder(output, source)


def open_or_export(source: str, folder: Path, recipe: Recipe, pretrained: str | None, on_step: OnStep) -> LazyModel:
    """The FP32 bundle in `folder`, exported first where there is none, with the model behind it.

    Raises:
        BundleError: the folder holds something else, or other weights.
        ModelError: the model cannot be loaded.
    """
    if is_bundle(folder):
        model = LazyModel(_fp32_bundle(folder, recipe, pretrained), pretrained)
        if pretrained and Path(pretrained).suffix:  # the manifest knows a file's name only: compare what is in it
            model.load(on_step)
        return model
    if folder.is_dir() and any(folder.iterdir()):
        raise BundleError(f"{folder}: exists, but is not a bundle. Move it away, or choose another --output.")
    refuse_existing(folder, overwrite=False)
    loaded = load(source, pretrained, recipe.seed, on_step)
    return LazyModel(export_loaded(loaded, folder, recipe, on_step=on_step), pretrained, loaded)


def _fp32_bundle(path: Path, recipe: Recipe, pretrained: str | None) -> Bundle:
    bundle = open_bundle(path)
    if bundle.quantized:
        raise BundleError(f"{path}: is quantised already. Name the FP32 bundle ({path.parent}).")
    known = bundle.manifest.model.pretrained
    asked = pretrained and (Path(pretrained).name if Path(pretrained).suffix else pretrained)
    if asked and asked != known:
        raise BundleError(f"{path}: holds {known} weights, not {asked}. Choose another --output.")
    if asked == "random" and bundle.manifest.seed != recipe.seed:
        raise BundleError(
            f"{path}: holds random weights of seed {bundle.manifest.seed}, not {recipe.seed}. Choose another --output."
        )
    return bundle
