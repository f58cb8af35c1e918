"""AdaRound: learn for every weight whether it is rounded up or down, by gradient descent on a region's output.

    W^ = s clip(floor(W / s) + h(V), low, high),   h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    minimise  E |f(x) - f^(x^)|^2 + 0.01 sum (1 - |2 h(V) - 1|^beta)

over V, where f is a layer or a bottleneck in float, f^ the same with soft weights and rounded activations, x^ the input
that the layers rounded so far deliver. beta falls from 20 to 2 and drives every h(V) to 0 or 1; during the first fifth
of the steps the regulariser waits. The square error is summed over channels and averaged over everything else (the
published code averages over channels and sums over tokens).

It needs gradients, and so torch; it is imported when it runs.

Source: AdaRound (Nagel et al., arXiv 2004.10568); the schedule is that of arXiv 2511.15411's code.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from d4c_onnx.graph.values import name_of
from d4c_onnx.quantization.inside.torch_graph import run_node
from d4c_onnx.quantization.rounding.base import QuantizedWeight, WeightGrid, grid_limits
from d4c_onnx.quantization.rounding.nearest import search_scales
from d4c_onnx.quantization.rounding.schedule import AdaRoundSchedule

_WARM_UP, _BETA = 0.2, (20.0, 2.0)
_REGULARISER = 0.01
_STRETCH = (1.2, -0.1)


class SoftWeight:
    """One weight between its two neighbours on the grid."""

    def __init__(self, weight: np.ndarray, num_bits: int) -> None:
        """weight: float32 [channels, inputs]."""
        self.num_bits = num_bits
        self.scale = search_scales(weight, WeightGrid(num_bits))
        steps = torch.from_numpy(weight / self.scale[:, None])
        self._floor = steps.floor()
        share = (steps - self._floor).clamp(1e-4, 1 - 1e-4)
        # h(V) = share at the start, so that nothing is lost before the first step
        inner = ((share - _STRETCH[1]) / _STRETCH[0]).clamp(1e-4, 1 - 1e-4)
        self.logits = torch.log(inner / (1 - inner)).requires_grad_()
        self._rows = torch.from_numpy(self.scale[:, None])

    def up(self) -> torch.Tensor:
        """h(V): how far each weight is rounded up, 0 to 1; [channels, inputs]."""
        return (_STRETCH[0] * self.logits.sigmoid() + _STRETCH[1]).clamp(0, 1)

    def values(self) -> torch.Tensor:
        """W^ while it is soft, float32 [channels, inputs]."""
        return (self._floor + self.up()).clamp(*grid_limits(self.num_bits)) * self._rows

    def regulariser(self, beta: float) -> torch.Tensor:
        """0 when every weight has decided."""
        return (1 - (2 * self.up() - 1).abs().pow(beta)).sum()

    def decide(self) -> QuantizedWeight:
        """The integers."""
        with torch.no_grad():
            chosen = (self._floor + (self.up() >= 0.5)).clamp(*grid_limits(self.num_bits))
        return QuantizedWeight(chosen.numpy().astype(np.int8), self.scale, self.num_bits)


def reconstruct(
    nodes: Sequence[ir.Node],
    constants: Mapping[str, np.ndarray],
    weights: Mapping[str, tuple[np.ndarray, tuple[int, ...], int, int]],
    source: tuple[str, np.ndarray],
    target: tuple[str, np.ndarray],
    schedule: AdaRoundSchedule,
    *,
    batch: int,
    seed: int,
) -> dict[str, QuantizedWeight]:
    """Round the weights of a region together.

    Args:
        nodes: the region, from the fake-quantised twin.
        constants: every initialiser that the nodes read and that is not in `weights`.
        weights: by initialiser: float32 rows [channels, inputs], the initialiser's shape, its channel axis, bits.
        source: the region's input: name, float32 [samples, ...].
        target: its output in float: name, float32 [samples, ...].
        schedule: of Adam.
        batch: how many samples a step looks at.
        seed: of the batches.

    Raises:
        GraphError: the region holds an operator that has no form here.
    """
    torch.manual_seed(seed)
    soft = {name: SoftWeight(rows, bits) for name, (rows, _, _, bits) in weights.items()}
    fixed = {name: torch.from_numpy(np.array(value)) for name, value in constants.items()}
    optimizer = torch.optim.Adam([entry.logits for entry in soft.values()], lr=schedule.learning_rate)
    inputs, outputs = torch.from_numpy(source[1]), torch.from_numpy(target[1])
    channels = 1 if outputs.ndim == 4 else outputs.ndim - 1
    draw = np.random.default_rng(seed)
    for step in range(schedule.steps):
        chosen = torch.from_numpy(draw.choice(len(inputs), min(batch, len(inputs)), replace=False))
        values = {**fixed, source[0]: inputs[chosen]}
        for name, entry in soft.items():
            _, shape, axis, _ = weights[name]
            values[name] = _to_shape(entry.values(), shape, axis)
        for node in nodes:
            given = [values[name_of(value)] if value is not None else None for value in node.inputs]
            values[name_of(node.outputs[0])] = run_node(node, given)[0]
        loss = (values[target[0]] - outputs[chosen]).square().sum(channels).mean()
        progress = (step / schedule.steps - _WARM_UP) / (1 - _WARM_UP)
        if progress >= 0:
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - progress)
            loss = loss + _REGULARISER * sum(entry.regulariser(beta) for entry in soft.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return {name: entry.decide() for name, entry in soft.items()}


def _to_shape(rows: torch.Tensor, shape: tuple[int, ...], axis: int) -> torch.Tensor:
    moved = (shape[axis], *(size for position, size in enumerate(shape) if position != axis))
    return rows.reshape(moved).movedim(0, axis)
