"""ONNX operators in torch, with gradients: what a reconstruction and the output moments run an encoder with.

onnxruntime executes encoders, but knows no gradient. Here are the operators that the float encoders of CLIPs hold; one
that is missing is refused by name. Rounding (QuantizeLinear) passes the gradient straight through.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.values import CONTRIB, attribute, constant, integers, is_constant, name_of, op_of

Given = Sequence[torch.Tensor | None]
Operator = Callable[[ir.Node, Given], torch.Tensor | tuple[torch.Tensor, ...]]


class TorchGraph:
    """An encoder whose nodes run in torch, one after the other."""

    def __init__(self, graph: ir.Graph) -> None:
        """graph: of a float encoder, nodes in topological order; its weights are shared where they lie in memory.

        Raises:
            GraphError: it holds an operator that has no form here.
        """
        self._nodes = list(graph)
        for node in self._nodes:
            _operator(node)
        read = {value for node in self._nodes for value in node.inputs if is_constant(value) and value is not None}
        self._constants = {name_of(value): as_tensor(constant(value)) for value in read}
        last = {name_of(v): number for number, node in enumerate(self._nodes) for v in node.inputs if v is not None}
        self._output = name_of(graph.outputs[0])
        self._last = last | {self._output: len(self._nodes)}

    def run(self, feeds: Mapping[str, np.ndarray], leaves: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Compute every value in order; yield those named in `leaves`, and at last the encoder's output.

        A leaf that depends on no other one is made to require its gradient, so that no gradient is computed before it.
        """
        wanted = set(leaves)
        values = {name: as_tensor(array) for name, array in feeds.items()}
        for number, node in enumerate(self._nodes):
            names = [name_of(value) if value is not None else None for value in node.inputs]
            given = [None if name is None else values.get(name, self._constants.get(name)) for name in names]
            made = run_node(node, given)
            for value, tensor in zip(node.outputs, made, strict=False):
                leaf = name_of(value) in wanted
                own = tensor.detach().requires_grad_() if leaf and not tensor.requires_grad else tensor
                values[name_of(value)] = own
                if leaf:
                    yield name_of(value), own
            for name in filter(None, names):
                if name in values and self._last[name] == number:
                    del values[name]
        yield self._output, values[self._output]


def run_node(node: ir.Node, given: Given) -> tuple[torch.Tensor, ...]:
    """One node: its outputs.

    Raises:
        GraphError: the operator has no form here, or an attribute is one that it does not know.
    """
    made = _operator(node)(node, given)
    return made if isinstance(made, tuple) else (made,)


def as_tensor(values: np.ndarray) -> torch.Tensor:
    """A constant, shared where torch can read the array's own memory."""
    array = np.asarray(values)
    return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else np.array(array))


def _operator(node: ir.Node) -> Operator:
    found = OPERATORS.get(op_of(node))
    if found is None:
        raise GraphError(f"{node.name}: {op_of(node)} has no gradient here. Use rounding gptaq, which asks for none.")
    return found


def _x(given: Given, position: int = 0) -> torch.Tensor:
    found = given[position] if position < len(given) else None
    assert found is not None
    return found


def _optional(given: Given, position: int) -> torch.Tensor | None:
    return given[position] if position < len(given) else None


def _numbers(node: ir.Node, given: Given, name: str, position: int) -> list[int] | None:
    """A list of integers that older opsets have as an attribute, newer ones as an input."""
    found = _optional(given, position)
    if found is not None:
        return [int(value) for value in found.reshape(-1).tolist()]
    stored = attribute(node, name)
    return None if stored is None else [int(value) for value in stored]


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Operator:
    return lambda node, given: function(_x(given))


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Operator:
    return lambda node, given: function(_x(given), _x(given, 1))


def _gemm(node: ir.Node, given: Given) -> torch.Tensor:
    left, right, bias = _x(given), _x(given, 1), _optional(given, 2)
    left = left.mT if attribute(node, "transA", 0) else left
    right = right.mT if attribute(node, "transB", 0) else right
    product = (left @ right) * attribute(node, "alpha", 1.0)
    return product if bias is None else product + bias * attribute(node, "beta", 1.0)


def _conv(node: ir.Node, given: Given) -> torch.Tensor:
    x, weight, rank = _x(given), _x(given, 1), _x(given).ndim - 2
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    padded = F.pad(x, _pads(node, rank))
    steps = [tuple(integers(node, name, rank)) for name in ("strides", "dilations")]
    return function(padded, weight, _optional(given, 2), steps[0], 0, steps[1], attribute(node, "group", 1))


def _pads(node: ir.Node, rank: int) -> list[int]:
    """torch's order: last axis first."""
    if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or attribute(node, "ceil_mode", 0):
        raise GraphError(f"{node.name}: auto_pad and ceil_mode have no form here.")
    pads = integers(node, "pads", 2 * rank, 0)
    return [end for axis in reversed(range(rank)) for end in (pads[axis], pads[rank + axis])]


def _average_pool(node: ir.Node, given: Given) -> torch.Tensor:
    x, pads = _x(given), _pads(node, 2)
    kernel, strides = integers(node, "kernel_shape", 2), integers(node, "strides", 2)
    pooled = F.avg_pool2d(F.pad(x, pads), tuple(kernel), tuple(strides))
    if any(pads) and not attribute(node, "count_include_pad", 0):
        inside = F.pad(torch.ones_like(x[:1, :1]), pads)
        pooled = pooled / F.avg_pool2d(inside, tuple(kernel), tuple(strides))
    return pooled


def _max_pool(node: ir.Node, given: Given) -> torch.Tensor:
    padded = F.pad(_x(given), _pads(node, 2), value=-torch.inf)
    return F.max_pool2d(padded, tuple(integers(node, "kernel_shape", 2)), tuple(integers(node, "strides", 2)))


def _global_average(node: ir.Node, given: Given) -> torch.Tensor:
    return _x(given).mean(tuple(range(2, _x(given).ndim)), keepdim=True)


def _layer_norm(node: ir.Node, given: Given) -> torch.Tensor:
    x, axis = _x(given), attribute(node, "axis", -1)
    shape = x.shape[axis % x.ndim :]
    bias = _optional(given, 2)
    scale = _x(given, 1).expand(shape)
    return F.layer_norm(
        x, shape, scale, bias.expand(shape) if bias is not None else None, attribute(node, "epsilon", 1e-5)
    )


def _batch_norm(node: ir.Node, given: Given) -> torch.Tensor:
    x, scale, bias, mean, variance = (_x(given, position) for position in range(5))
    return F.batch_norm(x, mean, variance, scale, bias, eps=attribute(node, "epsilon", 1e-5))


def _gelu(node: ir.Node, given: Given) -> torch.Tensor:
    return F.gelu(_x(given), approximate=attribute(node, "approximate", "none"))


def _quick_gelu(node: ir.Node, given: Given) -> torch.Tensor:
    return _x(given) * torch.sigmoid(attribute(node, "alpha", 1.702) * _x(given))


def _hard_sigmoid(node: ir.Node, given: Given) -> torch.Tensor:
    return (_x(given) * attribute(node, "alpha", 0.2) + attribute(node, "beta", 0.5)).clamp(0, 1)


def _clip(node: ir.Node, given: Given) -> torch.Tensor:
    low, high = _optional(given, 1), _optional(given, 2)
    low = low if low is not None else attribute(node, "min")
    high = high if high is not None else attribute(node, "max")
    return torch.clamp(_x(given), low, high) if low is not None or high is not None else _x(given)


def _quantize(node: ir.Node, given: Given) -> torch.Tensor:
    """The integers as floats, without their zero point, so that the gradient passes."""
    steps = _x(given) / _x(given, 1)
    return steps + (steps.round() - steps).detach()


def _reduce(function: Callable[..., torch.Tensor]) -> Operator:
    def run(node: ir.Node, given: Given) -> torch.Tensor:
        x, axes = _x(given), _numbers(node, given, "axes", 1)
        if not axes and attribute(node, "noop_with_empty_axes", 0):
            return x
        return function(x, tuple(axes or range(x.ndim)), keepdim=bool(attribute(node, "keepdims", 1)))

    return run


def _reshape(node: ir.Node, given: Given) -> torch.Tensor:
    x, sizes = _x(given), [int(size) for size in _x(given, 1).tolist()]
    if not attribute(node, "allowzero", 0):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(tuple(sizes))


def _flatten(node: ir.Node, given: Given) -> torch.Tensor:
    x, axis = _x(given), attribute(node, "axis", 1)
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _squeeze(node: ir.Node, given: Given) -> torch.Tensor:
    axes = _numbers(node, given, "axes", 1)
    return _x(given).squeeze(tuple(axes)) if axes is not None else _x(given).squeeze()


def _unsqueeze(node: ir.Node, given: Given) -> torch.Tensor:
    x, axes = _x(given), _numbers(node, given, "axes", 1) or []
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _split(node: ir.Node, given: Given) -> tuple[torch.Tensor, ...]:
    x, axis, sizes = _x(given), attribute(node, "axis", 0), _numbers(node, given, "split", 1)
    if sizes is None:
        return torch.tensor_split(x, len(node.outputs), axis)
    return x.split(sizes, axis)


def _slice(node: ir.Node, given: Given) -> torch.Tensor:
    x = _x(given)
    starts, ends = _numbers(node, given, "starts", 1) or [], _numbers(node, given, "ends", 2) or []
    axes = _numbers(node, given, "axes", 3) or list(range(len(starts)))
    steps = _numbers(node, given, "steps", 4) or [1] * len(starts)
    chosen: list[Any] = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise GraphError(f"{node.name}: a Slice that runs backwards has no form here.")
        chosen[axis] = slice(*slice(start, end, step).indices(x.shape[axis]))  # ends may be 2^63 - 1
    return x[tuple(chosen)]


def _gather(node: ir.Node, given: Given) -> torch.Tensor:
    x, indices = _x(given), _x(given, 1).long()
    axis = attribute(node, "axis", 0) % x.ndim
    rows = x.index_select(axis, torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1))
    return rows.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather_elements(node: ir.Node, given: Given) -> torch.Tensor:
    axis, indices = attribute(node, "axis", 0), _x(given, 1).long()
    return torch.gather(_x(given), axis, torch.where(indices < 0, indices + _x(given).shape[axis], indices))


def _gather_nd(node: ir.Node, given: Given) -> torch.Tensor:
    if attribute(node, "batch_dims", 0):
        raise GraphError(f"{node.name}: a GatherND of batches has no form here.")
    return _x(given)[tuple(_x(given, 1).long().unbind(-1))]


def _expand(node: ir.Node, given: Given) -> torch.Tensor:
    x, sizes = _x(given), tuple(int(size) for size in _x(given, 1).tolist())
    return x.expand(torch.broadcast_shapes(tuple(x.shape), sizes))


def _cast(node: ir.Node, given: Given) -> torch.Tensor:
    kind = ir.DataType(attribute(node, "to")).numpy()
    return _x(given).to(torch.from_numpy(np.empty(0, kind)).dtype)


def _shape(node: ir.Node, given: Given) -> torch.Tensor:
    return torch.tensor(tuple(_x(given).shape)[attribute(node, "start", 0) : attribute(node, "end")], dtype=torch.int64)


def _constant_of_shape(node: ir.Node, given: Given) -> torch.Tensor:
    stored = attribute(node, "value")
    filler = as_tensor(stored.numpy()) if stored is not None else torch.zeros(1)
    return filler.reshape(()).expand(tuple(int(size) for size in _x(given).tolist())).clone()


def _constant(node: ir.Node, given: Given) -> torch.Tensor:
    stored = attribute(node, "value")
    if stored is None:
        raise GraphError(f"{node.name}: a Constant of this kind has no form here.")
    return as_tensor(stored.numpy())


def _range(node: ir.Node, given: Given) -> torch.Tensor:
    return torch.arange(*(_x(given, position).item() for position in range(3)), dtype=_x(given).dtype)


def _arg_max(node: ir.Node, given: Given) -> torch.Tensor:
    if attribute(node, "select_last_index", 0):
        raise GraphError(f"{node.name}: an ArgMax of the last index has no form here.")
    x = _x(given)
    counted = x.to(torch.uint8) if x.dtype == torch.bool else x  # the first of equal ones, as ONNX wants it
    return counted.argmax(attribute(node, "axis", 0), keepdim=bool(attribute(node, "keepdims", 1)))


def _trilu(node: ir.Node, given: Given) -> torch.Tensor:
    diagonal = _optional(given, 1)
    side = torch.triu if attribute(node, "upper", 1) else torch.tril
    return side(_x(given), int(diagonal) if diagonal is not None else 0)


def _norm(x: torch.Tensor, axes: tuple[int, ...], keepdim: bool) -> torch.Tensor:
    return torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)


OPERATORS: dict[str, Operator] = {
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "ArgMax": _arg_max,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda node, given: torch.cat([x for x in given if x is not None], attribute(node, "axis")),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "DequantizeLinear": _binary(torch.mul),
    "Div": lambda node, given: _divide(_x(given), _x(given, 1)),
    "Equal": _binary(torch.eq),
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    f"{CONTRIB}:Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Greater": _binary(torch.gt),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _unary(F.hardswish),
    "Identity": _unary(lambda x: x),
    "IsNaN": _unary(torch.isnan),
    "LayerNormalization": _layer_norm,
    "Less": _binary(torch.lt),
    "MatMul": _binary(torch.matmul),
    "Max": _binary(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _binary(torch.minimum),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Not": _unary(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "Pow": _binary(torch.pow),
    "QuantizeLinear": _quantize,
    f"{CONTRIB}:QuickGelu": _quick_gelu,
    "Range": _range,
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceL2": _reduce(_norm),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": _unary(torch.sigmoid),
    "Slice": _slice,
    "Softmax": lambda node, given: torch.softmax(_x(given), attribute(node, "axis", -1)),
    "Split": _split,
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Tanh": _unary(torch.tanh),
    "Transpose": lambda node, given: _transpose(node, _x(given)),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": lambda node, given: torch.where(_x(given), _x(given, 1), _x(given, 2)),
}


def _divide(x: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    return x / divisor if x.is_floating_point() else torch.div(x, divisor, rounding_mode="trunc")


def _transpose(node: ir.Node, x: torch.Tensor) -> torch.Tensor:
    order = attribute(node, "perm")
    return x.permute([int(axis) for axis in order]) if order is not None else x.permute(*reversed(range(x.ndim)))
