"""The tokenizer of a folder as transformers publishes it: its own ids, with no cleaning before."""

from pathlib import Path
from typing import Any

import torch

from d4c_onnx.errors import ModelError
from d4c_onnx.untrusted_json import short


class FolderTokenizer:
    """transformers' tokenizer in the form of open_clip's: texts to ids of one length.

    Attributes:
        tokenizer: transformers' own.
        context_length: where texts are cut, and to which they are padded.
    """

    def __init__(self, folder: Path, context_length: int) -> None:
        from transformers import AutoTokenizer

        try:
            # a folder's code is never run, and the hub never asked
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ModelError(
                f"{folder}: holds no tokenizer that can be read ({short(error)}). Put the tokenizer.json and "
                "tokenizer_config.json that belong to the weights there, or into any folder: --tokenizer FOLDER."
            ) from error
        self.context_length = context_length

    @property
    def eot_token_id(self) -> int | None:
        """The end token."""
        end: int | None = self.tokenizer.eos_token_id
        return end

    def __call__(self, texts: list[str], context_length: int | None = None) -> torch.Tensor:
        """int64 [len(texts), context_length]."""
        length = context_length or self.context_length
        given: Any = self.tokenizer(
            texts, return_tensors="pt", max_length=length, padding="max_length", truncation=True
        )
        ids: torch.Tensor = given.input_ids
        return ids
