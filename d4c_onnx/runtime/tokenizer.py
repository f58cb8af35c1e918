"""Text to input_ids with the bundle's tokenizer.json."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from d4c_onnx.errors import BundleError


class TextTokenizer:
    """CLIP's tokenizer from a bundle's tokenizer.json."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise BundleError(f"{path}: the bundle has no tokenizer.json; tokenise with the model's own tokenizer.")
        self._tokenizer = Tokenizer.from_file(str(path))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """int64 [len(texts), longest]: truncated to the context length, padded to the longest of the batch."""
        return np.array([encoding.ids for encoding in self._tokenizer.encode_batch(texts)], np.int64)
