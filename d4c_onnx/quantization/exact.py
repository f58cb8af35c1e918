"""All exact rewrites of the float graph, before anything is rounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from d4c_onnx.calibration.readers import first_batches
from d4c_onnx.graph.model import drop_unused
from d4c_onnx.manifest import RewriteRecord
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rewrites import (
    apply_all,
    dead_start_rows,
    pin_start_token,
    read_by_pooled_row,
    same_answers,
    smooth,
    split_outliers,
)


@dataclass(frozen=True, slots=True)
class RewrittenEncoder:
    """The float graph after all exact rewrites: its plan, and what was done to it."""

    plan: Plan
    smoothed: dict[str, float]
    rewrites: tuple[RewriteRecord, ...]

    def with_widths(self, graph: ir.Graph, task: EncoderTask) -> RewrittenEncoder:
        """The same rewrites, planned anew for the widths of a task."""
        plan = _with_dead_rows(task.plan(graph), self.plan)
        return replace(self, plan=replace(plan, outliers=self.plan.outliers, pooled=self.plan.pooled))


def rewrite_exactly(model: ir.Model, task: EncoderTask) -> RewrittenEncoder:
    """All exact rewrites of the float graph, in place; the plan is that of the rewritten graph."""
    verify = same_answers(first_batches(task.reader, 2)) if task.verify else None
    applied = list(apply_all(task.target.float_rewrites, model, verify))
    plan = task.plan(model.graph)
    plan = replace(
        plan, dead_rows=dead_start_rows(model, plan, task.reader, provider=task.provider, threads=task.threads)
    )
    # float activations need no range: what smoothing takes from theirs it would add to the weights'. A start token that
    # is an outlier is pinned all the same, because it would rule the moments that weights are rounded by.
    smoothed: dict[str, float] = {}
    outliers: dict[str, tuple[int, ...]] = {}
    if not task.config.weights_only:
        symmetric = task.target.symmetric
        smoothed = smooth(
            model, plan, task.reader, task.config, symmetric=symmetric, provider=task.provider, threads=task.threads
        )
        applied.append(RewriteRecord("smoothing", len(smoothed)))
        plan = _with_dead_rows(task.plan(model.graph), plan)
        split, outliers = split_outliers(
            model, plan, task.reader, task.config, symmetric=symmetric, provider=task.provider, threads=task.threads
        )
        applied.append(split.record("outlier channels in float"))
    if plan.dead_rows:
        pinned = pin_start_token(model, task.reader, provider=task.provider, threads=task.threads)
        applied.append(pinned.record("start token pinned"))
    drop_unused(model)
    final = replace(_with_dead_rows(task.plan(model.graph), plan), outliers=outliers)
    if _has_two_terms(task, final):
        final = replace(final, pooled=read_by_pooled_row(model, final))
    return RewrittenEncoder(final, smoothed, tuple(applied))


def _has_two_terms(task: EncoderTask, plan: Plan) -> bool:
    # The published search of ranges, and narrower grids, are for comparing: they stay what they are. Full-range weights
    # need a session that makes uint8 of them, and onnxruntime 1.32 does not load a weight there that two products read.
    comparable = task.config.activation_bits == 8 and task.config.ranges != "mse-plain"
    return task.target.two_terms and comparable and plan.reduce_range


def _with_dead_rows(plan: Plan, before: Plan) -> Plan:
    """Smoothing may have put a Mul behind an activation: the layer then reads another value, dead in the same row."""
    dead = {layer.weight for layer in before.layers if layer.data in before.dead_rows}
    return replace(plan, dead_rows=frozenset(layer.data for layer in plan.layers if layer.weight in dead))
