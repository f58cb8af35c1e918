"""Embeddings as unit vectors."""

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows divided by their L2 norm."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
