"""Phrases of random tokens: texts from all of a model's vocabulary, where a list of nouns uses a few hundred ids."""

from typing import Any

import numpy as np

_LONGEST = 4  # tokens; a noun of the shipped vocabulary has 1 or 2, a class name of a data set up to 4
_TRIES = 20  # draws a phrase, before a tokenizer counts as one whose ids are no text


def random_phrases(tokenizer: Any, count: int, rng: np.random.Generator) -> list[str]:
    """Texts of 1 to 4 tokens each, every one drawn uniformly among the tokenizer's ordinary ones.

    Tokenised again a phrase may fall into other tokens than those drawn: what counts are the texts.

    Args:
        tokenizer: open_clip's SimpleTokenizer, or its wrapper of a Hugging Face tokenizer.
        count: how many, at most: fewer, or none, where the tokenizer does not give ids back as text.
        rng: the same state gives the same phrases.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = inner.encoder if hasattr(inner, "bpe_ranks") else getattr(inner, "get_vocab", dict)()
    ordinary = np.array(sorted(set(vocabulary.values()) - set(getattr(inner, "all_special_ids", ()))), np.int64)
    phrases: list[str] = []
    for _ in range(count * _TRIES if len(ordinary) else 0):
        ids = rng.choice(ordinary, rng.integers(1, _LONGEST + 1)).tolist()
        phrase = " ".join(inner.decode(ids).split())
        # a part of a character has no text, and a reader of the set should see what was fed
        if phrase and phrase.isprintable() and "\ufffd" not in phrase:
            phrases.append(phrase)
        if len(phrases) == count:
            break
    return phrases
