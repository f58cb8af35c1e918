"""Embeddings as unit vectors."""

import numpy as np

from d4c_onnx.errors import BundleError


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm.

    Raises:
        BundleError: an embedding is not finite: a measure of it would be no number, and a nearest neighbour any.
    """
    if not np.isfinite(vectors).all():
        raise BundleError("an encoder answers with NaN or infinity. Export or quantise the bundle again.")
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
