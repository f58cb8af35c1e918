"""Tracing one tower with torch's dynamo exporter."""

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.model import clear_notes, drop_unused

# 18 is the dynamo exporter's own floor and holds LayerNormalization; Gelu needs 20.
BASE_OPSET, GELU_OPSET = 18, 20
_GELUS = ("GELU", "GELUTanh", "GELUActivation")  # timm's and Hugging Face's are classes of their own


def trace_tower(
    tower: nn.Module, example: torch.Tensor, input_name: str, output_name: str, max_sequence: int | None = None
) -> ir.Model:
    """Export a tower with a dynamic batch, and a dynamic sequence when `max_sequence` is given.

    Args:
        tower: in eval mode, one tensor in, one tensor out.
        example: a batch of at least 2 (a batch of 1 would be specialised away).
        max_sequence: the context length when axis 1 may vary.

    Raises:
        GraphError: torch cannot trace the tower.
    """
    dynamic: dict[int, object] = {0: torch.export.Dim("batch", min=1, max=65535)}
    if max_sequence is not None:
        dynamic[1] = torch.export.Dim("sequence", min=2, max=max_sequence)
    gelu = any(isinstance(part, nn.GELU) or type(part).__name__ in _GELUS for part in tower.modules())
    try:
        with _quiet():
            program = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                input_names=[input_name],
                output_names=[output_name],
                dynamic_shapes=(dynamic,),
                opset_version=GELU_OPSET if gelu else BASE_OPSET,
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps anything a model does
        raise GraphError(f"{type(tower).__name__}: torch cannot export it ({str(error)[:400]}).") from error
    if program is None:
        raise GraphError(f"{type(tower).__name__}: torch's exporter returned nothing.")
    model = program.model
    clear_notes(model)
    drop_unused(model)
    name_dimensions(model)
    return model


def name_dimensions(model: ir.Model) -> None:
    """Give the dynamic axes of inputs and outputs the names that serving stacks show: batch, sequence."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        names = [
            size if isinstance(size, int) else ("batch", "sequence")[min(axis, 1)]
            for axis, size in enumerate(value.shape or ())
        ]
        value.shape = ir.Shape(names)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about its own progress; errors reach the user as GraphError."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")}
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        sys.stdout.flush()
