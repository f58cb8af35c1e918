"""One encoder at several widths of weights, the smallest file first: what a promise is searched on.

The widths share everything that comes before rounding: exact rewrites, ranges, and what each layer costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from d4c_onnx.graph.stored import average_bits
from d4c_onnx.quantization.encoder import write_encoder
from d4c_onnx.quantization.encoder_report import EncoderReport
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.prepared import PreparedEncoder, prepare_encoder
from d4c_onnx.quantization.sensitivity import LayerCost, least_bits, measure_costs, spend
from d4c_onnx.recipe import QuantizationConfig

_BUDGETS = (3.5, 3.75, 4, 4.25, 4.5, 4.75, 5, 5.5, 6, 6.5, 7)  # bits a weight


@dataclass(frozen=True, slots=True)
class Rung:
    """One choice of widths.

    Attributes:
        name: in words.
        config: how it is quantised.
        widths: by node, of weights that have another width than the config's.
    """

    name: str
    config: QuantizationConfig
    widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WrittenRung:
    """An encoder file of one rung, and what is known of it."""

    rung: Rung
    path: Path
    report: EncoderReport

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return average_bits(self.report.layers)


def rungs_of(costs: Sequence[LayerCost], config: QuantizationConfig) -> tuple[Rung, ...]:
    """From every layer as narrow as it may be to 8 bits everywhere.

    Args:
        costs: of one encoder's layers at the config's width.
    """
    rungs: list[Rung] = []
    least = least_bits(costs)
    for budget in (least, *(budget for budget in _BUDGETS if budget > least)):
        [widths] = spend(costs, budget).values()
        if not rungs or widths != rungs[-1].widths:
            rungs.append(Rung(f"{budget:.3g} bits a weight", config, widths))
    return (*rungs, Rung("w8", config.model_copy(update={"bits": f"w8a{config.activation_bits}"})))


@dataclass
class EncoderLadder:
    """The rungs of one encoder, each written when it is first asked for.

    Attributes:
        source: the float encoder.
        folder: where its files go, `<number>/<encoder's file name>`.
        task: the encoder's, of the recipe's width.
    """

    source: Path
    folder: Path
    task: EncoderTask
    _written: dict[int, WrittenRung] = field(default_factory=dict)

    @cached_property
    def _prepared(self) -> PreparedEncoder:
        return prepare_encoder(self.source, self.task)

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """The smallest first; what they cost is measured once."""
        task, prepared = self.task, self._prepared
        costs = measure_costs(
            self.source.name,
            prepared.model,
            prepared.exact.plan,
            task.reader,
            provider=task.provider,
            threads=task.threads,
            on_step=task.on_step,
        )
        return rungs_of(costs, task.config)

    def write(self, number: int) -> WrittenRung:
        """The file of a rung.

        Raises:
            GraphError: the encoder cannot be quantised.
        """
        if number not in self._written:
            rung = self.rungs[number]
            path = self.folder / str(number) / self.source.name
            path.parent.mkdir(parents=True)
            task = replace(self.task, config=rung.config, widths=rung.widths)
            self._written[number] = WrittenRung(rung, path, write_encoder(self._prepared, path, task))
        return self._written[number]
