"""Graphs with one stored weight, for the tests of its forms."""

import onnx_ir as ir

from d4c_onnx.graph.values import nodes_by_name

# A product of integers, as quantize_static leaves one; the zero points may be left out.
PRODUCT = """product (float[n, INPUTS] x) => (float[n, CHANNELS] y) {
    [quantize] q = QuantizeLinear(x, x_scale, x_zero)
    [dequantize] d = DequantizeLinear(q, x_scale, x_zero)
    [weight] r = DequantizeLinear<axis = 1>(w, w_scale)
    [layer] y = MatMul(d, r)
}"""
CONVOLUTION = """convolution (float[n, 3, 5, 5] x) => (float[n, 4, a, b] y) {
    [weight] r = DequantizeLinear<axis = 0>(w, w_scale, w_zero)
    [layer] y = Conv(x, r)
}"""
UNPACKED = """unpacked (float[n, 5] x) => (float[n, 3] y) {
    [integers] i = Cast<to = 1>(w)
    [scale] r = Mul(i, w_scale)
    [layer] y = MatMul(x, r)
}"""
GENERAL = """general (float[n, 5] x) => (float[n, 3] y) {
    [weight] r = DequantizeLinear<axis = 0>(w, w_scale)
    [layer] y = Gemm<transB = 1>(x, r)
}"""


def layer_of(model: ir.Model) -> ir.Node:
    return nodes_by_name(model.graph)["layer"]


def scramble(model: ir.Model) -> None:
    """Other names for every node and every value but inputs and outputs."""
    kept = {*model.graph.inputs, *model.graph.outputs}
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    for number, value in enumerate(values):
        if value not in kept and value.name:
            value.name = f"value{number}"
    for number, node in enumerate(model.graph):
        node.name = f"node{number}"
