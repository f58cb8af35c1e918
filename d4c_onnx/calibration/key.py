"""What was asked of a calibration set, as one key: sets of equal keys stand in for each other.

Device, resolved precision and versions decide the last bits; they are in the set's manifest, and no part of the key.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from d4c_onnx.calibration.method import METHODS, Method
from d4c_onnx.recipe import PromptConfig, SynthesisConfig
from d4c_onnx.vocabulary import texts_sha256

# Raise it when the same ask makes other images or texts, such as when the optimisation itself changes: sets and
# half-done work of an earlier release are then not taken for this one's. A method's constants are in the key anyway.
_GENERATOR = 3

# Recipe keys that went, at what they were by default: what was made then is found again. Empty it with the next number.
_GONE = {"coarse": 0.0}
# Constants of a method that came, at what they were before there was a choice. Empty it, too.
_CAME = {"patches": 0}


@dataclass(frozen=True, slots=True)
class CalibrationKey:
    """Everything that was asked of a set.

    Attributes:
        generator: which code makes images and texts of it.
        weights_sha256: of the model.
        seed: of every draw.
        synthesis, text: the recipe's sections; `source` is the SHA-256 of what was read.
        method: its constants; none: a control, which asks no model.
        nouns: the vocabulary.
        texts_sha256: of the user's own texts; none: nouns in templates.
        id: a digest of all that, which names the set's folder.
    """

    generator: int
    weights_sha256: str
    seed: int
    synthesis: Mapping[str, object]
    method: Mapping[str, object] | None
    text: Mapping[str, object]
    nouns: tuple[str, ...]
    texts_sha256: str | None = None
    id: str = ""

    @property
    def method_name(self) -> str:
        """`synthesis.method`."""
        return str(self.synthesis["method"])

    @property
    def template(self) -> str:
        """`synthesis.template`, with one `{}`."""
        return str(self.synthesis["template"])

    def record(self) -> dict[str, object]:
        """As JSON holds it."""
        told = {"id": self.id, **asdict(self), "nouns": list(self.nouns)}
        return {name: value for name, value in told.items() if name != "texts_sha256" or value is not None}


def calibration_key(
    weights_sha256: str,
    config: SynthesisConfig,
    text: PromptConfig,
    nouns: tuple[str, ...],
    seed: int,
    source_sha256: str | None = None,
    method: Method | None = None,
    texts: tuple[str, ...] | None = None,
) -> CalibrationKey:
    """Everything that was asked for.

    Args:
        source_sha256: stands in for `config.source`: a key holds what was read, not where it lay.
        method: instead of the one that `config.method` names.
        texts: the user's own, in place of nouns in templates; a key holds their SHA-256.
    """
    method = method or METHODS.get(config.method)
    key = CalibrationKey(
        generator=_GENERATOR,
        weights_sha256=weights_sha256,
        seed=seed,
        synthesis={**config.model_dump(mode="json"), "source": source_sha256},
        method=asdict(method) if method else None,
        text=text.model_dump(mode="json"),
        nouns=nouns,
        texts_sha256=None if texts is None else texts_sha256(texts),
    )
    constants = key.method and dict(key.method.items() - _CAME.items())
    named = {**key.record(), "synthesis": {**key.synthesis, **_GONE}, "method": constants}
    del named["id"]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return replace(key, id=digest[:12])
