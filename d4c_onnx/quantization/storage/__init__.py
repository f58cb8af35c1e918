"""The last step: weights, the token table and narrow activations into the form in which a file holds them."""

from d4c_onnx.quantization.storage.names import shorten_names
from d4c_onnx.quantization.storage.narrow_activations import clip_activations
from d4c_onnx.quantization.storage.token_table import TokenTable, store_token_table
from d4c_onnx.quantization.storage.weights import store_blocks, store_float16, store_narrow, store_scaled, stored_of

__all__ = [
    "TokenTable",
    "clip_activations",
    "shorten_names",
    "store_blocks",
    "store_float16",
    "store_narrow",
    "store_scaled",
    "store_token_table",
    "stored_of",
]
