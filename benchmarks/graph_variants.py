"""Which form of the same quantised graph runs fastest? Every variant is made from one `--target portable` file.

    d4c-onnx quantize ViT-B-32 --pretrained random --target portable --set quantization.pooled_row_only=false \
        --set quantization.separate_gelu=false ...
    python benchmarks/graph_variants.py exported/ViT-B-32 exported/ViT-B-32/w4a8 --batches 1,16

`pooled row only`, `GELU apart` from its bias, and `attention as one kernel` are what the product does
(`quantization.pooled_row_only`, `separate_gelu`, `fused_attention`), `fused biases` and `Attention of opset 23` what it
can do (`fused_biases`, `standard_attention`); the others did not win, and live here only. Where outputs are rounded to
integers, it is on a grid of no meaning: that tells how fast, not how well. `--beside` races other bundles of the model
as they are, such as those made with `quantization.attention=int8` and `quantization.fused_qkv=true`. Interleaved
medians, two threads.
"""

import argparse
import copy
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from d4c_onnx.bundle import open_bundle
from d4c_onnx.evaluation.latency import Contender, drawn_feeds, measure_latency
from d4c_onnx.graph.files import load_graph, save_graph
from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, replace_nodes, set_initializer
from d4c_onnx.graph.layers import added_constant
from d4c_onnx.quantization.deployment import compute_pooled_row_only, fuse_attention, fuse_biases, separate_gelu


def gemm_with_bias(model: onnx.ModelProto) -> None:
    """MatMul + Add as Gemm over rows: onnxruntime's QGemm adds the (int32) bias in its kernel.

    It takes a Gemm only whose weight has a zero point a channel; ours are given back to it here.
    """
    graph, index = model.graph, GraphIndex(model.graph)
    fresh: dict[str, list[onnx.NodeProto]] = {}
    flat: dict[str, str] = {}
    for product, data, weight in _products(index):
        found = added_constant(index, product.output[0])
        scales = index.array(weight.input[1])
        if found is None or scales is None or scales.ndim != 1:
            continue
        add, bias = found
        quantizer, name = index.producer[data.input[0]], product.name
        if quantizer.op_type != "QuantizeLinear":  # the pooled row's is a Gather
            continue
        rows = index.constant(bias).reshape(-1) / (index.constant(data.input[1]) * scales)
        set_initializer(graph, f"{name}_bias", np.rint(rows).astype(np.int32))
        set_initializer(graph, f"{name}_bias_scale", (index.constant(data.input[1]) * scales).astype(np.float32))
        set_initializer(graph, f"{name}_bias_zero", np.zeros(len(scales), np.int32))
        nodes = []
        if quantizer.input[0] not in flat:
            shape, value = f"{name}_rows_shape", f"{name}_rows"
            stored = index.initializers[_stored(index, weight)]
            set_initializer(graph, shape, np.array([-1, stored.dims[0]], np.int64))
            nodes += [
                helper.make_node("Reshape", [quantizer.input[0], shape], [value], name=value),
                helper.make_node("QuantizeLinear", [value, *quantizer.input[1:]], [f"{value}_q"], name=f"{value}_q"),
                helper.make_node(
                    "DequantizeLinear", [f"{value}_q", *data.input[1:]], [f"{value}_d"], name=f"{value}_d"
                ),
            ]
            flat[quantizer.input[0]] = f"{value}_d"
        like, zero = [f"{name}_like", f"{name}_back"], f"{name}_weight_zero"
        set_initializer(graph, zero, np.zeros(len(scales), np.int8))
        with_zero = [*weight.input[:2], zero]
        set_initializer(graph, f"{name}_n", np.array([len(scales)], np.int64))
        nodes += [
            helper.make_node(
                "DequantizeLinear", [f"{name}_bias", f"{name}_bias_scale", f"{name}_bias_zero"], [f"{name}_c"], axis=0
            ),
            helper.make_node("DequantizeLinear", with_zero, [f"{name}_w"], axis=1),
            helper.make_node("Gemm", [flat[quantizer.input[0]], f"{name}_w", f"{name}_c"], [f"{name}_2d"]),
            helper.make_node("Shape", [quantizer.input[0]], [like[0]], start=0, end=-1),
            helper.make_node("Concat", [like[0], f"{name}_n"], [like[1]], axis=0),
            helper.make_node("Reshape", [f"{name}_2d", like[1]], [add.output[0]], name=f"{name}_3d"),
        ]
        fresh[add.name] = nodes
    _insert(graph, fresh)


def skip_layer_norm(model: onnx.ModelProto) -> None:
    """Residual Add + LayerNormalization as com.microsoft.SkipLayerNormalization."""
    graph, index = model.graph, GraphIndex(model.graph)
    fresh: dict[str, list[onnx.NodeProto]] = {}
    gone = set()
    for norm in graph.node:
        add = index.producer.get(norm.input[0]) if norm.op_type == "LayerNormalization" else None
        if add is None or add.op_type != "Add" or any(name in index.initializers for name in add.input):
            continue
        outputs = [norm.output[0], "", "", add.output[0]]
        epsilon = attribute(norm, "epsilon", 1e-5)
        fresh[add.name] = [
            helper.make_node(
                "SkipLayerNormalization",
                [*add.input, *norm.input[1:3]],
                outputs,
                name=f"{norm.name}_skip",
                domain="com.microsoft",
                epsilon=epsilon,
            )
        ]
        gone.add(norm.name)
    _insert(graph, fresh, gone)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def attention_23(model: onnx.ModelProto) -> None:
    """The standard Attention operator of opset 23."""
    fuse_attention(model, standard=True)


def integer_products(model: onnx.ModelProto) -> None:
    """QLinearMatMul instead of MatMulIntegerToFloat: what a product makes is rounded before its bias is added."""
    _round_outputs(model, [product for product, _, _ in _products(GraphIndex(model.graph))])


def all_integers(model: onnx.ModelProto) -> None:
    """Whatever has an integer kernel: products, attention too, biases, residuals, activations, softmax."""
    ops = ("MatMul", "Add", "Mul", "Sigmoid", "Softmax", "LayerNormalization")
    _round_outputs(model, [node for node in model.graph.node if node.op_type in ops])


def _round_outputs(model: onnx.ModelProto, chosen: Iterable[onnx.NodeProto]) -> None:
    """Round what nodes make, and the constants that they add or multiply with."""
    graph, index = model.graph, GraphIndex(model.graph)
    for name, value in (("grid_scale", np.float32(0.05)), ("grid_zero", np.uint8(128))):
        graph.initializer.append(numpy_helper.from_array(np.array(value), name))  # scalars, or nothing is fused
    fresh: dict[str, list[onnx.NodeProto]] = {}
    for node in chosen:
        readers = index.consumers[node.output[0]]
        if node.output[0] in index.outputs or any(reader.op_type == "QuantizeLinear" for reader in readers):
            continue
        nodes = []
        changed = copy.deepcopy(node)
        for place, name in enumerate(node.input):
            values = index.array(name) if node.op_type in ("Add", "Mul") else None
            if values is not None and values.dtype == np.float32 and values.size > 1:
                set_initializer(graph, f"{name}_grid", np.clip(np.rint(values / 0.05) + 128, 0, 255).astype(np.uint8))
                nodes.append(_dequantize(f"{name}_grid", f"{node.name}_{place}"))
                changed.input[place] = f"{node.name}_{place}"
        name = node.output[0]
        changed.output[0] = f"{name}_raw"
        quantize = helper.make_node(
            "QuantizeLinear", [f"{name}_raw", "grid_scale", "grid_zero"], [f"{name}_grid"], name=f"{name}_grid"
        )
        fresh[node.name] = [*nodes, changed, quantize, _dequantize(f"{name}_grid", name)]
    _insert(graph, fresh)


def _dequantize(integers: str, name: str) -> onnx.NodeProto:
    inputs = [integers, "grid_scale", "grid_zero"]
    return helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}_dequantized")


def _products(index: GraphIndex) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, onnx.NodeProto]]:
    """Each MatMul of dequantised values, and the DequantizeLinear of its data and of its weight."""
    for node in index.graph.node:
        made = [index.producer.get(name) for name in node.input]
        if node.op_type == "MatMul" and all(maker and maker.op_type == "DequantizeLinear" for maker in made):
            yield node, made[0], made[1]


def _stored(index: GraphIndex, weight: onnx.NodeProto) -> str:
    """The initialiser that a weight is dequantised from, through the Cast from int4."""
    cast = index.producer.get(weight.input[0])
    return cast.input[0] if cast else weight.input[0]


def _insert(graph: onnx.GraphProto, fresh: dict[str, list[onnx.NodeProto]], gone: set[str] = frozenset()) -> None:
    nodes = [new for node in graph.node if node.name not in gone for new in fresh.get(node.name, [node])]
    replace_nodes(graph, nodes)
    drop_unused(graph)


def served(model: onnx.ModelProto) -> None:
    """What `--target cpu` writes."""
    compute_pooled_row_only(model)
    separate_gelu(model)
    fuse_attention(model)


def bias_gelu(model: onnx.ModelProto) -> None:
    """What `--target cpu` wrote before `separate_gelu`: onnxruntime makes BiasGelu of it."""
    compute_pooled_row_only(model)
    fuse_attention(model)


def served_gemm(model: onnx.ModelProto) -> None:
    """The bias inside QGemm, in what `--target cpu` writes."""
    served(model)
    gemm_with_bias(model)


def served_biases(model: onnx.ModelProto) -> None:
    """What `--target cpu --set quantization.fused_biases=true` writes."""
    compute_pooled_row_only(model)
    fuse_biases(model)  # before GELU's get a second axis
    separate_gelu(model)
    fuse_attention(model)


VARIANTS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "as quantised (portable, all rows)": lambda model: None,
    "pooled row only": compute_pooled_row_only,
    "attention as one kernel": fuse_attention,
    "both": bias_gelu,
    "both, and GELU apart (target cpu)": served,
    "target cpu, bias inside QGemm": served_gemm,
    "SkipLayerNormalization": skip_layer_norm,
    "Attention of opset 23": attention_23,
    "target cpu, fused biases": served_biases,
    "products to integers (QLinearMatMul)": integer_products,
    "everything in integers": all_integers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fp32", type=Path)
    parser.add_argument("quantized", type=Path, help="made with --target portable, quantization.pooled_row_only=false")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="further bundles, as they are")
    parser.add_argument("--only", default="", help="a regular expression for the names of variants")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    sizes = [int(size) for size in args.batches.split(",")]
    base, quantized = open_bundle(args.fp32), open_bundle(args.quantized)
    beside = [(path, open_bundle(path)) for path in args.beside]
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender("FP32", base.encoders)]
        contenders += [Contender(str(path), made.encoders, made.session_entries) for path, made in beside]
        variants = {name: rewrite for name, rewrite in VARIANTS.items() if re.search(args.only, name)}
        for number, (name, rewrite) in enumerate(variants.items()):
            files = {}
            for tower, path in quantized.encoders.items():
                model = load_graph(path)
                rewrite(model)
                files[tower] = Path(folder) / f"{number}-{tower}.onnx"
                save_graph(model, files[tower])
            contenders.append(Contender(name, files, quantized.session_entries))
        feeds = drawn_feeds(base, sizes, 16)
        towers = measure_latency(contenders, feeds, rounds=args.rounds, threads=args.threads)
    for tower, rows in towers.items():
        print(f"\n| {tower} encoder | {' | '.join(f'batch {size}, ms | faster than FP32' for size in sizes)} |")
        print(f"|---|{'---|---|' * len(sizes)}")
        for row in rows:
            cells = [f"{row.batches[size].median_ms:.1f} | {row.batches[size].speed_up:.2f}x" for size in sizes]
            print(f"| {row.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
