"""What a server needs to use a bundle: session, preprocess, tokenizer. onnxruntime, numpy, pillow; never torch.

The names below are resolved on first use: preprocessing alone loads no onnxruntime.
"""

import importlib
from typing import Any

_PUBLIC = {
    "ClipSession": "d4c_onnx.runtime.clip_session",
    "TextTokenizer": "d4c_onnx.runtime.tokenizer",
    "preprocess_image": "d4c_onnx.runtime.preprocess",
    "read_image": "d4c_onnx.runtime.images",
    "verify_bundle": "d4c_onnx.runtime.verify",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
