"""The interface that every rounding plugs into."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.trellis import Coded
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.plan import Plan


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight on a symmetric per-channel grid.

    Attributes:
        integers: int8 [channels, inputs], what kernels multiply; without a path each in
            [-2**(num_bits-1), 2**(num_bits-1) - 1].
        scale: float32 [channels], positive; real = integer * scale.
        num_bits: width of the grid, or of the path's codes; 3, 4 and 5 bits are stored in as many, wider grids in 8.
        path: what is stored where groups share multipliers, channels first; its levels are the integers.
    """

    integers: np.ndarray
    scale: np.ndarray
    num_bits: int
    path: Coded | None = None

    @classmethod
    def on_path(cls, codes: np.ndarray, multipliers: np.ndarray, scale: np.ndarray, num_bits: int) -> "QuantizedWeight":
        """A weight in groups."""
        path = Coded(codes, multipliers, 0, num_bits)
        return cls(path.levels, scale, num_bits, path)

    def dequantize(self) -> np.ndarray:
        """float32 [channels, inputs]."""
        return self.integers.astype(np.float32) * self.scale[:, None]

    def taken(self, order: np.ndarray) -> "QuantizedWeight":
        """Its channels in another order."""
        path = self.path
        if path is not None:
            path = replace(path, codes=path.codes[order], multipliers=path.multipliers[order])
        return QuantizedWeight(self.integers[order], self.scale[order], self.num_bits, path)


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Channels of several weights of one grid and one kind of groups, as one weight."""
    integers, scale = np.concatenate([part.integers for part in parts]), np.concatenate([part.scale for part in parts])
    paths = [part.path for part in parts if part.path is not None]
    path = None
    if paths:
        codes, multipliers = [own.codes for own in paths], [own.multipliers for own in paths]
        path = replace(paths[0], codes=np.concatenate(codes), multipliers=np.concatenate(multipliers))
    return QuantizedWeight(integers, scale, parts[0].num_bits, path)


@dataclass(frozen=True, slots=True, eq=False)
class WeightGrid:
    """Where the integers of a weight may lie.

    Attributes:
        num_bits: 4, 6 or 8; 3, 4 or 5 in groups.
        group_size: neighbouring inputs that share a multiplier; 0: one scale a channel.
        partners: int [inputs], see `pairs`; None: any two weights may be as large as they want.
    """

    num_bits: int
    group_size: int = 0
    partners: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class InputMoments:
    """What a rounding may know of a layer's input: x in float, x^ as the quantised encoder delivers it.

    Attributes:
        gram: float64 [inputs, inputs], second moments of x^.
        cross: float64 [inputs, inputs], second moments of x (rows) with x^ (columns).
    """

    gram: np.ndarray
    cross: np.ndarray


class LayerRounding(Protocol):
    """How one layer's weight meets its grid.

    Attributes:
        uses_data: whether `round` needs the layer's input moments.
        sequential: whether x^ must carry the errors of the layers before.
    """

    uses_data: bool
    sequential: bool

    def round(
        self,
        weight: np.ndarray,
        grid: WeightGrid,
        moments: InputMoments | None = None,
        outputs: np.ndarray | None = None,
    ) -> QuantizedWeight:
        """Round a weight.

        Args:
            weight: float32 [channels, inputs], output channels first.
            grid: that the integers lie on.
            moments: of the layer's input; given when `uses_data`.
            outputs: see `gradient_moments`, float32 [blocks, channels of one, channels of one]; none: not known.
        """
        ...


@dataclass(frozen=True, slots=True)
class RoundingTask:
    """What there is to round, and on what data.

    Attributes:
        model: the float encoder; not to be changed.
        plan: which weights, and how wide their grids are.
        ranges: the grid of every activation, for x^.
        reader: rewindable calibration data.
        correction: what is repaired in closed form afterwards: none, bias or affine.
        provider, threads: of the runs.
        on_step: told `round`, how many layers, of how many.
        outputs: by node, what an error of its output does to the embedding (`gradient_moments`), where that is known.
    """

    model: ir.Model
    plan: Plan
    ranges: Mapping[str, QuantParams]
    reader: CalibrationDataReader
    correction: str = "none"
    provider: str = "cpu"
    threads: int = 0
    on_step: OnStep = silent
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(slots=True)
class RoundedWeights:
    """What was chosen: per weight initialiser its grid, per bias initialiser its corrected float values."""

    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)


class Rounding(Protocol):
    """A method: all weights of an encoder onto their grids. `choices.ROUNDINGS` names them.

    Attributes:
        uses_outputs: whether the task should have output moments.
    """

    @property
    def uses_outputs(self) -> bool: ...

    def round_weights(self, task: RoundingTask) -> RoundedWeights:
        """Round every weight of the task's plan.

        Raises:
            GraphError: the graph holds what the method cannot round.
        """
        ...


def grid_limits(num_bits: int) -> tuple[int, int]:
    """Lowest and highest integer of the signed grid; 4 bits: -8 .. 7."""
    return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1


def stored_bits(num_bits: int, group_size: int = 0) -> float:
    """What a weight of that grid takes in the file, its share of a multiplier of 4 bits included."""
    if group_size:
        return num_bits + 4 / group_size
    return 4 if num_bits == 4 else 8
