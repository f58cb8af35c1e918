"""Text to input_ids with the bundle's tokenizer.json: the ids that open_clip's own tokenizer gives, without torch.

`tokenizer.json` alone gives them for most texts. What it cannot express is done here, as the manifest says: cleaning,
the words that CLIP's tokenizer sees, a token that becomes 0, and one that stands behind the padding.
"""

import copy
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, normalizers

from d4c_onnx.errors import BundleError
from d4c_onnx.manifest import TokenizerInfo
from d4c_onnx.manifest_file import MANIFEST, read_manifest
from d4c_onnx.runtime.cleaning import clean
from d4c_onnx.runtime.clip_words import ClipWords
from d4c_onnx.runtime.panics import no_panic, tokenizer_of


class TextTokenizer:
    """The tokenizer of a bundle, from its tokenizer.json and what its manifest says of it."""

    def __init__(self, path: Path, info: TokenizerInfo | None = None) -> None:
        """Read a tokenizer.

        Args:
            path: of the tokenizer.json.
            info: what the manifest says; None: the manifest beside the file is read. Without one, or where it names no
                cleaning, texts reach the file as they are.

        Raises:
            BundleError: there is no such file, or it is damaged, or the manifest is.
        """
        if info is None and (path.parent / MANIFEST).is_file():
            info = read_manifest(path.parent).tokenizer
        if not path.is_file():
            why = f" (cleaning: {info.cleaning})" if info is not None and not info.has_file else ""
            raise BundleError(
                f"{path}: the bundle has no tokenizer.json; tokenise with the model's own tokenizer{why}."
            )
        self.path, self.info = path, info or TokenizerInfo("tokenizer.json", 1, cleaning="none")
        self._clean = self.info.clean
        self._tokenizer = tokenizer_of(path, self._damaged)
        if self._clip:
            self._words = ClipWords(self._tokenizer, self.info)
        elif self.info.clean is not None:
            self._tokenizer.normalizer = self._own_normalizer()

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Token ids, truncated to the context length.

        Returns:
            int64 [len(texts), longest of them], the others padded; [len(texts), context length] where the text
            encoder takes no other.
        """
        name = self._clean
        cleaned = texts if name is None else [clean(text, name) for text in texts]
        if self._clip:
            with no_panic(self._damaged):
                return self._words(cleaned)
        with no_panic(self._damaged):
            ids = np.array([encoding.ids for encoding in self._tokenizer.encode_batch(cleaned)], np.int64)
        if self.info.zeroed_id is not None:
            ids[ids == self.info.zeroed_id] = 0
        if self.info.last_id is not None:
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=self.info.last_id)
        return ids

    def uncleaned(self) -> "TextTokenizer":
        """This tokenizer as a client has it that forgets the cleaning: texts fall into tokens as they are."""
        other = copy.copy(self)
        other._clean = None
        return other

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that are no words."""
        return [number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return dict(self._tokenizer.get_vocab())

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._words.decode(ids) if self._clip else str(self._tokenizer.decode(ids))

    @property
    def _clip(self) -> bool:
        """Whether it is open_clip's own, and of a bundle that says how it is cleaned."""
        return self.info.type == "clip-bpe" and self.info.clean is not None

    def _own_normalizer(self) -> normalizers.Normalizer:
        """The file's normalizer without its first part, which stands for the cleaning that `clean` does better.

        Cleaning twice is not the same: `&amp;amp;lt;` would lose one more `amp;`.
        """
        state = self._tokenizer.normalizer
        content = {} if state is None else json.loads(state.__getstate__())
        parts = content.get("normalizers")
        if content.get("type") != "Sequence" or not parts or parts[0].get("type") != "Sequence":
            raise self._damaged("its normalizer does not begin with the cleaning that the manifest names")
        own = {"type": "Sequence", "normalizers": parts[1:]}
        empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        return Tokenizer.from_str(json.dumps(empty | {"normalizer": own})).normalizer

    def _damaged(self, why: str) -> BundleError:
        return BundleError(f"{self.path}: is no tokenizer of this bundle ({why}). Export the bundle again.")
