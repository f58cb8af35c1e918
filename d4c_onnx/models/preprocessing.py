"""Which preprocessing and which GELU weights were trained with: who says so first, and when to ask.

A checkpoint does not say it, and wrong pixels give wrong embeddings without any error: so where a tag is loaded its
entry in open_clip's table decides, and for a file whoever comes first of the user's options, a config beside it, the
file itself, the tag that it is said to be like, and the architecture's published tags where they all agree. Where they
do not, the user is asked. Settings are looked for one by one: a mean given by an option leaves the rest to the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from d4c_onnx.errors import ModelError
from d4c_onnx.extras import need_extra
from d4c_onnx.manifest import ModelInfo, Preprocess
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.models.settings import ModelSettings
from d4c_onnx.models.settings import Source as Source  # for those who bring what configs say

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

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """What was decided, and by whom, by setting."""

    values: ModelSettings
    sources: Mapping[str, str]

    def preprocess(self, size: tuple[int, int] | None = None) -> Preprocess:
        """For the manifest.

        Args:
            size: what the model takes; None: what was said.
        """
        said = self.values
        return Preprocess(
            size or _known(said.size),
            _known(said.mean),
            _known(said.std),
            _known(said.interpolation),
            _known(said.resize_mode),
            _known(said.fill_color),
        )


def _known(value: T | None) -> T:
    """A setting that was decided: where nobody says one, somebody was asked before."""
    assert value is not None
    return value


def settings_of_tag(name: str, tag: str, options: ModelOptions) -> Settings:
    """Of a published tag's own weights."""
    size = (f"architecture {name}", architecture_settings(name).only(["size"]))
    return first_said([*options.stated(), (f"tag {tag}", tag_settings(name, tag)), size])


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
        (source, replace(agreed, quick_gelu=None)),
        (f"architecture {name}", architecture_settings(name, config)),
        ("open_clip's default, for random weights", default_settings()),
    ]
    return first_said([*options.stated(), *stated, *_liked(name, options), *rest])


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
    said = [*options.stated(), *stated, *_liked(name, options)]
    tags, own = _published(name), architecture_settings(name, config)
    if not tags:
        unknown = f"open_clip's default, {name} has no published tags"
        said.append((unknown, replace(default_settings(), quick_gelu=own.quick_gelu)))
    found = first_said([*said, _agreed(name, tags), (f"architecture {name}", own.only(["size"]))])
    missing = [setting for setting in _SETTINGS if setting not in found.sources]
    if missing:
        raise ModelError(_question(name, file, missing, tags))
    return found


def settings_of_folder(name: str, options: ModelOptions, stated: Iterable[Source]) -> Settings:
    """Of a folder that holds a model with its config.

    Raises:
        ModelError: `like` is no tag, or nothing in the folder says a setting.
    """
    color = ("open_clip's default", default_settings().only(["fill_color"]))
    found = first_said([*options.stated(), *stated, *_liked(name, options), color])
    missing = [setting for setting in _SETTINGS if setting not in found.sources]
    if missing:
        what = _listed([_SHOWN.get(setting, setting) for setting in missing])
        raise ModelError(
            f"{name}: nothing in the folder says which {what} these weights were trained with, and wrong ones give "
            "wrong embeddings. Put their preprocessor_config.json there, name a published tag that they are like "
            f"(--like MODEL:TAG), or say it yourself ({', '.join(_OPTIONS[setting] for setting in missing)})."
        )
    return found


def settings_of_hub(name: str, cfg: Mapping[str, Any], quick_gelu: bool, options: ModelOptions) -> Settings:
    """Of a repository of the hub: what open_clip read there, and which GELU the model was made with."""
    own = replace(_plain(cfg), size=square_or_sides(cfg["size"]), quick_gelu=quick_gelu)
    return first_said([*options.stated(), (name, own)])


def square_or_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of one number or two."""
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return int(height), int(width)


def default_settings() -> ModelSettings:
    """open_clip's own, where nothing is said."""
    from open_clip.transform import PreprocessCfg

    return replace(_plain(asdict(PreprocessCfg())), quick_gelu=False)


def tag_settings(name: str, tag: str) -> ModelSettings:
    """What open_clip's table says of a tag, and its architecture's config where that is a QuickGELU's."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    cfg = open_clip.get_pretrained_cfg(name, tag)
    # A tag trained with QuickGELU under an architecture that defaults to GELU gives wrong embeddings, silently.
    quick = bool(cfg.get("quick_gelu")) or architecture_settings(name).quick_gelu
    return replace(_plain(merge_preprocess_dict(PreprocessCfg(), cfg)), quick_gelu=quick)


def architecture_settings(name: str, config: Mapping[str, Any] | None = None) -> ModelSettings:
    """What an architecture's config says: image size, and which GELU."""
    if config is None:
        import open_clip

        config = open_clip.get_model_config(name) or {}
    size = config.get("vision_cfg", {}).get("image_size", 224)
    return ModelSettings(size=square_or_sides(size), quick_gelu=bool(config.get("quick_gelu")))


def contradictions(options: ModelOptions, preprocess: Preprocess, model: ModelInfo) -> list[str]:
    """What options say otherwise than a bundle that was exported, as `mean (0.5, 0.5, 0.5), not (0.0, 0.0, 0.0)`."""
    known = asdict(preprocess) | {"quick_gelu": model.quick_gelu}
    asked = {setting: value for _, one in options.stated() for setting, value in one.given().items()}
    for _, liked in _liked(model.name, options):
        values = liked.given()
        # a config goes before --like, and so do the weights themselves: what they said is no contradiction
        open_to_it = (name for name in values if not model.sources.get(name, "").endswith((BESIDE, WITHIN, BY_CONFIG)))
        asked = {name: values[name] for name in open_to_it} | asked
    return [f"{name} {known[name]}, not {value}" for name, value in asked.items() if known[name] != value]


def first_said(sources: Iterable[Source]) -> Settings:
    """Each setting as the first says it who says it at all."""
    values, found = ModelSettings(), dict[str, str]()
    for source, said in sources:
        for setting in said.given():
            found.setdefault(setting, source)
        values = values.over(said)
    return Settings(values, found)


def _plain(cfg: Mapping[str, Any]) -> ModelSettings:
    """open_clip's settings as the manifest has them, but for the size, which is the architecture's there."""
    mean, std = (tuple(float(value) for value in cfg[name]) for name in ("mean", "std"))
    return ModelSettings(mean, std, cfg["interpolation"], cfg["resize_mode"], int(cfg.get("fill_color") or 0))


def _published(name: str) -> dict[str, ModelSettings]:
    """Tag -> what the table says of it."""
    import open_clip

    return {tag: tag_settings(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}


def _agreed(name: str, tags: Mapping[str, ModelSettings]) -> Source:
    """The settings that an architecture's published tags have in common."""
    source = f"all {len(tags)} published tags of {name}" if len(tags) > 1 else f"the one published tag of {name}"
    first, *others = tags.values() if tags else [ModelSettings()]
    alike = [key for key in _SETTINGS if all(getattr(other, key) == getattr(first, key) for other in others)]
    return source, first.only(alike)


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


def _question(name: str, file: str, missing: Sequence[str], tags: Mapping[str, ModelSettings]) -> str:
    """What to ask: the choices are groups of tags that agree in what is missing."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for tag, said in tags.items():
        groups.setdefault(tuple(getattr(said, setting) for setting in missing), []).append(tag)
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


def _shown(settings: Sequence[str], values: Sequence[object]) -> str:
    return ", ".join(describe(setting, value) for setting, value in zip(settings, values, strict=True))


def described(preprocess: Preprocess, model: ModelInfo) -> str:
    """What a bundle was made for, and who says so, on one line."""
    values = {name: getattr(preprocess, name) for name in ("size", "mean", "std", "interpolation", "resize_mode")}
    grouped: dict[str, list[str]] = {}
    for setting, value in (values | {"quick_gelu": model.quick_gelu}).items():
        grouped.setdefault(model.sources.get(setting, ""), []).append(describe(setting, value))
    parts = (", ".join(said) + (f" ({source})" if source else "") for source, said in grouped.items())
    return "; ".join(parts)


def describe(setting: str, value: object) -> str:
    """A setting as a person reads it: `mean 0.5, 0.5, 0.5`, `squash`, `QuickGELU`."""
    if setting == "quick_gelu":
        return "QuickGELU" if value else "plain GELU"
    if isinstance(value, tuple):
        joined = " x ".join(map(str, value)) if setting == "size" else ", ".join(f"{part:.4g}" for part in value)
        return joined if setting == "size" else f"{setting} {joined}"
    return str(value)
