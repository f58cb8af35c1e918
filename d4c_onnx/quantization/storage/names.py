"""Shorter names for what `quantize_static` added: a third of a small model's graph is names."""

import onnx_ir as ir

from d4c_onnx.graph.values import name_of, nodes_of

_ENDINGS = {
    "_DequantizeLinear_Output": "_r",
    "_QuantizeLinear_Output": "_q",
    "_quantized": "_i",
    "_zero_point": "_z",
    "_scale": "_s",
}


def shorten_names(model: ir.Model) -> None:
    """Rename what quantisers read and write, in place; they themselves lose their names, which nobody asks for."""
    graph = model.graph
    taken = {name_of(value) for node in graph for value in node.outputs} | set(graph.initializers)
    pairs = list(nodes_of(graph, "QuantizeLinear", "DequantizeLinear"))
    for value in dict.fromkeys(value for pair in pairs for value in (*pair.inputs, *pair.outputs)):
        ending = next((ending for ending in _ENDINGS if value is not None and name_of(value).endswith(ending)), None)
        if value is None or ending is None or value.is_graph_input() or value.is_graph_output():
            continue
        short = name_of(value).removesuffix(ending) + _ENDINGS[ending]
        if short not in taken:
            taken.add(short)
            initializer = graph.initializers.pop(name_of(value), None)
            value.name = short
            if initializer is not None:
                graph.register_initializer(value)
    for pair in pairs:
        pair.name = None
