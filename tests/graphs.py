"""Graphs of tests: written in ONNX's own text form, run, listed and compared.

    model = parse("mlp (float[n, 8] x) => (float[n, 4] y) { [first] y = MatMul(x, weight) }", weight=np.ones((8, 4)))

A node's name stands in brackets before it. Constants are given as arrays, of the types that they shall have; numbers
that are not of a type of their own (Python's, and float64) become float32.
"""

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.graph.model import model_of
from d4c_onnx.graph.stored import StoredWeight, stored_weight
from d4c_onnx.runtime.session import EncoderSession, optimized_graph


def parse(text: str, opset: int = 21, **constants: object) -> ir.Model:
    """A model from `name (inputs) => (outputs) { nodes }`; what no node makes is a constant of that name."""
    graph = onnx.parser.parse_graph(text)
    for name, given in constants.items():
        values = np.asarray(given)
        if values.dtype == np.float64:
            values = values.astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))
    domains = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    proto = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10 if opset >= 21 else 9)
    return model_of(proto)


def stored_weights(model: ir.Model) -> list[StoredWeight]:
    """Of every product; some are read twice: those behind two integer terms, and those of average pools."""
    return [stored for node in model.graph if (stored := stored_weight(node)) is not None]


def run(model: ir.Model, batch: np.ndarray, optimize: bool = True) -> np.ndarray:
    """The first output for one batch; unoptimised, every operator is computed as it stands."""
    proto = ir.to_proto(model).SerializeToString()
    return EncoderSession(proto, threads=1, optimize=optimize, literal=not optimize).run(batch)


def run_all(model: ir.Model, batch: np.ndarray, outputs: Iterable[str]) -> dict[str, np.ndarray]:
    """Values of a model by name."""
    return EncoderSession.of_model(model, threads=1, literal=True, outputs=list(outputs)).run_all(batch)


def served(model: ir.Model) -> ir.Model:
    """What onnxruntime makes of a model when it loads it."""
    return optimized_graph(ir.to_proto(model).SerializeToString())


def check(model: ir.Model) -> None:
    """By ONNX's own checker."""
    onnx.checker.check_model(ir.to_proto(model))


def ops(model: ir.Model) -> list[str]:
    """The operators in graph order; those of graphs inside the graph are left out."""
    return [node.op_type for node in model.graph]


def snapshot(model: ir.Model) -> bytes:
    """Everything in a model: two that are equal are the same file."""
    return ir.to_proto(model).SerializeToString(deterministic=True)


class Feeds(CalibrationDataReader):
    """Calibration data that a test made itself."""

    def __init__(self, batches: Iterable[np.ndarray], input_name: str = "x") -> None:
        self._batches, self._name = list(batches), input_name
        self.rewind()

    def rewind(self) -> None:
        self._left = iter(self._batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._left, None)
        return None if batch is None else {self._name: batch}
