"""How open_clip's own tokenizer cuts a text into words, and words into ids.

A tokenizer.json looks for special tokens before all else and knows the letters of its own release of Unicode; open_clip
looks for both with one expression, so its ids are those of that expression, of the same library.
"""

import numpy as np
from tokenizers import Tokenizer

from d4c_onnx.errors import BundleError
from d4c_onnx.manifest import TokenizerInfo

_PATTERN = r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipWords:
    """The byte pairs of a bundle, behind open_clip's own cut into words."""

    def __init__(self, tokenizer: Tokenizer, info: TokenizerInfo) -> None:
        """Read words of a tokenizer.

        Raises:
            BundleError: it has no start or end token.
        """
        import regex  # here: other tokenizers are served without it

        added = sorted(tokenizer.get_added_tokens_decoder().items())
        self._special = {token.content: index for index, token in added}
        if info.sot_id is None or info.eot_id is None or not {info.sot_id, info.eot_id} <= {*self._special.values()}:
            raise BundleError("tokenizer.json lacks the start and end token of manifest.json. Export the bundle again.")
        self._find = regex.compile("|".join(map(regex.escape, self._special)) + _PATTERN, regex.IGNORECASE).findall
        self._tokenizer, self._pairs = tokenizer, tokenizer.model
        self._start, self._end = info.sot_id, info.eot_id
        self._context = info.context_length
        self._fixed = bool((tokenizer.padding or {}).get("length"))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """int64 [len(texts), longest or context length]: start, pairs, end; then zeros."""
        rows = [self._row(text) for text in texts]
        length = self._context if self._fixed else max(map(len, rows), default=0)
        ids = np.zeros((len(rows), length), np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, as open_clip gives it: what is no UTF-8 becomes U+FFFD."""
        letters = "".join(str(self._tokenizer.id_to_token(index) or "") for index in ids)
        return bytes(_BYTES[letter] for letter in letters).decode("utf-8", "replace").replace("</w>", " ")

    def _row(self, text: str) -> list[int]:
        tokens = [index for word in self._find(text) for index in self._ids(word)]
        return [self._start, *tokens[: self._context - 2], self._end]

    def _ids(self, word: str) -> list[int]:
        letters = "".join(_LETTERS[byte] for byte in word.encode("utf-8"))
        special = self._special.get(letters)
        return [token.id for token in self._pairs.tokenize(letters)] if special is None else [special]


def _byte_letters() -> list[str]:
    """For each byte the letter that stands for it in the vocabulary: printable ones for themselves."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)}
