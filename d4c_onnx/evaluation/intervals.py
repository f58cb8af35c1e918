"""Paired intervals: two models see the same images, so only the images on which they disagree carry information."""

import numpy as np

from d4c_onnx.results import PairedDifference

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def paired_difference(hits: np.ndarray, baseline: np.ndarray) -> PairedDifference:
    """hits minus baseline, bool [N] each.

    Source: Agresti and Min 2005 (adjusted Wald interval for matched pairs): half an observation is added to each cell
    of the 2 x 2 table, so that the interval keeps its coverage, and some width, when the discordant counts are small.
    """
    won, lost = int((hits & ~baseline).sum()), int((~hits & baseline).sum())
    total = len(hits) + 2
    share = ((won + 0.5) - (lost + 0.5)) / total
    variance = ((won + lost + 1) / total - share**2) / total
    margin = Z95 * float(np.sqrt(max(variance, 0.0)))
    points = 100 * (won - lost) / len(hits)
    return PairedDifference(points, 100 * (share - margin), 100 * (share + margin))
