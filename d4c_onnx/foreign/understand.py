"""Somebody's graph in the forms that our rewrites, plans and finders know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from d4c_onnx.foreign.decomposed import drop_casts, fix_shapes, fuse_gelus, fuse_layer_norms
from d4c_onnx.foreign.layout import fold_moved_weights
from d4c_onnx.foreign.plain_attention import express_attentions
from d4c_onnx.foreign.probe import Probe
from d4c_onnx.graph.model import drop_unused


def understand(model: ir.Model, feeds: Sequence[np.ndarray], context: int | None = None) -> None:
    """Rewrite a tower into our own forms, in place; what is not understood stays as it is.

    Args:
        model: with one input.
        feeds: of different batch sizes and, where it is open, lengths.
        context: positions of the longest text; None for images.
    """
    drop_casts(model)
    fold_moved_weights(model, Probe(model, feeds))
    fuse_layer_norms(model)
    fuse_gelus(model)
    drop_unused(model)
    fix_shapes(model, Probe(model, feeds))
    drop_unused(model)  # what computed shapes also read the values themselves
    express_attentions(model, Probe(model, feeds), context)
    drop_unused(model)
    NameFixPass()(model)
