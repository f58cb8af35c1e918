"""Both towers in one file, as Hugging Face's exports of a CLIP have them: similarities beside the embeddings."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import BundleError
from d4c_onnx.graph.model import opset_of, raise_opset
from d4c_onnx.graph.values import node, set_constant
from d4c_onnx.manifest import ModelInfo


def combine(image: ir.Model, text: ir.Model, info: ModelInfo) -> ir.Model:
    """One graph of two, its inputs and outputs named and ordered as in exports of transformers.

        input_ids, pixel_values -> logits_per_image, logits_per_text, text_embeds, image_embeds

        logits_per_image = logit_scale * image_embeds @ text_embeds.T + logit_bias      [images, texts]

    Args:
        image, text: the towers; both are used up.
        info: has the scale and the bias.

    Raises:
        BundleError: embeddings are not unit vectors, or the model has no scale: there would be no similarities.
    """
    if not info.normalized or info.logit_scale is None:
        why = "has no logit scale" if info.normalized else "gives embeddings that are not normalised (export --raw)"
        raise BundleError(f"{info.name}: the bundle {why}, so that a file of both towers has no similarities to give.")
    for tower, model in (("image", image), ("text", text)):
        _prefix(model, tower)
    raise_opset(image, opset_of(text))
    image.ir_version = max(image.ir_version, text.ir_version)
    for domain, version in text.graph.opset_imports.items():
        image.graph.opset_imports.setdefault(domain, version)
    _move(text.graph, image.graph)
    pixels, ids = image.graph.inputs
    _name(pixels, "pixel_values", "image_batch")
    _name(ids, "input_ids", "text_batch")
    images, texts = image.graph.outputs
    _name(images, "image_embeds", "image_batch")
    _name(texts, "text_embeds", "text_batch")
    logits = _logits(image.graph, images, texts, info)
    image.graph.inputs.clear()
    image.graph.inputs.extend([ids, pixels])
    image.graph.outputs.clear()
    image.graph.outputs.extend([*logits, texts, images])
    return image


def _prefix(model: ir.Model, tower: str) -> None:
    """Names that the other tower does not have; inputs and outputs get theirs later."""
    graph = model.graph
    constants = list(graph.initializers.values())
    graph.initializers.clear()
    for value in (*graph.inputs, *constants, *(value for entry in graph for value in entry.outputs)):
        if value.name:
            value.name = f"{tower}/{value.name}"
    for value in constants:
        graph.register_initializer(value)
    for entry in graph:
        entry.name = f"{tower}/{entry.name}"


def _move(source: ir.Graph, target: ir.Graph) -> None:
    """Everything of one graph behind another."""
    inputs, outputs, constants = list(source.inputs), list(source.outputs), list(source.initializers.values())
    nodes = list(source)
    source.inputs.clear()
    source.outputs.clear()
    source.initializers.clear()
    source.remove(nodes)
    for value in constants:
        target.register_initializer(value)
    target.extend(nodes)
    target.inputs.extend(inputs)
    target.outputs.extend(outputs)


def _name(value: ir.Value, name: str, batch: str) -> None:
    value.name = name
    value.shape = ir.Shape([batch, *list(value.shape or ())[1:]])


def _logits(graph: ir.Graph, images: ir.Value, texts: ir.Value, info: ModelInfo) -> tuple[ir.Value, ir.Value]:
    """What both similarity outputs are, their nodes appended."""
    scale = set_constant(graph, "logit_scale", np.array(info.logit_scale, np.float32))
    columns = node("Transpose", [texts], "text_columns", attributes={"perm": [1, 0]})
    cosines = node("MatMul", [images, columns.outputs[0]], "cosines")
    scaled = node("Mul", [cosines.outputs[0], scale], "scaled_cosines")
    nodes = [columns, cosines, scaled]
    if info.logit_bias is not None:
        bias = set_constant(graph, "logit_bias", np.array(info.logit_bias, np.float32))
        nodes.append(node("Add", [scaled.outputs[0], bias], "biased_cosines"))
    per_image = nodes[-1].outputs[0]
    nodes.append(node("Transpose", [per_image], "logits_per_text", attributes={"perm": [1, 0]}))
    per_text = nodes[-1].outputs[0]
    graph.extend(nodes)
    per_image.name = "logits_per_image"
    for value, axes in ((per_image, ("image_batch", "text_batch")), (per_text, ("text_batch", "image_batch"))):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(axes)
    return per_image, per_text
