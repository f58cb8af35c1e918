"""d4c-onnx inspect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from d4c_onnx.cli import options, show
from d4c_onnx.manifest import EncoderRecord, Signature

if TYPE_CHECKING:
    from d4c_onnx.runtime.inspection import InspectedLayer


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@options.output_modes
def command(bundle: Path, as_json: bool, quiet: bool) -> None:
    """Show what BUNDLE holds: each layer's true bits and ranges, and the kernel that onnxruntime runs on a CPU."""
    from d4c_onnx import measure

    with show.stdout_to_stderr(), show.waiting("loading both encoders", quiet or as_json):
        report = measure.inspect_bundle(bundle)
    if as_json:
        show.print_json(report.as_dict())
        return
    for name, encoder in report.encoders.items():
        show.table(f"{name}: {_signature(encoder.io)}", _HEADER, [_row(layer) for layer in encoder.layers])
        click.echo(f"{encoder.summary}; {encoder.weight_bits_average:.2f} bits per weight")
        for reason in dict.fromkeys(layer.reason for layer in encoder.layers if layer.reason):
            count = sum(layer.reason == reason for layer in encoder.layers)
            click.echo(f"  {count} not in int8: {reason}")
        if name in report.records:
            _show_rewrites(report.records[name])
    click.echo(f"{report.weight_bits_average:.2f} bits per MatMul, Gemm and Conv weight over both files")
    if report.minimum_onnxruntime is None:  # in FP32
        return
    click.echo(f"needs onnxruntime {report.minimum_onnxruntime} or newer")
    if any("int8" in layer.activation for encoder in report.encoders.values() for layer in encoder.layers):
        click.echo(
            "CUDA's provider runs int8 products as float products between (de)quantisers: correct, but slower than "
            "FP32. For it, quantize --target cuda --bits w4a16."
        )


def _show_rewrites(record: EncoderRecord) -> None:
    """Which rewrites of the graph applied, and where others did not and why."""
    applied = [f"{entry.name} ({entry.count})" for entry in record.rewrites if entry.count]
    if applied:
        click.echo(f"  rewrites: {', '.join(applied)}")
    for entry in record.rewrites:
        for refusal in entry.refused:
            click.echo(f"  {entry.name} not at {refusal.place}: {refusal.reason}")


_HEADER = ["layer", "op", "weight", "bits", "activation", "range", "weight scales", "kernel"]


def _row(layer: InspectedLayer) -> list[str]:
    ends, scales = layer.activation_range, layer.weight_scales
    return [
        layer.node,
        layer.op,
        "x".join(str(size) for size in layer.shape) or "-",
        f"{layer.bits:g}" if layer.bits else "-",
        layer.activation,
        f"{ends[0]:.3g} .. {ends[1]:.3g}" if ends else "-",
        f"{scales[0]:.2g} .. {scales[1]:.2g}" if scales else "-",
        layer.kernel,
    ]


def _signature(io: Signature) -> str:
    return f"{', '.join(map(str, io.inputs))} -> {', '.join(map(str, io.outputs))}"
