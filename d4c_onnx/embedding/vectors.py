"""From a source to a file of vectors: what cannot be read is left out and listed, and interrupted work is kept."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.embedding.parts import (
    Ask,
    Part,
    Parts,
    clear_finished,
    names_of,
    parts_of,
    write_lines,
    write_npy,
    write_parquet,
)
from d4c_onnx.embedding.sources import Item, Source, open_source
from d4c_onnx.errors import BundleError, DatasetError
from d4c_onnx.files import claimed
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.runtime.clip_session import ClipSession, batches
from d4c_onnx.untrusted_json import quoted

PART_ITEMS = 1024  # what an interruption costs at most, and what is in memory at a time
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class EmbedReport:
    """What was embedded.

    Attributes:
        output: the file.
        vectors, width: how many, of how many numbers.
        names: where the names of the vectors stand.
        broken: how many items could not be read.
        broken_list: the file that names them and says why; None where all could be read.
        first_broken: the first few, with their reasons.
        resumed: how many items an interrupted run had done.
    """

    output: str
    vectors: int
    width: int
    names: str
    broken: int
    broken_list: str | None
    first_broken: tuple[tuple[str, str], ...]
    resumed: int

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return asdict(self)


def embed_source(
    bundle: str | Path,
    source: str | Path,
    output: str | Path,
    *,
    provider: str = "cpu",
    threads: int = 0,
    batch: int = 32,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> EmbedReport:
    """Embed all images or texts of a source. The same call after an interruption goes on where it was.

    Args:
        bundle: its folder.
        source: a folder of images, a tar of images, or a text file with one text a line.
        output: a .npy file, with names beside it in `<output>.names.jsonl`, or a .parquet file.
        batch: that go through an encoder together.

    Raises:
        BundleError: the folder is no bundle, or the output is in the way, has another ending, or cannot be written.
        DatasetError: the source is not there, or nothing in it can be read.
    """
    source, output = Path(source), Path(output)
    if output.suffix not in (".npy", ".parquet"):
        raise BundleError(f"{output}: takes a name that ends in .npy or .parquet.")
    found = open_source(source)
    with claimed(parts_of(output), *(path.name for path in _written(output))):
        if not overwrite:
            clear_finished(output)
        _refuse(output, overwrite)
        session = ClipSession(open_bundle(bundle), provider=provider, threads=threads, batch=batch)
        parts = Parts(output, _ask(session.bundle, found))
        resumed = sum(counts.vectors + counts.broken for counts in parts.finished)
        _embed(session, found, parts, resumed, on_step)
        return _finish(parts, output, found, resumed)


def _written(output: Path) -> tuple[Path, ...]:
    """The output, and what may lie beside it."""
    return output, names_of(output), _broken_of(output)


def _broken_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.broken.jsonl")


def _refuse(output: Path, overwrite: bool) -> None:
    """Raises BundleError: something is in the way that may not be replaced, or cannot be."""
    if output.exists() and not overwrite:
        raise BundleError(f"{output}: already exists. Add --overwrite to replace it, or choose another --output.")
    for path in _written(output):
        if path.is_dir():
            raise BundleError(f"{path}: is a folder, and no file can take its place. Choose another --output.")
        if path.exists() and not os.access(path, os.W_OK):  # said before the work, not after it
            raise BundleError(f"{path}: may not be written here, so it is not replaced. Choose another --output.")


def _ask(bundle: Bundle, source: Source) -> Ask:
    return Ask(
        files={name: record.sha256 for name, record in bundle.manifest.files.items()},
        preprocess=bundle.manifest.preprocess,
        source=str(source.path.resolve()),
        form=source.form,
        total=source.total,
        changed=source.path.stat().st_mtime_ns if source.form != "folder" else 0,
        part=PART_ITEMS,
    )


def _embed(session: ClipSession, source: Source, parts: Parts, resumed: int, on_step: OnStep) -> None:
    """Part after part, the finished ones skipped."""
    items = iter(source)
    for _ in islice(items, resumed):
        pass
    broken = sum(counts.broken for counts in parts.finished)

    def told() -> Iterator[Item]:
        for item in islice(items, PART_ITEMS):
            on_step("embed", min(item.done, source.total - 1), source.total, {"broken": broken})
            yield item

    while True:
        part, vectors = _part(session, told(), source.form == "texts")
        if not part.names and not part.broken:
            break
        parts.add(part, vectors)
        broken += len(part.broken)
    on_step("embed", source.total, source.total, {"broken": broken})


def _part(session: ClipSession, items: Iterator[Item], texts: bool) -> tuple[Part, np.ndarray]:
    """Vectors of what can be read; items are opened and dropped one by one."""
    names: list[str] = []
    broken: list[tuple[str, str]] = []

    def readable() -> Iterator[Any]:
        for item in items:
            try:
                if item.content is None:
                    raise DatasetError(item.fault)
                value = item.content if isinstance(item.content, str) else session.pixels(item.content)
            except DatasetError as error:
                broken.append((item.name, str(error)))
                continue
            names.append(item.name)
            yield value

    # pixels, not images: what cannot be read has to be left out, and no batch ends with it
    if texts:
        vectors = session.embed_texts(readable())
    else:
        vectors = session.embed_pixels(np.stack(some) for some in batches(readable(), session.batch))
    return Part(tuple(names), tuple(broken)), vectors


def _finish(parts: Parts, output: Path, source: Source, resumed: int) -> EmbedReport:
    """One file of all parts, and the list of what is broken."""
    count, broken = (sum(getattr(each, what) for each in parts.finished) for what in ("vectors", "broken"))
    listed = _broken_of(output)
    pairs = (pair for part in parts for pair in part.broken)
    first = tuple(islice(pairs, _SHOWN))
    if not count:
        parts.remove()
        told = f" The first: {quoted(first[0][0])}: {first[0][1]}" if first else ""
        raise DatasetError(f"{source.path}: nothing in it can be embedded.{told}")
    listed.unlink(missing_ok=True)
    if broken:
        write_lines(listed, ({"name": name, "reason": reason} for name, reason in chain(first, pairs)))
    width = parts.vectors(0).shape[1]
    (write_npy if output.suffix == ".npy" else write_parquet)(output, parts, width)
    parts.remove()
    return EmbedReport(
        output=str(output),
        vectors=count,
        width=width,
        names=str(names_of(output)) if output.suffix == ".npy" else "column name",
        broken=broken,
        broken_list=str(listed) if broken else None,
        first_broken=first,
        resumed=resumed,
    )
