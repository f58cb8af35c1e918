"""What of a folder d4c-onnx itself wrote: `--overwrite` removes nothing else.

Bundles, calibration sets and packages name their files in a manifest; a page about a set lies beside it.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from d4c_onnx.errors import BundleError
from d4c_onnx.locks import LOCK
from d4c_onnx.untrusted_json import Node, read_json

MANIFEST = "manifest.json"
PACKAGE = "d4c-package.json"  # not package.json: some stacks' folders are read by npm, too
STAGE, OLD, WORK = ".stage-", ".old-", ".work-"  # what is being written, was replaced, or will be a set
_STAGED = re.compile(rf"{re.escape(STAGE)}(?P<name>.+)-[0-9a-f]{{16}}", re.DOTALL)


def staged_for(name: str) -> str | None:
    """Whose stage a name is; None: nobody's."""
    found = _STAGED.fullmatch(name)
    return found["name"] if found else None


def is_made(folder: Path) -> bool:
    """Whether a folder is a bundle, a set or a package of d4c-onnx."""
    return folder.is_dir() and not folder.is_symlink() and bool(_listed(folder))


def strangers(folder: Path) -> list[str]:
    """What lies in a folder, or below, and is in no manifest of d4c-onnx."""
    return sorted(_strangers(folder, "", _listed(folder)))


def _strangers(folder: Path, prefix: str, listed: set[str]) -> Iterator[str]:
    """Of a folder whose manifest, or that of a folder above, lists these names, as seen from here."""
    for entry in folder.iterdir():
        name = entry.name
        if entry.is_symlink():
            yield prefix + name
        elif entry.is_dir():
            below = {rest for first, _, rest in (one.partition("/") for one in listed) if first == name and rest}
            if below or is_made(entry):
                yield from _strangers(entry, f"{prefix}{name}/", below or _listed(entry))
            elif not name.startswith(WORK) and staged_for(name) is None and any(entry.iterdir()):
                yield prefix + name
        elif not (name in listed or name.startswith(LOCK) or staged_for(name) or _is_page(entry)):
            yield prefix + name


def _listed(folder: Path) -> set[str]:
    """The names in a folder's manifest, and the manifest's own; nothing where there is none that can be read."""
    for manifest in (MANIFEST, PACKAGE):
        if (folder / manifest).is_file():
            with contextlib.suppress(BundleError):
                return {manifest, *read_json(folder / manifest).take("files", _names)}
    return set()


def _names(node: Node) -> list[str]:
    if not isinstance(node.value, list | dict):
        raise node.wrong("a list of names")
    return [str(name) for name in node.value]


def _is_page(file: Path) -> bool:
    """Whether it is a page about a calibration set beside it."""
    return file.suffix == ".html" and is_made(file.with_suffix(""))
