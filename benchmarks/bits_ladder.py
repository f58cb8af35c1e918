"""Bits against agreement: layers raised to 8 bits one by one, in the order of their error, and whole kinds of layers.

    python benchmarks/bits_ladder.py exported/real-clip --calibration exported/real-clip/calibration-... \\
        --dataset labelled.parquet --results docs/results/bits-ladder.json

Both encoders of an FP32 bundle of transformers are prepared once (rewrites, ranges, what each layer costs); every row
rounds them anew, and the written files answer, executed by onnxruntime. `as asked` is the recipe's w4a8; `out`, `qkv`,
`fc1` and `fc2` are what each block has; `w8` is 8 bits everywhere.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from results import VERSUS_FP32, measured_here

from d4c_onnx.bundle import TOKENIZER, Bundle, encoder_size_bytes, open_bundle
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.evaluation.datasets import LabelledImages, open_dataset
from d4c_onnx.graph.attention import find_attentions
from d4c_onnx.graph.layers import linear_source
from d4c_onnx.graph.stored import average_bits
from d4c_onnx.graph.values import dims
from d4c_onnx.quantization.calibration_batches import calibration_readers
from d4c_onnx.quantization.encoder import write_encoder
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.prepared import PreparedEncoder, prepare_encoder
from d4c_onnx.quantization.sensitivity import RESERVE, LayerCost, measure_costs, spend
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.recipe import QuantizationConfig
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime import ClipSession
from d4c_onnx.vocabulary import templates

COLUMNS = (
    ("raised", "on 8 bits", ""),
    ("bits_average", "bits a weight", ".2f"),
    ("bits_image", "image", ".2f"),
    ("bits_text", "text", ".2f"),
    ("megabytes", "MB", ".1f"),
    ("points", "top-1 difference", "+.2f"),
    *VERSUS_FP32,
)
KINDS = ("out", "qkv", "fc1", "fc2")


@dataclass(frozen=True, slots=True)
class Tower:
    """One encoder, ready to be rounded, and what its layers cost."""

    task: EncoderTask
    prepared: PreparedEncoder
    costs: list[LayerCost]

    def kind(self, name: str) -> dict[str, int]:
        """8 bits for the nodes of a kind of layer, of all blocks."""
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
        return dict.fromkeys(found[name], 8)


@dataclass(frozen=True, slots=True)
class Choice:
    """One row: its name, the config, and by encoder the widths of nodes that have another one."""

    name: str
    config: QuantizationConfig
    widths: Mapping[str, Mapping[str, int]]


def prepare(bundle: Bundle, args: argparse.Namespace, config: QuantizationConfig) -> dict[str, Tower]:
    """Both encoders."""
    dataset = open_calibration_set(args.calibration)
    dataset = replace(dataset, pixel_values=dataset.pixel_values[: args.images])
    towers = {}
    for name, reader in calibration_readers(bundle, dataset).items():
        task = EncoderTask(config, target_of(config), reader, threads=args.threads)
        made = prepare_encoder(bundle.path / name, task)
        costs = measure_costs(name, made.model, made.exact.plan, reader, threads=args.threads)
        towers[name] = Tower(task, made, costs)
    return towers


def choices(towers: dict[str, Tower], config: QuantizationConfig, budgets: list[float]) -> list[Choice]:
    """Every row; what bounds the others comes first."""
    costs = [cost for tower in towers.values() for cost in tower.costs]
    none: dict[str, dict[str, int]] = {name: {} for name in towers}
    by_error = [Choice(f"by error, {budget:g} bits", config, spend(costs, budget, RESERVE)) for budget in budgets]
    kinds = [
        Choice(f"all {kind}", config, {name: tower.kind(kind) for name, tower in towers.items()}) for kind in KINDS
    ]
    ends = [Choice("as asked", config, none), Choice("w8", config.model_copy(update={"bits": "w8a8"}), none)]
    return [*ends, *by_error, *kinds]


@dataclass(frozen=True, slots=True)
class Answers:
    """What a bundle says of the labelled set: unit vectors [N, D] and [K, D], and the best class [N]."""

    images: np.ndarray
    texts: np.ndarray

    @property
    def best(self) -> np.ndarray:
        return (self.images @ self.texts.T).argmax(1)


def ask(bundle: Bundle, labelled: LabelledImages, threads: int) -> Answers:
    """Every crop, and every class in the first template."""
    session = ClipSession(bundle, threads=threads, batch=50)
    texts = session.embed_labels(labelled.classes, templates()[:1])
    return Answers(session.embed_images(chain.from_iterable(labelled.batches(50))), texts)


def write(bundle: Bundle, towers: dict[str, Tower], choice: Choice, folder: Path) -> tuple[Bundle, dict[str, Any]]:
    """Both files of a choice, and how large they are."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle.tokenizer, folder / TOKENIZER)
    layers = {}
    for name, tower in towers.items():
        task = replace(tower.task, config=choice.config, widths=choice.widths[name])
        layers[name] = write_encoder(tower.prepared, folder / name, task).layers
    written = Bundle(folder, bundle.manifest)
    image, text = (average_bits(found) for found in layers.values())
    return written, {
        "raised": choice.name,
        "bits_average": average_bits([layer for found in layers.values() for layer in found]),
        "bits_image": image,
        "bits_text": text,
        "megabytes": encoder_size_bytes(written)["total"] / 1e6,
    }


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Quantise and ask, row by row."""
    bundle, config = open_bundle(args.bundle), load_recipe(None, args.set).quantization
    labelled = open_dataset(args.dataset)
    labelled = labelled.select(range(0, len(labelled), max(1, len(labelled) // args.crops)))
    towers = prepare(bundle, args, config)
    exact = ask(bundle, labelled, args.threads)
    right = 100 * float((exact.best == labelled.labels).mean())
    for number, choice in enumerate(choices(towers, config, args.budgets)):
        written, row = write(bundle, towers, choice, args.output / str(number))
        seen = ask(written, labelled, args.threads)
        row |= {
            "points": 100 * float((seen.best == labelled.labels).mean()) - right,
            "agreement": 100 * float((seen.best == exact.best).mean()),
            "cosine_image": float((seen.images * exact.images).sum(1).mean()),
            "cosine_text": float((seen.texts * exact.texts).sum(1).mean()),
        }
        yield {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="in FP32, of transformers")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--dataset", required=True, help="a labelled .parquet")
    parser.add_argument("--budgets", type=float, nargs="+", default=[5, 5.5, 6, 7, 4.5])
    parser.add_argument("--images", type=int, default=None, help="of the calibration set; all without it")
    parser.add_argument("--crops", type=int, default=1000, help="of the labelled set, evenly spread")
    parser.add_argument("--set", action="append", default=[], help="a recipe key, such as quantization.group=32")
    parser.add_argument("-o", "--output", type=Path, default=Path("ladder"), help="an empty folder")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--results", type=Path, help="result file to write, such as docs/results/NAME.json")
    arguments = parser.parse_args()
    note = f"{arguments.images or 'all'} calibration images, {arguments.crops} crops"
    measured: list[dict[str, Any]] = []
    for found in measure(arguments):
        print(found, flush=True)
        measured.append(found)
        if arguments.results:  # an hour of work is not lost
            shown = sorted(measured, key=lambda row: row["bits_average"])
            measured_here(shown, threads=arguments.threads, note=note, columns=COLUMNS).write(arguments.results)
