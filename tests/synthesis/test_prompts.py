"""Labels and prompts: balanced, apart from what is held out, and half of them of random words."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d4c_onnx.calibration.prompts import draw_labels, draw_texts
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.synthesis import synthesize


@given(st.integers(1, 200), st.integers(2, 30))
def test_stratified_labels_are_balanced(count: int, classes: int) -> None:
    labels = draw_labels(count, classes, "stratified", 0)
    counts = np.bincount(labels, minlength=classes)
    assert len(labels) == count
    assert counts.max() - counts.min() <= 1


def test_texts_do_not_overlap() -> None:
    texts, held_out = draw_texts(("cat", "dog", "cow"), ("a {}.", "the {}.", "{}"), 100, 50, 0)
    assert len(texts) + len(held_out) <= 9
    assert texts
    assert held_out
    assert not set(texts) & set(held_out)


def test_phrases_stand_for_nouns_in_their_share() -> None:
    nouns, templates, phrases = ("cat", "dog", "cow"), ("a {}.", "the {}.", "{}"), ("alpha", "beta", "gamma", "delta")
    texts, held_out = draw_texts(nouns, templates, 8, 2, 0, phrases)
    assert [sum(word in text for text in texts) for word in phrases] == [1, 1, 1, 1]
    assert len(texts) == len(set(texts)) == 8
    assert len(held_out) == 2
    assert not [text for text in held_out if any(word in text for word in phrases)]
    assert (texts, held_out) == draw_texts(nouns, templates, 8, 2, 0, phrases)
    few, _ = draw_texts(nouns, templates, 100, 2, 0, [str(number) for number in range(50)])  # 9 prompts have a noun
    assert sum(any(noun in text for noun in nouns) for text in few) == 8
    assert len(few) == 16
    only, _ = draw_texts(nouns, templates, 4, 0, 0, phrases)
    assert all(any(word in text for word in phrases) for text in only)


def test_half_of_a_sets_prompts_are_random_words(mini_vit, tmp_path: Path) -> None:
    keys = ("synthesis.method=noise", "synthesis.images=1", "synthesis.held_out=1", "text.held_out=4")
    sets = []
    for share in (0, 0.5):
        recipe = load_recipe(None, [*keys, "text.prompts=24", f"text.random_words={share}"])
        made = synthesize(mini_vit, tmp_path / str(share), recipe.synthesis, recipe.text, ("cat", "dog"), seed=0)
        known = [text for text in made.texts if text.rstrip(".").endswith(("cat", "dog"))]
        assert len(made.texts) - len(known) == round(share * len(made.texts))
        assert made.input_ids == mini_vit.cut(mini_vit.tokenize(list(made.texts)))
        sets.append(made)
    assert sets[0].manifest.key.id != sets[1].manifest.key.id
    # they use tokens that no noun does
    assert len({token for row in sets[1].input_ids for token in row}) > 20
