"""Loading a CLIP, from whatever a user names: steps in a fixed order, the first that takes the name loads it."""

import copy
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load as load_safetensors

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import Resampled
from d4c_onnx.models.beside import CHECKPOINTS, config_of, configs_beside, weights_in
from d4c_onnx.models.catalogue import EmbeddedModel, embedded_models
from d4c_onnx.models.checkpoint import Checkpoint, load_published, load_tensors, read_checkpoint, set_image_size
from d4c_onnx.models.compact import unpack_token_table
from d4c_onnx.models.creation import (
    CONFIG,
    HUB,
    Architecture,
    Created,
    Fill,
    ImageSize,
    create,
    hub_access,
    hub_config,
    tokenizer_beside,
)
from d4c_onnx.models.folder_tokenizer import FolderTokenizer
from d4c_onnx.models.loaded import LoadedModel as LoadedModel
from d4c_onnx.models.loaded import hash_weights, uses_quick_gelu
from d4c_onnx.models.model_options import LOCAL, ModelOptions, is_local
from d4c_onnx.models.preprocessing import (
    BESIDE,
    BY_CONFIG,
    Settings,
    Source,
    default_settings,
    settings_of_file,
    settings_of_folder,
    settings_of_hub,
    settings_of_random,
    settings_of_tag,
    square_or_sides,
)
from d4c_onnx.models.transformers_folder import TRANSFORMERS_CONFIG, complete_config, convert_config, read_weights


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a user named."""

    name: str
    pretrained: str | None
    seed: int
    options: ModelOptions

    @property
    def folder(self) -> Path | None:
        """The folder that the name is, if it is one."""
        return Path(self.name.removeprefix(LOCAL)) if is_local(self.name) else None

    def holds(self, file: str) -> bool:
        """Whether the folder has a file."""
        return self.folder is not None and (self.folder / file).is_file()


@dataclass(frozen=True, slots=True)
class Step:
    """One form in which a model can be named.

    Attributes:
        name: what the error about an unknown name calls it.
        takes: whether a name is of this form.
        load: loads it, or raises.
    """

    name: str
    takes: Callable[[_Asked], bool]
    load: Callable[[_Asked], LoadedModel]


def load_model(
    name: str, pretrained: str | None = None, seed: int = 0, options: ModelOptions | None = None
) -> LoadedModel:
    """Load a model on the CPU in float32.

    Args:
        name: of any form that `STEPS` lists.
        pretrained: None where the name is one of weights, too; else a tag, a checkpoint's path, or `random`.
        seed: for `random` weights.
        options: what the user says of weights that do not say it themselves.

    Raises:
        ModelError: nothing of that name, the weights cannot be reached or read, do not fit the architecture, or do not
            tell which preprocessing they are for.
    """
    asked = _Asked(name, pretrained, seed, options or ModelOptions())
    step = next((step for step in STEPS if step.takes(asked)), None)
    if step is None:
        near = difflib.get_close_matches(name, [*embedded_models(), *open_clip.list_models()], 3, 0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        forms = "".join(f"\n  {number}. {step.name}" for number, step in enumerate(STEPS, 1))
        raise ModelError(f"{name}: no such model.{hint} d4c-onnx models lists names. Tried, in this order:{forms}")
    with hub_access():
        return step.load(asked)


def _load_embedded(asked: _Asked) -> LoadedModel:
    """A mini with its own weights, random ones, or a file's."""
    entry, pretrained = embedded_models()[asked.name], asked.pretrained or "embedded"
    if Path(pretrained).suffix in CHECKPOINTS:
        return _load_weights(asked, Architecture(entry.name, entry.model_cfg), entry=entry)
    if pretrained not in ("embedded", "random"):
        raise ModelError(
            f"--pretrained {pretrained}: {entry.name} ships with its weights. Leave --pretrained away, or name a "
            f"checkpoint ({', '.join(CHECKPOINTS)})."
        )
    if options := [*asked.options.said(), *asked.options.places()]:
        raise ModelError(f"{', '.join(options)}: {entry.name} ships with its preprocessing. Leave it away.")
    torch.manual_seed(asked.seed)
    model: Any = CLIP(**copy.deepcopy(entry.model_cfg))
    if pretrained == "embedded":
        blob = (resources.files("d4c_onnx.models.embedded") / f"{entry.name}.safetensors").read_bytes()
        state = unpack_token_table(load_safetensors(blob))
        model.load_state_dict({key: value.float() for key, value in state.items()})
    size = entry.model_cfg["vision_cfg"]["image_size"]
    said = replace(default_settings(), size=(size, size), quick_gelu=entry.model_cfg["quick_gelu"])
    settings = Settings(said, dict.fromkeys(said.given(), f"{entry.name} as it ships"))
    tokenizer = SimpleTokenizer(context_length=entry.model_cfg["text_cfg"]["context_length"])
    return _loaded(entry.name, pretrained, Created(model, tokenizer, ()), settings, entry)


def _load_registry(asked: _Asked) -> LoadedModel:
    """An open_clip architecture with a tag's weights, a file's, or random ones."""
    name, pretrained, options = asked.name, asked.pretrained, asked.options
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        known = ", ".join(tags) or "none"
        raise ModelError(f"{name}: which weights? Add --pretrained TAG ({known}), --pretrained FILE, or random.")
    architecture = Architecture(name, open_clip.get_model_config(name) or {}, options.tokenizer, known=True)
    if pretrained not in tags:
        return _load_weights(asked, architecture)
    if options.like is not None:
        raise ModelError(f"--like {options.like}: --pretrained {pretrained} is a tag itself. Leave --like away.")
    settings = settings_of_tag(name, pretrained, options)

    def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
        file = open_clip.factory.download_pretrained(open_clip.get_pretrained_cfg(name, pretrained))
        return load_published(model, file, name, image_size)

    return _created(asked, architecture, pretrained, settings, fill)


def _load_config(asked: _Asked) -> LoadedModel:
    """An architecture of the user's own, with a file's weights or random ones."""
    file, name = Path(str(asked.options.config)), asked.name
    if asked.name.startswith((HUB, LOCAL)):
        raise ModelError(f"--config {file}: {asked.name} says its own architecture. Leave one of the two away.")
    if not file.is_file():
        raise ModelError(f"--config {file}: no such file.")
    if asked.pretrained is None:
        raise ModelError(f"{name}: which weights? Add --pretrained FILE, or random, beside --config {file}.")
    config, said = config_of(file)
    tokenizer = asked.options.tokenizer or tokenizer_beside(file.parent, config)
    return _load_weights(asked, Architecture(name, config, tokenizer), [(f"{file.name}, {BY_CONFIG}", said)])


def _load_weights(
    asked: _Asked, architecture: Architecture, stated: Sequence[Source] = (), entry: EmbeddedModel | None = None
) -> LoadedModel:
    """An architecture with a file's weights, or random ones; `stated` is what its config says."""
    name, pretrained, options = architecture.name, str(asked.pretrained), asked.options
    if pretrained == "random":

        def randomly(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
            if image_size is not None:
                set_image_size(model, image_size)
            return ()  # of random positions nothing is lost

        settings = settings_of_random(name, options, stated, architecture.config)
        return _created(asked, architecture, pretrained, settings, randomly)
    path = _check_checkpoint(name, Path(pretrained), open_clip.list_pretrained_tags_by_model(name))
    beside = [(f"{config} {BESIDE}", said) for config, said in configs_beside(path)]
    checkpoint = read_checkpoint(path)
    told = [*stated, *beside, *checkpoint.stated]
    settings = settings_of_file(name, str(path), options, told, architecture.config)
    if architecture.tokenizer is None:
        architecture = replace(architecture, tokenizer=tokenizer_beside(path.parent, architecture.config))

    def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
        return load_tensors(model, checkpoint, name, image_size)

    return _created(asked, architecture, path.name, settings, fill, entry)


def _load_hub(asked: _Asked) -> LoadedModel:
    """A repository of the hub, which says all of itself; options go before it."""
    name, options = asked.name, asked.options
    _refuse_pretrained(asked)
    if options.like is not None:
        raise ModelError(f"--like {options.like}: {name} says its own preprocessing. Leave --like away.")
    architecture = Architecture(name, hub_config(name)["model_cfg"], options.tokenizer)

    def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
        file = open_clip.factory.download_pretrained_from_hf(name.removeprefix(HUB))
        return load_published(model, file, name, image_size)

    created = create(architecture, "", options.image_size, options.quick_gelu, asked.seed, fill)
    _refuse_resampled(created.resampled, name, options)
    model = created.model
    settings = settings_of_hub(name, model.visual.preprocess_cfg, uses_quick_gelu(model), options)
    return _loaded(name, "hub", created, settings)


def _load_folder(asked: _Asked) -> LoadedModel:
    """A folder as open_clip publishes it: `open_clip_config.json`, weights, a tokenizer."""
    folder, name = _named_folder(asked)
    config, said = config_of(folder / CONFIG)
    weights = weights_in(folder)
    beside = [(f"{file} {BESIDE}", settings) for file, settings in configs_beside(weights) if file != CONFIG]
    settings = settings_of_folder(name, asked.options, [(f"{CONFIG} {BESIDE}", said), *beside])
    checkpoint = read_checkpoint(weights)
    architecture = Architecture(name, config, asked.options.tokenizer or tokenizer_beside(folder, config))

    def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
        return load_tensors(model, checkpoint, name, image_size)

    return _created(asked, architecture, "folder", settings, fill)


def _load_transformers(asked: _Asked) -> LoadedModel:
    """A folder as transformers publishes it: `config.json`, weights, a tokenizer, a preprocessor's config."""
    folder, name = _named_folder(asked)
    converted = convert_config(folder / TRANSFORMERS_CONFIG)
    beside = [(f"{file} {BESIDE}", said) for file, said in configs_beside(folder / TRANSFORMERS_CONFIG)]
    settings = settings_of_folder(name, asked.options, [*beside, (f"{TRANSFORMERS_CONFIG} {BESIDE}", converted.said)])
    stored = read_weights(folder)
    checkpoint = Checkpoint(stored.file, converted.rename(stored.state), ())

    def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
        converted.finish(model)
        return load_tensors(model, checkpoint, name, image_size)

    with complete_config(converted) as config:
        context = config["text_cfg"]["context_length"]
        make = partial(FolderTokenizer, asked.options.tokenizer or folder, context)
        return _created(asked, Architecture(name, config, make_tokenizer=make), "folder", settings, fill)


def _named_folder(asked: _Asked) -> tuple[Path, str]:
    """A folder that is there, and the name that its bundle gets."""
    _refuse_pretrained(asked)
    folder = asked.folder
    if folder is None or not folder.is_dir():
        raise ModelError(f"{asked.name}: no such folder.")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: holds a LoRA adapter (adapter_config.json): changes to weights, which have to be merged first. "
            "With peft: model.merge_and_unload(), then save the model."
        )
    if not any((folder / file).is_file() for file in (CONFIG, TRANSFORMERS_CONFIG)):
        raise ModelError(
            f"{folder}: holds neither {CONFIG} (open_clip's) nor config.json (transformers'). Put the one that the "
            "weights came with there, or name an architecture, and the weights with --pretrained FILE."
        )
    return folder, folder.resolve().name


def _refuse_pretrained(asked: _Asked) -> None:
    if asked.pretrained is not None:
        raise ModelError(
            f"--pretrained {asked.pretrained}: {asked.name} names its own weights. Leave --pretrained away."
        )


def _created(
    asked: _Asked,
    architecture: Architecture,
    shown: str,
    settings: Settings,
    fill: Fill,
    entry: EmbeddedModel | None = None,
) -> LoadedModel:
    said = settings.values
    created = create(architecture, shown, said.size, said.quick_gelu, asked.seed, fill)
    _refuse_resampled(created.resampled, architecture.name, asked.options)
    return _loaded(architecture.name, shown, created, settings, entry)


def _check_checkpoint(name: str, path: Path, tags: list[str]) -> Path:
    known = ", ".join(tags) or "none"
    if path.is_dir():
        raise ModelError(
            f"--pretrained {path}: is a folder. Name the file in it; or, where its config lies in it, name the folder "
            f"in place of {name}."
        )
    if path.suffix not in CHECKPOINTS:
        raise ModelError(
            f"--pretrained {path}: neither a tag of {name} ({known}) nor a checkpoint ({', '.join(CHECKPOINTS)})."
        )
    if not path.is_file():
        raise ModelError(f"--pretrained {path}: no such file.")
    return path


def _refuse_resampled(resampled: tuple[Resampled, ...], name: str, options: ModelOptions) -> None:
    if options.strict and resampled:
        what = "; ".join(f"{one.name} has {one.stored} positions, the model takes {one.taken}" for one in resampled)
        raise ModelError(
            f"--strict: {name} would resample what the weights have for another image size or text length ({what}). "
            "Name the architecture or the --image-size they were trained for, or leave --strict away."
        )


def _loaded(
    name: str, pretrained: str, created: Created, settings: Settings, entry: EmbeddedModel | None = None
) -> LoadedModel:
    model = created.model
    model.eval().float().requires_grad_(False)
    size = square_or_sides(model.visual.image_size)
    return LoadedModel(
        name=name,
        pretrained=pretrained,
        model=model,
        tokenizer=created.tokenizer,
        preprocess=settings.preprocess(size),
        weights_sha256=hash_weights(model),
        quick_gelu=uses_quick_gelu(model),
        embedded=entry,
        sources=settings.sources,
        resampled=created.resampled,
    )


STEPS = (
    Step(
        "a config of your own: --config FILE.json, with or without a name",
        lambda it: bool(it.options.config),
        _load_config,
    ),
    Step("an embedded model: mini-vit, mini-rn", lambda it: it.name in embedded_models(), _load_embedded),
    Step("the hub: hf-hub:org/repo", lambda it: it.name.startswith(HUB), _load_hub),
    Step("an open_clip architecture, and --pretrained", lambda it: it.name in open_clip.list_models(), _load_registry),
    Step(f"a folder with {CONFIG}: local-dir:FOLDER or FOLDER", lambda it: it.holds(CONFIG), _load_folder),
    Step(f"a folder of transformers, with {TRANSFORMERS_CONFIG}", lambda it: it.folder is not None, _load_transformers),
)
