"""The finder of a text encoder's token table."""

import onnx_ir as ir

from d4c_onnx.graph.values import dims, is_constant, nodes_of


def find_token_table(graph: ir.Graph) -> ir.Node | None:
    """The Gather that looks token ids up in a float or float16 table of more than one column; None without one."""
    for gather in nodes_of(graph, "Gather"):
        table, ids = gather.inputs[:2]
        if table is None or ids is None or not ids.is_graph_input() or is_constant(ids):
            continue
        shape = dims(table) or ()
        if len(shape) == 2 and shape[1] > 1 and table.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return gather
    return None
