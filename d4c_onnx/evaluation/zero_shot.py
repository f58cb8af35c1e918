"""Zero-shot classification of several bundles on the same labelled images, compared pair by pair."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from d4c_onnx.bundle import Bundle
from d4c_onnx.evaluation.baseline import Baselines, answers_of
from d4c_onnx.evaluation.datasets import LabelledImages
from d4c_onnx.evaluation.intervals import paired_difference
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.results import Accuracy, BundleAccuracy, Versus
from d4c_onnx.runtime.clip_session import ClipSession
from d4c_onnx.vocabulary import templates

_TEXTS = 64  # that go through the text encoder together


@dataclass(frozen=True, slots=True)
class Answers:
    """What one bundle says: unit vectors [N, D] and [K, D], their products [N, K], the best five classes, hits [N]."""

    images: np.ndarray
    texts: np.ndarray
    similarity: np.ndarray
    best: np.ndarray
    hits: np.ndarray


def evaluate_zero_shot(
    bundles: Sequence[Bundle],
    dataset: LabelledImages,
    *,
    batch: int = 100,
    exif_rotation: bool = False,
    provider: str = "cpu",
    threads: int = 0,
    baselines: Baselines[Answers] | None = None,
    on_step: OnStep = silent,
) -> Accuracy:
    """Top-1 and top-5 of each bundle, and how each compares with the first.

    Args:
        bundles: the baseline first (FP32, where there is one).
        dataset: all of its images are used.
        exif_rotation: turn them upright first, as their EXIF entry says.
        baselines: of earlier calls on the same data, where the first bundle may be known.

    Returns:
        In percent and percentage points; rows after the first hold the paired 95 % interval of top-1, agreement of the
        top-1 answers, the mean cosine of each tower's embeddings, and the error of the similarity matrix.
    """

    def ask(bundle: Bundle, count: Callable[[int], None]) -> Answers:
        session = ClipSession(bundle, provider=provider, threads=threads, batch=_TEXTS, exif_rotation=exif_rotation)
        texts = session.embed_labels(dataset.classes, templates())
        images = chain.from_iterable(dataset.batches(batch))
        return _answer(session.embed_images(images, batch, count), texts, dataset.labels)

    answers = answers_of(bundles, len(dataset), ask, baselines, on_step)
    first = next(answers)
    rows = [_row(bundles[0], first, dataset, None)]
    rows += [_row(bundle, seen, dataset, first) for bundle, seen in zip(bundles[1:], answers, strict=True)]
    return Accuracy("zero-shot", len(dataset), tuple(rows), dataset=dataset.name)


def _row(bundle: Bundle, seen: Answers, dataset: LabelledImages, first: Answers | None) -> BundleAccuracy:
    return BundleAccuracy(
        bundle=str(bundle.path),
        top1=100 * float(seen.hits.mean()),
        top5=100 * float((seen.best == dataset.labels[:, None]).any(1).mean()),
        versus_first=None if first is None else _compare(seen, first),
    )


def _answer(images: np.ndarray, texts: np.ndarray, labels: np.ndarray) -> Answers:
    similarity = images @ texts.T
    best = np.argsort(-similarity, axis=1, kind="stable")[:, :5]
    return Answers(images, texts, similarity, best, best[:, 0] == labels)


def _compare(seen: Answers, first: Answers) -> Versus:
    return Versus(
        agreement=100 * float((seen.best[:, 0] == first.best[:, 0]).mean()),
        cosine_image=float((seen.images * first.images).sum(1).mean()),
        cosine_text=float((seen.texts * first.texts).sum(1).mean()),
        similarity_rmse=float(np.sqrt(np.square(seen.similarity - first.similarity).mean())),
        top1_difference=paired_difference(seen.hits, first.hits),
    )
