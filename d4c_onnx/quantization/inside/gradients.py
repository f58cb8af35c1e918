"""What an error of a layer's output does to the embedding: second moments of the embedding's gradients.

Let u be a random direction in the space of embeddings and g = d<u, e> / dy, the gradient by one row y of a layer's
output. An error d of that row moves the embedding by a mean square of d^T E[g g^T] d. So H = E[g g^T] says which
outputs of a layer matter, and, off its diagonal, which errors of two outputs cancel each other.

A picture has hundreds of rows, most of which say little: where there are many, some are drawn, each with a probability
that grows with its square, and counted as often as it is rare: the mean is H all the same, for a quarter of the
products of a ViT-S/14 at 224 pixels (Drineas, Kannan and Mahoney 2006).

Source: the output side of YAQA's Kronecker-factored Hessian (Tseng et al., arXiv 2505.22988, section 3), for the
embedding in place of a language model's likelihood.

It needs gradients, and so torch; it is imported when it runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.bfloat16 import multiplies_bfloat16
from d4c_onnx.graph.layers import WeightedLayer
from d4c_onnx.graph.values import attribute, is_op, name_of, nodes_by_name
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.inside.torch_graph import TorchGraph

# Images and prompts whose gradients are taken, which lie evenly over all of them.
_IMAGES, _PROMPTS = 64, 1024

# Gradients in all: of few samples more directions are asked, or H would know a few directions only.
_GRADIENTS = 512

_PIXELS = 2 * 224 * 224  # of the images whose gradients are in memory together

_ROWS = 64  # of each sample's gradients by a layer's rows, how many are multiplied, on average

_LARGEST = 1024  # outputs whose errors are looked at together; more of them fall into blocks


def gradient_moments(
    model: ir.Model,
    layers: Sequence[WeightedLayer],
    reader: CalibrationDataReader,
    on_step: OnStep = silent,
    others: Sequence[ir.Node] = (),
) -> dict[str, np.ndarray]:
    """H of every layer, by its node; of a layer that the embedding does not depend on, none.

    Args:
        model: the float encoder.
        layers: of it.
        reader: rewindable.
        on_step: told `gradients`, how many batches, of how many.
        others: nodes of it whose output's last axis is looked at, too.

    Returns:
        float32 [blocks, outputs, outputs] each, summed over rows: blocks of neighbouring outputs, one for each group of
        a convolution, and of no more than 1,024.

    Raises:
        GraphError: the encoder holds an operator whose gradient is not known here.
    """
    nodes = nodes_by_name(model.graph)
    asked = [*(nodes[layer.node] for layer in layers), *others]
    made = {name_of(node.outputs[0]): node for node in asked}
    encoder = TorchGraph(model.graph)
    moments: dict[str, np.ndarray] = {}
    feeds = _spread(reader)
    directions = -(-_GRADIENTS // sum(map(_samples, feeds)))
    draw = torch.Generator().manual_seed(len(feeds))  # no feed's own seed
    for number, feed in enumerate(feeds):
        for name, gradient in _gradients(encoder, feed, list(made), directions, number):
            node = made[name]
            rows = gradient.movedim(1 if is_op(node, "Conv") else -1, -1).flatten(0, -2)
            found, key = _squared(_drawn(rows, _ROWS * _samples(feed), draw), node), node.name or ""
            moments[key] = moments[key] + found if key in moments else found
        on_step("gradients", number + 1, len(feeds), {})
    return moments


def _gradients(
    encoder: TorchGraph, feed: Mapping[str, np.ndarray], names: Sequence[str], directions: int, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Value by value, the gradients of the embeddings along random directions, float32, direction by direction."""
    draw = torch.Generator().manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
        *leaves, (_, embeds) = encoder.run(feed, names)
    asked = [leaf for _, leaf in leaves]
    for left in reversed(range(directions)):
        direction = torch.randn(embeds.shape, generator=draw).to(embeds.dtype)
        found = torch.autograd.grad(embeds, asked, direction, allow_unused=True, retain_graph=left > 0)
        yield from ((name, part.float()) for (name, _), part in zip(leaves, found, strict=True) if part is not None)


def _drawn(rows: torch.Tensor, count: int, draw: torch.Generator) -> torch.Tensor:
    """At most about `count` of rows [N, channels], so scaled that sums of g g^T have the mean that all of them give."""
    if len(rows) <= count:
        return rows
    squares = rows.square().sum(1)
    share = (squares * (count / squares.sum().clamp(min=torch.finfo(rows.dtype).tiny))).clamp(max=1)
    kept = torch.rand(len(rows), generator=draw) < share
    return rows[kept] * share[kept].rsqrt()[:, None]


def _squared(rows: torch.Tensor, node: ir.Node) -> np.ndarray:
    """Sums of g g^T over rows [N, channels], float32 [blocks, outputs, outputs]."""
    channels = rows.shape[-1]
    blocks = _blocks(channels, attribute(node, "group", 1))
    parts = rows.reshape(-1, blocks, channels // blocks).transpose(0, 1)
    squared: np.ndarray = (parts.mT @ parts).numpy()
    return squared


def _blocks(channels: int, groups: int) -> int:
    """Into how many parts outputs fall: at least the groups of a convolution, and parts that are not too large."""
    blocks = groups
    while channels // blocks > _LARGEST or channels % blocks:
        blocks += groups
    return blocks


def _spread(reader: CalibrationDataReader) -> list[Mapping[str, np.ndarray]]:
    """Feeds that lie evenly over all of a reader's, since prompts come sorted by length; images in other batches."""
    reader.rewind()
    samples = sum(map(_samples, iter(reader.get_next, None)))  # of which no more are kept than are used
    reader.rewind()
    [(name, first)] = reader.get_next().items()
    images = first.ndim == 4
    reader.rewind()
    every = max(1, samples // (_IMAGES if images else _PROMPTS))
    chosen: list[Mapping[str, np.ndarray]] = list(islice(iter(reader.get_next, None), None, None, every))
    if not images:
        return chosen
    pixels = np.concatenate([feed[name] for feed in chosen])
    together = max(1, _PIXELS // (pixels.shape[2] * pixels.shape[3]))
    return [{name: pixels[start : start + together]} for start in range(0, len(pixels), together)]


def _samples(feed: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(feed.values())))
