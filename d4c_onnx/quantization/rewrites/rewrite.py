"""What a rewrite is: a value with a name, what it needs, and a function that says what it did and what not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from d4c_onnx.graph.model import drop_unused
from d4c_onnx.manifest import Refusal, RewriteRecord

# Told each rewrite's name, the model before it and the model after it; raises where they differ.
Verify = Callable[[str, ir.Model, ir.Model], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What a rewrite did.

    Attributes:
        count: how many places it changed.
        refused: the places that look like its own and were left alone, with the reason.
    """

    count: int = 0
    refused: tuple[Refusal, ...] = ()

    def record(self, name: str) -> RewriteRecord:
        """For the manifest."""
        return RewriteRecord(name, self.count, self.refused)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """One rewrite of a graph, in place. Unless it says otherwise, the answers stay the same.

    Attributes:
        name: for manifests and reports.
        needs: the graph that it is for.
        function: the rewrite itself; a place whose form it does not know must be left untouched, and said so.
    """

    name: str
    needs: str
    function: Callable[[ir.Model], Result]

    def apply(self, model: ir.Model) -> Result:
        """Rewrite a model in place, and drop what nothing reads any more."""
        result = self.function(model)
        if result.count:
            drop_unused(model)
        return result


def apply_all(rewrites: Iterable[Rewrite], model: ir.Model, verify: Verify | None = None) -> tuple[RewriteRecord, ...]:
    """Apply rewrites in order, in place; what each did and what it left alone.

    Args:
        verify: shown the model before and after each; see `rewrites.answers_check`.
    """
    applied = []
    for rewrite in rewrites:
        before = model.clone() if verify is not None else None
        applied.append(rewrite.apply(model).record(rewrite.name))
        if verify is not None and before is not None:
            verify(rewrite.name, before, model)
    return tuple(applied)
