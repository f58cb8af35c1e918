"""Both encoders of an FP32 bundle, quantised into a bundle of the same form."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.bundle import (
    IMAGE_ENCODER,
    TEXT_ENCODER,
    TOKENIZER,
    Bundle,
    file_size_bytes,
)
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.calibration.readers import D4CCalibrationDataReader, PromptCalibrationDataReader, first_batches
from d4c_onnx.errors import CheckFailed
from d4c_onnx.files import staged_folder
from d4c_onnx.graph.bits import average_bits
from d4c_onnx.graph.files import load_graph
from d4c_onnx.graph.signature import signature
from d4c_onnx.manifest import Manifest, Quantization, Session
from d4c_onnx.manifest_file import EXACT_PRODUCTS, write_manifest
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.budget import measure_costs, spend
from d4c_onnx.quantization.deployment import target_of
from d4c_onnx.quantization.encoder import quantize_encoder
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.recipe import QuantizationSection
from d4c_onnx.runtime.golden import read_golden, write_golden
from d4c_onnx.runtime.optimizer import OptimizerEffect, optimizer_effect
from d4c_onnx.runtime.session import EncoderSession

# Eight images once looked like an optimiser that took a quarter of the error away (mini-rn, w6a6); thirty-two do not.
_OPTIMIZER_SAMPLES = 32
_BATCH = 8
# All activations of a batch are looked at: of 8 images they take 1.4 GB in a ViT-L/14, several times that on their way.
_LARGE_BYTES, _LARGE_BATCH = 2**30, 2
# Max abs difference of an embedding between machines: other int8 kernels, other float16 ones.
GOLDEN_TOLERANCE, FP16_GOLDEN_TOLERANCE = 0.05, 0.01


def quantize_bundle_files(
    bundle: Bundle,
    dataset: CalibrationSet,
    target: Path,
    section: QuantizationSection,
    *,
    recipe_dump: dict[str, Any],
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> Bundle:
    """Quantise both encoders and write the quantised bundle; or leave nothing behind.

    Args:
        bundle: in FP32.
        dataset: calibration images and prompts of the bundle's model.
        target: the quantised bundle's folder.
        section: widths, rounding, ranges.
        recipe_dump: the whole resolved recipe, for the manifest.

    Raises:
        GraphError: an encoder cannot be quantised.
        BundleError: the folder cannot be written.
        CheckFailed: onnxruntime's optimiser changes the answers beyond the rounding of quantised activations.
        RecipeError: keys contradict the target; the bit budget is smaller than what the first and last layers take.
    """
    readers = calibration_readers(bundle, dataset, section)
    form = target_of(section)
    raised = _spend_budget(bundle, readers, section, provider=provider, threads=threads, on_step=on_step)
    with staged_folder(target) as stage:
        reports = {
            name: quantize_encoder(
                bundle.path / name,
                stage / name,
                reader,
                section,
                raised=raised.get(name, frozenset()),
                provider=provider,
                threads=threads,
                on_step=on_step,
            )
            for name, reader in readers.items()
        }
        # full-range weights saturate on x86 without VNNI: their sessions need a setting, and the manifest says so
        session = Session(config_entries={} if form.reduce_range or section.weights_only else EXACT_PRODUCTS)
        effects = check_optimizer(bundle, stage, readers, session, threads=threads, on_step=on_step)
        layers = [layer for report in reports.values() for layer in report.layers]
        made = Quantization(
            bits=section.bits.lower(),
            target=section.target,
            target_note=form.note,
            recipe=recipe_dump,
            minimum_onnxruntime=max(report.minimum_onnxruntime for report in reports.values()),
            accuracy_mode_only=section.activation_bits < 8 or section.weight_bits == 6,
            source_files=source_files(bundle),
            session=session,
            optimizer_effect={name: effect.record() for name, effect in effects.items()},
            weight_bits_average=round(average_bits(layers), 4),
            encoders={name: report.record() for name, report in reports.items()},
            calibration=dataset.manifest["key"]["id"],
            calibration_seed=dataset.manifest["key"]["seed"],
        )
        tolerance = FP16_GOLDEN_TOLERANCE if section.weights_only else GOLDEN_TOLERANCE
        written = finish_bundle(bundle, stage, made, seed=recipe_dump["seed"], tolerance=tolerance)
    return Bundle(target, written)


def images_at_a_time(encoder: Path) -> int:
    """How many images a calibration batch of an encoder holds, so that their activations fit in memory."""
    return _LARGE_BATCH if file_size_bytes(encoder) > _LARGE_BYTES else _BATCH


def finish_bundle(bundle: Bundle, stage: Path, made: Quantization, *, seed: int, tolerance: float) -> Manifest:
    """Put beside two written encoders what every bundle made from an FP32 one has: tokenizer, golden vectors, manifest.

    Args:
        bundle: in FP32.
        stage: the folder that holds the encoders.
        made: how they were made.
        seed: of the recipe.
        tolerance: max abs difference of an embedding between machines.
    """
    if bundle.tokenizer.exists():
        shutil.copyfile(bundle.tokenizer, stage / TOKENIZER)
    source = bundle.manifest
    files = (stage / IMAGE_ENCODER, stage / TEXT_ENCODER)
    ids = np.array([read_golden(bundle.path).input_ids], np.int64)
    write_golden(stage, *files, source.preprocess, ids, tolerance, made.session.config_entries)
    manifest = Manifest(
        model=source.model,
        preprocess=source.preprocess,
        tokenizer=source.tokenizer,
        io={file.name: signature(load_graph(file)) for file in files},
        seed=seed,
        quantization=made,
    )
    return write_manifest(stage, manifest)


def source_files(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of the encoders of an FP32 bundle: which one another bundle was made from."""
    return {name: bundle.manifest.files[name].sha256 for name in (IMAGE_ENCODER, TEXT_ENCODER)}


def check_optimizer(
    bundle: Bundle,
    stage: Path,
    readers: Mapping[str, CalibrationDataReader],
    session: Session,
    *,
    threads: int = 0,
    on_step: OnStep = silent,
) -> dict[str, OptimizerEffect]:
    """See that onnxruntime's graph optimiser keeps the answers of two written encoders.

    Args:
        bundle: in FP32.
        stage: the folder that holds the encoders.
        readers: per encoder file, of calibration data.
        session: what the files are served with.
        threads, on_step: as elsewhere.

    Returns:
        The optimiser's effect by file.

    Raises:
        CheckFailed: it changes the answers beyond the rounding of quantised activations.
    """
    effects: dict[str, OptimizerEffect] = {}
    for name, reader in readers.items():
        on_step("check", len(effects), len(readers), {})
        batches = unseen_images(first_batches(reader, _OPTIMIZER_SAMPLES))
        effect = effects[name] = optimizer_effect(
            stage / name, bundle.path / name, batches, threads, session.config_entries
        )
        if not effect.harmless:
            raise CheckFailed(
                f"{name}: onnxruntime's graph optimiser changes the answers: with it they are {effect.ratio:.2f} times "
                f"as far from FP32 as without ({effect.literal:.2e} rms). Nothing was written; please report the model."
            )
    on_step("check", len(effects), len(readers), {})
    return effects


def calibration_readers(
    bundle: Bundle, dataset: CalibrationSet, section: QuantizationSection
) -> dict[str, CalibrationDataReader]:
    """Per encoder file its calibration data, in batches that fit in memory."""
    fixed = EncoderSession(bundle.text_encoder).fixed_length
    return {
        IMAGE_ENCODER: D4CCalibrationDataReader(dataset, section.batch or images_at_a_time(bundle.image_encoder)),
        TEXT_ENCODER: PromptCalibrationDataReader(dataset, section.batch or _BATCH, fixed_length=fixed),
    }


def unseen_images(batches: list[np.ndarray]) -> list[np.ndarray]:
    """Images that the rounding was not fitted to: mirrored, and where they are few, shifted several times, too.

    On few images that it was fitted to, it undoes the very steps that activations were rounded by; every other rounding
    of them, such as that of fused kernels, then looks like a change. And on eight images, chance alone can move one of
    the two differences by a quarter.
    """
    if not batches or batches[0].ndim != 4:  # token ids
        return batches
    rounds = -(-_OPTIMIZER_SAMPLES // sum(len(batch) for batch in batches))
    shifts = [number * batches[0].shape[-1] // rounds for number in range(rounds)]
    return [np.roll(batch[..., ::-1], shift, axis=-1) for shift in shifts for batch in batches]


def _spend_budget(
    bundle: Bundle,
    readers: Mapping[str, CalibrationDataReader],
    section: QuantizationSection,
    *,
    provider: str,
    threads: int,
    on_step: OnStep,
) -> Mapping[str, frozenset[str]]:
    """Per encoder file the nodes that `average_bits` raises to 8 bits: one budget for both encoders."""
    if section.average_bits is None:
        return {}
    costs = []
    for name, reader in readers.items():
        model = load_graph(bundle.path / name)
        plan = make_plan(model.graph, section)
        costs += measure_costs(name, model, plan, reader, provider=provider, threads=threads, on_step=on_step)
    return spend(costs, section.average_bits)
