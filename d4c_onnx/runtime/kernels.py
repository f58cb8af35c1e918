"""Which kernels onnxruntime's CPU provider really runs for a file: counted in its own optimised graph."""

from collections import Counter
from pathlib import Path

from d4c_onnx.runtime.session import optimized_graph

INT8_KERNELS = (
    "QLinearMatMul",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
)
FLOAT_KERNELS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "NhwcFusedConv")


def count_kernels(path: Path) -> dict[str, int]:
    """Matrix products of the optimised graph: `int8`, `float`, and each kernel by name."""
    ops = Counter(node.op_type for node in optimized_graph(path).graph)
    kernels = {name: ops[name] for name in (*INT8_KERNELS, *FLOAT_KERNELS) if ops[name]}
    return {
        "int8": sum(ops[name] for name in INT8_KERNELS),
        "float": sum(ops[name] for name in FLOAT_KERNELS),
        **kernels,
    }
