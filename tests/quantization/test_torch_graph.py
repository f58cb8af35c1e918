"""Every operator that encoders are run by in torch, beside onnxruntime; and whole encoders."""

import numpy as np
import pytest
from graphs import parse, run

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import GraphError
from d4c_onnx.graph.model import load_model
from d4c_onnx.quantization.inside.torch_graph import OPERATORS, TorchGraph

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
WIDE = RNG.standard_normal((3, 8)).astype(np.float32)
IDS = np.array([[3, 1, 7, 0], [2, 7, 7, 5]], np.int64)
I64 = {
    name: np.array(values, np.int64)
    for name, values in {
        "axes1": [1],
        "axes23": [2, 3],
        "shape": [0, -1],
        "sizes": [3, 5],
        "wide": [2, 3, 8],
        "starts": [1],
        "ends": [2**62],
        "back": [-1],
        "twos": [2],
        "rows": [[0, 2], [-1, 1]],
        "points": [[0, 1], [2, 7]],
        "zero": 0,
        "five": 5,
        "one": 1,
    }.items()
}
REAL = {
    "weight": RNG.standard_normal((4, 2, 3, 3)),
    "four": RNG.standard_normal(4),
    "variance": RNG.random(4) + 0.5,
    "square": RNG.standard_normal((8, 8)),
    "eight": RNG.standard_normal(8),
    "half": np.float32(0.5),
    "low": np.float32(-0.4),
    "high": np.float32(0.7),
}
# operator -> nodes that make y of x [2, 4, 6, 6], w [3, 8] or ids [2, 4]
CASES = {
    "Add": "y = Add(w, eight)",
    "And": "a = Greater(w, half) b = Less(w, high) c = And(a, b) y = Cast<to=1>(c)",
    "ArgMax": "a = ArgMax<axis=1, keepdims=0>(ids) y = Cast<to=1>(a)",
    "AveragePool": "y = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(x)",
    "BatchNormalization": "y = BatchNormalization<epsilon=0.01>(x, four, four, four, variance)",
    "Cast": "y = Cast<to=1>(ids)",
    "Clip": "y = Clip(w, low, high)",
    "Concat": "y = Concat<axis=1>(w, w)",
    "Constant": "a = Constant<value=float[1] {2.0}>() y = Mul(w, a)",
    "ConstantOfShape": "a = Shape(w) b = ConstantOfShape<value=float[1] {3.0}>(a) y = Add(w, b)",
    "Conv": "y = Conv<group=2, strides=[2,1], pads=[1,0,1,2], dilations=[1,2]>(x, weight, four)",
    "Div": "a = Div(w, eight) b = Div(five, twos) c = Cast<to=1>(b) y = Mul(a, c)",
    "Equal": "a = Equal(ids, five) y = Cast<to=1>(a)",
    "Erf": "y = Erf(w)",
    "Exp": "y = Exp(w)",
    "Expand": "y = Expand(w, wide)",
    "Flatten": "y = Flatten<axis=2>(x)",
    "Gather": "y = Gather<axis=0>(w, rows)",
    "GatherElements": "y = GatherElements<axis=1>(w, rows)",
    "GatherND": "y = GatherND(w, points)",
    "Gelu": 'y = Gelu<approximate="tanh">(w)',
    "com.microsoft:Gelu": "y = com.microsoft.Gelu(w)",
    "Gemm": "y = Gemm<transB=1, alpha=0.5, beta=2.0>(w, square, eight)",
    "GlobalAveragePool": "y = GlobalAveragePool(x)",
    "Greater": "a = Greater(w, half) y = Cast<to=1>(a)",
    "HardSigmoid": "y = HardSigmoid<alpha=0.3>(w)",
    "HardSwish": "y = HardSwish(w)",
    "Identity": "y = Identity(w)",
    "IsNaN": "a = Sqrt(w) b = IsNaN(a) y = Cast<to=1>(b)",
    "LayerNormalization": "y = LayerNormalization<epsilon=0.1>(w, eight, eight)",
    "Less": "a = Less(w, half) y = Cast<to=1>(a)",
    "MatMul": "y = MatMul(w, square)",
    "Max": "y = Max(w, eight)",
    "MaxPool": "y = MaxPool<kernel_shape=[2,3], strides=[2,2], pads=[0,1,1,0]>(x)",
    "Min": "y = Min(w, eight)",
    "Mul": "y = Mul(w, eight)",
    "Neg": "y = Neg(w)",
    "Not": "a = Greater(w, half) b = Not(a) y = Cast<to=1>(b)",
    "Or": "a = Greater(w, high) b = Less(w, low) c = Or(a, b) y = Cast<to=1>(c)",
    "Pow": "a = Abs2(w) y = Pow(a, half)",
    "com.microsoft:QuickGelu": "y = com.microsoft.QuickGelu<alpha=1.5>(w)",
    "Range": "a = Range(zero, five, one) y = Cast<to=1>(a)",
    "Reciprocal": "y = Reciprocal(w)",
    "ReduceL2": "y = ReduceL2<keepdims=0>(x, axes23)",
    "ReduceMax": "y = ReduceMax(x, axes1)",
    "ReduceMean": "y = ReduceMean<keepdims=1>(x, axes23)",
    "ReduceSum": "y = ReduceSum(x)",
    "Relu": "y = Relu(w)",
    "Reshape": "y = Reshape(x, shape)",
    "Shape": "a = Shape<start=1>(x) y = Cast<to=1>(a)",
    "Sigmoid": "y = Sigmoid(w)",
    "Slice": "y = Slice(x, starts, ends, axes1, twos)",
    "Softmax": "y = Softmax<axis=0>(w)",
    "Split": "a, b = Split<axis=1>(w, sizes) y = Concat<axis=1>(b, a)",
    "Sqrt": "a = Mul(w, w) y = Sqrt(a)",
    "Squeeze": "a = ReduceMean<keepdims=1>(x, axes1) y = Squeeze(a, axes1)",
    "Sub": "y = Sub(w, eight)",
    "Tanh": "y = Tanh(w)",
    "Transpose": "y = Transpose<perm=[0,2,3,1]>(x)",
    "Trilu": "y = Trilu<upper=0>(square, back)",
    "Unsqueeze": "y = Unsqueeze(w, axes1)",
    "Where": "a = Greater(w, half) y = Where(a, w, eight)",
}
INPUTS = {"x": ("float[2,4,6,6] x", X), "w": ("float[3,8] w", WIDE), "ids": ("int64[2,4] ids", IDS)}


def test_every_operator_has_a_case() -> None:
    # rounding is another thing here than what onnxruntime computes: see test_adaround
    assert set(OPERATORS) == {*CASES, "QuantizeLinear", "DequantizeLinear"}


@pytest.mark.parametrize("operator", CASES)
def test_operators_compute_what_onnxruntime_computes(operator: str) -> None:
    nodes = CASES[operator].replace("Abs2(w)", "Mul(w, w)").replace(") ", ") \n ")
    name = next((name for name in ("ids", "x") if f"({name}" in nodes), "w")
    declared, values = INPUTS[name]
    read = {key: value for key, value in {**I64, **REAL}.items() if _reads(nodes, key)}
    used = "" if _reads(nodes, name) else f" unread = Identity({name})"
    model = parse(f"g ({declared}) => (float y) {{ {nodes}{used} }}", **read)
    expected = run(model, values, optimize=False)
    *_, (_, found) = TorchGraph(model.graph).run({name: values}, [])
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5, atol=1e-5)


def _reads(nodes: str, name: str) -> bool:
    words = nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return name in words


@pytest.mark.parametrize("mini", ["vit_bundle", pytest.param("rn_bundle", marks=pytest.mark.slow)])
def test_encoders_compute_what_onnxruntime_computes(mini: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(mini)
    side = bundle.manifest.preprocess.size
    feeds = {
        bundle.image_encoder: np.random.default_rng(0).standard_normal((2, 3, *side)).astype(np.float32),
        bundle.text_encoder: np.array([[49406, 320, 2368, 49407, 0], [49406, 320, 49407, 0, 0]], np.int64),
    }
    for path, batch in feeds.items():
        model = load_model(path)
        *_, (_, found) = TorchGraph(model.graph).run({model.graph.inputs[0].name or "": batch}, [])
        np.testing.assert_allclose(found.detach().numpy(), run(model, batch), atol=1e-5)


def test_an_unknown_operator_is_refused_by_name() -> None:
    model = parse("g (float[3,8] w) => (float y) { [odd] y = Sinh(w) }")
    with pytest.raises(GraphError, match=r"odd.*Sinh"):
        TorchGraph(model.graph)
