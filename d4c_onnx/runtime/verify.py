"""Whether a bundle is whole, does what its manifest says, and gives its golden vectors; and if not, what is likeliest.

onnxruntime, numpy, pillow and the bundle: nothing that made the files is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import BundleError, D4CError
from d4c_onnx.files import sha256
from d4c_onnx.manifest import Signature
from d4c_onnx.runtime.clip_session import ClipSession
from d4c_onnx.runtime.golden import GoldenVectors, read_golden
from d4c_onnx.runtime.golden_check import (
    Answers,
    Check,
    Subject,
    check_embeddings,
    check_ids,
    check_pixels,
    likeliest_mistake,
)
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.untrusted_json import short

_AS_TOLD = Check("contract", True, "inputs and outputs as the manifest says")


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at in a bundle or a package.

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

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {**asdict(self), "ok": self.ok}


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
        subject = _subject(session)
        pixels = subject.pixels(golden)
        found = {"image": subject.seen(pixels), "text": subject.read(one.input_ids for one in golden.texts)}
        checks += [check_pixels(golden, pixels), check_ids(golden, "ids", subject.tokenizer)]
    except D4CError as error:  # nothing more can be looked at
        return Verification(str(bundle.path), (*checks, not_running(error)), likeliest)
    for tower, own in found.items():
        checks.append(check_embeddings(golden, tower, f"{tower} embeddings", own))
        if not checks[-1].ok:
            likeliest[tower] = likeliest_mistake(subject, golden, tower, own=own)
    checks += judge_client(subject, golden, answers or Answers(), likeliest, found)
    return Verification(str(bundle.path), tuple(checks), likeliest)


def judge_client(
    subject: Subject,
    golden: GoldenVectors,
    answers: Answers,
    likeliest: dict[str, str | None],
    own: Mapping[str, np.ndarray] | None = None,
) -> list[Check]:
    """Checks of a client's answers; the mistakes that explain them are put into `likeliest`.

    Args:
        own: what the subject's towers answered, where they were asked already.
    """
    known = own or {}
    checks = []
    for tower, theirs in (("image", answers.images), ("text", answers.texts)):
        if theirs is not None:
            checks.append(check_embeddings(golden, tower, f"client's {tower} embeddings", theirs))
            if not checks[-1].ok:
                likeliest[tower] = likeliest_mistake(subject, golden, tower, theirs, own=known.get(tower))
    return checks


def not_running(error: D4CError) -> Check:
    """What stopped a verification, as a check that failed."""
    return Check("running", False, short(error))


def _subject(session: ClipSession) -> Subject:
    bundle = session.bundle
    tokenizer = session.tokenizer if bundle.tokenizer.is_file() else None
    preprocess = bundle.manifest.preprocess
    return Subject(bundle.path, preprocess, tokenizer, session.embed_pixels, session.embed_ids)


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
    return _AS_TOLD


def check_contract(files: dict[str, tuple[EncoderSession, Signature]]) -> Check:
    """The same of files that are open, against what a manifest says."""
    for name, (session, told) in files.items():
        if difference := told.difference(*session.takes_and_gives()):
            return Check("contract", False, f"{name}: {difference}. Make the files again.")
    return _AS_TOLD


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
