"""Text to input_ids with the bundle's tokenizer.json."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from d4c_onnx.errors import BundleError


class TextTokenizer:
    """The tokenizer of a bundle, from its tokenizer.json."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise BundleError(f"{path}: the bundle has no tokenizer.json; tokenise with the model's own tokenizer.")
        self._tokenizer = Tokenizer.from_file(str(path))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Token ids, truncated to the context length.

        Returns:
            int64 [len(texts), longest of them], the others padded; [len(texts), context length] where the text
            encoder takes no other.
        """
        return np.array([encoding.ids for encoding in self._tokenizer.encode_batch(texts)], np.int64)
