"""What was asked of a calibration set, as one key: sets of equal keys stand in for each other.

Device, resolved precision and versions decide the last bits; they are in the set's manifest, and no part of the key.
"""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from d4c_onnx.calibration.method import METHODS, Method
from d4c_onnx.recipe import PromptSection, SynthesisSection
from d4c_onnx.vocabulary import texts_sha256

# Raise it when the same ask makes other images or texts, such as when the optimisation itself changes: sets and
# half-done work of an earlier release are then not taken for this one's. A method's constants are in the key anyway.
_GENERATOR = 3

# Recipe keys that went, at what they were by default: what was made then is found again. Empty it with the next number.
_GONE = {"coarse": 0.0}


def calibration_key(
    weights_sha256: str,
    section: SynthesisSection,
    text: PromptSection,
    nouns: tuple[str, ...],
    seed: int,
    source_sha256: str | None = None,
    method: Method | None = None,
    texts: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Everything that was asked for, and an `id` that names the set's folder.

    Args:
        source_sha256: stands in for `section.source`: a key holds what was read, not where it lay.
        method: instead of the one that `section.method` names.
        texts: the user's own, in place of nouns in templates; a key holds their SHA-256.
    """
    method = method or METHODS.get(section.method)
    key: dict[str, Any] = {
        "generator": _GENERATOR,
        "weights_sha256": weights_sha256,
        "seed": seed,
        "synthesis": {**section.model_dump(mode="json"), "source": source_sha256},
        "method": asdict(method) if method else None,
        "text": text.model_dump(mode="json"),
        "nouns": list(nouns),
    }
    if texts is not None:
        key["texts_sha256"] = texts_sha256(texts)
    named = {**key, "synthesis": {**key["synthesis"], **_GONE}}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    return {"id": digest[:12], **key}
