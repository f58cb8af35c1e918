"""Two towers that somebody else exported become an FP32 bundle."""

from __future__ import annotations

from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle, is_bundle, open_bundle
from d4c_onnx.files import claimed, refuse_existing
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.exporting import bundle_folder
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import Recipe

if TYPE_CHECKING:
    from d4c_onnx.foreign import ForeignFiles


def import_bundle(
    files: ForeignFiles,
    output: str | Path,
    recipe: Recipe,
    *,
    name: str | None = None,
    options: ModelOptions | None = None,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> Bundle:
    """Import two ONNX files into `<output>/<name>/` in FP32, checked against the files.

    Args:
        files: the towers, and what the user says of their outputs and texts.
        name: the model's; None: that of the folder that both lie in.
        options: what the user says of their preprocessing.

    Raises:
        GraphError, ModelError: a file is not what it must be, or nobody says what it cannot say itself.
        BundleError: the folder is in the way, cannot be written, or another run is writing it.
        CheckFailed: a rewritten tower answers otherwise than its file.
    """
    from d4c_onnx.foreign import import_files

    output_path = bundle_folder(output, name or _common_folder(files.image, files.text))
    with claimed(output_path):
        refuse_existing(output_path, overwrite)
        return import_files(
            files, output_path, options or ModelOptions(), seed=recipe.seed, overwrite=overwrite, on_step=on_step
        )


def find_or_import(
    files: ForeignFiles,
    output: str | Path,
    recipe: Recipe,
    *,
    name: str | None = None,
    options: ModelOptions | None = None,
    on_step: OnStep = silent,
) -> Bundle:
    """The bundle of two ONNX files in `<output>/<name>/`: the one that is there, or a new one.

    Args:
        files, name, options: see `import_bundle`.

    Raises:
        BundleError: what is there was made of other files, or with other settings.
        GraphError, ModelError, CheckFailed: see `import_bundle`.
    """
    from d4c_onnx.foreign import check_made_of

    output_path = bundle_folder(output, name or _common_folder(files.image, files.text))
    if not is_bundle(output_path):
        return import_bundle(files, output, recipe, name=output_path.name, options=options, on_step=on_step)
    bundle = open_bundle(output_path)
    check_made_of(bundle, files, options or ModelOptions())
    return bundle


def _common_folder(*paths: Path) -> str:
    folder = Path(commonpath([path.resolve().parent for path in paths]))
    return (folder.parent if folder.name == "onnx" else folder).name or "imported"
