"""Which preprocessing and which GELU weights were trained with: who says so first, and when to ask.

A checkpoint does not say it, and wrong pixels give wrong embeddings without any error: so where a tag is loaded its
entry in open_clip's table decides, and for a file whoever comes first of the user's options, a config beside it, the
file itself, the tag that it is said to be like, and the architecture's published tags where they all agree. Where they
do not, the user is asked. Settings are looked for one by one: a mean given by an option leaves the rest to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from d4c_onnx.errors import ModelError
from d4c_onnx.extras import need_extra
from d4c_onnx.manifest import ModelInfo, Preprocess
from d4c_onnx.models.model_options import ModelOptions

# What may be asked for, and the options that say it; size is the architecture's own, unless somebody says another.
_OPTIONS = {
    "mean": "--mean",
    "std": "--std",
    "interpolation": "--interpolation",
    "resize_mode": "--resize-mode",
    "quick_gelu": "--quick-gelu or --no-quick-gelu",
}
_SETTINGS = (*_OPTIONS, "fill_color")
_SHOWN = {"resize_mode": "resize mode", "quick_gelu": "GELU"}
_NAMED = 4  # tags of a kind that a question lists

BESIDE, WITHIN, BY_CONFIG = "beside the weights", "in the checkpoint", "by --config"  # how those sources end

Source = tuple[str, Mapping[str, Any]]  # who, and what they say of each setting


@dataclass(frozen=True, slots=True)
class Settings:
    """What was decided, and by whom.

    Attributes:
        values: by setting: those of the manifest's `preprocess`, and `quick_gelu`.
        sources: by setting.
    """

    values: Mapping[str, Any]
    sources: Mapping[str, str]

    def preprocess(self) -> Preprocess:
        """For the manifest."""
        return Preprocess(**{name: value for name, value in self.values.items() if name != "quick_gelu"})


def settings_of_tag(name: str, tag: str, options: ModelOptions) -> Settings:
    """Of a published tag's own weights."""
    size = (f"architecture {name}", {"size": architecture_settings(name)["size"]})
    return first_said([*said_by(options), (f"tag {tag}", tag_settings(name, tag)), size])


def settings_of_random(
    name: str, options: ModelOptions, stated: Iterable[Source] = (), config: Mapping[str, Any] | None = None
) -> Settings:
    """Of random weights, which nothing can be wrong for: nobody is asked.

    Args:
        name: the architecture.
        stated: what a config of the user's own says.
        config: the architecture's; None: open_clip's of that name.

    Raises:
        ModelError: `like` is no tag.
    """
    source, agreed = _agreed(name, _published(name))
    rest = [
        (source, {setting: value for setting, value in agreed.items() if setting != "quick_gelu"}),
        (f"architecture {name}", architecture_settings(name, config)),
        ("open_clip's default, for random weights", default_settings()),
    ]
    return first_said([*said_by(options), *stated, *_liked(name, options), *rest])


def settings_of_file(
    name: str, file: str, options: ModelOptions, stated: Iterable[Source], config: Mapping[str, Any] | None = None
) -> Settings:
    """Of a checkpoint.

    Args:
        name: the architecture.
        file: as messages call it.
        stated: what configs beside the file, and the file itself, say.
        config: the architecture's; None: open_clip's of that name.

    Raises:
        ModelError: `like` is no tag, or nobody says a setting in which the published tags differ: the choices.
    """
    said = [*said_by(options), *stated, *_liked(name, options)]
    tags, own = _published(name), architecture_settings(name, config)
    if not tags:
        unknown = f"open_clip's default, {name} has no published tags"
        said.append((unknown, default_settings() | {"quick_gelu": own["quick_gelu"]}))
    said += [_agreed(name, tags), (f"architecture {name}", {"size": own["size"]})]
    missing = [setting for setting in _SETTINGS if not any(setting in values for _, values in said)]
    if missing:
        raise ModelError(_question(name, file, missing, tags))
    return first_said(said)


def settings_of_folder(name: str, options: ModelOptions, stated: Iterable[Source]) -> Settings:
    """Of a folder that holds a model with its config.

    Raises:
        ModelError: `like` is no tag, or nothing in the folder says a setting.
    """
    color = ("open_clip's default", {"fill_color": default_settings()["fill_color"]})
    said = [*said_by(options), *stated, *_liked(name, options), color]
    missing = [setting for setting in _SETTINGS if not any(setting in values for _, values in said)]
    if missing:
        what = _listed([_SHOWN.get(setting, setting) for setting in missing])
        raise ModelError(
            f"{name}: nothing in the folder says which {what} these weights were trained with, and wrong ones give "
            "wrong embeddings. Put their preprocessor_config.json there, name a published tag that they are like "
            f"(--like MODEL:TAG), or say it yourself ({', '.join(_OPTIONS[setting] for setting in missing)})."
        )
    return first_said(said)


def settings_of_hub(name: str, cfg: Mapping[str, Any], quick_gelu: bool, options: ModelOptions) -> Settings:
    """Of a repository of the hub: what open_clip read there, and which GELU the model was made with."""
    own = _plain(cfg) | {"size": square_or_sides(cfg["size"]), "quick_gelu": quick_gelu}
    return first_said([*said_by(options), (name, own)])


def square_or_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of one number or two."""
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return int(height), int(width)


def said_by(options: ModelOptions) -> list[Source]:
    """What options say outright."""
    return [(option, {setting: value}) for setting, (option, value) in options.settings().items()]


def default_settings() -> dict[str, Any]:
    """open_clip's own, where nothing is said."""
    from open_clip.transform import PreprocessCfg

    return _plain(asdict(PreprocessCfg())) | {"quick_gelu": False}


def tag_settings(name: str, tag: str) -> dict[str, Any]:
    """What open_clip's table says of a tag, and its architecture's config where that is a QuickGELU's."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = open_clip.get_pretrained_cfg(name, tag)
    # A tag trained with QuickGELU under an architecture that defaults to GELU gives wrong embeddings, silently.
    quick = bool(cfg.get("quick_gelu")) or architecture_settings(name)["quick_gelu"]
    return _plain(merge_preprocess_dict(PreprocessCfg(), cfg)) | {"quick_gelu": quick}


def architecture_settings(name: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What an architecture's config says: image size, and which GELU."""
    if config is None:
        import open_clip

        config = open_clip.get_model_config(name) or {}
    size = config.get("vision_cfg", {}).get("image_size", 224)
    return {"size": square_or_sides(size), "quick_gelu": bool(config.get("quick_gelu"))}


def contradictions(options: ModelOptions, preprocess: Preprocess, model: ModelInfo) -> list[str]:
    """What options say otherwise than a bundle that was exported, as `mean (0.5, 0.5, 0.5), not (0.0, 0.0, 0.0)`."""
    known = asdict(preprocess) | {"quick_gelu": model.quick_gelu}
    asked = {setting: value for setting, (_, value) in options.settings().items()}
    for _, values in _liked(model.name, options):
        # a config goes before --like, and so do the weights themselves: what they said is no contradiction
        open_to_it = (name for name in values if not model.sources.get(name, "").endswith((BESIDE, WITHIN, BY_CONFIG)))
        asked = {name: values[name] for name in open_to_it} | asked
    return [f"{name} {known[name]}, not {value}" for name, value in asked.items() if known[name] != value]


def first_said(sources: Iterable[Source]) -> Settings:
    """Each setting as the first says it who says it at all."""
    values: dict[str, Any] = {}
    found: dict[str, str] = {}
    for source, said in sources:
        for setting, value in said.items():
            if setting not in values:
                values[setting], found[setting] = value, source
    return Settings(values, found)


def _plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's settings as the manifest has them, but for the size, which is the architecture's there."""
    mean, std = (tuple(float(value) for value in cfg[name]) for name in ("mean", "std"))
    words = {name: cfg[name] for name in ("interpolation", "resize_mode")}
    return {"mean": mean, "std": std, **words, "fill_color": int(cfg.get("fill_color") or 0)}


def _published(name: str) -> dict[str, dict[str, Any]]:
    """Tag -> what the table says of it."""
    import open_clip

    return {tag: tag_settings(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}


def _agreed(name: str, tags: Mapping[str, Mapping[str, Any]]) -> Source:
    """The settings that an architecture's published tags have in common."""
    source = f"all {len(tags)} published tags of {name}" if len(tags) > 1 else f"the one published tag of {name}"
    first, *others = tags.values() if tags else [{}]
    return source, {key: first[key] for key in _SETTINGS if key in first and all(o[key] == first[key] for o in others)}


def liked_tag(like: str) -> tuple[str, str]:
    """The model, empty where it is not said, and the tag of MODEL:TAG or TAG.

    Raises:
        MissingExtra: open_clip, whose table of published tags says what they stand for, is not installed.
    """
    need_extra("export", f"--like {like}: reading the table of published tags")
    model, _, tag = like.rpartition(":")
    return model, tag


def _liked(name: str, options: ModelOptions) -> list[Source]:
    """The tag that weights are said to be like."""
    if options.like is None:
        return []
    model, tag = liked_tag(options.like)
    import open_clip

    model = model or name
    if not open_clip.get_pretrained_cfg(model, tag):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ModelError(
            f"--like {options.like}: {model} has no such published tag (it has: {tags}). "
            "MODEL:TAG names one of another architecture."
        )
    return [(f"tag {options.like}, by --like", tag_settings(model, tag))]


def _question(name: str, file: str, missing: Sequence[str], tags: Mapping[str, Mapping[str, Any]]) -> str:
    """What to ask: the choices are groups of tags that agree in what is missing."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for tag, said in tags.items():
        groups.setdefault(tuple(said[setting] for setting in missing), []).append(tag)
    width = max(len(alike[0]) for alike in groups.values())
    lines = [
        f"  --like {alike[0]:<{width}}  {_shown(missing, values)}{_others(alike)}" for values, alike in groups.items()
    ]
    named = _listed([_SHOWN.get(setting, setting) for setting in missing])
    options = ", ".join(_OPTIONS[setting] for setting in missing if setting in _OPTIONS)
    return "\n".join(
        [
            f"{file}: nothing says which {named} these weights were trained with, and the published tags of {name} "
            "differ. Wrong ones give wrong embeddings. Add the tag that yours are like:",
            *lines,
            f"or say it yourself ({options}), or put their open_clip_config.json beside the file.",
        ]
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _others(alike: Sequence[str]) -> str:
    """The other tags of a kind."""
    more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    return f" (also {', '.join(alike[1:_NAMED])}{more})" if len(alike) > 1 else ""


def _shown(settings: Sequence[str], values: Sequence[Any]) -> str:
    return ", ".join(describe(setting, value) for setting, value in zip(settings, values, strict=True))


def described(preprocess: Preprocess, model: ModelInfo) -> str:
    """What a bundle was made for, and who says so, on one line."""
    values = {name: getattr(preprocess, name) for name in ("size", "mean", "std", "interpolation", "resize_mode")}
    grouped: dict[str, list[str]] = {}
    for setting, value in (values | {"quick_gelu": model.quick_gelu}).items():
        grouped.setdefault(model.sources.get(setting, ""), []).append(describe(setting, value))
    parts = (", ".join(said) + (f" ({source})" if source else "") for source, said in grouped.items())
    return "; ".join(parts)


def describe(setting: str, value: Any) -> str:
    """A setting as a person reads it: `mean 0.5, 0.5, 0.5`, `squash`, `QuickGELU`."""
    if setting == "quick_gelu":
        return "QuickGELU" if value else "plain GELU"
    if isinstance(value, tuple):
        joined = " x ".join(map(str, value)) if setting == "size" else ", ".join(f"{part:.4g}" for part in value)
        return joined if setting == "size" else f"{setting} {joined}"
    return str(value)
