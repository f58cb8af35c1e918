"""Zero-shot classification of several bundles on the same labelled images, compared pair by pair."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from d4c_onnx.bundle import Bundle
from d4c_onnx.evaluation.datasets import LabelledImages
from d4c_onnx.evaluation.embed import BundleEncoders, class_embeddings
from d4c_onnx.evaluation.intervals import paired_difference
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.vocabulary import templates


def evaluate_zero_shot(
    bundles: Sequence[Bundle],
    dataset: LabelledImages,
    *,
    batch: int = 100,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> dict[str, Any]:
    """Top-1 and top-5 of each bundle, and how each compares with the first.

    Args:
        bundles: the baseline first (FP32, where there is one).
        dataset: all of its images are used.

    Returns:
        `kind`, `dataset`, `images`, and `bundles`: one entry each, in percent and percentage points; entries after
        the first also hold `versus_first` with the paired 95 % interval of top-1, agreement of the top-1 answers, the
        mean cosine of each tower's embeddings, and the root mean square error of the similarity matrix.
    """
    total, done = len(dataset) * len(bundles), 0
    rows: list[dict[str, Any]] = []
    first: dict[str, np.ndarray] = {}
    for bundle in bundles:
        encoders = BundleEncoders(bundle, provider, threads)

        def count(images: int) -> None:
            nonlocal done
            done += images
            on_step("evaluate", done, total, {})

        texts = class_embeddings(encoders, dataset.classes, templates())
        images = encoders.image_batches(dataset.batches(batch), count)
        similarity = images @ texts.T
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(5, len(dataset.classes))]
        seen = {
            "images": images,
            "texts": texts,
            "similarity": similarity,
            "top1": order[:, 0],
            "hits": order[:, 0] == dataset.labels,
        }
        row: dict[str, Any] = {
            "bundle": str(bundle.path),
            "top1": 100 * float(seen["hits"].mean()),
            "top5": 100 * float((order == dataset.labels[:, None]).any(1).mean()),
        }
        if first:
            row["versus_first"] = _compare(seen, first)
        else:
            first = seen
        rows.append(row)
    return {"kind": "zero-shot", "dataset": dataset.name, "images": len(dataset), "bundles": rows}


def _compare(seen: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "top1_difference": asdict(paired_difference(seen["hits"], first["hits"])),
        "agreement": 100 * float((seen["top1"] == first["top1"]).mean()),
        "cosine_image": float((seen["images"] * first["images"]).sum(1).mean()),
        "cosine_text": float((seen["texts"] * first["texts"]).sum(1).mean()),
        "similarity_rmse": float(np.sqrt(np.square(seen["similarity"] - first["similarity"]).mean())),
    }
