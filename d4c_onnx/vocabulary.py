"""Prompt vocabularies and templates: text files with one entry a line, `#` for comments."""

from importlib import resources
from pathlib import Path

from d4c_onnx.errors import RecipeError


def generic_nouns() -> tuple[str, ...]:
    """The shipped vocabulary of everyday nouns."""
    return _lines((resources.files("d4c_onnx.recipes") / "vocabulary.txt").read_text("utf-8"))


def templates() -> tuple[str, ...]:
    """The shipped prompt templates, each with one `{}`."""
    return _lines((resources.files("d4c_onnx.recipes") / "templates.txt").read_text("utf-8"))


def read_nouns(path: str | Path) -> tuple[str, ...]:
    """The user's vocabulary.

    Raises:
        RecipeError: the file cannot be read, is empty, or names one noun twice.
    """
    try:
        nouns = _lines(Path(path).read_text("utf-8-sig"))  # Windows editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--prompts {path}: cannot be read as UTF-8 text ({error}).") from error
    if len(nouns) < 2:
        raise RecipeError(f"--prompts {path}: needs at least two nouns, one a line, has {len(nouns)}.")
    double = sorted({noun for noun in nouns if nouns.count(noun) > 1})
    if double:
        raise RecipeError(f"--prompts {path}: {double[0]!r} stands there twice.")
    return nouns


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
