"""What a command starts from: an FP32 bundle, exported first where there is none, and the torch model behind it."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle, is_bundle, open_bundle
from d4c_onnx.errors import BundleError, ModelError, RecipeError
from d4c_onnx.files import claimed, refuse_existing
from d4c_onnx.manifest import ModelInfo
from d4c_onnx.models.model_options import ModelOptions, is_local
from d4c_onnx.pipeline.exporting import bundle_folder, export_loaded, load
from d4c_onnx.progress import OnStep
from d4c_onnx.recipe import Recipe
from d4c_onnx.untrusted_json import quoted
from d4c_onnx.vocabulary import generic_nouns

if TYPE_CHECKING:
    from d4c_onnx.models.load import LoadedModel

_WHOLE = ("embedded", "hub", "folder")  # models that are named without --pretrained
_ASK_NO_MODEL = ("leaves", "noise", "pink", "real")


@dataclass(slots=True)
class LazyModel:
    """The torch model of a bundle, which is loaded when images have to be synthesised from it.

    Attributes:
        bundle: in FP32.
        pretrained: as the user gave it.
        loaded: the model, once it is in memory.
        asked: the model as the user named it; the bundle's path says nothing.
        options: as the user gave them.
    """

    bundle: Bundle
    pretrained: str | None
    loaded: LoadedModel | None = None
    asked: str | None = None
    options: ModelOptions | None = None

    def load(self, on_step: OnStep) -> LoadedModel:
        """The model, compared with the bundle by the SHA-256 of its weights.

        Raises:
            ModelError: it cannot be loaded, or is another one.
        """
        if self.loaded is None:
            model = self.bundle.manifest.model
            known = model.pretrained
            if self.bundle.imported:
                raise ModelError(
                    f"{self.bundle.path}: was imported from ONNX files, so there are no torch weights. Use images "
                    "that ask no model: --set synthesis.method=leaves."
                )
            if Path(known).suffix and not self.pretrained:
                raise ModelError(
                    f"{self.bundle.path}: synthesis needs the weights again. Add --pretrained PATH/{known}."
                )
            if known == "folder" and self.asked is None:
                raise ModelError(
                    f"{self.bundle.path}: synthesis needs the weights again. Name the folder of {model.name} that they "
                    "came from in place of the bundle."
                )
            name = self.asked if known == "folder" and self.asked else model.name
            if self.asked is None and not re.fullmatch(r"[\w.-]+", name):
                raise ModelError(
                    f"{self.bundle.path}: its manifest says that the weights are {quoted(name)}, and what a manifest "
                    "names is not fetched or opened unasked. If you trust it, name the model itself in place of the "
                    f"bundle, with --output {self.bundle.path.parent}."
                )
            pretrained = None if known in _WHOLE else self.pretrained or known
            loaded = load(name, pretrained, self.bundle.manifest.seed, on_step, self._options())
            # synthesis looks through the very preprocessing that the bundle serves
            self.loaded = replace(loaded, preprocess=self.bundle.manifest.preprocess)
            if self.loaded.weights_sha256 != self.bundle.weights_sha256:
                raise ModelError(self._other_weights())
        return self.loaded

    def own_nouns(self) -> tuple[str, ...]:
        """The vocabulary of an embedded model; the generic one of any other."""
        from d4c_onnx.models.catalogue import embedded_models

        shipped = embedded_models().get(self.bundle.model_name)
        return shipped.nouns if shipped else generic_nouns()

    def _options(self) -> ModelOptions | None:
        """What the manifest says of the weights, so that nobody is asked twice."""
        model, preprocess = self.bundle.manifest.model, self.bundle.manifest.preprocess
        if model.pretrained == "embedded" or (model.pretrained == "random" and self._is_embedded()):
            return None
        given = self.options or ModelOptions()
        # a model of the hub says it itself, and an older manifest says false of all of them
        decided = model.pretrained != "hub" or model.sources.get("quick_gelu", "").startswith("--")
        return ModelOptions(
            mean=preprocess.mean,
            std=preprocess.std,
            interpolation=preprocess.interpolation,
            resize_mode=preprocess.resize_mode,
            image_size=preprocess.size,
            quick_gelu=model.quick_gelu if decided else None,
            config=given.config,
            tokenizer=given.tokenizer,
        )

    def _is_embedded(self) -> bool:
        """Whether the model ships, and its preprocessing with it."""
        from d4c_onnx.models.catalogue import embedded_models

        return self.bundle.model_name in embedded_models()

    def _other_weights(self) -> str:
        model = self.bundle.manifest.model
        return other_weights(self.bundle.path, model, self.asked or model.name, self.pretrained, self.options)


def other_weights(
    path: Path, known: ModelInfo, source: str, pretrained: str | None, options: ModelOptions | None
) -> str:
    """What to say of a bundle that holds other weights than were asked for: the one command that helps."""
    words = ["d4c-onnx", "export", source, *(["--pretrained", pretrained] if pretrained else [])]
    words += [*(options.words() if options else []), "--output", str(path.parent), "--overwrite"]
    asked = f"those of {pretrained or source}"
    return (
        f"{path}: was exported from other weights ({known.pretrained}, {known.weights_sha256[:12]}) than {asked}. To "
        f"replace it, and all inside it: {shlex.join(words)}"
    )


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
