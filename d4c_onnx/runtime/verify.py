"""Whether a bundle is whole, does what its manifest says, and gives its golden vectors; and if not, what is likeliest.

onnxruntime, numpy, pillow and the bundle: nothing that made the files is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d4c_onnx.bundle import GOLDEN, Bundle, open_bundle
from d4c_onnx.errors import BundleError, D4CError
from d4c_onnx.files import sha256
from d4c_onnx.manifest_file import GOLDEN_FOLDER
from d4c_onnx.runtime.clip_session import ClipSession
from d4c_onnx.runtime.golden import GoldenText, GoldenVectors, ids_sha256, pixels_sha256, read_golden
from d4c_onnx.runtime.images import read_image
from d4c_onnx.runtime.mistakes import image_mistakes, text_mistakes
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.vectors import unit
from d4c_onnx.untrusted_json import short

_NEARER = 0.5  # a mistake is named where it explains at least so much of the distance


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: None: it is only told, and decides nothing.
        detail: a sentence.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at in a bundle.

    Attributes:
        bundle: its folder.
        checks: in order.
        likeliest: by tower, the mistake that explains best what came out; None where nothing came out wrong, or no
            known mistake explains it.
    """

    bundle: str
    checks: tuple[Check, ...]
    likeliest: dict[str, str | None]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(check.ok is not False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True, slots=True)
class Answers:
    """What a client of one's own gave for the golden images and texts, in their order: [N, D] each, or None."""

    images: np.ndarray | None = None
    texts: np.ndarray | None = None


def verify_bundle(
    path: str | Path, answers: Answers | None = None, *, provider: str = "cpu", threads: int = 0
) -> Verification:
    """Check hashes, inputs and outputs, and golden vectors.

    Args:
        path: the bundle's folder.
        answers: a client's, to be judged beside the bundle.

    Raises:
        BundleError: the folder is no bundle, its manifest cannot be read, or answers do not fit the golden vectors.
    """
    bundle = open_bundle(path, verify=False)
    checks = [_files(bundle)]
    session = ClipSession(bundle, provider=provider, threads=threads, verify=False)
    likeliest: dict[str, str | None] = {"image": None, "text": None}
    try:
        checks.append(_contract(session))
        golden = read_golden(bundle.path)
        pixels, images = _images(session, golden)
        ids, texts = _texts(session, golden)
    except Exception as error:  # onnxruntime raises types of its own; nothing more can be looked at
        if not isinstance(error, D4CError) and not type(error).__module__.startswith("onnxruntime"):
            raise
        return Verification(str(bundle.path), (*checks, Check("running", False, short(error))), likeliest)
    checks += [pixels, ids]
    given = answers or Answers()
    for tower, own, theirs in (("image", images, given.images), ("text", texts, given.texts)):
        checks.append(_compare(golden, tower, "", own))
        if not checks[-1].ok:
            likeliest[tower] = _likeliest(session, golden, tower, None)
        if theirs is not None:
            checks.append(_compare(golden, tower, "client's ", theirs))
            if not checks[-1].ok:
                likeliest[tower] = _likeliest(session, golden, tower, theirs)
    return Verification(str(bundle.path), tuple(checks), likeliest)


def _files(bundle: Bundle) -> Check:
    """Every file against its SHA-256 in the manifest."""
    wrong = [name for name, record in bundle.manifest.files.items() if sha256(bundle.path / name) != record.sha256]
    if wrong:
        return Check(
            "files", False, f"{', '.join(wrong[:5])}: not as the manifest's SHA-256 says. Copy the bundle again."
        )
    return Check("files", True, f"{len(bundle.manifest.files)} files as the manifest's SHA-256 says")


def _contract(session: ClipSession) -> Check:
    """Names, types and axes of both files, as onnxruntime sees them; a session that is not so is not made."""
    try:
        session.encoders()
    except BundleError as error:
        return Check("contract", False, short(error))
    return Check("contract", True, "inputs and outputs as the manifest says")


def _images(session: ClipSession, golden: GoldenVectors) -> tuple[Check, np.ndarray]:
    """Whether today's pixels are those of the golden images, and what the encoder answers to them."""
    preprocess = session.bundle.manifest.preprocess
    pixels = [preprocess_image(image, preprocess) for image in _opened(session.bundle, golden)]
    digests = [one.pixels_sha256 for one in golden.images]
    same = sum(not digest or pixels_sha256(one) == digest for one, digest in zip(pixels, digests, strict=True))
    detail = f"{same} of {len(pixels)} golden images give the very pixels"
    found = session.embed_pixels(one[None] for one in pixels)
    # other releases of pillow may round a pixel otherwise: what counts are the embeddings
    return Check("pixels", True if same == len(pixels) else None, detail), found


def _texts(session: ClipSession, golden: GoldenVectors) -> tuple[Check, np.ndarray]:
    """Whether today's ids are those of the golden texts, and what the encoder answers to the golden ids."""
    embeds = session.embed_ids(np.array([one.input_ids], np.int64) for one in golden.texts)
    bundle = session.bundle
    if not bundle.tokenizer.is_file() or (golden.older and bundle.manifest.tokenizer.clean is None):
        return Check("ids", None, "no tokenizer.json that could be asked: ids are the client's"), embeds
    wrong = [number for number, one in enumerate(golden.texts) if not _same_ids(session, one)]
    if wrong:
        numbers = ", ".join(str(number) for number in wrong)
        return Check(
            "ids", False, f"golden texts {numbers} get other ids: tokenizer.json or the manifest changed"
        ), embeds
    return Check("ids", True, f"{len(golden.texts)} golden texts get the very ids"), embeds


def _same_ids(session: ClipSession, one: GoldenText) -> bool:
    ids = session.input_ids([one.text])[0].tolist()
    return ids == list(one.input_ids) and one.ids_sha256 in ("", ids_sha256(ids))


def _opened(bundle: Bundle, golden: GoldenVectors) -> list[Image.Image]:
    return [read_image(bundle.path / GOLDEN_FOLDER / Path(one.file).name) for one in golden.images]


def _compare(golden: GoldenVectors, tower: str, whose: str, found: np.ndarray) -> Check:
    """Embeddings of one tower against the golden ones.

    Raises:
        BundleError: there are more or fewer of them, or they have another length.
    """
    embeds = [one.embeds for one in (golden.images if tower == "image" else golden.texts)]
    if found.shape != (len(embeds), len(embeds[0])):
        raise BundleError(
            f"the {whose}{tower} embeddings have the shape {list(found.shape)}, not {[len(embeds), len(embeds[0])]}: "
            f"one row for each entry of {GOLDEN}."
        )
    distances = [golden.distance(row, right) for row, right in zip(found, embeds, strict=True)]
    worst = max(distances)
    told = f"{worst:.2g} from the golden ones at most, allowed {golden.tolerance[tower]:.2g}"
    return Check(f"{whose}{tower} embeddings", bool(worst <= golden.tolerance[tower]), told)  # False for NaN


def _likeliest(session: ClipSession, golden: GoldenVectors, tower: str, answers: np.ndarray | None) -> str | None:
    """The mistake whose embeddings are nearest to what came out.

    Args:
        answers: a client's [N, D], which a mistake of its own would explain; None: the bundle's own, and golden vectors
            that were made with other settings than those of its manifest would.
    """
    right = np.array([one.embeds for one in (golden.images if tower == "image" else golden.texts)])
    wanted = unit(right if answers is None else answers)
    candidates = _seen(session, golden) if tower == "image" else _read(session, golden)
    own = (
        session.embed_pixels(
            preprocess_image(image, session.bundle.manifest.preprocess)[None]
            for image in _opened(session.bundle, golden)
        )
        if tower == "image"
        else session.embed_ids(np.array([one.input_ids], np.int64) for one in golden.texts)
    )
    nearest, name = _NEARER * float(np.linalg.norm(own - wanted)), None
    for mistake, embeds in candidates:
        distance = float(np.linalg.norm(embeds - wanted))
        if distance < nearest:
            nearest, name = distance, mistake
    return name


def _seen(session: ClipSession, golden: GoldenVectors) -> Iterator[tuple[str, np.ndarray]]:
    """Each mistake with images, and what comes of it."""
    preprocess = session.bundle.manifest.preprocess
    images = _opened(session.bundle, golden)
    for mistake in image_mistakes(preprocess):
        yield mistake.name, session.embed_pixels(mistake.pixels(image, preprocess)[None] for image in images)


def _read(session: ClipSession, golden: GoldenVectors) -> Iterator[tuple[str, np.ndarray]]:
    """Each mistake with texts, and what comes of it."""
    for mistake in text_mistakes(session.tokenizer) if session.bundle.tokenizer.is_file() else ():
        rows = [mistake.ids(one.text, one.input_ids) for one in golden.texts]
        yield mistake.name, session.embed_ids(np.array([row], np.int64) for row in rows)


def read_answers(images: Path | None, texts: Path | None) -> Answers:
    """A client's embeddings from .npy files.

    Raises:
        BundleError: a file is none, or holds something else than a matrix of numbers.
    """
    return Answers(*(None if file is None else _matrix(file) for file in (images, texts)))


def _matrix(file: Path) -> np.ndarray:
    try:
        # mapped: a header may tell of an array that no memory holds
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header with ast
        raise BundleError(f"{file}: is no .npy file ({short(error)}). Write one with numpy.save.") from error
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
        raise BundleError(f"{file}: holds no matrix of numbers. Save float32 [N, D], a row for each golden entry.")
    return found.astype(np.float64)
