"""The whole story: export -> synthesis -> quantisation -> evaluation. Every command is one call of this module.

torch is imported inside the steps that need it: quantising a bundle with a calibration set at hand needs none.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d4c_onnx.bundle import (
    Bundle,
    encoder_size_bytes,
    is_bundle,
    open_bundle,
    write_manifest,
)
from d4c_onnx.errors import BundleError, CheckFailed, ModelError
from d4c_onnx.files import refuse_existing
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import generic_nouns, read_nouns

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Machine:
    """Where things run: onnxruntime's provider, torch's device, threads (0: each engine's own choice)."""

    provider: str = "auto"
    device: str = "auto"
    threads: int = 0


def bundle_folder(output: Path, model: str) -> Path:
    """`<output>/<model>`, with what a folder name cannot hold replaced."""
    return output / model.replace("hf-hub:", "").replace("/", "--")


def export_bundle(
    model: str,
    output: Path,
    recipe: Recipe,
    *,
    pretrained: str | None = None,
    raw: bool = False,
    overwrite: bool = False,
    machine: Machine | None = None,
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
    return _export(_load(model, pretrained, recipe.seed), target, recipe, raw)


def synthesize_calibration_set(
    source: str,
    recipe: Recipe,
    *,
    output: Path,
    pretrained: str | None = None,
    prompts: Path | None = None,
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
    machine = machine or Machine()
    nouns = read_nouns(prompts) if prompts else None
    folder = Path(source) if is_bundle(Path(source)) else bundle_folder(output, source)
    _use_threads(machine)
    _, origin = _source_bundle(source, folder, recipe, pretrained)
    return _calibration_set(origin, folder, recipe, nouns, machine, on_step)


def quantize_bundle(
    source: str,
    recipe: Recipe,
    *,
    output: Path,
    pretrained: str | None = None,
    prompts: Path | None = None,
    calibration: Path | None = None,
    overwrite: bool = False,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Quantise both encoders of a model or bundle, and measure the written files against FP32.

    Exports first when the model has no bundle yet, synthesises when there is no calibration set of the recipe's key.
    The result goes to `<bundle>/<bits>/`.

    Args:
        source: a model's name, or an FP32 bundle's path.
        calibration: a set's folder; none is then synthesised and torch is not needed for a bundle.

    Returns:
        The report: model, bits, bundle, weight_bits_average, size_bytes, size_ratio, accuracy, top1, seconds.

    Raises:
        CheckFailed: top-1 or cosine fell by more than the recipe allows (the files are written all the same).
    """
    from d4c_onnx.calibration.dataset import open_calibration_set
    from d4c_onnx.quantization import quantize_bundle_files
    from d4c_onnx.runtime.session import resolve_provider

    machine = machine or Machine()
    nouns = read_nouns(prompts) if prompts else None
    folder = Path(source) if is_bundle(Path(source)) else bundle_folder(output, source)
    target = folder / recipe.quantization.bits.lower()
    refuse_existing(target, overwrite)
    _check_dataset_name(recipe)
    dataset = open_calibration_set(calibration) if calibration else None
    if dataset is None:
        _use_threads(machine)
    clock = _Clock()
    bundle, origin = _source_bundle(source, folder, recipe, pretrained)
    clock.lap("export")
    if dataset is None:
        _, dataset = _calibration_set(origin, folder, recipe, nouns, machine, on_step)
    _check_belongs(dataset, bundle)
    clock.lap("synthesize")
    quantized = quantize_bundle_files(
        bundle,
        dataset,
        target,
        recipe.quantization,
        recipe_dump=recipe.model_dump(mode="json"),
        provider=resolve_provider(machine.provider),
        threads=machine.threads,
        on_step=on_step,
    )
    clock.lap("quantize")
    accuracy = evaluate([bundle, quantized], recipe, dataset, machine, on_step)
    clock.lap("evaluate")
    content = {key: value for key, value in quantized.manifest.items() if key not in ("format", "files", "versions")}
    content["accuracy"] = _relative(accuracy, folder)
    quantized = write_manifest(quantized.path, content)
    report = _report(bundle, quantized, recipe, accuracy, clock.seconds)
    check_limits(accuracy, recipe)
    return report


def evaluate_bundles(
    paths: Sequence[Path],
    recipe: Recipe,
    *,
    calibration: Path | None = None,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Measure bundles side by side, the first one being the baseline.

    Args:
        calibration: the set whose held-out part label-free fidelity uses.
    """
    from d4c_onnx.calibration.dataset import open_calibration_set

    _check_dataset_name(recipe)
    bundles = [open_bundle(path) for path in paths]
    dataset = open_calibration_set(calibration) if calibration else None
    result = evaluate(bundles, recipe, dataset, machine or Machine(), on_step)
    check_limits(result, recipe)
    return result


def inspect_bundle(path: Path) -> dict[str, Any]:
    """What a bundle's files hold, and how onnxruntime's CPU provider runs them.

    Returns:
        `model`, `bits`, `minimum_onnxruntime`, `weight_bits_average` over both files, and `encoders`: per file `layers`
        (see `runtime.inspection.InspectedLayer`), `summary`, `weight_bits_average` and `io`.

    Raises:
        BundleError: the folder is not a bundle, or onnxruntime cannot load a file.
    """
    from d4c_onnx.graph.bits import average_bits, layer_bits
    from d4c_onnx.graph.files import load_graph
    from d4c_onnx.graph.signature import signature
    from d4c_onnx.runtime.inspection import inspect_encoder

    bundle = open_bundle(path)
    graphs = {file.name: load_graph(file) for file in bundle.encoders.values()}
    io = signature(graphs)
    return {
        "model": bundle.model_name,
        "bits": bundle.manifest.get("bits", "fp32"),
        "minimum_onnxruntime": bundle.manifest.get("minimum_onnxruntime"),
        "weight_bits_average": round(average_bits([bit for graph in graphs.values() for bit in layer_bits(graph)]), 4),
        "encoders": {name: {**inspect_encoder(path / name).as_dict(), "io": io[name]} for name in graphs},
    }


def benchmark_bundles(
    paths: Sequence[Path],
    *,
    batches: Sequence[int] = (1, 8, 16, 32),
    sequence: int = 16,
    rounds: int = 15,
    peers: bool = False,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Time bundles side by side in one run, the first one being the baseline.

    Args:
        batches: batch sizes.
        sequence: token ids per text, where the text encoder takes any length.
        rounds: timed runs of each bundle at each batch size.
        peers: also build and time what onnxruntime's own tools make of the first bundle.

    Returns:
        `machine` (cpu, threads, provider, onnxruntime), `rounds`, `towers` (see `evaluation.latency.measure_latency`),
        and `failed`: peers that could not be built or loaded, with the reason.

    Raises:
        BundleError: a folder is not a bundle, or onnxruntime cannot load a file.
    """
    from d4c_onnx.evaluation.latency import Contender, describe_machine, drawn_feeds, measure_latency
    from d4c_onnx.evaluation.peers import build_peers, loads
    from d4c_onnx.runtime.session import resolve_provider

    machine = machine or Machine(provider="cpu")
    provider = resolve_provider(machine.provider)
    bundles = [open_bundle(path) for path in paths]
    contenders = [Contender(_label(bundle), bundle.encoders) for bundle in bundles]
    feeds = drawn_feeds(bundles[0], batches, sequence)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        if peers:
            found: dict[str, dict[str, Path]] = {}
            for tower, path in bundles[0].encoders.items():
                for name, made in build_peers(path, Path(folder), feeds[tower][min(batches)]).items():
                    reason = made if isinstance(made, str) else loads(made, provider)
                    if isinstance(made, Path) and not reason:
                        found.setdefault(name, {})[tower] = made
                    else:
                        failed.append({"name": name, "tower": tower, "reason": reason})
            contenders += [Contender(name, encoders) for name, encoders in found.items()]
        towers = measure_latency(
            contenders, feeds, rounds=rounds, provider=provider, threads=machine.threads, on_step=on_step
        )
    return {
        "machine": describe_machine(provider, machine.threads),
        "rounds": rounds,
        "towers": towers,
        "failed": failed,
    }


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
    name = recipe.evaluation.dataset
    if name == "auto":
        name = bundles[0].manifest["model"].get("dataset") or "fidelity"
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


def check_limits(accuracy: dict[str, Any], recipe: Recipe) -> None:
    """Compare every bundle after the first with the recipe's limits.

    Raises:
        CheckFailed: a limit is passed.
    """
    drop, cosine = recipe.evaluation.max_drop, recipe.evaluation.min_cosine
    for row in accuracy["bundles"][1:]:
        versus = row["versus_first"]
        lost = -versus.get("top1_difference", {}).get("points", 0.0)
        if drop is not None and lost > drop:
            raise CheckFailed(
                f"{row['bundle']}: top-1 fell by {lost:.2f} points, allowed {drop} (evaluation.max_drop)."
            )
        least = min(versus["cosine_image"], versus["cosine_text"])
        if cosine is not None and least < cosine:
            raise CheckFailed(
                f"{row['bundle']}: cosine to FP32 is {least:.4f}, asked {cosine} (evaluation.min_cosine)."
            )


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
        return str(self.bundle.manifest["model"]["weights_sha256"])

    @property
    def name(self) -> str:
        if self.loaded is not None:
            return self.loaded.name
        assert self.bundle is not None
        return self.bundle.model_name

    def load(self) -> LoadedModel:
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
            )
            if self.loaded.weights_sha256 != model["weights_sha256"]:
                raise ModelError(
                    f"{self.bundle.path}: was exported from other weights. Export it again with --overwrite."
                )
        return self.loaded


def _source_bundle(source: str, folder: Path, recipe: Recipe, pretrained: str | None) -> tuple[Bundle, _Origin]:
    if is_bundle(folder):
        bundle = _float_bundle(folder, pretrained)
        return bundle, _Origin(pretrained, bundle)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BundleError(f"{folder}: exists, but is not a bundle. Move it away, or choose another --output.")
    loaded = _load(source, pretrained, recipe.seed)
    return _export(loaded, folder, recipe, raw=False), _Origin(pretrained, loaded=loaded)


def _float_bundle(path: Path, pretrained: str | None) -> Bundle:
    bundle = open_bundle(path)
    if bundle.quantized:
        raise BundleError(f"{path}: is quantised already. Name the FP32 bundle ({path.parent}).")
    known = bundle.manifest["model"]["pretrained"]
    asked = pretrained and (Path(pretrained).name if Path(pretrained).suffix else pretrained)
    if asked and asked != known:
        raise BundleError(f"{path}: holds {known} weights, not {asked}. Choose another --output.")
    return bundle


def _load(model: str, pretrained: str | None, seed: int) -> LoadedModel:
    from d4c_onnx.models.load import load_model

    return load_model(model, pretrained, seed)


def _export(loaded: LoadedModel, target: Path, recipe: Recipe, raw: bool) -> Bundle:
    from d4c_onnx.export import export_fp32

    return export_fp32(loaded, target, seed=recipe.seed, raw=raw)


def _calibration_set(
    origin: _Origin,
    folder: Path,
    recipe: Recipe,
    nouns: tuple[str, ...] | None,
    machine: Machine,
    on_step: OnStep,
) -> tuple[Path, CalibrationSet]:
    from d4c_onnx.calibration.dataset import open_calibration_set
    from d4c_onnx.calibration.key import calibration_key
    from d4c_onnx.models.catalogue import embedded_models

    shipped = embedded_models().get(origin.name)
    nouns = nouns or (shipped.nouns if shipped else generic_nouns())
    key = calibration_key(origin.weights_sha256, recipe.synthesis, recipe.text, nouns, recipe.seed)
    target = folder / f"calibration-{key['id']}"
    if target.exists():
        return target, open_calibration_set(target)
    from d4c_onnx.synthesis import synthesize

    made = synthesize(
        origin.load(),
        target,
        recipe.synthesis,
        recipe.text,
        nouns,
        seed=recipe.seed,
        device=machine.device,
        on_step=on_step,
    )
    return target, made


def _check_belongs(dataset: CalibrationSet, bundle: Bundle) -> None:
    from d4c_onnx.errors import CalibrationError

    height, width = bundle.manifest["preprocess"]["size"]
    if tuple(dataset.pixel_values.shape[2:]) != (height, width):
        found = "x".join(str(size) for size in dataset.pixel_values.shape[2:])
        raise CalibrationError(f"the calibration images are {found}, {bundle.model_name} needs {height}x{width}.")


def _check_dataset_name(recipe: Recipe) -> None:
    """Bad input is refused before work starts: a data set that cannot be opened, say."""
    if recipe.evaluation.dataset not in ("auto", "fidelity"):
        from d4c_onnx.evaluation.datasets import open_dataset

        open_dataset(recipe.evaluation.dataset)


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
