"""How well bundles answer: zero-shot where there are labels, fidelity to the first bundle elsewhere, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import BundleError, CheckFailed, RecipeError, Report
from d4c_onnx.measure.calibration_fit import check_set_fits
from d4c_onnx.measure.machine import Machine
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import Recipe
from d4c_onnx.results import Accuracy

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.evaluation.baseline import Baselines


def evaluate_bundles(
    paths: Sequence[str | Path],
    recipe: Recipe,
    *,
    calibration: str | Path | None = None,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> Accuracy:
    """Measure bundles side by side, the first one being the baseline.

    Args:
        paths: bundles of one model.
        calibration: the set whose held-out part label-free fidelity uses.

    Raises:
        BundleError: a folder is not a bundle, or they are of different models.
        CalibrationError: the set is of another model, or holds nothing out.
        CheckFailed: top-1 or cosine fell by more than the recipe allows; its `report` is what would be returned.
    """
    from d4c_onnx.calibration.dataset import open_calibration_set

    check_dataset_name(recipe)
    bundles = [open_bundle(path) for path in paths]
    dataset = open_calibration_set(calibration) if calibration else None
    for bundle in bundles[1:]:
        if bundle.weights_sha256 != bundles[0].weights_sha256:
            raise BundleError(
                f"{bundle.path}: is of other weights than {bundles[0].path}, so their answers cannot be compared. "
                "Evaluate each model by itself."
            )
    if dataset is not None:
        check_set_fits(dataset, bundles[0])
    check_measurable(recipe, bundles[0], None if dataset is None else held_out_counts(dataset))
    result = evaluate(bundles, recipe, dataset, machine or Machine(), on_step)
    check_limits(result, recipe, result)
    return result


def evaluate(
    bundles: Sequence[Bundle],
    recipe: Recipe,
    calibration: CalibrationSet | None,
    machine: Machine,
    on_step: OnStep = silent,
    baselines: Baselines[Any] | None = None,
) -> Accuracy:
    """Zero-shot accuracy where there are labels; fidelity on held-out synthetic input otherwise.

    Args:
        baselines: of earlier calls with the same recipe and set: the first bundle, once known, is not asked again.

    Raises:
        BundleError: there is nothing to measure with, or a bundle answers with what is no finite number.
    """
    from d4c_onnx.evaluation.datasets import open_dataset
    from d4c_onnx.evaluation.fidelity import evaluate_fidelity
    from d4c_onnx.evaluation.zero_shot import evaluate_zero_shot

    name = _dataset_name(recipe, bundles[0])
    if name != "fidelity":
        return evaluate_zero_shot(
            bundles,
            open_dataset(name),
            batch=recipe.evaluation.batch,
            exif_rotation=recipe.evaluation.exif_rotation,
            provider=machine.provider,
            threads=machine.threads,
            baselines=baselines,
            on_step=on_step,
        )
    if calibration is None:
        raise BundleError(
            f"{bundles[0].model_name}: has no labelled set. "
            "Add --dataset FILE.parquet, or --calibration DIR for fidelity."
        )
    return evaluate_fidelity(
        bundles,
        calibration,
        batch=16,
        provider=machine.provider,
        threads=machine.threads,
        baselines=baselines,
        on_step=on_step,
    )


def _dataset_name(recipe: Recipe, bundle: Bundle) -> str:
    """`fidelity`, an embedded set's name, or a file."""
    name = recipe.evaluation.dataset
    return (bundle.manifest.model.dataset or "fidelity") if name == "auto" else name


def check_measurable(recipe: Recipe, bundle: Bundle, held_out: tuple[int, int] | None) -> None:
    """Refuse what the measuring at the end would stumble over.

    Args:
        held_out: images and prompts that the calibration set holds out, or will; None where there is no set.

    Raises:
        RecipeError: fidelity knows no top-1 that a `max_drop` could be about.
        CalibrationError: fidelity has nothing held out to look at.
    """
    from d4c_onnx.evaluation.fidelity import check_held_out

    unlabelled, promised = _dataset_name(recipe, bundle) == "fidelity", recipe.quantization
    about_top1 = {
        ("evaluation.max_drop", "evaluation.min_cosine"): recipe.evaluation.max_drop,
        ("quantization.max_drop", "quantization.target_cosine"): promised.max_drop,
    }
    for (key, other), asked in about_top1.items():
        if unlabelled and asked is not None:
            raise RecipeError(f"{key}: is about top-1, which needs labels. Add --dataset FILE.parquet, or use {other}.")
    if held_out is not None and (unlabelled or promised.target_cosine is not None):
        check_held_out(*held_out)


def fidelity_recipe(recipe: Recipe) -> Recipe:
    """The same recipe, measured on what the calibration set holds out, whatever labelled set there is."""
    return recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"dataset": "fidelity"})})


def held_out_counts(dataset: CalibrationSet) -> tuple[int, int]:
    """Images and prompts that a set keeps from calibration."""
    return len(dataset.held_out), len(dataset.held_out_texts)


def check_limits(accuracy: Accuracy, recipe: Recipe, report: Report) -> None:
    """Compare every bundle after the first with the recipe's limits.

    Args:
        report: what the caller would return; the error carries it.

    Raises:
        CheckFailed: a limit is passed.
    """
    drop, cosine = recipe.evaluation.max_drop, recipe.evaluation.min_cosine
    for row in accuracy.bundles:
        versus = row.versus_first
        if versus is None:  # the baseline
            continue
        if drop is not None and not versus.top1_lost <= drop:  # so that what is not a number fails, too
            raise CheckFailed(
                f"{row.bundle}: top-1 fell by {versus.top1_lost:.2f} points, allowed {drop} (evaluation.max_drop).",
                report,
            )
        found = (versus.cosine_image, versus.cosine_text)
        if cosine is not None and not all(value >= cosine for value in found):
            raise CheckFailed(
                f"{row.bundle}: cosine to FP32 is {min(found):.4f}, asked {cosine} (evaluation.min_cosine).", report
            )


def check_dataset_name(recipe: Recipe) -> None:
    """Bad input is refused before work starts: a data set that cannot be opened, say."""
    if recipe.evaluation.dataset not in ("auto", "fidelity"):
        from d4c_onnx.evaluation.datasets import open_dataset

        open_dataset(recipe.evaluation.dataset)
