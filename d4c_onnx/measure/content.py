"""What is in a bundle's files, and how onnxruntime runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import open_bundle
from d4c_onnx.manifest import EncoderRecord

if TYPE_CHECKING:
    from d4c_onnx.runtime.inspection import Inspection


@dataclass(frozen=True, slots=True)
class BundleInspection:
    """A bundle's content.

    Attributes:
        model, bits: which one.
        minimum_onnxruntime: None in FP32.
        weight_bits_average: stored bits a weight, over both files.
        encoders: by file.
        records: by file what its manifest tells of how it was made; empty in FP32 and FP16.
    """

    model: str
    bits: str
    minimum_onnxruntime: str | None
    weight_bits_average: float
    encoders: Mapping[str, Inspection]
    records: Mapping[str, EncoderRecord]

    def as_dict(self) -> dict[str, object]:
        """For JSON: what was found in the files, and what the manifest says of rewrites."""
        rewrites = {name: [asdict(entry) for entry in record.rewrites] for name, record in self.records.items()}
        return {
            "model": self.model,
            "bits": self.bits,
            "minimum_onnxruntime": self.minimum_onnxruntime,
            "weight_bits_average": self.weight_bits_average,
            "encoders": {
                name: {**entry.as_dict(), "rewrites": rewrites.get(name, [])} for name, entry in self.encoders.items()
            },
        }


def inspect_bundle(path: str | Path) -> BundleInspection:
    """What a bundle's files hold, and how onnxruntime's CPU provider runs them.

    Raises:
        BundleError: the folder is not a bundle, or onnxruntime cannot load a file.
        GraphError: a file is not as its manifest says, or holds what is no number.
    """
    from d4c_onnx.graph.door import check_graph
    from d4c_onnx.graph.stored import average_bits
    from d4c_onnx.runtime.inspection import inspect_encoder

    bundle = open_bundle(path)
    io = bundle.manifest.io
    models = {file: check_graph(file, io[file.name]) for file in bundle.encoders.values()}
    found = {file.name: inspect_encoder(file, bundle.session_entries, model) for file, model in models.items()}
    made = bundle.manifest.quantization
    return BundleInspection(
        model=bundle.model_name,
        bits=bundle.manifest.bits,
        minimum_onnxruntime=made.minimum_onnxruntime if made else None,
        weight_bits_average=round(average_bits([row for entry in found.values() for row in entry.stored]), 4),
        encoders=found,
        records=made.encoders if made else {},
    )
