"""Whether a package is whole and answers as its bundle does, through its own files, names, configs and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from d4c_onnx.errors import BundleError, D4CError
from d4c_onnx.files import sha256
from d4c_onnx.manifest_file import GOLDEN_FOLDER
from d4c_onnx.packaging.feeds import PackagedSession
from d4c_onnx.packaging.own_configs import stated
from d4c_onnx.packaging.package_manifest import AGAIN, PackageManifest, read_package
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
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.runtime.verify import Verification, check_contract, judge_client, not_running
from d4c_onnx.untrusted_json import short

_TOWERS = ("image", "text")


def verify_package(
    path: str | Path, answers: Answers | None = None, *, provider: str = "cpu", threads: int = 0
) -> Verification:
    """Check hashes, inputs and outputs, golden vectors through each file, and what the stack's own configs say.

    Args:
        path: a folder that `package_bundle` wrote.
        answers: a client's, to be judged beside the package.

    Raises:
        BundleError: the package's manifest cannot be read, or answers do not fit the golden vectors.
    """
    folder = Path(path)
    manifest = read_package(folder)
    changed = _changed(folder, manifest)
    checks = [_files(manifest, changed)]
    likeliest: dict[str, str | None] = dict.fromkeys(_TOWERS)
    try:
        golden = read_golden(folder)
        idle = _idle(golden, manifest)
        sessions = [PackagedSession(folder, model, idle, provider, threads) for model in manifest.content.models]
        checks.append(check_contract({one.model.file: (one.encoder, one.model.io) for one in sessions}))
        named = _named(folder, manifest, _TOKENIZER)
        tokenizers = {listed: TextTokenizer(file, manifest.tokenizer) for listed, file in named}
        subject = _subject(folder, manifest, sessions, tokenizers)
        pixels = [] if subject.embed_pixels is None else subject.pixels(golden)
        checks += _inputs(golden, pixels, tokenizers)
        for tower in _TOWERS:
            checks += _tower(tower, golden, subject, pixels, sessions, likeliest, changed)
        checks += _configs(folder, manifest, golden, subject, likeliest)
    except D4CError as error:  # nothing more can be looked at
        return Verification(str(folder), (*checks, not_running(error)), likeliest)
    checks += judge_client(subject, golden, answers or Answers(), likeliest)
    return Verification(str(folder), tuple(checks), likeliest)


def _changed(folder: Path, manifest: PackageManifest) -> list[str]:
    """Files that are missing, or not those that were written."""

    def same(name: str) -> bool:
        file, record = folder / name, manifest.content.files[name]
        return file.is_file() and file.stat().st_size == record.size_bytes and sha256(file) == record.sha256

    return [name for name in manifest.content.files if not same(name)]


def _files(manifest: PackageManifest, changed: list[str]) -> Check:
    if changed:
        detail = f"{', '.join(changed[:5])}: missing, or not as the manifest's SHA-256 says. {AGAIN}"
        return Check("files", False, detail)
    return Check("files", True, f"{len(manifest.content.files)} files as the manifest's SHA-256 says")


def _idle(golden: GoldenVectors, manifest: PackageManifest) -> dict[str, np.ndarray]:
    """A row for the tower that is not asked, in files of both."""
    height, width = manifest.preprocess.size
    ids = np.array([golden.texts[0].input_ids], np.int64)
    return {"image": np.zeros((1, 3, height, width), np.float32), "text": ids}


def _subject(
    folder: Path,
    manifest: PackageManifest,
    sessions: list[PackagedSession],
    tokenizers: Mapping[str, TextTokenizer],
) -> Subject:
    """The package as golden vectors see it: of each tower the first file that has it."""
    first = {
        tower: next((partial(one.embed, tower) for one in sessions if tower in one.model.towers), None)
        for tower in _TOWERS
    }
    tokenizer = next(iter(tokenizers.values()), None)
    return Subject(folder, manifest.preprocess, tokenizer, first["image"], first["text"])


_TOKENIZER = "tokenizer.json"


def _named(folder: Path, manifest: PackageManifest, name: str = "") -> Iterator[tuple[str, Path]]:
    """The stack's own files of that name, or all; what is missing is told by the hashes."""
    for listed in sorted(manifest.content.files):
        file = folder / listed
        if not listed.startswith(f"{GOLDEN_FOLDER}/") and name in ("", file.name) and file.is_file():
            yield listed, file


def _inputs(
    golden: GoldenVectors, pixels: list[np.ndarray], tokenizers: Mapping[str, TextTokenizer]
) -> Iterator[Check]:
    """Golden pixels as today's pillow makes them, and the ids of each tokenizer of the package."""
    if pixels:
        yield check_pixels(golden, pixels)
    for listed, tokenizer in tokenizers.items():
        yield check_ids(golden, listed, tokenizer)


def _tower(
    tower: str,
    golden: GoldenVectors,
    subject: Subject,
    pixels: list[np.ndarray],
    sessions: list[PackagedSession],
    likeliest: dict[str, str | None],
    changed: list[str],
) -> Iterator[Check]:
    """Golden embeddings of a tower through each file that has it."""
    for one in sessions:
        if tower not in one.model.towers:
            continue
        file = one.model.file
        own = replace(subject, embed_pixels=partial(one.embed, "image"), embed_ids=partial(one.embed, "text"))
        found = own.seen(pixels) if tower == "image" else own.read(text.input_ids for text in golden.texts)
        check = check_embeddings(golden, tower, f"{tower} embeddings of {file}", found)
        if not check.ok:
            another = f"{file} is another file than the one that was packaged" if file in changed else None
            likeliest[tower] = likeliest_mistake(own, golden, tower, own=found) or another
        yield check


def _configs(
    folder: Path,
    manifest: PackageManifest,
    golden: GoldenVectors,
    subject: Subject,
    likeliest: dict[str, str | None],
) -> Iterator[Check]:
    """Each config that says how images or texts are prepared; where it says otherwise, what comes of it is named."""
    for listed, file in _named(folder, manifest):
        try:
            said = stated(file, manifest.preprocess, manifest.tokenizer)
        except BundleError as error:
            yield Check(listed, False, short(error))
            continue
        if said is None:
            continue
        yield Check(listed, not said.differences, "; ".join(said.differences) or "says what the model wants")
        if not said.differences:
            continue
        tower, mistake = "text" if said.preprocess is None else "image", None
        if said.preprocess is not None and said.preprocess.size == subject.preprocess.size and subject.embed_pixels:
            answers = subject.seen(subject.pixels(golden, said.preprocess))
            mistake = likeliest_mistake(subject, golden, tower, answers)
        likeliest[tower] = mistake or f"{listed}: {said.differences[0]}"
