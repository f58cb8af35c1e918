"""How texts reach a text tower that somebody brings: where they are cut, what fills them up, and who hides it.

Nothing in a file says it, so it is tried out on the file itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from d4c_onnx.errors import ModelError
from d4c_onnx.foreign.beside import check_positions, context_beside, padding_beside, read_tokenizer
from d4c_onnx.foreign.original import TOLERANCE, OriginalTower
from d4c_onnx.foreign.tower import ForeignTower
from d4c_onnx.manifest import LONGEST_CONTEXT, TokenizerInfo
from d4c_onnx.runtime.panics import no_panic
from d4c_onnx.runtime.trial import TRIAL_TEXT

PROMPTS = ("a photo of a cat.", "two words", TRIAL_TEXT, "red", "the small blue house and the river", "7", "of")


@dataclass(frozen=True, slots=True)
class Texts:
    """How a tower takes texts.

    Attributes:
        tokenizer: cuts at the context length and does not pad.
        context: ids of the longest text.
        pad_id: fills texts up.
        dynamic: whether any length up to the context's may be fed, padding behind.
        causal: whether padding is hidden by itself, because a token sees those before it only.
        masked: whether padding has to be told apart by its id.
        why_fixed: why no other length than the context's may be fed, though the graph would take it.
    """

    tokenizer: Tokenizer
    context: int
    pad_id: int
    dynamic: bool
    causal: bool
    masked: bool
    why_fixed: str | None = None

    def ids(self, texts: list[str] | tuple[str, ...], length: int | None = None) -> np.ndarray:
        """int64 [len(texts), length], by default that of the longest, or the context's where it is fixed."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        return padded(rows, length or (max(map(len, rows)) if self.dynamic else self.context), self.pad_id)

    def write(self, path: Path) -> TokenizerInfo:
        """Write `tokenizer.json`; what the manifest says of it."""
        own = Tokenizer.from_str(self.tokenizer.to_str())
        pad = own.id_to_token(self.pad_id) or ""
        own.enable_padding(length=None if self.dynamic else self.context, pad_id=self.pad_id, pad_token=pad)
        path.write_text(own.to_str(pretty=True), "utf-8")
        return TokenizerInfo(
            "tokenizer.json",
            self.context,
            cleaning="none but tokenizer.json's own",
            pad_id=self.pad_id,
            causal=self.causal,
            dynamic_sequence=self.dynamic,
            why_fixed=self.why_fixed,
        )


def texts_of(
    tower: ForeignTower, original: OriginalTower, *, tokenizer: Path | None, context: int | None, pad: str | None
) -> Texts:
    """Find out how a tower takes texts.

    Args:
        tower, original: the cut graph and its file.
        tokenizer, context, pad: the user's file, context length and padding token; None: what lies beside says it.

    Raises:
        ModelError: nobody says what cannot be tried out, or what was said does not fit the graph.
    """
    if "position" in tower.others:
        check_positions(tower.original.path)
    found, file = read_tokenizer(tower.original.path, tokenizer)
    known = padding_beside(found, file) if pad is None else found.token_to_id(pad)
    if pad is not None and known is None:
        raise ModelError(f"--pad-token {pad!r}: {file} has no such token.")
    axis = list(tower.main.shape or (None, None))[1]
    fixed = axis if isinstance(axis, int) else None
    length = fixed or context or context_beside(found, file)
    if context is not None and fixed not in (None, context):
        raise ModelError(f"--context-length {context}: {tower.original.path} takes {fixed} ids, no other number.")
    if length is None:
        raise ModelError(f"{tower.original.path}: nothing says how long a text may be. Add --context-length N.")
    found.no_padding()
    rows = _cut_rows(tower.original.path, found, length)
    return _Trial(tower, original, found, rows, length).decide(known, fixed is not None)


def _cut_rows(path: Path, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Ids of the prompts, cut at the context length by the tokenizer, which goes on to do so.

    Raises:
        ModelError: no text has room in so few ids beside what the tokenizer puts around it, or no tower takes as many.
    """
    rows: list[list[int]] = []
    if 1 <= length <= LONGEST_CONTEXT:
        # the library raises this very class: there is no room for its own tokens
        with suppress(Exception), no_panic(ModelError):
            tokenizer.enable_truncation(length)
            rows = [encoding.ids for encoding in tokenizer.encode_batch(list(PROMPTS))]
    if not rows or max(map(len, rows)) > length:
        raise ModelError(f"{path}: takes texts of {length} ids, which the tokenizer cannot make. Export it again.")
    return rows


@dataclass(frozen=True, slots=True)
class _Trial:
    """Texts of several lengths, and the file that is asked about them."""

    tower: ForeignTower
    original: OriginalTower
    tokenizer: Tokenizer
    rows: list[list[int]]
    context: int

    def decide(self, pad: int | None, fixed: bool) -> Texts:
        """What of padding, masks and lengths the file shows."""
        hidden = self._hidden(0, self._all_count, fixed) and self._hidden(1, self._all_count, fixed)
        if hidden:  # whatever it is: a token sees those before it only
            return self._texts(pad if pad is not None and self._hidden(pad, self._all_count, fixed) else 0, True)
        if pad is None:
            raise ModelError(
                f"{self.tower.original.path}: answers otherwise when texts are padded, and nothing says with which "
                "token. Add --pad-token TOKEN, or put its tokenizer_config.json beside the tokenizer."
            )
        if "mask" in self.tower.others:
            if self._hidden(pad, lambda ids: (ids != pad).astype(np.int64), fixed):
                return self._texts(pad, False, dynamic=not fixed, masked=True)
            raise ModelError(
                f"{self.tower.original.path}: its mask cannot be told from the ids, because {pad} pads texts and is a "
                "token of theirs, too. Add another --pad-token."
            )
        why = None if fixed else "the tower sees padding: texts are padded to the context length, as it was trained"
        return self._texts(pad, False, dynamic=False, why=why)

    def _texts(
        self, pad: int, causal: bool, dynamic: bool | None = None, masked: bool = False, why: str | None = None
    ) -> Texts:
        axis = list(self.tower.main.shape or (None, None))[1]
        open_axis = not isinstance(axis, int)
        return Texts(self.tokenizer, self.context, pad, open_axis if dynamic is None else dynamic, causal, masked, why)

    def _all_count(self, ids: np.ndarray) -> np.ndarray:
        return np.ones_like(ids)

    def _hidden(self, pad: int, mask: Callable[[np.ndarray], np.ndarray], fixed: bool) -> bool:
        """Whether padding with a token changes no answer, under a mask that is made of the ids."""
        ids = padded(self.rows, self.context, pad)
        found = self.original(ids, mask(ids))
        if fixed:  # there is no other length: another filling, or the true mask, is what it must agree with
            true = np.arange(self.context) < np.array([[len(row)] for row in self.rows])
            other = padded(self.rows, self.context, 2 if "mask" not in self.tower.others else pad)
            expected = self.original(other, true.astype(np.int64))
        else:
            expected = np.concatenate([self.original(np.array([row], np.int64)) for row in self.rows])
        return bool(np.abs(found - expected).max() <= TOLERANCE)


def padded(rows: list[list[int]], length: int, pad_id: int) -> np.ndarray:
    """Rows of ids, filled up: int64 [len(rows), length]."""
    ids = np.full((len(rows), length), pad_id, np.int64)
    for filled, row in zip(ids, rows, strict=True):
        filled[: len(row)] = row
    return ids
