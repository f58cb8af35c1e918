"""What a calibration set depends on, as one key: equal keys mean equal sets on one machine."""

import hashlib
import json
from typing import Any

from d4c_onnx.recipe import PromptSection, SynthesisSection


def calibration_key(
    weights_sha256: str,
    section: SynthesisSection,
    text: PromptSection,
    nouns: tuple[str, ...],
    seed: int,
    source_sha256: str | None = None,
) -> dict[str, Any]:
    """Everything that decides a set's content, and an `id` that names its folder.

    Args:
        source_sha256: stands in for `section.source`: a key holds what was read, not where it lay.
    """
    key: dict[str, Any] = {
        "weights_sha256": weights_sha256,
        "seed": seed,
        "synthesis": {**section.model_dump(mode="json"), "source": source_sha256},
        "text": text.model_dump(mode="json"),
        "nouns": list(nouns),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return {"id": digest[:12], **key}
