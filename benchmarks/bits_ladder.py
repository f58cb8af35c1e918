"""Bits against agreement: layers raised to 8 bits one by one, in the order of their error, and whole kinds of layers.

    python benchmarks/bits_ladder.py exported/real-clip --calibration exported/real-clip/calibration-... \\
        --dataset labelled.parquet --results docs/results/bits-ladder.json

Both encoders of an FP32 bundle of transformers are prepared once (rewrites, ranges, what each layer costs); every row
rounds them anew, and the written files answer, executed by onnxruntime. `as asked` is the recipe's w4a8; `out`, `qkv`,
`fc1` and `fc2` are what each block has; `w8` is 8 bits everywhere.
"""

import argparse
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from results import measured_here

from d4c_onnx.bundle import TOKENIZER, Bundle, encoder_size_bytes, open_bundle
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.evaluation.datasets import open_dataset
from d4c_onnx.evaluation.zero_shot import evaluate_zero_shot
from d4c_onnx.graph.attention import find_attentions
from d4c_onnx.graph.layers import linear_source
from d4c_onnx.graph.stored import average_bits
from d4c_onnx.graph.values import dims
from d4c_onnx.quantization.calibration_batches import calibration_readers
from d4c_onnx.quantization.encoder import PreparedEncoder, prepare_encoder, write_encoder
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.sensitivity import RESERVE, LayerCost, measure_costs, spend
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.recipe import QuantizationSection, load_recipe

COLUMNS = (
    ("raised", "on 8 bits", ""),
    ("bits_average", "bits a weight", ".2f"),
    ("bits_image", "image", ".2f"),
    ("bits_text", "text", ".2f"),
    ("megabytes", "MB", ".1f"),
    ("points", "top-1 difference", "+.2f"),
    ("agreement", "agreement %", ".1f"),
    ("cosine_image", "cosine image", ".4f"),
    ("cosine_text", "cosine text", ".4f"),
)
KINDS = ("out", "qkv", "fc1", "fc2")


@dataclass(frozen=True, slots=True)
class Tower:
    """One encoder, ready to be rounded, and what its layers cost."""

    task: EncoderTask
    prepared: PreparedEncoder
    costs: list[LayerCost]

    def kind(self, name: str) -> frozenset[str]:
        """The nodes of a kind of layer, of all blocks."""
        graph = self.prepared.model.graph
        read = [value for entry in find_attentions(graph)[0] for value in (entry.query, entry.key, entry.value)]
        projections = {source.node.name for value in read if (source := linear_source(value)) is not None}
        found: dict[str, set[str]] = {kind: set() for kind in KINDS}
        for layer in self.prepared.exact.plan.layers:
            if layer.first or layer.last:
                continue
            shape = dims(graph.initializers[layer.weight]) or ()
            channels, inputs = shape[layer.channel_axis], shape[1 - layer.channel_axis]
            square = "qkv" if layer.node in projections else "out"
            found[square if channels == inputs else "fc1" if channels > inputs else "fc2"].add(layer.node)
        return frozenset(found[name])


def prepare(bundle: Bundle, args: argparse.Namespace, section: QuantizationSection) -> dict[str, Tower]:
    """Both encoders."""
    dataset = open_calibration_set(args.calibration)
    dataset = replace(dataset, pixel_values=dataset.pixel_values[: args.images])
    towers = {}
    for name, reader in calibration_readers(bundle, dataset).items():
        task = EncoderTask(section, target_of(section), reader, threads=args.threads)
        made = prepare_encoder(bundle.path / name, task)
        costs = measure_costs(name, made.model, made.exact.plan, reader, threads=args.threads)
        towers[name] = Tower(task, made, costs)
    return towers


def choices(
    towers: dict[str, Tower], section: QuantizationSection, budgets: list[float]
) -> list[tuple[str, QuantizationSection, dict[str, frozenset[str]]]]:
    """Per row its name, the section, and the nodes on 8 bits by encoder."""
    costs = [cost for tower in towers.values() for cost in tower.costs]
    rows = [("as asked", section, dict.fromkeys(towers, frozenset()))]
    rows += [(f"by error, {budget:g} bits", section, dict(spend(costs, budget, RESERVE))) for budget in budgets]
    rows += [(f"all {kind}", section, {name: tower.kind(kind) for name, tower in towers.items()}) for kind in KINDS]
    return [*rows, ("w8", section.model_copy(update={"bits": "w8a8"}), dict.fromkeys(towers, frozenset()))]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantise and ask, row by row; the FP32 bundle answers once."""
    bundle, section = open_bundle(args.bundle), load_recipe(None, args.set).quantization
    towers = prepare(bundle, args, section)
    labelled = open_dataset(args.dataset)
    labelled = labelled.select(range(0, len(labelled), max(1, len(labelled) // args.crops)))
    made = []
    for number, (raised, own, nodes) in enumerate(choices(towers, section, args.budgets)):
        folder = args.output / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.tokenizer, folder / TOKENIZER)
        layers = {}
        for name, tower in towers.items():
            task = replace(tower.task, section=own, eight_bit_nodes=nodes[name])
            layers[name] = write_encoder(tower.prepared, folder / name, task).layers
        written = Bundle(folder, bundle.manifest)
        image, text = (average_bits(found) for found in layers.values())
        average = average_bits([layer for found in layers.values() for layer in found])
        size = encoder_size_bytes(written)["total"] / 1e6
        row = {"raised": raised, "bits_average": average, "bits_image": image, "bits_text": text, "megabytes": size}
        made.append((row, written))
        print(row, flush=True)
    found = evaluate_zero_shot([bundle, *(written for _, written in made)], labelled, threads=args.threads)
    for (row, _), answers in zip(made, found.bundles[1:], strict=True):
        versus = answers.versus_first
        assert versus is not None
        assert versus.top1_difference is not None
        row |= {key: getattr(versus, key) for key in ("agreement", "cosine_image", "cosine_text")}
        row |= {"points": versus.top1_difference.points}
        print(row, flush=True)
    return [
        {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()} for row, _ in made
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="in FP32, of transformers")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--dataset", required=True, help="a labelled .parquet")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.5, 5, 6, 7])
    parser.add_argument("--images", type=int, default=None, help="of the calibration set; all without it")
    parser.add_argument("--crops", type=int, default=10**9, help="of the labelled set, evenly spread; all without it")
    parser.add_argument("--set", action="append", default=[], help="a recipe key, such as quantization.group=32")
    parser.add_argument("-o", "--output", type=Path, default=Path("ladder"), help="an empty folder")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--results", type=Path, help="result file to write, such as docs/results/NAME.json")
    arguments = parser.parse_args()
    measured = measure(arguments)
    if arguments.results:
        note = f"{arguments.images or 'all'} calibration images"
        measured_here(measured, threads=arguments.threads, note=note, columns=COLUMNS).write(arguments.results)
