"""The torch model behind an FP32 bundle, loaded when images have to be made from it, and compared with the bundle."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import ModelInfo
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.exporting import load
from d4c_onnx.progress import OnStep
from d4c_onnx.untrusted_json import quoted
from d4c_onnx.vocabulary import generic_nouns

if TYPE_CHECKING:
    from d4c_onnx.models.load import LoadedModel

_WHOLE = ("embedded", "hub", "folder")  # models that are named without --pretrained


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
