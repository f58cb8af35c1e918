"""What open_clip does to a text before it falls into tokens, by open_clip's names."""

import html
import string

from d4c_onnx.errors import BundleError

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, name: str) -> str:
    """The text as open_clip's tokenizer of that cleaning reads it.

    Repairs by ftfy (mojibake, curly quotes, full-width letters, ligatures, control characters), HTML entities, and
    white space folded to single spaces come first, whatever the name.

    Args:
        text: any.
        name: `whitespace` does no more; `lower` also lowers case; `canonicalize` also removes ASCII punctuation.

    Raises:
        BundleError: no such cleaning.
    """
    import ftfy  # here: a bundle without cleaning is served without it

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if name == "whitespace":
        return _fold(text)
    if name == "lower":
        return _fold(text).lower()
    if name == "canonicalize":
        return _fold(text.replace("_", " ").translate(_NO_PUNCTUATION).lower())
    raise BundleError(f"unknown cleaning {name!r}: update d4c-onnx.")


def _fold(text: str) -> str:
    return " ".join(text.split())
