"""d4c-onnx inspect."""

from pathlib import Path
from typing import Any

import click

from d4c_onnx.cli import options, show


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@options.output_modes
def command(bundle: Path, as_json: bool, quiet: bool) -> None:
    """Show what BUNDLE holds: each layer's true bits and ranges, and the kernel that onnxruntime runs on a CPU."""
    from d4c_onnx import measure

    with show.stdout_to_stderr(), show.waiting("loading both encoders", quiet or as_json):
        report = measure.inspect_bundle(bundle)
    if as_json:
        show.print_json(report)
        return
    for name, encoder in report["encoders"].items():
        show.table(f"{name}: {_signature(encoder)}", _HEADER, [_row(layer) for layer in encoder["layers"]])
        click.echo(f"{encoder['summary']}; {encoder['weight_bits_average']:.2f} bits per weight")
        for reason in dict.fromkeys(layer["reason"] for layer in encoder["layers"] if layer["reason"]):
            count = sum(layer["reason"] == reason for layer in encoder["layers"])
            click.echo(f"  {count} not in int8: {reason}")
    click.echo(f"{report['weight_bits_average']:.2f} bits per MatMul, Gemm and Conv weight over both files")
    if report["minimum_onnxruntime"] is None:  # in FP32
        return
    click.echo(f"needs onnxruntime {report['minimum_onnxruntime']} or newer")
    layers = [layer for encoder in report["encoders"].values() for layer in encoder["layers"]]
    if any("int8" in layer["activation"] for layer in layers):
        click.echo(
            "CUDA's provider runs int8 products as float products between (de)quantisers: correct, but slower than "
            "FP32. For it, quantize --target cuda --bits w4a16."
        )


_HEADER = ["layer", "op", "weight", "bits", "activation", "range", "weight scales", "kernel"]


def _row(layer: dict[str, Any]) -> list[str]:
    ends, scales = layer["activation_range"], layer["weight_scales"]
    return [
        layer["node"],
        layer["op"],
        "x".join(str(size) for size in layer["shape"]) or "-",
        str(layer["bits"] or "-"),
        layer["activation"],
        f"{ends[0]:.3g} .. {ends[1]:.3g}" if ends else "-",
        f"{scales[0]:.2g} .. {scales[1]:.2g}" if scales else "-",
        layer["kernel"],
    ]


def _signature(encoder: dict[str, Any]) -> str:
    def shown(value: dict[str, Any]) -> str:
        return f"{value['name']} {value['dtype']} [{', '.join(str(size) for size in value['shape'])}]"

    values = [", ".join(shown(value) for value in encoder["io"][side]) for side in ("inputs", "outputs")]
    return " -> ".join(values)
