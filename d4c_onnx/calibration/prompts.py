"""Which noun each image is made for, and which texts calibrate the text tower."""

from collections.abc import Sequence

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


def split_texts(texts: tuple[str, ...], count: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Calibration prompts and held-out prompts of a user's own texts: a random order of them, cut apart.

    Fewer come back when there are fewer texts; at most a fifth of them is held out then.
    """
    order = np.random.default_rng([seed, 2]).permutation(len(texts))
    spare = min(held_out, len(texts) // 5) if len(texts) < count + held_out else held_out
    chosen = [texts[index] for index in order]
    used = min(count, len(texts) - spare)
    return chosen[:used], chosen[used : used + spare]


def draw_texts(
    nouns: tuple[str, ...],
    templates: tuple[str, ...],
    count: int,
    held_out: int,
    seed: int,
    phrases: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Calibration prompts and held-out prompts: a random order of every noun in every template, cut apart.

    Fewer come back when there are fewer nouns x templates; at least one always calibrates. Held-out prompts are what a
    client asks for, so they have nouns only.

    Args:
        count: calibration prompts, those with phrases included.
        held_out: held-out prompts.
        phrases: stand for a noun in as many of the calibration prompts, in the same share of them where nouns are few.
    """
    every = [template.format(noun) for template in templates for noun in nouns]
    wanted = count - len(phrases)
    order = np.random.default_rng([seed, 2]).permutation(len(every))
    spare = min(held_out, len(every) // 5) if len(every) < wanted + held_out else held_out
    texts = [every[index] for index in order]
    used = min(wanted, len(texts) - spare)
    fitting = phrases if used == wanted else phrases[: used * len(phrases) // wanted]
    places = np.random.default_rng([seed, 3]).integers(0, len(templates), len(fitting))
    others = [templates[place].format(phrase) for place, phrase in zip(places, fitting, strict=True)]
    return texts[:used] + others, texts[used : used + spare]
