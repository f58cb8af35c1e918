"""A target: what an execution provider wants of a quantised graph, as ordered rewrites and forms of storage."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from importlib import import_module

import onnx_ir as ir

from d4c_onnx import choices
from d4c_onnx.graph.forms import FORMS, NATIVE, Form
from d4c_onnx.graph.opsets import lower_opset
from d4c_onnx.quantization import rewrites
from d4c_onnx.quantization.rewrites import Rewrite
from d4c_onnx.quantization.storage import TokenTable
from d4c_onnx.recipe import QuantizationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(choices.TargetTraits):
    """The form of a file for one way of serving it.

    Attributes:
        float_rewrites: of the float graph, in order, before anything is measured or rounded; exact.
        served_rewrites: of the QDQ graph, in order; the answers stay the same.
        int4: how 4-bit weights without groups lie in the file.
        token_table: how the text encoder's does.
    """

    float_rewrites: tuple[Rewrite, ...]
    served_rewrites: tuple[Rewrite, ...]
    int4: Form
    token_table: TokenTable

    @property
    def grouped(self) -> bool:
        """Whether 4-bit weights may be paths through a trellis: compilers know nothing of those."""
        return self.int4 is not NATIVE

    def label(self, model: ir.Model) -> None:
        """Label a finished graph with the opset that its files are to have, in place."""
        if self.lowest_opset:
            lower_opset(model)


def _rewrites(names: tuple[str, ...]) -> tuple[Rewrite, ...]:
    files = [name.split(".") for name in names]
    return tuple(getattr(import_module(f"{rewrites.__name__}.{module}"), value) for module, value in files)


def _made(row: choices.TargetChoice) -> Target:
    return Target(
        **{trait.name: getattr(row, trait.name) for trait in fields(choices.TargetTraits)},
        float_rewrites=_rewrites(row.float_rewrites),
        served_rewrites=_rewrites(row.served_rewrites),
        int4=FORMS[row.int4],
        token_table=TokenTable(row.token_table),
    )


# A word's value: the table is `choices.TARGETS`, which recipes read, too.
TARGETS: dict[str, Target] = {name: _made(row) for name, row in choices.TARGETS.items()}

_UNPACKED = "weights are unpacked to float16 when the file is loaded, and run as the FP16 bundle does"


def target_of(config: QuantizationConfig) -> Target:
    """The recipe's target, with the keys that overrule it, and what to expect of both."""
    target = TARGETS[config.target]
    if config.reduce_range is not None:
        target = replace(target, reduce_range=config.reduce_range)
    return replace(target, note=_note(config, target))


def _note(config: QuantizationConfig, target: Target) -> str:
    """What to expect of the form that was chosen."""
    if config.weights_only:
        return _UNPACKED
    note = target.note
    if config.group_size and config.weight_bits == 4 and not target.grouped:
        note += "; 4-bit weights have one scale a channel there, and no groups"
    compiled = target.int4 is NATIVE and config.weight_bits == 4
    if compiled:
        note += "; onnxruntime's CPU provider runs 4-bit layers of this file in float"
    if target.symmetric and not compiled:
        note += "; on x86 onnxruntime computes in float whatever reads an int8 activation that several nodes read"
    return note
