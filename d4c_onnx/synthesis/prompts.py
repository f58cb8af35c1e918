"""Which noun each image is made for, and which texts calibrate the text tower."""

import numpy as np


def draw_labels(count: int, classes: int, how: str, seed: int) -> np.ndarray:
    """A class index per image, int64 [count].

    Args:
        how: `random` (published: uniform draws, so some classes come up often and some never), or `stratified`
            (every class equally often, in random order).
    """
    rng = np.random.default_rng([seed, 1])
    if how == "random":
        return rng.integers(0, classes, count)
    return np.concatenate([rng.permutation(classes) for _ in range(-(-count // classes))])[:count]


def draw_texts(
    nouns: tuple[str, ...], templates: tuple[str, ...], count: int, held_out: int, seed: int
) -> tuple[list[str], list[str]]:
    """Calibration prompts and held-out prompts: a random order of every noun in every template, cut apart.

    Fewer come back when nouns x templates is less than count + held_out; at least one always calibrates.
    """
    every = [template.format(noun) for template in templates for noun in nouns]
    order = np.random.default_rng([seed, 2]).permutation(len(every))
    spare = min(held_out, len(every) // 5) if len(every) < count + held_out else held_out
    texts = [every[index] for index in order]
    used = min(count, len(texts) - spare)
    return texts[:used], texts[used : used + spare]
