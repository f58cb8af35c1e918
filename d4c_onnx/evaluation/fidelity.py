"""Label-free fidelity: how near a quantised bundle's answers stay to FP32 on images and prompts it never saw.

For models without an embedded labelled set. It measures agreement with FP32 on synthetic input, not accuracy.
"""

from collections.abc import Callable, Sequence

import numpy as np

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.errors import CalibrationError
from d4c_onnx.evaluation.baseline import Baselines, answers_of
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.results import Accuracy, BundleAccuracy, Versus
from d4c_onnx.runtime.clip_session import ClipSession

_TEXTS = 64  # that go through the text encoder together
Pair = tuple[np.ndarray, np.ndarray]  # unit vectors of images and of texts


def check_held_out(images: int, prompts: int) -> None:
    """Refuse a calibration set that holds so many out.

    Raises:
        CalibrationError: there is nothing to look at.
    """
    if not (images and prompts):
        raise CalibrationError("the calibration set holds nothing out. Raise synthesis.held_out and text.held_out.")


def evaluate_fidelity(
    bundles: Sequence[Bundle],
    calibration: CalibrationSet,
    *,
    batch: int = 16,
    provider: str = "cpu",
    threads: int = 0,
    baselines: Baselines[Pair] | None = None,
    on_step: OnStep = silent,
) -> Accuracy:
    """Compare each bundle with the first on the set's held-out images and prompts.

    Args:
        baselines: of earlier calls on the same set, where the first bundle may be known.

    Returns:
        Rows after the first hold the mean and least cosine per tower, agreement of the best prompt per image in
        percent, and the error of the similarity matrix.

    Raises:
        CalibrationError: the set holds nothing out.
    """
    images, texts = calibration.held_out, list(calibration.held_out_texts)
    check_held_out(len(images), len(texts))

    def ask(bundle: Bundle, count: Callable[[int], None]) -> Pair:
        session = ClipSession(bundle, provider=provider, threads=threads)
        pixels = session.embed_pixels((images[i : i + batch] for i in range(0, len(images), batch)), count)
        return pixels, session.embed_texts(texts, _TEXTS)

    answers = answers_of(bundles, len(images), ask, baselines, on_step)
    first = next(answers)
    compared = [None, *(_compare(seen, first) for seen in answers)]
    rows = [BundleAccuracy(str(one.path), versus_first=versus) for one, versus in zip(bundles, compared, strict=True)]
    return Accuracy("fidelity", len(images), tuple(rows), prompts=len(texts))


def _compare(seen: Pair, first: Pair) -> Versus:
    similarity, baseline = seen[0] @ seen[1].T, first[0] @ first[1].T
    image, text = ((mine * reference).sum(1) for mine, reference in zip(seen, first, strict=True))
    return Versus(
        agreement=100 * float((similarity.argmax(1) == baseline.argmax(1)).mean()),
        cosine_image=float(image.mean()),
        cosine_text=float(text.mean()),
        similarity_rmse=float(np.sqrt(np.square(similarity - baseline).mean())),
        cosine_image_least=float(image.min()),
        cosine_text_least=float(text.min()),
    )
