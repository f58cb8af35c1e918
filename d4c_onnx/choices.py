"""The words that name a rounding and a target: one table each, for recipes, `--help` and the rooms that do the work.

Nothing is imported here: a recipe is checked, and help is shown, without numpy and onnx. So a rounding names the value
that does it, and `quantization.rounding` looks it up.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RoundingChoice:
    """A rounding's row.

    Attributes:
        module, value: where its `Rounding` is, in `quantization.rounding`.
        learns: by torch's gradients, from the outputs: nothing is left to correct, and a channel has one scale.
        clause: what `d4c-onnx recipe` says of it; empty where its name says enough.
    """

    module: str
    value: str
    learns: bool = False
    clause: str = ""


ROUNDINGS = {
    "nearest": RoundingChoice("layerwise", "NEAREST"),
    "gptq": RoundingChoice("gptq", "GPTQ"),
    "gptaq": RoundingChoice("gptq", "GPTAQ"),
    "yaqa": RoundingChoice("yaqa", "YAQA"),
    "adaround": RoundingChoice("reconstruction", "ADAROUND", learns=True),
    "adaround-published": RoundingChoice(
        "reconstruction", "ADAROUND_PUBLISHED", learns=True, clause="for the published 20,000 steps a region"
    ),
}

TARGET_CLAUSES = {
    "cpu": "onnxruntime's CPU provider",
    "portable": "standard operators, old runtimes",
    "tensorrt": "symmetric int8, plain int4",
    "openvino": "plain int4",
    "cuda": "an FP16 bundle beside",
}


def in_words(clauses: dict[str, str]) -> str:
    """`name: clause; name: clause`, of those that have one."""
    return "; ".join(f"{name}: {clause}" for name, clause in clauses.items() if clause)
