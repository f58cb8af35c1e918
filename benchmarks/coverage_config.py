"""One config of open_clip with random weights through everything; what `benchmarks/coverage.py` forks a process for.

Writes FOLDER/record.json anew after each step, so that a process that was stopped says how far it came. Every file that
it makes is in FOLDER.
"""

import contextlib
import io
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from text_towers import options_of
from tokenizer_kinds import AWKWARD

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import D4CError
from d4c_onnx.files import write_json
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.quantize_report import QuantizeReport
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer

WIDTHS = ("w8a8", "w4a8")
BATCHES = (1, 5)
# Coverage, not accuracy: as few images as every step can do with. Prompts are short, and of 16 a random text tower's
# weights learn too little for a text of two words.
CALIBRATION = (
    "synthesis.method=noise",
    "synthesis.images=4",
    "synthesis.held_out=2",
    "synthesis.batch=2",
    "text.prompts=192",
    "text.held_out=4",
    "evaluation.dataset=fidelity",
)
_SAME_IN_A_BATCH = 2e-3  # float sums in another order may round an activation the other way
_TEXTS = {
    "short": ["a cat", "a dog", "red", "two words", "the sea"],
    "long": [f"a photo of a {word} " * 3 for word in ("cat", "dog", "red house", "river", "boat")],
}
_WORDS = ("cat", "dog", "red", "house", "river", "boat", "two", "photo", "a", "the", "of", "small", "old", "blue")


class Record:
    """What is known of a config so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"steps": {}}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """A step's processor time and peak of memory; what it found out goes into the dictionary that is yielded."""
        self._write(at=name)
        _forget_peak()
        start, told = time.process_time(), dict[str, Any]()
        yield told
        cost = {"seconds": round(time.process_time() - start, 1), "peak_gb": round(_peak_bytes() / 1e9, 2)}
        self.found["steps"][name] = cost
        self._write(at="", **told)

    def _write(self, **more: Any) -> None:
        self.found |= more
        write_json(self.path, self.found)

    def end(self, reason: str) -> None:
        """The last word: why the config is not covered, or nothing."""
        self._write(reason=reason)


def measure(
    name: str,
    folder: Path,
    record: Record,
    *,
    blocks: int | None = None,
    rounding: str = "auto",
    widths: Sequence[str] = WIDTHS,
) -> list[str]:
    """All steps of a config.

    Args:
        name: open_clip's.
        folder: for all files.
        record: what is found goes there.
        blocks: the most that a tower has; None: as published.
        rounding, widths: the recipe's.

    Returns:
        What fell short, a sentence each.

    Raises:
        D4CError: the library refuses, or a check of its own failed.
    """
    output, options = folder / "bundles", options_of(name, folder, blocks)
    settings = [*CALIBRATION, f"quantization.rounding={rounding}"]
    recipe = load_recipe(None, settings)
    given: dict[str, Any] = {"pretrained": "random", "options": options}
    with record.step("export") as told:
        bundle = pipeline.export_bundle(name, output, recipe, **given)
        assert bundle.manifest.parity_max_abs_difference is not None
        told["parity"] = dict(bundle.manifest.parity_max_abs_difference)
        told["dynamic"] = bundle.manifest.tokenizer.dynamic_sequence
    with record.step("inputs") as told:
        told |= {"tokenizer": wrong_texts(name, bundle, options), "pixels": wrong_images(name, bundle)}
    short = [told[what] for what in ("tokenizer", "pixels") if told[what]]
    with record.step("calibrate"):
        calibration, _ = pipeline.synthesize_calibration_set(name, recipe, output=output, **given)
    for bits in widths:
        asked = load_recipe(None, [*settings, f"quantization.bits={bits}"])
        with record.step(bits) as told:
            report = pipeline.quantize_bundle(str(bundle.path), asked, output=output, calibration=calibration)
            told[bits] = census(report)
        with record.step(f"run {bits}") as told:
            wrong, cosine = run_files(bundle, open_bundle(report.bundle))
            told[bits] = record.found[bits] | {"cosine": cosine}
        short += [f"{bits}: {sentence}" for sentence in wrong]
        share = told[bits]["int8"] / told[bits]["products"]
        if share < 0.9:
            short.append(f"{bits}: {share:.0%} of the weight products in int8")
    return short


def wrong_texts(name: str, bundle: Bundle, options: ModelOptions) -> str:
    """Which awkward texts get other ids from the bundle than from open_clip's own tokenizer; nothing is good."""
    if not bundle.manifest.tokenizer.has_file:
        return f"no tokenizer.json: {bundle.manifest.tokenizer.cleaning}"
    text = open_clip.get_model_config(name)["text_cfg"]
    context = bundle.manifest.model.context_length
    if options.tokenizer is None:
        own: Any = open_clip.get_tokenizer(name)
    else:
        own = HFTokenizer(str(options.tokenizer), context_length=context, **text.get("tokenizer_kwargs", {}))
    texts = list(AWKWARD)
    expected, ids = own(texts, context_length=context).numpy(), TextTokenizer(bundle.tokenizer)(texts)
    padding = bundle.manifest.tokenizer.pad_id or 0
    ids = np.pad(ids, [(0, 0), (0, expected.shape[1] - ids.shape[1])], constant_values=padding)
    wrong = [text for text, one, other in zip(texts, ids, expected, strict=True) if not np.array_equal(one, other)]
    return f"{len(wrong)} of {len(texts)} texts get other ids, first {wrong[0][:40]!r}" if wrong else ""


def wrong_images(name: str, bundle: Bundle) -> str:
    """Which odd images become other pixels than by open_clip's own transform; nothing is good."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    published = open_clip.get_pretrained_cfg(name, tags[0]) if tags else {}
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    merged = merge_preprocess_dict(PreprocessCfg(), published) | {"size": size}
    own = image_transform_v2(PreprocessCfg(**merged), is_train=False)
    wrong = []
    for kind, image in odd_images().items():
        with warnings.catch_warnings(action="ignore"):  # pillow's, of a palette's transparency
            expected = own(image.copy()).numpy()
        if not np.array_equal(preprocess_image(image, bundle.manifest.preprocess), expected):
            wrong.append(kind)
    return f"other pixels of {', '.join(wrong)}" if wrong else ""


def odd_images() -> dict[str, Image.Image]:
    """A photograph's size, a cut-out, a palette, two colours, grey, and a strip."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((410, 290))
    cut_out = photo.copy()
    cut_out.putalpha(Image.fromarray(rng.integers(0, 256, (290, 410), dtype=np.uint8)))
    other = {"palette": photo.quantize(32), "1-bit": photo.convert("1"), "grey": photo.convert("L")}
    return {"RGB": photo, "RGBA": cut_out, **other, "a strip": photo.resize((600, 7))}


def census(report: QuantizeReport) -> dict[str, Any]:
    """Sizes, and how many products with a stored weight onnxruntime runs in int8."""
    bundle = open_bundle(report.bundle, verify=False)
    layers = [
        layer
        for path in bundle.encoders.values()
        for layer in inspect_encoder(path, bundle.session_entries).layers
        if layer.shape
    ]
    reasons = sorted({f"{layer.op}: {layer.reason}" for layer in layers if not layer.int8})
    return {
        "ratio": report.size_ratio["total"],
        "mb": round(report.size_bytes.quantized["total"] / 1e6, 1),
        "bits": report.weight_bits_average,
        "int8": sum(layer.int8 for layer in layers),
        "products": len(layers),
        "float": reasons[:3],
    }


def run_files(fp32: Bundle, quantized: Bundle) -> tuple[list[str], float]:
    """Run both written files at each batch size, and at two lengths where the sequence is dynamic.

    Returns:
        What is wrong with the answers, and the least cosine to FP32.
    """
    rng = np.random.default_rng(1)
    images = rng.standard_normal((max(BATCHES), 3, *fp32.manifest.preprocess.size), dtype=np.float32)
    tokenizer = TextTokenizer(fp32.tokenizer)
    feeds = [("image", "", images), *(("text", f", {length}", tokenizer(texts)) for length, texts in _TEXTS.items())]
    wrong, least = [], 1.0
    for tower, kind, feed in feeds:
        float_session, session = _sessions(fp32, quantized, tower)
        answers = {batch: session.run(feed[:batch]) for batch in BATCHES}
        expected = float_session.run(feed)
        for batch, answer in answers.items():
            if not (np.isfinite(answer).all() and np.allclose(np.linalg.norm(answer, axis=1), 1, atol=1e-3)):
                wrong.append(f"{tower}{kind}, batch {batch}: no unit vectors")
        if np.abs(answers[1][0] - answers[max(BATCHES)][0]).max() > _SAME_IN_A_BATCH:
            wrong.append(f"{tower}{kind}: other answers in a batch of {max(BATCHES)} than alone")
        least = min(least, float(_cosines(answers[max(BATCHES)], expected).min()))
    return wrong, round(least, 4)


def mean_cosines(fp32: Bundle, quantized: Bundle) -> dict[str, float]:
    """To FP32 by tower, over 64 images and over 64 texts: what no single answer decides."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((64, 3, *fp32.manifest.preprocess.size), dtype=np.float32)
    texts = [" ".join(rng.choice(_WORDS, size)) for size in rng.integers(1, 6, 64)]
    means = {}
    for tower, feed in (("image", images), ("text", TextTokenizer(fp32.tokenizer)(texts))):
        expected, answers = (session.run(feed) for session in _sessions(fp32, quantized, tower))
        means[tower] = float(_cosines(answers, expected).mean())
    return means


def _sessions(fp32: Bundle, quantized: Bundle, tower: str) -> tuple[EncoderSession, EncoderSession]:
    own = EncoderSession(quantized.encoders[tower], entries=quantized.session_entries)
    return EncoderSession(fp32.encoders[tower]), own


def _cosines(answers: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of unit vectors."""
    cosines: np.ndarray = (answers * expected).sum(1)
    return cosines


def _forget_peak() -> None:
    """Let the kernel count the peak anew, where it can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """The most resident memory since `_forget_peak`; 0 where nobody counts."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def run(name: str, folder: Path, configs: Path | None, **given: Any) -> None:
    """Measure a config into `folder`/record.json, whatever becomes of it.

    Args:
        name, folder: as `measure`.
        configs: a folder of further open_clip configs.
        given: the rest of what `measure` takes.

    Raises:
        Exception: what is none of the library's own errors, with its traceback.
    """
    if configs is not None:
        open_clip.add_model_config(configs)
    record = Record(folder / "record.json")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            short = measure(name, folder, record, **given)
    except D4CError as error:
        record.end(str(error))
    except MemoryError:
        record.end("no memory left under the limit")
    except Exception as error:
        record.end(f"{type(error).__name__}: {error}")
        raise  # with its traceback, on stderr
    else:
        record.end("; ".join(short))
