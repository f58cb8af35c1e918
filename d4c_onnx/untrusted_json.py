"""JSON that is not trusted: every field is asked for by type and range, and an error says where it stands.

A reader turns a `Node` into a value or raises; readers of lists and objects are made from those of their parts. Keys
that nobody asks for are neither looked at nor kept.
"""

import json
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, overload

from d4c_onnx.errors import BundleError, D4CError

T = TypeVar("T")
D = TypeVar("D")

_REQUIRED = object()

QUOTED = 200  # characters that a message repeats of what it complains about
_LARGEST = 64 * 2**20  # bytes; the manifest of a ViT-g/14 has a thousandth of it
_LONGEST = 1000  # characters of a name or a sentence
_DEEPEST = 8  # levels of a value that is only recorded

_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxstring = _short.maxother = QUOTED


def quoted(value: object) -> str:
    """A value as messages repeat it: nothing unprintable, at most `QUOTED` characters."""
    return _short.repr(value)[:QUOTED]


def short(error: object) -> str:
    """An error of another library, on one line and not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def printable(text: str) -> str:
    """A text as a terminal may have it: what would move its cursor is written out."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a JSON file.

    Attributes:
        value: as the parser gave it.
        file: the file.
        place: where in it, such as `model.name`; empty for all of it.
        error, mend: what is raised for a wrong value, and what the message says to do.
    """

    value: Any
    file: Path
    place: str = ""
    error: type[D4CError] = BundleError
    mend: str = "Export or quantise the bundle again."

    def wrong(self, expected: str) -> D4CError:
        """What to raise for a value that is not as `expected`."""
        return self.error(
            f"{self.file}: is damaged at {self.place or 'its top'}: expected {expected}, found {quoted(self.value)}. "
            f"{self.mend}"
        )

    def below(self, key: object, value: Any) -> "Node":
        """The node of a part of this one."""
        shown = str(key) if str(key).isprintable() else quoted(key)
        return replace(self, value=value, place=f"{self.place}.{shown}".lstrip(".")[:QUOTED])

    @overload
    def take(self, key: str, read: "Callable[[Node], T]") -> T: ...

    @overload
    def take(self, key: str, read: "Callable[[Node], T]", default: D) -> T | D: ...

    def take(self, key: str, read: "Callable[[Node], Any]", default: Any = _REQUIRED) -> Any:
        """What a reader makes of the value under a key; without the key the default, where one is given.

        Raises:
            D4CError: the node's `error`: this is no object, it lacks the key, or the reader refuses the value.
        """
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        if key in self.value:
            return read(self.below(key, self.value[key]))
        if default is _REQUIRED:
            raise self.wrong(f"an object with {key}")
        return default


def read_json(
    file: Path, error: type[D4CError] = BundleError, mend: str = "Export or quantise the bundle again."
) -> Node:
    """The top of a JSON file, whose wrong values raise that error and end in that advice.

    Raises:
        BundleError: or `error`: the file cannot be read, is too large, no UTF-8, no JSON, or nested too deeply.
    """
    check_readable(file, error)
    try:
        size = file.stat().st_size
        if size > _LARGEST:
            raise error(f"{file}: has {size:,} bytes, which no such file has. {mend}")
        return Node(json.loads(file.read_bytes().decode("utf-8")), file, error=error, mend=mend)
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{file}: cannot be read ({short(cause)}). {mend}") from cause


def holds(file: Path, value: object) -> bool:
    """Whether a JSON file says just that; a missing or damaged one does not."""
    try:
        return bool(read_json(file).value == json.loads(json.dumps(value)))
    except BundleError:
        return False


def check_readable(file: str | Path, error: type[D4CError] = BundleError) -> None:
    """Refuse a file that this account may not read: it is not damaged, and to make it again is no help.

    Raises:
        BundleError: or `error`: it is there, or in a folder that cannot be looked into.
    """
    try:
        os.stat(file)
    except PermissionError:
        pass
    except (OSError, ValueError):  # not there, or no name of a file: another message's business
        return
    else:
        if os.access(file, os.R_OK):
            return
    raise error(f"{file}: this account may not read it. Change its permissions, or ask whoever owns it for a copy.")


def text(node: Node) -> str:
    """Printable text of at most a thousand characters: what is shown on a terminal holds no escapes."""
    if not isinstance(node.value, str) or len(node.value) > _LONGEST or not node.value.isprintable():
        raise node.wrong(f"printable text of at most {_LONGEST} characters")
    return node.value


def flag(node: Node) -> bool:
    """true or false."""
    if not isinstance(node.value, bool):
        raise node.wrong("true or false")
    return node.value


def sha256_text(node: Node) -> str:
    """A SHA-256 in hexadecimal."""
    value = node.value
    if not isinstance(value, str) or len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise node.wrong("a SHA-256 in lower-case hexadecimal")
    return value


def one_of(*choices: str) -> Callable[[Node], str]:
    """One of these words."""

    def read(node: Node) -> str:
        if node.value not in choices:
            raise node.wrong(f"one of {', '.join(choices)}")
        return str(node.value)

    return read


def integer(least: int, most: int = 2**63 - 1) -> Callable[[Node], int]:
    """A whole number from `least` to `most`."""

    def read(node: Node) -> int:
        if not isinstance(node.value, int) or isinstance(node.value, bool) or not least <= node.value <= most:
            raise node.wrong(f"a whole number from {least} to {most}")
        return node.value

    return read


def real(least: float, most: float) -> Callable[[Node], float]:
    """A number from `least` to `most`."""

    def read(node: Node) -> float:
        value = measured_number(node)
        if not least <= value <= most:
            raise node.wrong(f"a number from {least:g} to {most:g}")
        return value

    return read


# What is told is computed with in float32, where a larger number is infinite and a smaller one 0.
_LARGEST_NUMBER = 3.4e38
number = real(-_LARGEST_NUMBER, _LARGEST_NUMBER)
positive = real(1.2e-38, _LARGEST_NUMBER)


def measured_number(node: Node) -> float:
    """A number, finite or not: what is measured of a broken file may be neither."""
    if not isinstance(node.value, int | float) or isinstance(node.value, bool):
        raise node.wrong("a number")
    try:
        return float(node.value)
    except OverflowError as error:
        raise node.wrong("a number") from error


def nullable(read: Callable[[Node], T]) -> Callable[[Node], T | None]:
    """null, or what the reader reads."""
    return lambda node: None if node.value is None else read(node)


def sequence(read: Callable[[Node], T], length: int | None = None) -> Callable[[Node], tuple[T, ...]]:
    """A list of so many, or of any number of them."""

    def read_all(node: Node) -> tuple[T, ...]:
        if not isinstance(node.value, list) or length not in (None, len(node.value)):
            raise node.wrong("a list" if length is None else f"a list of {length}")
        return tuple(read(node.below(number, value)) for number, value in enumerate(node.value))

    return read_all


def mapping(read: Callable[[Node], T], key: Callable[[Node], str] = text) -> Callable[[Node], dict[str, T]]:
    """An object of values of one kind, under names of one kind."""

    def read_all(node: Node) -> dict[str, T]:
        if not isinstance(node.value, dict):
            raise node.wrong("an object")
        return {
            key(replace(node, value=name, place=f"{node.place} (a name)")): read(node.below(name, value))
            for name, value in node.value.items()
        }

    return read_all


def recorded(node: Node) -> Any:
    """A value that is only kept and compared: plain, in valid text, and not nested deeply."""

    def plain(value: Any, depth: int) -> bool:
        if isinstance(value, dict):
            return depth < _DEEPEST and all(plain(part, depth + 1) for pair in value.items() for part in pair)
        if isinstance(value, list):
            return depth < _DEEPEST and all(plain(part, depth + 1) for part in value)
        return not isinstance(value, str) or not any("\ud800" <= letter <= "\udfff" for letter in value)

    if not plain(node.value, 0):
        raise node.wrong(f"valid text in at most {_DEEPEST} levels")
    return node.value
