"""A model becomes an FP32 bundle: the first step, and where every other one finds its encoders."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle
from d4c_onnx.extras import need_extra
from d4c_onnx.files import claimed, refuse_existing
from d4c_onnx.measure.machine import Machine
from d4c_onnx.models.model_options import LOCAL, ModelOptions, is_local
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import Recipe

if TYPE_CHECKING:
    from d4c_onnx.models.load import LoadedModel


def bundle_folder(output: str | Path, model: str) -> Path:
    """`<output>/<model>`, with what a folder name cannot hold replaced; of a folder, `<output>/<its name>`."""
    if is_local(model):
        return Path(output) / Path(model.removeprefix(LOCAL)).resolve().name
    return Path(output) / model.replace("hf-hub:", "").replace("/", "--")


def export_bundle(
    model: str,
    output: str | Path,
    recipe: Recipe,
    *,
    pretrained: str | None = None,
    options: ModelOptions | None = None,
    raw: bool = False,
    overwrite: bool = False,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> Bundle:
    """Export a model to `<output>/<model>/` in FP32, checked against torch.

    Args:
        options: what the user says of weights that do not say it themselves.

    Raises:
        BundleError: the folder is in the way, cannot be written, or another run is writing it.
        ModelError: the model cannot be loaded, or its weights do not tell which preprocessing they are for.
        CheckFailed: a file differs from torch by more than 1e-4.
    """
    output_path = bundle_folder(output, model)
    with claimed(output_path):
        refuse_existing(output_path, overwrite)
        use_threads(machine or Machine())
        loaded = load(model, pretrained, recipe.seed, on_step, options)
        return export_loaded(loaded, output_path, recipe, raw=raw, overwrite=overwrite, on_step=on_step)


def load(
    model: str, pretrained: str | None, seed: int, on_step: OnStep, options: ModelOptions | None = None
) -> LoadedModel:
    """Load a torch model.

    Raises:
        MissingExtra: torch and open_clip are not installed.
        ModelError: there is no such model.
    """
    need_extra("export", f"{model}: making files from a model")
    on_step("load", 0, 1, {})
    from d4c_onnx.models.load import load_model

    loaded = load_model(model, pretrained, seed, options)
    on_step("load", 1, 1, {})
    return loaded


def export_loaded(
    loaded: LoadedModel,
    output_path: Path,
    recipe: Recipe,
    *,
    raw: bool = False,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> Bundle:
    """Export a model that is in memory."""
    from d4c_onnx.export import export_fp32

    return export_fp32(loaded, output_path, seed=recipe.seed, raw=raw, overwrite=overwrite, on_step=on_step)


def use_threads(machine: Machine) -> None:
    """Tell torch how many threads to use, where that was asked for and it is installed."""
    if machine.threads and find_spec("torch"):
        import torch

        torch.set_num_threads(machine.threads)
