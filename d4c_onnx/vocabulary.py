"""Words that calibrate: nouns and templates, one a line, `#` for comments; and whole texts as clients send them."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from d4c_onnx.errors import RecipeError
from d4c_onnx.untrusted_json import check_readable

_LARGEST = 16 * 2**20  # bytes of a user's file; 768 prompts are 30 thousand
_LONGEST = 10_000  # characters of a line; towers cut a text behind 77 ids, the longest ones behind a few hundred
_FEWEST_TEXTS = 5  # of which one is held out


@dataclass(frozen=True, slots=True)
class OwnWords:
    """What a user wants calibrated for; None: nothing was said.

    Attributes:
        nouns: the vocabulary, which stands in templates.
        texts: whole texts, which calibrate as they are in place of nouns in templates.
    """

    nouns: tuple[str, ...] | None = None
    texts: tuple[str, ...] | None = None


def read_words(prompts: str | Path | None, texts: str | Path | None) -> OwnWords:
    """The user's files, where there are any.

    Raises:
        RecipeError: a file cannot be read, or is not what it must be.
    """
    return OwnWords(read_nouns(prompts) if prompts else None, read_texts(texts) if texts else None)


def generic_nouns() -> tuple[str, ...]:
    """The shipped vocabulary of everyday nouns."""
    return _entries((resources.files("d4c_onnx.recipes") / "vocabulary.txt").read_text("utf-8").splitlines())


def templates() -> tuple[str, ...]:
    """The shipped prompt templates, each with one `{}`."""
    return _entries((resources.files("d4c_onnx.recipes") / "templates.txt").read_text("utf-8").splitlines())


def read_nouns(path: str | Path) -> tuple[str, ...]:
    """The user's vocabulary.

    Raises:
        RecipeError: the file cannot be read, is no text, is empty, or names one noun twice.
    """
    nouns = _entries(_lines("--prompts", path))
    if len(nouns) < 2:
        raise RecipeError(f"--prompts {path}: needs at least two nouns, one a line, has {len(nouns)}.")
    double = sorted({noun for noun in nouns if nouns.count(noun) > 1}) if len(set(nouns)) < len(nouns) else []
    if double:
        raise RecipeError(f"--prompts {path}: {double[0]!r} stands there twice.")
    return nouns


def read_texts(path: str | Path) -> tuple[str, ...]:
    """The user's own texts, one a line, each once: what clients will send, with no comments and no templates.

    Raises:
        RecipeError: the file cannot be read, is no text, or has too few lines.
    """
    texts = tuple(dict.fromkeys(line.strip() for line in _lines("--texts", path) if line.strip()))
    if len(texts) < _FEWEST_TEXTS:
        raise RecipeError(
            f"--texts {path}: needs at least {_FEWEST_TEXTS} different texts, one a line, has {len(texts)}. A few "
            "hundred are good."
        )
    return texts


def texts_sha256(texts: tuple[str, ...]) -> str:
    """Of a user's own texts, in their order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def _lines(option: str, path: str | Path) -> list[str]:
    """Lines of a user's file; a mark in front, as Windows editors put it, is no part of the first.

    Raises:
        RecipeError: it cannot be read, is too large, is not UTF-8, or holds what no text has.
    """
    check_readable(path, RecipeError)
    try:
        if Path(path).stat().st_size > _LARGEST:
            raise RecipeError(
                f"{option} {path}: is larger than {_LARGEST // 2**20} MB. Choose a few thousand lines of it."
            )
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{option} {path}: cannot be read as UTF-8 text ({error}).") from error
    for number, line in enumerate(lines, 1):
        if len(line) > _LONGEST:
            raise RecipeError(f"{option} {path}: line {number} has {len(line):,} characters. Put one entry on a line.")
        odd = next((letter for letter in line if unicodedata.category(letter) == "Cc" and letter != "\t"), None)
        if odd is not None:
            raise RecipeError(f"{option} {path}: line {number} holds the control character {odd!r}. Is it a text file?")
    return lines


def _entries(lines: list[str]) -> tuple[str, ...]:
    return tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
