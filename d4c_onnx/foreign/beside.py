"""What lies beside the files that somebody brings: preprocessing, tokenizer, lengths.

Looked for in a file's folder and in the one above: exporters put graphs into a folder of their own below the configs.
None of it is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import LONGEST_CONTEXT, Preprocess
from d4c_onnx.models.beside import configs_beside
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.models.preprocessing import BESIDE, architecture_settings, first_said, liked_tag, tag_settings
from d4c_onnx.models.settings import ModelSettings, Source
from d4c_onnx.runtime.panics import tokenizer_of
from d4c_onnx.untrusted_json import Node, check_readable, integer, nullable, read_json, text

_ASKED = {
    "mean": "--mean",
    "std": "--std",
    "interpolation": "--interpolation",
    "resize_mode": "--resize-mode",
    "size": "--image-size",
}
_LARGEST_TOKENIZER = 64 * 2**20  # bytes; XLM-R's has a quarter of it
_OTHER_POSITIONS = ("roberta", "camembert", "mpnet", "longformer")
_MEND = "Mend it, or move it away and name what it says with an option."


def folders_of(file: Path) -> tuple[Path, Path]:
    """Where configs of a file may lie."""
    folder = file.resolve().parent
    return folder, folder.parent


def pixels_beside(
    image: Path, options: ModelOptions, taken: tuple[int, int] | None
) -> tuple[Preprocess, Mapping[str, str]]:
    """The preprocessing, and who says each setting of it.

    Args:
        image: the image tower's file.
        options: what the user says.
        taken: height and width that the graph takes, where it fixes them.

    Raises:
        ModelError: nobody says a setting, `like` is no tag, or a config is damaged or contradicts the graph.
    """
    said = options.stated()
    for folder in folders_of(image):
        said += [(f"{name} {BESIDE}", found) for name, found in configs_beside(folder / image.name)]
    said += _liked(options)
    if taken is not None:
        said.append(("the graph", ModelSettings(size=taken)))
    said.append(("default", ModelSettings(fill_color=0)))
    settings = first_said(said)
    missing = [option for name, option in _ASKED.items() if name not in settings.sources]
    if missing:
        raise ModelError(
            f"{image}: nothing says which pixels it was trained with. Put its preprocessor_config.json, "
            f"preprocess_cfg.json or open_clip_config.json beside it, or say {', '.join(missing)}, or "
            "--like MODEL:TAG, a published tag of open_clip whose pixels it takes."
        )
    preprocess, sources = settings.preprocess(), settings.sources
    if taken is not None and preprocess.size != taken:
        raise ModelError(
            f"{image}: takes images of {_sides(taken)}, but {sources['size']} says {_sides(preprocess.size)}. "
            f"Add --image-size {taken[0]},{taken[1]} if the graph is right."
        )
    # which GELU it has is seen in the graph
    return preprocess, {name: source for name, source in sources.items() if name != "quick_gelu"}


def read_tokenizer(file: Path, given: Path | None) -> tuple[Tokenizer, Path]:
    """The tokenizer of a text tower, and its file.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    places = [given] if given is not None else [folder / "tokenizer.json" for folder in folders_of(file)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ModelError(
            f"{given or file}: "
            + ("no such file." if given else "no tokenizer.json lies beside it. Put its own there, or name one with ")
            + ("" if given else "--tokenizer FILE: with another one, texts get wrong ids.")
        )
    check_readable(found, ModelError)
    if found.stat().st_size > _LARGEST_TOKENIZER:
        raise ModelError(f"{found}: has {found.stat().st_size:,} bytes, which no tokenizer has. Name another one.")
    refuse = partial(_no_tokenizer, found)
    return tokenizer_of(found, refuse), found


def _no_tokenizer(file: Path, why: str) -> ModelError:
    return ModelError(f"{file}: is no tokenizer ({why}). Name another one.")


def padding_beside(tokenizer: Tokenizer, file: Path) -> int | None:
    """What texts are padded with; None where nobody says it.

    Args:
        file: the tokenizer's.
    """
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    config = file.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    token = read_json(config, ModelError, _MEND).take("pad_token", nullable(_token), None)
    return None if token is None else tokenizer.token_to_id(token)


def context_beside(tokenizer: Tokenizer, file: Path) -> int | None:
    """How many ids a text has at most; None where nobody says it.

    Args:
        file: the tokenizer's.
    """
    if tokenizer.truncation is not None:
        return int(tokenizer.truncation["max_length"])
    return next(_lengths(file.parent), None)


def check_positions(file: Path) -> None:
    """Refuse to fill in positions where a config says that they are not 0, 1, ...

    Args:
        file: of a text tower that takes them as an input.

    Raises:
        ModelError: it is a RoBERTa or of its kin, which begin behind the padding's id.
    """
    for config in (folder / "config.json" for folder in folders_of(file)):
        if not config.is_file():
            continue
        top = read_json(config, ModelError, _MEND)
        kinds = [top.take("model_type", nullable(text), None), _kind_of_texts(top)]
        if any(kind and any(word in kind for word in _OTHER_POSITIONS) for kind in kinds):
            raise ModelError(
                f"{file}: takes positions as an input, and {config.name} says that it counts them as RoBERTa does, "
                "from behind the padding's id on. Export it without position_ids, so that the graph counts them."
            )


def _kind_of_texts(top: Node) -> str | None:
    value = top.value.get("text_config") if isinstance(top.value, dict) else None
    return top.below("text_config", value).take("model_type", nullable(text), None) if isinstance(value, dict) else None


def _lengths(folder: Path) -> Iterator[int]:
    """The lengths that configs of a folder and of the one above give, the nearest first."""
    ways: dict[str, list[tuple[str, ...]]] = {
        "tokenizer_config.json": [("model_max_length",)],
        "config.json": [("text_config", "max_position_embeddings"), ("text_cfg", "context_length")],
        "open_clip_config.json": [("model_cfg", "text_cfg", "context_length")],
    }
    for file in (place / name for place in (folder, folder.parent) for name in ways):
        if not file.is_file():
            continue
        top = read_json(file, ModelError, _MEND)
        for keys in ways[file.name]:
            node: Node | None = top
            for key in keys:
                known = node is not None and isinstance(node.value, dict) and key in node.value
                node = node.below(key, node.value[key]) if known and node is not None else None
            # configs write 1e30 for "no limit"
            if node is not None and isinstance(node.value, int | float) and 1 <= node.value <= LONGEST_CONTEXT:
                yield integer(1, LONGEST_CONTEXT)(node)


def _token(node: Node) -> str:
    """A token: its text, or an object that holds it."""
    return node.take("content", text) if isinstance(node.value, dict) else text(node)


def _liked(options: ModelOptions) -> list[Source]:
    if options.like is None:
        return []
    model, tag = liked_tag(options.like)
    import open_clip

    if not model or not open_clip.get_pretrained_cfg(model, tag):
        raise ModelError(
            f"--like {options.like}: is no published tag. A file has no architecture's name, so this takes MODEL:TAG, "
            "such as ViT-B-32:laion2b_s34b_b79k."
        )
    settings = replace(tag_settings(model, tag), size=architecture_settings(model).size)
    return [(f"tag {options.like}, by --like", settings)]


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
