"""One tower of a file: which input and output are its own, under the names and types that a bundle has.

A file with both towers is cut: a tower's output is one that nothing but the tower's own inputs leads to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import ModelError
from d4c_onnx.graph.model import drop_unused
from d4c_onnx.graph.values import ancestors, name_of, node, prepend, set_constant, set_scalar, values_by_name
from d4c_onnx.untrusted_json import quoted

# What exporters call the embedding, the surest first; a tower may give out hidden states beside it.
_EMBEDDINGS = {
    "image": ("image_embeds", "image_embeddings", "image_embedding", "image_features"),
    "text": ("text_embeds", "text_embeddings", "text_embedding", "text_features"),
}
_EITHER = ("sentence_embedding", "embeds", "embeddings", "embedding", "features", "pooler_output", "output")
_NAMES = {"image": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


@dataclass(frozen=True, slots=True)
class Original:
    """How a tower's file is fed, before anything is rewritten.

    Attributes:
        path: of the file.
        inputs: what it takes, by what it is: `pixels`, or `ids` and perhaps `mask`, `type` and `position`.
        dtypes: numpy's name of the type of each of them.
        output: the embedding.
        alone: whether the file takes nothing else, such as the other tower's.
        shared_positions: whether it takes positions as [1, length], for the whole batch.
    """

    path: Path
    inputs: dict[str, str]
    dtypes: dict[str, str]
    output: str
    alone: bool
    shared_positions: bool = False


@dataclass(frozen=True, slots=True)
class ForeignTower:
    """A tower cut out of its file; its input and output have a bundle's names.

    Attributes:
        model: takes what `original` does, until `feed_alone` has taken the other inputs away.
        original: how the file itself is fed.
        others: what the tower takes beside its pixels or ids, by what it is.
    """

    model: ir.Model
    original: Original
    others: dict[str, ir.Value]

    @property
    def main(self) -> ir.Value:
        """pixel_values or input_ids."""
        return self.model.graph.inputs[0]


def cut_tower(model: ir.Model, kind: str, path: Path, output: str | None = None) -> ForeignTower:
    """Leave one tower of a graph, in place.

    Args:
        kind: image or text.
        path: of its file, for messages.
        output: the embedding's name, where the user gives it.

    Raises:
        ModelError: the inputs or the output cannot be told, or do not leave the batch open.
    """
    graph = model.graph
    inputs = _inputs(graph, kind, path)
    chosen = _output(graph, kind, set(inputs.values()), path, output)
    original = Original(
        path,
        {what: name_of(value) for what, value in inputs.items()},
        {what: value.dtype.numpy().name if value.dtype else "" for what, value in inputs.items()},
        name_of(chosen),
        alone=set(graph.inputs) == set(inputs.values()),
        shared_positions="position" in inputs and next(iter(inputs["position"].shape or (None,))) == 1,
    )
    graph.outputs.clear()
    graph.outputs.append(chosen)
    drop_unused(model)
    used = ancestors([chosen])
    graph.inputs.clear()
    graph.inputs.extend(value for value in inputs.values() if value in used)
    main = graph.inputs[0]
    for value, name in ((main, _NAMES[kind][0]), (chosen, _NAMES[kind][1])):
        _rename(graph, value, name)
    sizes = list(main.shape or ())
    if sizes and isinstance(sizes[0], int):
        raise ModelError(f"{path}: takes batches of {sizes[0]} only. Export it with a dynamic batch.")
    _as_int64(graph, main)
    others = {what: value for what, value in inputs.items() if value in used and value is not main}
    return ForeignTower(model, original, others)


def feed_alone(tower: ForeignTower, pad_id: int | None) -> None:
    """Let a text tower take ids alone, in place: every token counts, or every one but the padding; the first is at 0.

    Args:
        pad_id: what is no token; None: nothing.
    """
    graph, ids = tower.model.graph, tower.main
    for what, value in tower.others.items():
        dtype = value.dtype or ir.DataType.INT64
        sizes = node("Shape", [ids], f"{what}_sizes")
        nodes = [sizes]
        if what == "mask" and pad_id is not None:
            pad = set_constant(graph, "padding_id", np.array(pad_id, np.int64))
            same = node("Equal", [ids, pad], f"{what}_padding")
            real = node("Not", [same.outputs[0]], f"{what}_tokens")
            made = node("Cast", [real.outputs[0]], f"{what}_of_ids", attributes={"to": int(dtype)})
            nodes = [same, real, made]
        elif what == "position":
            nodes += _positions(graph, sizes.outputs[0], dtype, tower.original.shared_positions)
            made = nodes[-1]
        else:
            fill = ir.tensor(np.array([1 if what == "mask" else 0], dtype.numpy()))
            made = node("ConstantOfShape", [sizes.outputs[0]], f"{what}_of_ids", attributes={"value": fill})
            nodes.append(made)
        prepend(graph, nodes)
        value.replace_all_uses_with(made.outputs[0])
        graph.inputs.remove(value)
    tower.others.clear()


def _positions(graph: ir.Graph, sizes: ir.Value, dtype: ir.DataType, shared: bool) -> list[ir.Node]:
    """0, 1, ... for each text, or once for all of them."""
    zero, one, axis = (
        set_scalar(graph, f"position_{what}", number) for what, number in (("zero", 0), ("one", 1), ("axis", 1))
    )
    length = node("Gather", [sizes, axis], "position_length")
    places = node("Range", [zero, length.outputs[0], one], "position_places")
    shape = set_constant(graph, "position_shape", np.array([1, 1], np.int64)) if shared else sizes
    rows = node("Expand", [places.outputs[0], shape], "position_rows")
    cast = node("Cast", [rows.outputs[0]], "position_of_ids", attributes={"to": int(dtype)})
    return [length, places, rows, cast]


def _inputs(graph: ir.Graph, kind: str, path: Path) -> dict[str, ir.Value]:
    """What the tower takes, by what it is; its pixels or ids come first."""
    if kind == "image":
        pixels = [value for value in graph.inputs if value.dtype == ir.DataType.FLOAT and _rank(value) in (4, None)]
        if len(pixels) != 1:
            raise ModelError(f"{path}: has {len(pixels)} inputs of float32 images, not one ({_listed(graph.inputs)}).")
        return {"pixels": pixels[0]}
    found: dict[str, ir.Value] = {}
    for value in graph.inputs:
        if value.dtype not in (*_INTEGERS, ir.DataType.BOOL) or _rank(value) not in (2, None):
            continue
        name = name_of(value).lower()
        what = next((word for word in ("mask", "type", "position") if word in name), "ids")
        if what in found:
            raise ModelError(f"{path}: cannot tell its inputs of texts apart ({_listed(graph.inputs)}).")
        found[what] = value
    if "ids" not in found:
        raise ModelError(f"{path}: has no input of token ids ({_listed(graph.inputs)}).")
    return {"ids": found.pop("ids"), **found}


def _output(graph: ir.Graph, kind: str, inputs: set[ir.Value], path: Path, name: str | None) -> ir.Value:
    given = set(graph.inputs)
    own = [value for value in graph.outputs if (ancestors([value]) & given) and (ancestors([value]) & given) <= inputs]
    if name is not None:
        named = [value for value in own if value.name == name]
        if not named:
            raise ModelError(
                f"--{kind}-output {quoted(name)}: {path} has no such output of the {kind} tower alone "
                f"({_listed(graph.outputs)})."
            )
        return named[0]
    flat = [value for value in own if value.dtype in (ir.DataType.FLOAT, None) and _rank(value) in (2, None)]
    if len(flat) == 1:
        return flat[0]
    for known in (*_EMBEDDINGS[kind], *_EITHER):
        for value in flat:
            if value.name == known:
                return value
    why = "several outputs could be" if flat else "no output [batch, width] is"
    raise ModelError(
        f"{path}: {why} the {kind} embedding ({_listed(graph.outputs)}). Name one with --{kind}-output NAME."
    )


def _as_int64(graph: ir.Graph, ids: ir.Value) -> None:
    """Token ids are int64 in a bundle; a file that takes int32 gets a Cast."""
    if ids.dtype != ir.DataType.INT32:
        return
    cast = node("Cast", [ids], "input_ids_int32", attributes={"to": int(ir.DataType.INT32)})
    ids.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, ids)
    prepend(graph, [cast])
    ids.dtype = ir.DataType.INT64


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    other = values_by_name(graph).get(name)
    if other is value:
        return
    if other is not None:
        other.name = f"{name}_inside"
    value.name = name


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _listed(values: Iterable[ir.Value]) -> str:
    shown = [f"{name_of(value)} {list(value.shape) if value.shape else '?'}" for value in values]
    return quoted(", ".join(shown))
