"""What every step of quantising one encoder is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.plan import Plan, make_plan
from d4c_onnx.quantization.targets import Target
from d4c_onnx.recipe import QuantizationConfig


@dataclass(frozen=True, slots=True)
class EncoderTask:
    """One encoder to quantise, and how.

    Attributes:
        config: widths, rounding, ranges.
        target: of the config.
        reader: rewindable calibration data for the encoder's input.
        widths: by node, of weights that have another width than the recipe's; see `make_plan`.
        provider, threads: of the calibration runs.
        on_step: told where it is: fold, calibrate, round, write.
        verify: check every rewrite by running the graph before and after it.
    """

    config: QuantizationConfig
    target: Target
    reader: CalibrationDataReader
    widths: Mapping[str, int] = field(default_factory=dict)
    provider: str = "cpu"
    threads: int = 0
    on_step: OnStep = silent
    verify: bool = False

    @property
    def group_size(self) -> int:
        """How many neighbouring inputs share a multiplier at 4 bits; 0: none, or the target stores no groups."""
        return self.config.group_size if self.target.grouped else 0

    def plan(self, graph: ir.Graph) -> Plan:
        """What of a graph is quantised."""
        target = self.target
        return make_plan(
            graph,
            self.config,
            self.widths,
            reduce_range=target.reduce_range,
            grouped=target.grouped,
            saturating=not target.symmetric,
        )
