"""Sigmoids that gate what they are made of: QuickGELU, h * Sigmoid(constant * h), and SiLU, h * Sigmoid(h)."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from d4c_onnx.graph.values import is_constant, is_op, maker, nodes_of, only_reader


def quick_gelu_gates(graph: ir.Graph) -> list[ir.Node]:
    """The `Mul(h, constant)` of every h * Sigmoid(constant * h)."""
    return [gate for mul in nodes_of(graph, "Mul") if (gate := quick_gelu_gate(mul)) is not None]


def quick_gelu_gate(mul: ir.Node) -> ir.Node | None:
    """The `Mul(h, constant)` of h * Sigmoid(constant * h), when `mul` is its outer product."""
    for hidden, sigmoid in _sigmoids(mul):
        gate = maker(sigmoid.inputs[0])
        if gate is None or not is_op(gate, "Mul") or only_reader(gate.outputs[0]) is not sigmoid:
            continue
        if sum(is_constant(entry) for entry in gate.inputs) == 1 and hidden in gate.inputs:
            return gate
    return None


def is_silu(mul: ir.Node) -> bool:
    """Whether a Mul is the outer product of h * Sigmoid(h): what is left of QuickGELU without its constant."""
    return any(sigmoid.inputs[0] is hidden for hidden, sigmoid in _sigmoids(mul))


def _sigmoids(mul: ir.Node) -> Iterator[tuple[ir.Value, ir.Node]]:
    """The h and the Sigmoid of h * Sigmoid(...), when `mul` is that product."""
    for hidden, gated in (tuple(mul.inputs), tuple(reversed(mul.inputs))):
        sigmoid = maker(gated)
        if hidden is None or gated is None or sigmoid is None or not is_op(sigmoid, "Sigmoid"):
            continue
        if only_reader(gated) is mul:
            yield hidden, sigmoid
