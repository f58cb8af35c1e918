"""The encoders of a bundle out of somebody's towers, written and compared with their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER
from d4c_onnx.errors import BundleError, CheckFailed, ModelError
from d4c_onnx.foreign.decomposed import holds_quick_gelu
from d4c_onnx.foreign.opening import ForeignFiles
from d4c_onnx.foreign.original import OriginalTower, check_same
from d4c_onnx.foreign.texts import PROMPTS, Texts, texts_of
from d4c_onnx.foreign.tower import ForeignTower, feed_alone
from d4c_onnx.foreign.understand import understand
from d4c_onnx.graph.model import save_model, set_metadata, signature_of
from d4c_onnx.manifest import Preprocess, Signature, TokenizerInfo
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.trial import trial_pixels

_BATCHES = (1, 2, 3)

Batch = tuple[np.ndarray, np.ndarray | None]  # what both are fed, and the mask that the file gets beside ids


@dataclass(frozen=True, slots=True)
class Written:
    """An encoder on disk.

    Attributes:
        signature: what it takes and gives.
        difference: the largest between its unit vectors and the file's.
        normalized: whether its embeddings have length 1.
        quick_gelu: whether it runs QuickGELU.
    """

    signature: Signature
    difference: float
    normalized: bool
    quick_gelu: bool


def write_image_encoder(
    tower: ForeignTower, preprocess: Preprocess, stage: Path, notes: Mapping[str, str], seed: int
) -> Written:
    """Write and check the image encoder.

    Args:
        stage: the bundle's folder.
        notes: what the file says of itself.
        seed: of the random images.

    Raises:
        CheckFailed: it answers otherwise than the file.
    """
    rng = np.random.default_rng(seed)
    batches = [rng.standard_normal((batch, 3, *preprocess.size), dtype=np.float32) for batch in _BATCHES]
    feeds: list[Batch] = [(batch, None) for batch in (*batches, trial_pixels(preprocess))]
    asked = OriginalTower(tower.original)
    return _understood(tower, asked, stage / IMAGE_ENCODER, notes, feeds, lambda model: understand(model, batches[1:]))


def write_text_encoder(
    tower: ForeignTower, files: ForeignFiles, stage: Path, notes: Mapping[str, str]
) -> tuple[Written, Texts, TokenizerInfo]:
    """Write and check tokenizer and text encoder.

    Raises:
        ModelError: nobody says how it takes texts.
        CheckFailed: it answers otherwise than the file.
    """
    asked = OriginalTower(tower.original)
    texts = texts_of(tower, asked, tokenizer=files.tokenizer, context=files.context_length, pad=files.pad_token)
    feed_alone(tower, texts.pad_id if texts.masked else None)
    tower.main.shape = ir.Shape(["batch", "sequence" if texts.dynamic else texts.context])
    tokenizer = texts.write(stage / TOKENIZER)
    sizes = _two_sizes(texts)
    written = _understood(
        tower,
        asked,
        stage / TEXT_ENCODER,
        notes,
        _text_batches(texts),
        lambda model: understand(model, sizes, texts.context),
    )
    return written, texts, tokenizer


def check_widths(image: Written, text: Written) -> None:
    """Raises: ModelError: the towers' embeddings are not of one width."""
    widths = [tower.signature.outputs[0].shape[-1] for tower in (image, text)]
    if widths[0] != widths[1]:
        raise ModelError(
            f"the image embedding has {widths[0]} values, the text embedding {widths[1]}: they are not of one CLIP, or "
            "an output is the wrong one. Name the embeddings with --image-output and --text-output."
        )


def _two_sizes(texts: Texts) -> list[np.ndarray]:
    """Ids of two batch sizes and, where it is open, lengths; none of them equal to another."""
    longest = texts.context
    lengths = (longest, longest) if not texts.dynamic or longest < 6 else (longest, longest - 1)
    return [texts.ids(PROMPTS[:batch], longest)[:, :length] for batch, length in zip((2, 3), lengths, strict=True)]


def _text_batches(texts: Texts) -> list[Batch]:
    """Prompts of several lengths together, a few, one alone, and padded to the context length."""
    fed = [texts.ids(some) for some in (PROMPTS, PROMPTS[:2], PROMPTS[2:3])] + [texts.ids(PROMPTS, texts.context)]
    return [(ids, (ids != texts.pad_id).astype(np.int64) if texts.masked else None) for ids in fed]


def _understood(
    tower: ForeignTower,
    asked: OriginalTower,
    path: Path,
    notes: Mapping[str, str],
    feeds: Sequence[Batch],
    rewrite: Callable[[ir.Model], None],
) -> Written:
    """Write the tower in our own forms where it answers like its file in them, and else as it came."""
    expected = [asked.raw(batch, mask) for batch, mask in feeds]
    own = tower.model.clone()
    try:
        rewrite(own)
        return _write(own, path, notes, feeds, expected)
    except (BundleError, CheckFailed):  # a form that looks like one of ours and is none
        return _write(tower.model, path, notes, feeds, expected)


def _write(
    model: ir.Model, path: Path, notes: Mapping[str, str], feeds: Sequence[Batch], expected: Sequence[np.ndarray]
) -> Written:
    output = model.graph.outputs[0]
    output.shape, output.dtype = ir.Shape(["batch", expected[0].shape[1]]), ir.DataType.FLOAT
    set_metadata(model, notes)
    save_model(model, path)
    session = EncoderSession(path)
    name = path.name.partition("_")[0]
    worst = max(
        check_same(name, wanted, session.run(batch)) for wanted, (batch, _) in zip(expected, feeds, strict=True)
    )
    lengths = np.linalg.norm(np.concatenate(expected), axis=1)
    quick_gelu = holds_quick_gelu(model.graph)
    return Written(signature_of(model), worst, bool(np.abs(lengths - 1).max() < 1e-3), quick_gelu)
