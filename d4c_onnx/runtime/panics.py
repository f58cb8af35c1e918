"""The tokenizers library panics on some damaged files: what it raises then is no Exception."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from d4c_onnx.errors import D4CError
from d4c_onnx.untrusted_json import quoted, short

Refuse = Callable[[str], D4CError]


@contextlib.contextmanager
def no_panic(refuse: Refuse) -> Iterator[None]:
    """A panic as an error of ours.

    Args:
        refuse: the error, from the reason.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise refuse(short(error)) from error


@contextlib.contextmanager
def refusing(refuse: Refuse) -> Iterator[None]:
    """Whatever a library raises, panics included, as an error of ours; see `no_panic`."""
    with no_panic(refuse):
        try:
            yield
        except Exception as error:  # the tokenizers library raises this very class
            raise refuse(short(error)) from error


def tokenizer_of(path: Path, refuse: Refuse) -> Tokenizer:
    """A tokenizer.json, which somebody else may have written; `refuse` makes the error of a damaged one."""
    with refusing(refuse):
        made = Tokenizer.from_file(str(path))
    cut = made.truncation
    if cut is not None:  # the library panics at the first text that is too long, and speaks on stderr
        room = cut["max_length"] - made.num_special_tokens_to_add(False)
        if room < 0 or cut["stride"] >= max(room, 1):
            raise refuse(f"it cuts texts to {cut['max_length']} tokens in steps of {cut['stride']}, and adds its own")
    if made.post_processor is not None:
        unknown = next(_unknown_tokens(json.loads(made.post_processor.__getstate__())), None)
        if unknown is not None:
            raise refuse(f"its template names the token {quoted(unknown)}, whose id it does not tell")
    return made


def _unknown_tokens(processor: Any) -> Iterator[str]:
    """Special tokens that a template, or one of a sequence, names without an id: a text would be a panic."""
    for part in processor.get("processors", ()):
        yield from _unknown_tokens(part)
    pieces = (*processor.get("single", ()), *processor.get("pair", ()))
    named = (piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece)
    yield from (name for name in named if name not in processor.get("special_tokens", {}))
