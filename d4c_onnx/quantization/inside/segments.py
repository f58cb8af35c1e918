"""Running an encoder piece by piece: each piece starts from what the one before left alive, so no layer runs twice.

Sequential rounding looks at one layer after the other, over all samples. Running the encoder from its input for every
layer would cost the square of its depth; kept between two cuts are only the values that later nodes still read (the
residual stream and the activation at hand), a few tens of megabytes for a ViT-B/32 and 128 images, and gigabytes for
a conv net's first stages: `live` keeps those on disk.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.graph.values import constant, name_of, reads, set_constant
from d4c_onnx.quantization.inside.live import LiveValues
from d4c_onnx.runtime.session import EncoderSession


class SegmentedEncoder:
    """An encoder that stands at a position of its own node list, with the live values of every batch at hand."""

    def __init__(self, model: ir.Model, reader: CalibrationDataReader, provider: str = "cpu", threads: int = 0) -> None:
        """Read all batches.

        Args:
            model: nodes in topological order. It is not changed: the copy here shares its weights.
            reader: rewindable.
        """
        self._model = model.clone()
        self._nodes = list(self._model.graph)
        self._provider, self._threads = provider, threads
        self._position = 0
        self._live = LiveValues()
        reader.rewind()
        while (feed := reader.get_next()) is not None:
            self._live.append(feed)

    @property
    def held_bytes(self) -> int:
        """What the live values take in memory."""
        return self._live.held_bytes

    @property
    def graph(self) -> ir.Graph:
        """The copy that runs."""
        return self._model.graph

    def replace(self, name: str, values: np.ndarray) -> None:
        """Give a layer that has not run yet its new weights; here only, not in the model."""
        set_constant(self._model.graph, name, values)

    def constant(self, name: str) -> np.ndarray:
        """An initialiser as the nodes that have not run yet will read it."""
        return constant(self._model.graph.initializers[name])

    def advance(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Run on until all `names` are computed; yield them batch by batch. The iterator must be used up."""
        made = {name_of(value): number for number, node in enumerate(self._nodes) for value in node.outputs}
        stop = max(self._position, *(made.get(name, -1) + 1 for name in names))
        nodes = self._nodes[self._position : stop]
        later = {name_of(value) for node in self._nodes[stop:] for value in reads(node)}
        later |= {name_of(value) for value in self._model.graph.outputs}
        produced = {name_of(value): value for node in nodes for value in node.outputs}
        outputs = [name for name in dict.fromkeys((*sorted(later & produced.keys()), *names)) if name in produced]
        session = self._session(nodes, [produced[name] for name in outputs]) if outputs else None
        self._position = stop
        for value in self._model.graph.initializers.values():
            if name_of(value) not in later:
                value.const_value = None  # weights that were replaced would stay in memory
        for number in range(len(self._live)):
            live = self._live.read(number)
            fed = {name: live[name] for name in session.input_names} if session else {}
            fresh = session.run_named(fed) if session else {}
            self._live.update(number, fresh, later)
            everything = {**live, **fresh}
            yield {name: everything[name] for name in names}

    def outputs(self) -> np.ndarray:
        """What the encoder would give from here, float [samples, D]; the position stays where it is."""
        session = self._session(self._nodes[self._position :], list(self._model.graph.outputs))
        every = (self._live.read(number) for number in range(len(self._live)))
        parts = [session.run_named({name: live[name] for name in session.input_names}) for live in every]
        return np.concatenate([part[session.output_names[0]] for part in parts])

    def _session(self, nodes: list[ir.Node], outputs: list[ir.Value]) -> EncoderSession:
        read = dict.fromkeys(value for node in nodes for value in reads(node))
        live = self._live.read(0)
        inputs = [value for value in read if name_of(value) in live and value.const_value is None]
        inputs = sorted((value for value in inputs if value.producer() not in set(nodes)), key=name_of)
        for value in inputs:
            fed = live[name_of(value)]
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(fed.dtype)), ir.Shape([None] * fed.ndim)
        graph = self._model.graph
        view = ir.GraphView(
            inputs,
            outputs,
            nodes=nodes,
            initializers=[value for value in read if value.const_value is not None],
            opset_imports=graph.opset_imports,
            name="segment",
        )
        # a graph of its own, which shares the weights: a view cannot be written beside them
        part = ir.Model(view.clone(), ir_version=self._model.ir_version)
        # literal: a float weight behind a DequantizeLinear stays the weight that was placed there
        return EncoderSession.of_model(part, self._provider, self._threads, literal=True)
