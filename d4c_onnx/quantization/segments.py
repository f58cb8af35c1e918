"""Running an encoder piece by piece: each piece starts from what the one before left alive, so no layer runs twice.

Sequential rounding looks at one layer after the other, over all samples. Running the encoder from its input for every
layer would cost the square of its depth; kept between two cuts are only the values that later nodes still read (the
residual stream and the activation at hand), a few tens of megabytes for a ViT-B/32 and 128 images.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.runtime.session import EncoderSession


class SegmentedEncoder:
    """An encoder that stands at a position of its own node list, with the live values of every batch in memory."""

    def __init__(
        self,
        model: onnx.ModelProto,
        reader: CalibrationDataReader,
        provider: str = "cpu",
        threads: int = 0,
        weights: onnx.ModelProto | None = None,
    ) -> None:
        """Read all batches.

        Args:
            model: nodes in topological order. It is read, never changed, and must stay as it is meanwhile.
            reader: rewindable.
            weights: whose initialisers the model has beside its own; they are shared, not copied.
        """
        self.model = model
        self._constants = {
            tensor.name: tensor for owner in (weights, model) if owner for tensor in owner.graph.initializer
        }
        self._provider, self._threads = provider, threads
        self._position = 0
        self._live: list[dict[str, np.ndarray]] = []
        reader.rewind()
        while (feed := reader.get_next()) is not None:
            self._live.append(dict(feed))

    def replace(self, name: str, values: np.ndarray) -> None:
        """Give a layer that has not run yet its new weights; here only, not in the model."""
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)

    def constant(self, name: str) -> np.ndarray:
        """An initialiser as the nodes that have not run yet will read it."""
        return numpy_helper.to_array(self._constants[name])

    def advance(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Run on until all `names` are computed; yield them batch by batch. The iterator must be used up."""
        graph = self.model.graph
        made = {name: number for number, node in enumerate(graph.node) for name in node.output}
        stop = max(self._position, *(made.get(name, -1) + 1 for name in names))
        nodes = list(graph.node[self._position : stop])
        produced = {name for node in nodes for name in node.output}
        later = {name for node in graph.node[stop:] for name in node.input} | {value.name for value in graph.output}
        outputs = [name for name in dict.fromkeys((*sorted(later & produced), *names)) if name in produced]
        session = self._session(nodes, outputs) if outputs else None
        self._position = stop
        self._constants = {name: tensor for name, tensor in self._constants.items() if name in later}
        for number, live in enumerate(self._live):
            fed = {name: live[name] for name in session.input_names} if session else {}
            fresh = session.run_named(fed) if session else {}
            everything = {**live, **fresh}
            self._live[number] = {name: value for name, value in everything.items() if name in later}
            yield {name: everything[name] for name in names}

    def _session(self, nodes: list[onnx.NodeProto], outputs: list[str]) -> EncoderSession:
        read = {name for node in nodes for name in node.input}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for name, value in sorted(self._live[0].items())
            if name in read
        ]
        constants = [tensor for name, tensor in self._constants.items() if name in read]
        # outputs carry no type: onnxruntime infers it
        graph = helper.make_graph(nodes, "segment", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
        part = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        # literal: a float weight behind a DequantizeLinear stays the weight that was placed there
        return EncoderSession.of_model(part, self._provider, self._threads, literal=True, shared=constants)
