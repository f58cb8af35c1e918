"""What a bundle's graph must be before anybody looks into it: as its manifest says, of numbers, and sound."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.model import load_model, signature_of
from d4c_onnx.manifest import Signature
from d4c_onnx.untrusted_json import quoted, short

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_MEND = "Export or quantise the bundle again."


def check_graph(path: Path, told: Signature) -> ir.Model:
    """A bundle's encoder, which somebody else may have written, read and looked at.

    Args:
        told: what the manifest says of it.

    Raises:
        GraphError: it takes or gives something else, or a weight is no number. Infinities are let through: masks of
            attention are made of them.
    """
    model = load_model(path)
    found = signature_of(model)
    if difference := told.difference(found.inputs, found.outputs):
        raise GraphError(f"{path}: {difference}. {_MEND}")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATS:
            continue
        try:
            broken = bool(np.isnan(tensor.numpy()).any())
        except Exception as error:  # sizes that the bytes do not have
            raise GraphError(f"{path}: cannot read {quoted(value.name)} ({short(error)}). {_MEND}") from error
        if broken:
            raise GraphError(f"{path}: {quoted(value.name)} holds NaN. {_MEND}")
    return model


def check_source(path: Path, told: Signature) -> None:
    """As `check_graph`, of a float graph that is going to be taken apart: it keeps ONNX's rules, too.

    Raises:
        GraphError: see there; or it breaks a rule: a value that nobody makes, say.
    """
    check_graph(path, told)
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker raises several kinds
        raise GraphError(f"{path}: breaks ONNX's rules ({short(error)}). {_MEND}") from error
