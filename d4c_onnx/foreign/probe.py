"""What sizes a graph computes with, seen by running it: exporters write them out, each in its own operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import BundleError
from d4c_onnx.graph.values import array, is_op, maker, name_of, node, reads
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.untrusted_json import short

_SHOWN = "_shape_shown"  # behind a value's name: its shape, as an output of the probed copy


class Probe:
    """Values of a graph on a few feeds, which differ in batch size and, where it is open, in length."""

    def __init__(self, model: ir.Model, feeds: Sequence[np.ndarray]) -> None:
        """Args: model: with one input; feeds: of different sizes, none with two equal ones."""
        self._model, self.feeds = model, feeds

    def look(self, values: Iterable[ir.Value], shapes_of: Iterable[ir.Value]) -> list[dict[str, np.ndarray]]:
        """For each feed the named values themselves, and shapes of others under `shape_name`.

        Raises:
            BundleError: the graph does not run on a feed.
        """
        copy = self._model.clone()
        made = {name_of(value): value for entry in copy.graph for value in entry.outputs}
        made |= {name_of(value): value for value in copy.graph.inputs}
        names = list(dict.fromkeys(name_of(value) for value in values if array(value) is None))
        shown = list(dict.fromkeys(name_of(value) for value in shapes_of))
        for name in shown:
            copy.graph.append(node("Shape", [made[name]], shape_name(name)))
        outputs = [*names, *map(shape_name, shown)]
        if not outputs:
            return [{} for _ in self.feeds]
        session = EncoderSession.of_model(copy, outputs=outputs)
        try:
            return [session.run_all(feed) for feed in self.feeds]
        except BundleError as error:
            reason = short(error.__cause__ or error)
            raise BundleError(f"the graph does not run on batches of another size ({reason}).") from error


def shape_name(name: str) -> str:
    """Under which name `Probe.look` gives a value's shape."""
    return f"{name}{_SHOWN}"


def sizes_only(value: ir.Value | None, known: dict[ir.Value, bool] | None = None) -> bool:
    """Whether a value depends on constants and on sizes alone, never on what is in a tensor."""
    known = {} if known is None else known
    if value is None or array(value) is not None:
        return True
    if value not in known:
        made = maker(value)
        known[value] = made is not None and (
            is_op(made, "Shape", "Size") or all(sizes_only(entry, known) for entry in reads(made))
        )
    return known[value]


def known_value(value: ir.Value | None, seen: dict[str, np.ndarray]) -> Any:
    """A constant's values, or those that a probe has seen; None where there are neither."""
    found = array(value)
    return found if found is not None or value is None else seen.get(name_of(value))
