"""What a command starts from: an FP32 bundle, exported first where there is none, held against other runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from d4c_onnx.bundle import Bundle, is_bundle, open_bundle
from d4c_onnx.errors import BundleError, RecipeError
from d4c_onnx.files import claimed, refuse_existing
from d4c_onnx.models.model_options import ModelOptions, is_local
from d4c_onnx.pipeline.exporting import bundle_folder, export_loaded, load
from d4c_onnx.pipeline.lazy_model import LazyModel, other_weights
from d4c_onnx.progress import OnStep
from d4c_onnx.recipe import Recipe

_ASK_NO_MODEL = ("leaves", "noise", "pink", "real")


def source_folder(source: str, output: str | Path) -> Path:
    """Where the FP32 bundle is, or will be: `source` is a bundle's path or a model's name."""
    return Path(source) if is_bundle(Path(source)) else bundle_folder(output, source)


@contextlib.contextmanager
def claimed_source(source: str, output: str | Path, rank: int = 0) -> Iterator[Path]:
    """Where the FP32 bundle is or will be, held against other runs; the first of several processes holds it for all.

    Raises:
        BundleError: another run is writing there, or nobody can.
    """
    folder = source_folder(source, output)
    with contextlib.nullcontext() if rank else claimed(folder):
        yield folder


def without_model(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe as it can be followed for the bundle in a folder: behind an imported one there are no torch weights.

    D4C, the default, gives way to dead leaves, which ask no model.

    Raises:
        RecipeError: another method that asks the weights.
    """
    method = recipe.synthesis.method
    if method in _ASK_NO_MODEL or not is_bundle(folder) or not open_bundle(folder, verify=False).imported:
        return recipe
    if method != "d4c":
        raise RecipeError(
            f"synthesis.method {method}: needs torch weights, and {folder} was imported from ONNX files. Use "
            f"{', '.join(_ASK_NO_MODEL)}."
        )
    leaves = recipe.synthesis.model_copy(update={"method": "leaves", "early_stop_tolerance": None})
    return recipe.model_copy(update={"synthesis": leaves})


def open_or_export(
    source: str,
    folder: Path,
    recipe: Recipe,
    pretrained: str | None,
    on_step: OnStep,
    options: ModelOptions | None = None,
) -> LazyModel:
    """The FP32 bundle in `folder`, exported first where there is none, with the model behind it.

    Raises:
        BundleError: the folder holds something else, other weights, or other preprocessing than was asked for.
        ModelError: the model cannot be loaded.
    """
    if is_bundle(folder):
        bundle = _fp32_bundle(folder, source, recipe, pretrained, options)
        if options is not None:
            _check_options(bundle, options)
        asked = None if is_bundle(Path(source)) else source
        model = LazyModel(bundle, pretrained, asked=asked, options=options)
        # the manifest knows a file's or a folder's name only: compare what is in it
        if (pretrained and Path(pretrained).suffix) or (asked and bundle.manifest.model.pretrained == "folder"):
            model.load(on_step)
        return model
    if folder.is_dir() and any(folder.iterdir()):
        raise BundleError(f"{folder}: exists, but is not a bundle. Move it away, or choose another --output.")
    refuse_existing(folder, overwrite=False)
    loaded = load(source, pretrained, recipe.seed, on_step, options)
    return LazyModel(export_loaded(loaded, folder, recipe, on_step=on_step), pretrained, loaded, source, options)


def _check_options(bundle: Bundle, options: ModelOptions) -> None:
    """Refuse a bundle that was exported otherwise than it is asked for now."""
    from d4c_onnx.models.preprocessing import contradictions

    model = bundle.manifest.model
    wrong = contradictions(options, bundle.manifest.preprocess, model)
    if options.strict:
        wrong += [f"{one.name} resampled from {one.stored} to {one.taken} positions" for one in model.resampled]
    if wrong:
        raise BundleError(
            f"{bundle.path}: was exported with {'; '.join(wrong)}. Export it again with --overwrite, or choose another "
            "--output."
        )


def _fp32_bundle(
    path: Path, source: str, recipe: Recipe, pretrained: str | None, options: ModelOptions | None
) -> Bundle:
    bundle = open_bundle(path)
    if bundle.quantized:
        raise BundleError(f"{path}: is quantised already. Name the FP32 bundle ({path.parent}).")
    known = bundle.manifest.model.pretrained
    asked = pretrained and (Path(pretrained).name if Path(pretrained).suffix else pretrained)
    # a plain name that happens to be a folder here, too, is the name of an architecture first
    whole = "folder" if is_local(source) and Path(source).name != source and not is_bundle(Path(source)) else None
    if (asked and asked != known) or (whole and whole != known):
        model = bundle.manifest.model
        name = model.name if is_bundle(Path(source)) else source
        raise BundleError(other_weights(path, model, name, pretrained, options))
    if asked == "random" and bundle.manifest.seed != recipe.seed:
        raise BundleError(
            f"{path}: holds random weights of seed {bundle.manifest.seed}, not {recipe.seed}. Choose another --output."
        )
    return bundle
