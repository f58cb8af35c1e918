"""What can be loaded, without loading it: the embedded minis and open_clip's own registry."""

import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from d4c_onnx.extras import need_extra


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A trained CLIP that ships inside the package."""

    name: str
    description: str
    dataset: str
    nouns: tuple[str, ...]
    model_cfg: dict[str, Any]


def embedded_models() -> dict[str, EmbeddedModel]:
    """The shipped models by name. They were trained on CIFAR-10 by recipes/train_mini.py."""
    folder = resources.files("d4c_onnx.models.embedded")
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".json"):
            data = json.loads(entry.read_text("utf-8"))
            name = entry.name[:-5]
            nouns = tuple(data["nouns"])
            found[name] = EmbeddedModel(name, data["description"], data["dataset"], nouns, data["model_cfg"])
    return found


def registry_models() -> dict[str, list[str]]:
    """open_clip architecture -> pretrained tags. Imports open_clip (and so torch).

    Raises:
        MissingExtra: it is not installed.
    """
    need_extra("export", "open_clip's registry")
    import open_clip

    return {name: open_clip.list_pretrained_tags_by_model(name) for name in open_clip.list_models()}
