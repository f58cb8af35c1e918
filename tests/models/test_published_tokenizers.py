"""For every published tag the tokenizer that a bundle gets is open_clip's own, with a small vocabulary of its kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
from miniatures import WIDTH, small_text
from tokenizer_kinds import AWKWARD, stand_in

from d4c_onnx.export.tokenizer_file import write_checked_tokenizer
from d4c_onnx.models.load import load_model
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.runtime.tokenizer import TextTokenizer


def _tokenizers() -> dict[str, list[tuple[str, str]]]:
    """The published tags by all that a config says of its tokenizer, and of how texts are padded."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, tag in open_clip.list_pretrained():
        text = open_clip.get_model_config(name)["text_cfg"]
        repository = text.get("hf_tokenizer_name")
        kind = stand_in(repository).__name__ if repository else "clip"
        cleaned = [text.get(key) for key in ("tokenizer_kwargs", "tokenizer_mode", "context_length")]
        said = [kind, *cleaned, bool(text.get("no_causal_mask")), "hf_model_name" in text]
        found.setdefault(json.dumps(said), []).append((name, tag))
    return found


TOKENIZERS = _tokenizers()


def test_these_are_all_published_tags() -> None:
    tags = [tag for tags in TOKENIZERS.values() for tag in tags]
    assert sorted(tags) == sorted(open_clip.list_pretrained())
    assert len(tags) >= 190


def _case(number: int, said: str, name: str) -> Any:
    """CLIP's own vocabulary takes a second to read: one of its lengths is enough for every day."""
    return pytest.param(said, id=name, marks=pytest.mark.slow if number and json.loads(said)[0] == "clip" else ())


CASES = [_case(number, said, tags[0][0]) for number, (said, tags) in enumerate(TOKENIZERS.items())]


@pytest.mark.parametrize("said", CASES)
def test_a_bundle_like_a_tag_tokenizes_as_open_clip(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, tag = TOKENIZERS[said][0]
    text = open_clip.get_model_config(name)["text_cfg"]
    own = open_clip.tokenizer.HFTokenizer
    folder = None
    if repository := text.get("hf_tokenizer_name"):
        pytest.importorskip("transformers")
        folder = tmp_path / "tokenizer"
        stand_in(repository)(folder)
    # as open_clip makes it from its config; only the place is another one
    monkeypatch.setattr(open_clip.factory, "HFTokenizer", lambda _, **options: own(str(folder), **options))
    reference = open_clip.get_tokenizer(name)
    options = ModelOptions(like=f"{name}:{tag}", config=_small(name, tmp_path), tokenizer=folder)
    loaded = load_model(name, "random", options=options)
    info = write_checked_tokenizer(loaded, tmp_path / "tokenizer.json", fixed=not loaded.dynamic_sequence)
    assert info.has_file
    texts = list(AWKWARD)
    ids, expected = TextTokenizer(tmp_path / "tokenizer.json", info)(texts), reference(texts).numpy()
    behind = [(0, 0), (0, expected.shape[1] - ids.shape[1])]
    assert np.array_equal(np.pad(ids, behind, constant_values=info.pad_id or 0), expected)


def _small(name: str, folder: Path) -> Path:
    """The config with its own tokenizer and text length, small, and a ViT for whatever sees its images."""
    text = open_clip.get_model_config(name)["text_cfg"]
    small: dict[str, Any] = small_text(text, text.get("context_length", 77))
    if small.pop("hf_model_name", None):  # what it says of the text tower is no matter here
        small = {key: small[key] for key in ("hf_tokenizer_name", "tokenizer_kwargs") if key in small}
        small = small_text(small, 77)
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": small}
    path = folder / "small.json"
    path.write_text(json.dumps(config))
    return path
