"""One encoder, float file in, quantised file out."""

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.graph.bits import LayerBits, layer_bits
from d4c_onnx.graph.files import load_graph, save_graph, set_metadata, strip_notes
from d4c_onnx.graph.index import GraphIndex, drop_unused
from d4c_onnx.manifest import EncoderRecord, LayerRecord, RewriteRecord
from d4c_onnx.memory import release_freed
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.deployment import (
    Target,
    compute_pooled_row_only,
    convert_to_half,
    convolve_pools,
    fuse_attention,
    fuse_biases,
    fuse_qkv,
    separate_gelu,
    target_of,
)
from d4c_onnx.quantization.folding import (
    dead_start_rows,
    fold_batch_norms,
    fold_gates,
    pin_start_token,
    skip_idle_pools,
    smooth,
    unfold_patches,
)
from d4c_onnx.quantization.layout import (
    MINIMUM_ORT,
    clip_activations,
    find_token_table,
    omit_zero_points,
    store_int4,
    store_scaled,
    store_token_table,
)
from d4c_onnx.quantization.plan import Plan, make_plan
from d4c_onnx.quantization.qdq import quantize_file, save_placed
from d4c_onnx.quantization.ranges import collect_ranges
from d4c_onnx.quantization.rounding import QuantizedWeight, make_rounding
from d4c_onnx.quantization.weights import place_biases, round_weights
from d4c_onnx.recipe import QuantizationSection


@dataclass(frozen=True, slots=True)
class EncoderReport:
    """What was written.

    Attributes:
        layers: each weighted layer with its true bits.
        token_table_bits: None without a token table, or where it stays float.
        activations: how many are quantised.
        smoothed: alpha per smoothed place, by the node that makes the activation.
        start_token_pinned: whether the start token's keys and values are constants of the file.
        pooled_row_only: whether the last block computes one row only.
        fused_attention: how many attentions are one operator.
        fused_biases: how many products are one with their bias, and QDQ no more.
        fused_qkv: how many products read what others read, and are one with them.
        minimum_onnxruntime: the oldest release that loads the file.
    """

    layers: tuple[LayerBits, ...]
    token_table_bits: int | None
    activations: int
    smoothed: dict[str, float]
    start_token_pinned: bool
    pooled_row_only: bool
    fused_attention: int
    fused_biases: int
    fused_qkv: int
    minimum_onnxruntime: str

    def record(self) -> EncoderRecord:
        """For the manifest."""
        counts = ("pooled_row_only", "fused_attention", "fused_biases", "fused_qkv")
        return EncoderRecord(
            layers={layer.node: LayerRecord(layer.op, layer.bits, layer.elements) for layer in self.layers},
            token_table_bits=self.token_table_bits,
            quantized_activations=self.activations,
            smoothing_alpha=self.smoothed,
            start_token_pinned=self.start_token_pinned,
            minimum_onnxruntime=self.minimum_onnxruntime,
            rewrites=tuple(RewriteRecord(name, int(getattr(self, name))) for name in counts),
        )


def quantize_encoder(
    source: Path,
    target: Path,
    reader: CalibrationDataReader,
    section: QuantizationSection,
    *,
    raised: Collection[str] = (),
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> EncoderReport:
    """Quantise one encoder file.

    Args:
        source: the float encoder.
        target: where the quantised one goes (a staged path).
        reader: rewindable calibration data for the encoder's input.
        section: widths, rounding, ranges.
        raised: nodes whose weights get 8 bits whatever the recipe's width.
        provider, threads: of the calibration runs.
        on_step: told where it is: fold, calibrate, round, write.

    Raises:
        GraphError: the graph cannot be quantised.
        CalibrationError: an activation is not finite.
        RecipeError: keys contradict the target.
    """
    on_step("fold", 0, 1, {})
    model = load_graph(source)
    strip_notes(model)
    plan, smoothed = fold(model, reader, section, raised, provider=provider, threads=threads)
    release_freed()
    on_step("fold", 1, 1, {})
    ranges = collect_ranges(model, plan, reader, section, provider=provider, threads=threads, on_step=on_step)
    release_freed()
    rounded = round_weights(model, plan, ranges, reader, section, provider=provider, threads=threads, on_step=on_step)
    on_step("write", 0, 1, {})
    weights = rounded.weights
    place_biases(model, rounded.biases)
    form = target_of(section)
    metadata = {entry.key: entry.value for entry in model.metadata_props} | {"quantization": section.bits}
    if section.weights_only:
        quantized, served = _in_half(model, plan, weights, section)
    else:
        with tempfile.TemporaryDirectory() as folder:
            placed = Path(folder) / "float.onnx"
            save_placed(model, plan, weights, placed)
            del model  # quantize_static loads the file again, several times over: a large encoder needs the room
            release_freed()
            quantized = quantize_file(placed, plan, weights, ranges, reader, form)
        strip_notes(quantized)
        clip_activations(quantized, ranges)
        served = _served(quantized, section)
        served["fused_qkv"] = _lay_out(quantized, weights, form)
    table_bits = _store_table(quantized, section, form)
    set_metadata(quantized, metadata)
    save_graph(quantized, target, limit_bytes=0 if section.external_data else None)
    on_step("write", 1, 1, {})
    layouts: set[str | None] = {None}
    if form.standard_attention and served["fused_attention"]:
        layouts.add("attention")
    if any(weight.num_bits == 4 for weight in weights.values()):
        layouts.add(form.int4_layout)
    if table_bits == 4 and form.token_table == "folded":
        layouts.add("cast")
    return EncoderReport(
        tuple(layer_bits(quantized)),
        table_bits,
        len(ranges),
        smoothed,
        bool(plan.dead_rows),
        minimum_onnxruntime=max(MINIMUM_ORT[layout] for layout in layouts),
        **served,
    )


def _served(model: onnx.ModelProto, section: QuantizationSection) -> dict[str, Any]:
    """Rewrite a QDQ graph for serving, in place; what the report says of that."""
    one_row = section.pooled_row_only and compute_pooled_row_only(model)
    form = target_of(section)
    biases = fuse_biases(model) if form.fused_biases and form.int4_layout != "native" else 0
    if form.separate_gelu:
        separate_gelu(model)
    one_operator = (form.fused_attention or form.standard_attention) and section.attention == "float"
    attentions = fuse_attention(model, standard=form.standard_attention) if one_operator else 0
    return {"pooled_row_only": one_row, "fused_attention": attentions, "fused_biases": biases}


def _in_half(
    model: onnx.ModelProto, plan: Plan, weights: Mapping[str, QuantizedWeight], section: QuantizationSection
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Weights only: the float16 graph, whose weights are unpacked when it is loaded, and what the report says of it."""
    one_row = section.pooled_row_only and compute_pooled_row_only(model)
    half, fused = convert_to_half(model, target_of(section))
    store_scaled(half, {layer.weight: (weights[layer.weight], layer.channel_axis) for layer in plan.layers})
    return half, {"pooled_row_only": one_row, "fused_attention": fused, "fused_biases": 0, "fused_qkv": 0}


def _lay_out(quantized: onnx.ModelProto, weights: Mapping[str, QuantizedWeight], form: Target) -> int:
    """Store 4-bit weights in 4 bits, in place, as the target wants them; how many products were joined before."""
    narrow = [f"{name}_quantized" for name, weight in weights.items() if weight.num_bits == 4]
    pools: list[str] = []
    joined: dict[str, str] = {}
    if not form.weight_zero_points:
        omit_zero_points(quantized, [f"{name}_quantized" for name in weights])
    if form.int4_layout != "native":  # there nothing is multiplied as int8
        pools = convolve_pools(quantized) if form.convolved_pools else []
        joined = fuse_qkv(quantized, frozenset(narrow)) if form.fused_qkv else {}
    store_int4(quantized, [*(joined.get(name, name) for name in narrow), *pools] if narrow else [], form.int4_layout)
    return len(joined)


def _store_table(model: onnx.ModelProto, section: QuantizationSection, form: Target) -> int | None:
    """Store the token table in integers, in place; its bits, or None where there is none or it stays as it is."""
    table = None if form.token_table == "float" else find_token_table(model.graph)
    if table is None:
        return None
    gather, name = table
    rows = np.asarray(GraphIndex(model.graph).constant(name), np.float32)
    halves = form.token_table == "folded" or rows.shape[1] % 2 == 0
    bits = section.table_bits if halves else 8
    rounded = make_rounding("nearest").round(rows, bits)
    if form.token_table == "folded":
        store_scaled(model, {name: (rounded, 0)})
    else:
        store_token_table(model, gather, name, rounded)
    return bits


def fold(
    model: onnx.ModelProto,
    reader: CalibrationDataReader,
    section: QuantizationSection,
    raised: Collection[str] = (),
    *,
    provider: str = "cpu",
    threads: int = 0,
) -> tuple[Plan, dict[str, float]]:
    """All exact rewrites, in place; returns the plan of the rewritten graph and the smoothing that was chosen."""
    fold_batch_norms(model)
    skip_idle_pools(model)
    fold_gates(model)
    if target_of(section).patch_product:
        unfold_patches(model)
    plan = make_plan(model.graph, section, raised)
    dead_rows = dead_start_rows(model, plan, reader, section, provider=provider, threads=threads)
    plan = replace(plan, dead_rows=dead_rows)
    # float activations need no range: what smoothing takes from theirs it would add to the weights'. A start token that
    # is an outlier is pinned all the same, because it would rule the moments that weights are rounded by.
    smoothed = {} if section.weights_only else smooth(model, plan, reader, section, provider=provider, threads=threads)
    if plan.dead_rows:
        pin_start_token(model, plan, reader, provider=provider, threads=threads)
    drop_unused(model.graph)
    # smoothing may have put a Mul behind an activation: the layer then reads another value
    dead = {layer.weight for layer in plan.layers if layer.data in plan.dead_rows}
    final = make_plan(model.graph, section, raised)
    return replace(final, dead_rows=frozenset(layer.data for layer in final.layers if layer.weight in dead)), smoothed
