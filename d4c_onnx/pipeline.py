"""The whole story: export -> synthesis -> quantisation -> evaluation. Every command is one call of this module.

torch is imported inside the steps that need it: quantising a bundle with a calibration set at hand needs none.
"""

from __future__ import annotations

import gc
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4c_onnx.bundle import (
    Bundle,
    encoder_size_bytes,
    is_bundle,
    open_bundle,
    write_manifest,
)
from d4c_onnx.errors import BundleError, DatasetError, ModelError, RecipeError
from d4c_onnx.files import refuse_existing
from d4c_onnx.measure import (
    Machine,
    check_dataset_name,
    check_limits,
    check_measurable,
    check_set_fits,
    evaluate,
    held_out_counts,
)
from d4c_onnx.memory import release_freed
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import generic_nouns, read_nouns

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.models.load import LoadedModel
    from d4c_onnx.synthesis import ProcessGroup


def bundle_folder(output: str | Path, model: str) -> Path:
    """`<output>/<model>`, with what a folder name cannot hold replaced."""
    return Path(output) / model.replace("hf-hub:", "").replace("/", "--")


def export_bundle(
    model: str,
    output: str | Path,
    recipe: Recipe,
    *,
    pretrained: str | None = None,
    raw: bool = False,
    overwrite: bool = False,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> Bundle:
    """Export a model to `<output>/<model>/` in FP32, checked against torch.

    Raises:
        BundleError: the folder is in the way, or cannot be written.
        ModelError: the model cannot be loaded.
        CheckFailed: a file differs from torch by more than 1e-4.
    """
    target = bundle_folder(output, model)
    refuse_existing(target, overwrite)
    _use_threads(machine or Machine())
    return _export(_load(model, pretrained, recipe.seed, on_step), target, recipe, raw, on_step)


def synthesize_calibration_set(
    source: str,
    recipe: Recipe,
    *,
    output: str | Path,
    pretrained: str | None = None,
    prompts: str | Path | None = None,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> tuple[Path, CalibrationSet]:
    """Make a calibration set in the model's bundle folder, or return the one of the same key that is there.

    Exports first when the model has no bundle yet: a set always lies beside the encoders it is for.

    Args:
        source: a model's name, or the path of an FP32 bundle (its model is loaded again).
        prompts: the user's vocabulary.

    Returns:
        The set's folder, and the set.
    """
    from d4c_onnx.synthesis import init_process_group

    machine = machine or Machine()
    nouns = read_nouns(prompts) if prompts else None
    folder = Path(source) if is_bundle(Path(source)) else bundle_folder(output, source)
    _use_threads(machine)
    group = init_process_group(machine.rank, machine.world_size, machine.local_rank)
    _, origin = group.rank_zero_first(lambda: _source_bundle(source, folder, recipe, pretrained, on_step))
    return _calibration_set(origin, folder, recipe, nouns, machine, on_step, group)


def quantize_bundle(
    source: str,
    recipe: Recipe,
    *,
    output: str | Path,
    pretrained: str | None = None,
    prompts: str | Path | None = None,
    calibration: str | Path | None = None,
    overwrite: bool = False,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Quantise both encoders of a model or bundle, and measure the written files against FP32.

    Exports first when the model has no bundle yet, synthesises when there is no calibration set of the recipe's key.
    The result goes to `<bundle>/<bits>/`; with `target: cuda` an FP16 bundle goes to `<bundle>/fp16/`, too, unless the
    same one is there from another width.

    Args:
        source: a model's name, or an FP32 bundle's path.
        calibration: a set's folder; none is then synthesised and torch is not needed for a bundle.

    Returns:
        The report: model, bits, target, bundle, weight_bits_average, size_bytes, size_ratio, accuracy, top1, seconds.

    Raises:
        BundleError: the folder of the result, or of the FP16 bundle, holds something else.
        RecipeError: keys contradict the target.
        CheckFailed: top-1 or cosine fell by more than the recipe allows (the files are written all the same, and its
            `report` is what would be returned).
    """
    from d4c_onnx.calibration.dataset import open_calibration_set
    from d4c_onnx.quantization import find_half_bundle, half_bundle_files, quantize_bundle_files, target_of
    from d4c_onnx.runtime.session import resolve_provider

    machine = machine or Machine()
    nouns = read_nouns(prompts) if prompts else None
    folder = Path(source) if is_bundle(Path(source)) else bundle_folder(output, source)
    target = folder / recipe.quantization.bits.lower()
    form = target_of(recipe.quantization)
    unmeasured = None if overwrite else _unmeasured(target, recipe, whole=calibration is None)
    if unmeasured is None:
        refuse_existing(target, overwrite)
    half_target, half = folder / "fp16", None
    if form.half and not overwrite and is_bundle(folder):
        half = find_half_bundle(open_bundle(folder, verify=False), half_target, recipe.quantization)
    if form.half and half is None:
        refuse_existing(half_target, overwrite)
    check_dataset_name(recipe)
    dataset = open_calibration_set(calibration) if calibration else None
    if dataset is None:
        _use_threads(machine)
    elif nouns is not None and dataset.manifest["key"]["nouns"] != list(nouns):
        raise RecipeError(f"--prompts {prompts}: {calibration} was made for other nouns. Leave one of the two out.")
    clock = _Clock()
    bundle, origin = _source_bundle(source, folder, recipe, pretrained, on_step)
    planned = (recipe.synthesis.held_out, recipe.text.held_out)
    check_measurable(recipe, bundle, planned if dataset is None else held_out_counts(dataset))
    clock.lap("export")
    if dataset is None:
        _, dataset = _calibration_set(origin, folder, recipe, nouns, machine, on_step)
    del origin  # the torch model, if it was loaded: a large one leaves no room for what follows
    gc.collect()  # its modules refer to each other in circles
    release_freed()
    check_set_fits(dataset, bundle)
    clock.lap("synthesize")
    if unmeasured is not None and unmeasured.manifest["calibration"] != dataset.manifest["key"]["id"]:
        refuse_existing(target, overwrite)
    # Which images and texts calibrated is the set's word: it may have been given, and it holds no machine's paths.
    dump = recipe.model_dump(mode="json") | {name: dataset.manifest["key"][name] for name in ("synthesis", "text")}
    quantized = unmeasured or quantize_bundle_files(
        bundle,
        dataset,
        target,
        recipe.quantization,
        recipe_dump=dump,
        provider=resolve_provider(machine.provider),
        threads=machine.threads,
        on_step=on_step,
    )
    if form.half and half is None:
        half = half_bundle_files(
            bundle, half_target, recipe.quantization, dataset, threads=machine.threads, on_step=on_step
        )
    beside = [half] if half else []
    clock.lap("quantize")
    accuracy = evaluate([bundle, quantized, *beside], recipe, dataset, machine, on_step)
    clock.lap("evaluate")
    measured = {"accuracy": _relative(accuracy, folder)}
    # the quantised one last: until its manifest has its accuracy, a rerun measures both
    *_, quantized = [write_manifest(made.path, {**made.content, **measured}) for made in (*beside, quantized)]
    report = _report(bundle, quantized, recipe, accuracy, clock.seconds)
    check_limits(accuracy, recipe, report)
    return report


@dataclass(slots=True)
class _Origin:
    """Where images can be synthesised from: a model in hand, or a bundle whose model is loaded when it is needed."""

    pretrained: str | None
    bundle: Bundle | None = None
    loaded: LoadedModel | None = None

    @property
    def weights_sha256(self) -> str:
        if self.loaded is not None:
            return self.loaded.weights_sha256
        assert self.bundle is not None
        return self.bundle.weights_sha256

    @property
    def name(self) -> str:
        if self.loaded is not None:
            return self.loaded.name
        assert self.bundle is not None
        return self.bundle.model_name

    def load(self, on_step: OnStep) -> LoadedModel:
        """The model, compared with the bundle by the SHA-256 of its weights."""
        if self.loaded is None:
            assert self.bundle is not None
            model = self.bundle.manifest["model"]
            known = model["pretrained"]
            if Path(known).suffix and not self.pretrained:
                raise ModelError(
                    f"{self.bundle.path}: synthesis needs the weights again. Add --pretrained PATH/{known}."
                )
            self.loaded = _load(
                model["name"],
                None if known in ("embedded", "hub") else self.pretrained or known,
                self.bundle.manifest["seed"],
                on_step,
            )
            if self.loaded.weights_sha256 != self.bundle.weights_sha256:
                raise ModelError(
                    f"{self.bundle.path}: was exported from other weights. Export it again with --overwrite."
                )
        return self.loaded


def _source_bundle(
    source: str, folder: Path, recipe: Recipe, pretrained: str | None, on_step: OnStep
) -> tuple[Bundle, _Origin]:
    if is_bundle(folder):
        bundle = _float_bundle(folder, recipe, pretrained)
        origin = _Origin(pretrained, bundle)
        if pretrained and Path(pretrained).suffix:  # the manifest knows a file's name only: compare what is in it
            origin.load(on_step)
        return bundle, origin
    if folder.is_dir() and any(folder.iterdir()):
        raise BundleError(f"{folder}: exists, but is not a bundle. Move it away, or choose another --output.")
    refuse_existing(folder, overwrite=False)
    loaded = _load(source, pretrained, recipe.seed, on_step)
    return _export(loaded, folder, recipe, False, on_step), _Origin(pretrained, loaded=loaded)


def _unmeasured(target: Path, recipe: Recipe, whole: bool) -> Bundle | None:
    """What an interrupted run of this very quantisation wrote and did not come to measure.

    Args:
        whole: compare how images and texts are made, too; not where a given set says that.
    """
    if not is_bundle(target):
        return None
    bundle = open_bundle(target)
    own, known = (_sourceless(dump) for dump in (recipe.model_dump(mode="json"), bundle.manifest.get("recipe", {})))
    compared = own.keys() - {"evaluation"} - (set() if whole else {"synthesis", "text"})
    same = all(known.get(section) == own[section] for section in compared)
    return bundle if same and "accuracy" not in bundle.manifest else None


def _sourceless(recipe: dict[str, Any]) -> dict[str, Any]:
    """Without what images were read from: a path in a recipe, a SHA-256 in a manifest, and part of the set's id."""
    return {**recipe, "synthesis": {**recipe.get("synthesis", {}), "source": None}}


def _float_bundle(path: Path, recipe: Recipe, pretrained: str | None) -> Bundle:
    bundle = open_bundle(path)
    if bundle.quantized:
        raise BundleError(f"{path}: is quantised already. Name the FP32 bundle ({path.parent}).")
    known = bundle.manifest["model"]["pretrained"]
    asked = pretrained and (Path(pretrained).name if Path(pretrained).suffix else pretrained)
    if asked and asked != known:
        raise BundleError(f"{path}: holds {known} weights, not {asked}. Choose another --output.")
    if asked == "random" and bundle.manifest["seed"] != recipe.seed:
        raise BundleError(
            f"{path}: holds random weights of seed {bundle.manifest['seed']}, not {recipe.seed}. "
            "Choose another --output."
        )
    return bundle


def _load(model: str, pretrained: str | None, seed: int, on_step: OnStep) -> LoadedModel:
    on_step("load", 0, 1, {})
    from d4c_onnx.models.load import load_model

    loaded = load_model(model, pretrained, seed)
    on_step("load", 1, 1, {})
    return loaded


def _export(loaded: LoadedModel, target: Path, recipe: Recipe, raw: bool, on_step: OnStep) -> Bundle:
    from d4c_onnx.export import export_fp32

    return export_fp32(loaded, target, seed=recipe.seed, raw=raw, on_step=on_step)


def _calibration_set(
    origin: _Origin,
    folder: Path,
    recipe: Recipe,
    nouns: tuple[str, ...] | None,
    machine: Machine,
    on_step: OnStep,
    group: ProcessGroup | None = None,
) -> tuple[Path, CalibrationSet]:
    from d4c_onnx.calibration.dataset import open_calibration_set, work_folder
    from d4c_onnx.calibration.key import calibration_key
    from d4c_onnx.evaluation.datasets import content_sha256
    from d4c_onnx.models.catalogue import embedded_models

    shipped = embedded_models().get(origin.name)
    nouns = nouns or (shipped.nouns if shipped else generic_nouns())
    source = Path(recipe.synthesis.source) if recipe.synthesis.source else None
    digest = content_sha256(source) if source else None
    key = calibration_key(origin.weights_sha256, recipe.synthesis, recipe.text, nouns, recipe.seed, digest)
    target = folder / f"calibration-{key['id']}"
    if target.exists():
        shutil.rmtree(work_folder(target), ignore_errors=True)  # a run was killed after its last rename
        return target, open_calibration_set(target)
    from d4c_onnx.synthesis import synthesize

    loaded = origin.load(on_step)
    made = synthesize(
        loaded,
        target,
        recipe.synthesis,
        recipe.text,
        nouns,
        seed=recipe.seed,
        device=machine.device,
        given=_real_images(source, recipe, loaded.preprocess) if source else None,
        source_sha256=digest,
        group=group,
        on_step=on_step,
    )
    return target, made


def _real_images(source: Path, recipe: Recipe, preprocess: dict[str, Any]) -> np.ndarray:
    """The control: pixel_values float32 [images + held_out, 3, H, W] of randomly drawn images, none twice."""
    from d4c_onnx.evaluation.datasets import open_images
    from d4c_onnx.runtime.preprocess import preprocess_image

    found = open_images(source)
    count = recipe.synthesis.images + recipe.synthesis.held_out
    if len(found) < count:
        raise DatasetError(
            f"{source}: holds {len(found)} images; images + held_out are {count}. Lower synthesis.images."
        )
    chosen = np.random.default_rng([recipe.seed, 9]).choice(len(found), count, replace=False)
    batches = found.select(chosen).batches(64)
    return np.stack([preprocess_image(image, preprocess) for images in batches for image in images])


def _report(
    bundle: Bundle, quantized: Bundle, recipe: Recipe, accuracy: dict[str, Any], seconds: dict[str, float]
) -> dict[str, Any]:
    before, after = encoder_size_bytes(bundle), encoder_size_bytes(quantized)
    tops = [row.get("top1") for row in accuracy["bundles"]]
    return {
        "model": bundle.model_name,
        "pretrained": bundle.manifest["model"]["pretrained"],
        "bits": recipe.quantization.bits.lower(),
        "bundle": str(quantized.path),
        "calibration": quantized.manifest["calibration"],
        "accuracy_mode_only": quantized.manifest["accuracy_mode_only"],
        "target": recipe.quantization.target,
        "target_note": quantized.manifest["target_note"],
        "weight_bits_average": quantized.manifest["weight_bits_average"],
        "size_bytes": {"fp32": before, "quantized": after},
        "size_ratio": {tower: round(before[tower] / after[tower], 3) for tower in ("image", "text", "total")},
        "top1": {"fp32": tops[0], "quantized": tops[1]},
        "accuracy": accuracy,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }


def _relative(accuracy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Bundle paths as seen from the FP32 bundle: a manifest holds no machine's paths."""
    rows = [
        {**row, "bundle": "fp32" if Path(row["bundle"]) == folder else Path(row["bundle"]).name}
        for row in accuracy["bundles"]
    ]
    return {**accuracy, "bundles": rows}


def _use_threads(machine: Machine) -> None:
    if machine.threads:
        import torch

        torch.set_num_threads(machine.threads)


class _Clock:
    """Wall-clock seconds per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
