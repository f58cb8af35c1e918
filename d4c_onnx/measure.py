"""What can be asked of finished bundles: accuracy, speed, and what is inside. None of it needs torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import BundleError, CalibrationError, CheckFailed, RecipeError
from d4c_onnx.files import write_text
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import Recipe

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet


@dataclass(frozen=True, slots=True)
class Machine:
    """Where things run.

    Attributes:
        provider: onnxruntime's.
        device: torch's.
        threads: 0 is each engine's own choice.
        rank, world_size, local_rank: of this process, where torch's launcher started several.
    """

    provider: str = "auto"
    device: str = "auto"
    threads: int = 0
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def evaluate_bundles(
    paths: Sequence[str | Path],
    recipe: Recipe,
    *,
    calibration: str | Path | None = None,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> dict[str, Any]:
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


def inspect_bundle(path: str | Path) -> dict[str, Any]:
    """What a bundle's files hold, and how onnxruntime's CPU provider runs them.

    Returns:
        `model`, `bits`, `minimum_onnxruntime`, `weight_bits_average` over both files, and `encoders`: per file `layers`
        (see `runtime.inspection.InspectedLayer`), `summary`, `weight_bits_average` and `io`.

    Raises:
        BundleError: the folder is not a bundle, or onnxruntime cannot load a file.
    """
    from d4c_onnx.graph.bits import average_bits
    from d4c_onnx.runtime.inspection import inspect_encoder

    bundle = open_bundle(path)
    found = {file.name: inspect_encoder(file, bundle.session_entries) for file in bundle.encoders.values()}
    return {
        "model": bundle.model_name,
        "bits": bundle.manifest.get("bits", "fp32"),
        "minimum_onnxruntime": bundle.manifest.get("minimum_onnxruntime"),
        "weight_bits_average": round(average_bits([row for entry in found.values() for row in entry.stored]), 4),
        "encoders": {name: entry.as_dict() for name, entry in found.items()},
    }


def report_calibration_set(
    folder: str | Path,
    *,
    against: Sequence[str | Path] = (),
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> Path:
    """Write `<set>.html` beside a calibration set in its bundle's folder: one self-contained page to look at.

    It shows the images with their prompts, the loss curves, and what reaches each layer of the FP32 image encoder under
    these images, under Gaussian noise and under other sets.

    Args:
        folder: the set, inside its bundle's folder.
        against: other calibration sets, real images for example.

    Returns:
        The page's path.

    Raises:
        CalibrationError: a folder is no calibration set, or its images have another size.
        BundleError: the set does not lie in a bundle, or the page cannot be written.
    """
    from d4c_onnx.calibration.controls import noise_images
    from d4c_onnx.calibration.dataset import open_calibration_set
    from d4c_onnx.evaluation.activations import layer_inputs
    from d4c_onnx.evaluation.page import calibration_page
    from d4c_onnx.runtime.preprocess import denormalize

    machine, folder = machine or Machine(), Path(folder)
    bundle, made = open_bundle(folder.parent), open_calibration_set(folder)
    sets = {"these images": made, **{Path(path).name: open_calibration_set(path) for path in against}}
    for other in sets.values():
        check_images_fit(other, bundle)
    images = {name: np.asarray(other.pixel_values) for name, other in sets.items()}
    images["Gaussian noise"] = noise_images("noise", made.pixel_values.shape, bundle.manifest["seed"])
    inputs = {
        name: layer_inputs(
            bundle.image_encoder, pixels, provider=machine.provider, threads=machine.threads, on_step=on_step
        )
        for name, pixels in images.items()
    }
    key = made.manifest["key"]
    facts = {
        "model": bundle.model_name,
        "method": key["synthesis"]["method"],
        "images": f"{len(made.pixel_values)}, and {len(made.held_out)} held out",
        "prompts for the text tower": str(len(made.texts)),
        "seed": str(key["seed"]),
        "key": key["id"],
    }
    page = calibration_page(
        f"{bundle.model_name}: calibration images",
        facts,
        denormalize(images["these images"], bundle.manifest["preprocess"]),
        [key["synthesis"]["template"].format(label) for label in made.labels],
        made.losses,
        inputs,
    )
    target = folder.with_name(f"{folder.name}.html")
    write_text(target, page)
    return target


def benchmark_bundles(
    paths: Sequence[str | Path],
    *,
    batches: Sequence[int] = (1, 8, 16, 32),
    sequence: int = 16,
    rounds: int = 15,
    peers: bool = False,
    picture: str | Path | None = None,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Time bundles side by side in one run, the first one being the baseline.

    Args:
        batches: batch sizes.
        sequence: token ids per text, where the text encoder takes any length.
        rounds: timed runs of each bundle at each batch size.
        peers: also build and time what onnxruntime's own tools make of the first bundle.
        picture: a .png or .svg file for the speed-ups; needs matplotlib.

    Returns:
        `machine` (cpu, threads (None: onnxruntime's choice), provider, onnxruntime), `rounds`, `towers` (see
        `evaluation.latency.measure_latency`), and `failed`: peers that could not be built or loaded, with the reason.

    Raises:
        BundleError: a folder is not a bundle, or onnxruntime cannot load a file.
    """
    from d4c_onnx.evaluation.latency import Contender, describe_machine, drawn_feeds, measure_latency
    from d4c_onnx.evaluation.peers import build_peers, loads
    from d4c_onnx.evaluation.picture import check_picture, draw_benchmark
    from d4c_onnx.runtime.session import resolve_provider

    machine = machine or Machine(provider="cpu")
    provider = resolve_provider(machine.provider)
    bundles = [open_bundle(path) for path in paths]
    for bundle in bundles[1:]:
        if _inputs(bundle) != _inputs(bundles[0]):
            raise BundleError(
                f"{bundle.path}: takes other input than {bundles[0].path} (image size, or length of texts). "
                "Time each by itself."
            )
    if picture is not None:
        check_picture(Path(picture))
    labels = [_label(bundle) for bundle in bundles]
    contenders = [
        Contender(
            label if labels.count(label) == 1 else f"{label} ({bundle.path})",
            bundle.encoders,
            bundle.session_entries,
        )
        for label, bundle in zip(labels, bundles, strict=True)
    ]
    feeds = drawn_feeds(bundles[0], batches, sequence)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            found: dict[str, dict[str, Path]] = {}
            name_of = {file: io["inputs"][0]["name"] for file, io in bundles[0].manifest["io"].items()}
            for tower, path in bundles[0].encoders.items():
                for name, made in build_peers(
                    path, Path(folder), name_of[path.name], feeds[tower][min(batches)]
                ).items():
                    reason = made if isinstance(made, str) else loads(made, provider)
                    if isinstance(made, Path) and not reason:
                        found.setdefault(name, {})[tower] = made
                    else:
                        failed.append({"name": name, "tower": tower, "reason": reason})
            contenders += [Contender(name, encoders) for name, encoders in found.items()]
        towers = measure_latency(
            contenders, feeds, rounds=rounds, provider=provider, threads=machine.threads, on_step=on_step
        )
    report = {
        "machine": describe_machine(provider, machine.threads),
        "rounds": rounds,
        "towers": towers,
        "failed": failed,
    }
    if picture is not None:
        draw_benchmark(report, Path(picture))
    return report


def _inputs(bundle: Bundle) -> tuple[Any, ...]:
    tokenizer = bundle.manifest["tokenizer"]
    return bundle.manifest["preprocess"]["size"], tokenizer["context_length"], tokenizer["dynamic_sequence"]


def _label(bundle: Bundle) -> str:
    return f"{bundle.model_name} {bundle.manifest.get('bits', 'fp32')}"


def evaluate(
    bundles: Sequence[Bundle],
    recipe: Recipe,
    calibration: CalibrationSet | None,
    machine: Machine,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Zero-shot accuracy where there are labels; fidelity on held-out synthetic input otherwise."""
    from d4c_onnx.evaluation.datasets import open_dataset
    from d4c_onnx.evaluation.fidelity import evaluate_fidelity
    from d4c_onnx.evaluation.zero_shot import evaluate_zero_shot
    from d4c_onnx.runtime.session import resolve_provider

    provider = resolve_provider(machine.provider)
    name = _dataset_name(recipe, bundles[0])
    if name != "fidelity":
        return evaluate_zero_shot(
            bundles,
            open_dataset(name),
            batch=recipe.evaluation.batch,
            provider=provider,
            threads=machine.threads,
            on_step=on_step,
        )
    if calibration is None:
        raise BundleError(
            f"{bundles[0].model_name}: has no labelled set. "
            "Add --dataset FILE.parquet, or --calibration DIR for fidelity."
        )
    return evaluate_fidelity(
        bundles, calibration, batch=16, provider=provider, threads=machine.threads, on_step=on_step
    )


def _dataset_name(recipe: Recipe, bundle: Bundle) -> str:
    """`fidelity`, an embedded set's name, or a file."""
    name = recipe.evaluation.dataset
    return str(bundle.manifest["model"].get("dataset") or "fidelity") if name == "auto" else name


def check_measurable(recipe: Recipe, bundle: Bundle, held_out: tuple[int, int] | None) -> None:
    """Refuse what the measuring at the end would stumble over.

    Args:
        held_out: images and prompts that the calibration set holds out, or will; None where there is no set.

    Raises:
        RecipeError: fidelity knows no top-1 that `evaluation.max_drop` could be about.
        CalibrationError: fidelity has nothing held out to look at.
    """
    from d4c_onnx.evaluation.fidelity import check_held_out

    if _dataset_name(recipe, bundle) != "fidelity":
        return
    if recipe.evaluation.max_drop is not None:
        raise RecipeError(
            "evaluation.max_drop: is about top-1, which needs labels. Add --dataset FILE.parquet, or use "
            "evaluation.min_cosine."
        )
    if held_out is not None:
        check_held_out(*held_out)


def held_out_counts(dataset: CalibrationSet) -> tuple[int, int]:
    """Images and prompts that a set keeps from calibration."""
    return len(dataset.held_out), len(dataset.held_out_texts)


def check_set_fits(dataset: CalibrationSet, bundle: Bundle) -> None:
    """Compare a set's model and the size of its images with what the encoder is and takes.

    Raises:
        CalibrationError: they differ.
    """
    check_images_fit(dataset, bundle)
    if dataset.manifest["key"]["weights_sha256"] != bundle.weights_sha256:
        raise CalibrationError(
            f"the calibration set belongs to other weights ({dataset.manifest.get('model')}) than {bundle.path}. "
            "Synthesise one from this model."
        )


def check_images_fit(dataset: CalibrationSet, bundle: Bundle) -> None:
    """Compare the size of a set's images with what the encoder takes.

    Raises:
        CalibrationError: they differ.
    """
    height, width = bundle.manifest["preprocess"]["size"]
    if tuple(dataset.pixel_values.shape[2:]) != (height, width):
        found = "x".join(str(size) for size in dataset.pixel_values.shape[2:])
        raise CalibrationError(f"the calibration images are {found}, {bundle.model_name} needs {height}x{width}.")


def check_limits(accuracy: dict[str, Any], recipe: Recipe, report: dict[str, Any]) -> None:
    """Compare every bundle after the first with the recipe's limits.

    Args:
        report: what the caller would return; the error carries it.

    Raises:
        CheckFailed: a limit is passed.
    """
    drop, cosine = recipe.evaluation.max_drop, recipe.evaluation.min_cosine
    for row in accuracy["bundles"][1:]:
        versus = row["versus_first"]
        lost = -versus.get("top1_difference", {}).get("points", 0.0)
        if drop is not None and not lost <= drop:  # so that what is not a number fails, too
            raise CheckFailed(
                f"{row['bundle']}: top-1 fell by {lost:.2f} points, allowed {drop} (evaluation.max_drop).", report
            )
        found = (versus["cosine_image"], versus["cosine_text"])
        if cosine is not None and not all(value >= cosine for value in found):
            raise CheckFailed(
                f"{row['bundle']}: cosine to FP32 is {min(found):.4f}, asked {cosine} (evaluation.min_cosine).", report
            )


def check_dataset_name(recipe: Recipe) -> None:
    """Bad input is refused before work starts: a data set that cannot be opened, say."""
    if recipe.evaluation.dataset not in ("auto", "fidelity"):
        from d4c_onnx.evaluation.datasets import open_dataset

        open_dataset(recipe.evaluation.dataset)
