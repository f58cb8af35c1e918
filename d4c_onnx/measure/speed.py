"""How fast bundles run, side by side and beside what onnxruntime's own tools make of the same encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.evaluation.benchmark_report import BenchmarkReport, FailedPeer
from d4c_onnx.files import temporary_folder
from d4c_onnx.measure.machine import Machine
from d4c_onnx.progress import OnStep, silent

if TYPE_CHECKING:
    import numpy as np

    from d4c_onnx.evaluation.latency import Contender


def benchmark_bundles(
    paths: Sequence[str | Path],
    *,
    batches: Sequence[int] = (1, 8, 16, 32),
    sequence: int = 16,
    rounds: int = 15,
    peers: bool = False,
    picture: str | Path | None = None,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> BenchmarkReport:
    """Time bundles side by side in one run, the first one being the baseline.

    Args:
        batches: batch sizes.
        sequence: token ids per text, where the text encoder takes any length.
        rounds: timed runs of each bundle at each batch size.
        peers: also build and time what onnxruntime's own tools make of the first bundle.
        picture: a .png or .svg file for the speed-ups; needs matplotlib.

    Raises:
        BundleError: a folder is not a bundle, or onnxruntime cannot load a file.
    """
    from d4c_onnx.evaluation.latency import describe_machine, drawn_feeds, measure_latency
    from d4c_onnx.evaluation.picture import check_picture, draw_benchmark
    from d4c_onnx.runtime.session import resolve_provider

    machine = machine or Machine(provider="cpu")
    provider = resolve_provider(machine.provider)
    bundles = [open_bundle(path) for path in paths]
    _check_inputs(bundles)
    if picture is not None:
        check_picture(Path(picture))
    contenders = _contenders(bundles)
    failed: list[FailedPeer] = []
    feeds = drawn_feeds(bundles[0], batches, sequence)
    with temporary_folder() as folder:
        if peers:
            built, failed = _build_peers(bundles[0], folder, feeds, provider)
            contenders += built
        towers = measure_latency(
            contenders, feeds, rounds=rounds, provider=provider, threads=machine.threads, on_step=on_step
        )
    report = BenchmarkReport(describe_machine(provider, machine.threads), rounds, towers, failed)
    if picture is not None:
        draw_benchmark(report, Path(picture))
    return report


def _check_inputs(bundles: Sequence[Bundle]) -> None:
    """Refuse bundles that are not what their manifests say, or cannot be fed alike."""
    from d4c_onnx.graph.door import check_graph

    for bundle in bundles:
        for file in bundle.encoders.values():
            check_graph(file, bundle.manifest.io[file.name])

    def takes(bundle: Bundle) -> tuple[object, ...]:
        tokenizer = bundle.manifest.tokenizer
        return bundle.manifest.preprocess.size, tokenizer.context_length, tokenizer.dynamic_sequence

    for bundle in bundles[1:]:
        if takes(bundle) != takes(bundles[0]):
            raise BundleError(
                f"{bundle.path}: takes other input than {bundles[0].path} (image size, or length of texts). "
                "Time each by itself."
            )


def _contenders(bundles: Sequence[Bundle]) -> list[Contender]:
    """One each, by model and bits; by path, too, where these do not tell them apart."""
    from d4c_onnx.evaluation.latency import Contender

    labels = [f"{bundle.model_name} {bundle.manifest.bits}" for bundle in bundles]
    return [
        Contender(
            label if labels.count(label) == 1 else f"{label} ({bundle.path})", bundle.encoders, bundle.session_entries
        )
        for label, bundle in zip(labels, bundles, strict=True)
    ]


def _build_peers(
    bundle: Bundle, folder: Path, feeds: Mapping[str, Mapping[int, np.ndarray]], provider: str
) -> tuple[list[Contender], list[FailedPeer]]:
    """What onnxruntime's own tools make of a bundle's encoders, and what they fail at."""
    from d4c_onnx.evaluation.latency import Contender
    from d4c_onnx.evaluation.peers import build_peers, loads

    found: dict[str, dict[str, Path]] = {}
    failed = []
    for tower, path in bundle.encoders.items():
        batch = feeds[tower][min(feeds[tower])]
        for name, made in build_peers(path, folder, bundle.manifest.io[path.name].inputs[0].name, batch).items():
            reason = made if isinstance(made, str) else loads(made, provider)
            if isinstance(made, Path) and not reason:
                found.setdefault(name, {})[tower] = made
            else:
                failed.append(FailedPeer(name, tower, reason))
    return [Contender(name, encoders) for name, encoders in found.items()], failed
