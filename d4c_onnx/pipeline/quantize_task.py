"""What a quantisation has to do: decided, and refused where it cannot end well, before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle, is_bundle, open_bundle
from d4c_onnx.errors import RecipeError
from d4c_onnx.files import refuse_existing
from d4c_onnx.measure.accuracy import check_dataset_name
from d4c_onnx.measure.machine import Machine
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.source import source_folder, without_model
from d4c_onnx.progress import OnAhead, OnStep
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import OwnWords, read_words, texts_sha256

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet


@dataclass(frozen=True, slots=True)
class QuantizeTask:
    """A quantisation that was asked for, and what of it is there already.

    Attributes:
        source, pretrained, options, recipe, overwrite, machine, on_step, on_ahead: as asked.
        folder: of the FP32 bundle, which may have to be exported.
        words: the user's vocabulary and texts.
        given: the user's calibration set; None: the one of the recipe's key.
        resumed: this very bundle, which an interrupted run wrote and did not come to measure.
        wants_fp16: whether an FP16 bundle goes beside.
        fp16: the one that another width left.
    """

    source: str
    pretrained: str | None
    options: ModelOptions | None
    recipe: Recipe
    overwrite: bool
    machine: Machine
    on_step: OnStep
    folder: Path
    words: OwnWords
    given: CalibrationSet | None
    resumed: Bundle | None
    wants_fp16: bool
    fp16: Bundle | None
    on_ahead: OnAhead | None = None

    @property
    def output_path(self) -> Path:
        """Where the quantised bundle goes."""
        return quantized_folder(self.folder, self.recipe)

    @property
    def fp16_path(self) -> Path:
        """Where an FP16 bundle goes."""
        return fp16_folder(self.folder)


def quantized_folder(folder: Path, recipe: Recipe) -> Path:
    """Beside the FP32 encoders, by width."""
    return folder / recipe.quantization.bits.lower()


def fp16_folder(folder: Path) -> Path:
    """Beside the FP32 encoders."""
    return folder / "fp16"


def decide(
    source: str,
    recipe: Recipe,
    *,
    output: str | Path,
    pretrained: str | None,
    options: ModelOptions | None,
    prompts: str | Path | None,
    texts: str | Path | None,
    calibration: str | Path | None,
    overwrite: bool,
    machine: Machine,
    on_step: OnStep,
    on_ahead: OnAhead | None = None,
) -> QuantizeTask:
    """See what is there, and refuse what is in the way.

    Raises:
        BundleError: the folder of the result, or of the FP16 bundle, holds something else.
        RecipeError: keys contradict the target, or the given set was made for other nouns or texts.
        CalibrationError, DatasetError: what was given cannot be opened.
    """
    from d4c_onnx.quantization import target_of

    words = read_words(prompts, texts)
    folder = source_folder(source, output)
    recipe = without_model(folder, recipe) if calibration is None else recipe
    wants_fp16 = target_of(recipe.quantization).float16
    resumed = None if overwrite else _unmeasured_bundle(folder, recipe, whole=calibration is None)
    if resumed is None:
        refuse_existing(quantized_folder(folder, recipe), overwrite)
    fp16 = _reusable_fp16(folder, recipe) if wants_fp16 and not overwrite else None
    if wants_fp16 and fp16 is None:
        refuse_existing(fp16_folder(folder), overwrite)
    check_dataset_name(recipe)
    given = _given_set(calibration, prompts, texts, words) if calibration else None
    asked = (source, pretrained, options, recipe, overwrite, machine, on_step)
    return QuantizeTask(*asked, folder, words, given, resumed, wants_fp16, fp16, on_ahead)


def _given_set(
    calibration: str | Path, prompts: str | Path | None, texts: str | Path | None, words: OwnWords
) -> CalibrationSet:
    from d4c_onnx.calibration.dataset import open_calibration_set

    given = open_calibration_set(calibration)
    key = given.manifest.key
    if words.nouns is not None and key.nouns != words.nouns:
        raise RecipeError(f"--prompts {prompts}: {calibration} was made for other nouns. Leave one of the two out.")
    if words.texts is not None and key.texts_sha256 != texts_sha256(words.texts):
        raise RecipeError(f"--texts {texts}: {calibration} was made for other texts. Leave one of the two out.")
    return given


def _reusable_fp16(folder: Path, recipe: Recipe) -> Bundle | None:
    """What another width left; None where nothing is there, or something else."""
    from d4c_onnx.quantization import find_fp16_bundle

    if not is_bundle(folder):
        return None
    return find_fp16_bundle(open_bundle(folder, verify=False), fp16_folder(folder), recipe.quantization)


def _unmeasured_bundle(folder: Path, recipe: Recipe, whole: bool) -> Bundle | None:
    """What an interrupted run of this very quantisation wrote and did not come to measure.

    Args:
        whole: compare how images and texts are made, too; not where a given set says that.
    """
    output_path = quantized_folder(folder, recipe)
    if not is_bundle(output_path):
        return None
    bundle = open_bundle(output_path)
    made = bundle.manifest.quantization
    if made is None or made.accuracy is not None:
        return None
    own, known = (_without_source(dump) for dump in (recipe.model_dump(mode="json"), made.recipe))
    compared = own.keys() - {"evaluation"} - (set() if whole else {"synthesis", "text"})
    return bundle if all(known.get(config) == own[config] for config in compared) else None


def _without_source(recipe: Mapping[str, object]) -> dict[str, object]:
    """Without what images were read from: a path in a recipe, a SHA-256 in a manifest, and part of the set's id."""
    synthesis = recipe.get("synthesis")
    return {**recipe, "synthesis": {**synthesis, "source": None} if isinstance(synthesis, dict) else synthesis}
