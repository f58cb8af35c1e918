"""An open_clip model and its tokenizer from a config, with weights put in: what can go wrong is named.

Nothing that a config or a repository brings is run: transformers is kept from asking whether it may.
"""

import contextlib
import json
import logging
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants as hub

from d4c_onnx.errors import ModelError
from d4c_onnx.files import temporary_folder
from d4c_onnx.manifest import Resampled
from d4c_onnx.models.preprocessing import square_or_sides
from d4c_onnx.untrusted_json import quoted, short

ImageSize = tuple[int, int] | None
Fill = Callable[[Any, ImageSize], tuple[Resampled, ...]]
HUB = "hf-hub:"
CONFIG = "open_clip_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model")
WAYS_OUT = (
    "Three ways out: run once where the hub can be reached (the weights are then cached); pass a local checkpoint "
    "with --pretrained FILE.safetensors; or, for speed and size work only, --pretrained random."
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model is built from.

    Attributes:
        name: as messages and the manifest call it.
        config: open_clip's `model_cfg`.
        tokenizer: a folder with the tokenizer's files; None: from where the config says.
        known: whether open_clip knows it by that name; else the config is all there is.
        make_tokenizer: makes a tokenizer that open_clip has no wrapper for.
    """

    name: str
    config: Mapping[str, Any]
    tokenizer: Path | None = None
    known: bool = False
    make_tokenizer: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class Created:
    """A model with its weights, its tokenizer, and the positions that were resampled."""

    model: Any
    tokenizer: Any
    resampled: tuple[Resampled, ...]


def create(
    architecture: Architecture, shown: str, image_size: ImageSize, quick_gelu: bool | None, seed: int, fill: Fill
) -> Created:
    """Build a model and its tokenizer.

    Args:
        shown: which weights, for messages.
        image_size, quick_gelu: None: as its config says.
        fill: puts weights in, and makes a timm tower take another image size, where one is given.

    Raises:
        ModelError: a config that no model can be made of, a package or a file that is missing, weights that do not fit.
    """
    torch.manual_seed(seed)
    name, vision = architecture.name, architecture.config["vision_cfg"]
    _refuse_code(architecture)
    try:
        with warnings.catch_warnings(), _named(architecture) as known, _no_remote_code(architecture.config):
            warnings.simplefilter("ignore")
            other = None if image_size == square_or_sides(vision.get("image_size", 224)) else image_size
            by_timm = other is not None and "timm_model_name" in vision
            model = open_clip.create_model(
                known,
                load_weights=False,
                pretrained_text=False,
                force_image_size=None if other is None or by_timm else other[0] if len({*other}) == 1 else other,
                **({} if quick_gelu is None else {"quick_gelu": quick_gelu}),
            )
            tokenizer = _tokenizer(architecture, known)
            resampled = fill(model, other if by_timm else None)
    except ModelError:
        raise
    except Exception as error:  # the hub client raises a dozen types, none of them public
        if isinstance(error, ModuleNotFoundError) or "pip install transformers" in str(error):
            package = getattr(error, "name", None) or "transformers"
            raise ModelError(
                f"{name}: needs the Python package {package}. Install it with pip install 'd4c-onnx[hf]'."
            ) from error
        raise ModelError(_failed(architecture, shown, error)) from error
    return Created(model, tokenizer, resampled)


def hub_config(name: str) -> dict[str, Any]:
    """The `open_clip_config.json` of `hf-hub:org/repo`.

    Raises:
        ModelError: it cannot be had, or is none.
    """
    repository = name.removeprefix(HUB)
    try:
        file = open_clip.factory.download_pretrained_from_hf(repository, filename=CONFIG)
        config: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
        if not all(isinstance(config["model_cfg"][tower], dict) for tower in ("vision_cfg", "text_cfg")):
            raise KeyError("model_cfg")
    except Exception as error:
        raise ModelError(
            f"{name}: {CONFIG} of the repository {repository} cannot be had ({short(error)}). Run once where the hub "
            "can be reached, or put a copy of the repository (config, weights, tokenizer files) into a folder and name "
            "the folder instead. A repository of transformers has config.json only: its copy is converted."
        ) from error
    return config


def _tokenizer(architecture: Architecture, known: str) -> Any:
    """open_clip's own, or its wrapper of a Hugging Face tokenizer, from a folder or the hub."""
    text = architecture.config["text_cfg"]
    repository = text.get("hf_tokenizer_name")
    if architecture.make_tokenizer is not None:
        return architecture.make_tokenizer()
    if not repository:
        if architecture.tokenizer is not None:
            raise ModelError(f"--tokenizer: {architecture.name} has open_clip's own tokenizer. Leave it away.")
        return open_clip.get_tokenizer(known)
    try:
        return open_clip.tokenizer.HFTokenizer(
            str(architecture.tokenizer or repository),
            context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text.get("tokenizer_mode"),
            **text.get("tokenizer_kwargs", {}),
        )
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if architecture.tokenizer is not None:
            raise ModelError(
                f"{architecture.tokenizer}: holds no tokenizer that can be read ({short(error)}). It takes the "
                f"tokenizer files of {quoted(repository)}: {TOKENIZER_FILES[0]} and {TOKENIZER_FILES[1]}."
            ) from error
        raise ModelError(
            f"{architecture.name}: its tokenizer is that of the repository {quoted(repository)} on the hub, which "
            f"cannot be had ({short(error)}). Run once where the hub can be reached, or put a copy of "
            f"{TOKENIZER_FILES[0]} and {TOKENIZER_FILES[1]} of that repository beside the weights, or into any folder: "
            "--tokenizer FOLDER."
        ) from error


def tokenizer_beside(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The folder, where the config wants a tokenizer from the hub and its files lie there."""
    wanted = config["text_cfg"].get("hf_tokenizer_name")
    return folder if wanted and any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def _failed(architecture: Architecture, shown: str, error: Exception) -> str:
    name, text = architecture.name, architecture.config["text_cfg"].get("hf_model_name")
    if text is not None and not isinstance(error, TypeError) and not Path(str(text), "config.json").is_file():
        return (
            f"{name}: its text tower is described by config.json of the repository {quoted(text)} on the hub, which "
            f"cannot be had ({short(error)}). Run once where the hub can be reached, or put a copy of that file into a "
            "folder, and name the folder as hf_model_name in a config of your own: --config FILE.json."
        )
    if not architecture.known and not name.startswith(HUB):
        return f"{name}: no model can be made of its config ({short(error)}). Compare it with one of open_clip's."
    return f"{name} {shown}: cannot be loaded ({short(error)}). {WAYS_OUT}"


@contextlib.contextmanager
def _named(architecture: Architecture) -> Iterator[str]:
    """A name by which open_clip finds the config: its own, or that of a folder made for it."""
    if architecture.known or architecture.name.startswith(HUB):
        yield architecture.name
        return
    with temporary_folder() as folder:
        (folder / CONFIG).write_text(json.dumps({"model_cfg": dict(architecture.config)}), "utf-8")
        yield f"local-dir:{folder}"


def _refuse_code(architecture: Architecture) -> None:
    """Refuse a config that would have transformers run what a repository brings."""
    text = architecture.config["text_cfg"]
    kwargs = text.get("tokenizer_kwargs") or {}
    if not isinstance(kwargs, Mapping) or "trust_remote_code" in kwargs:
        raise ModelError(
            f"{architecture.name}: its config asks for code of a repository to be run (trust_remote_code). Nothing is "
            "ever run. Take that key out of tokenizer_kwargs, if the tokenizer can do without."
        )


@contextlib.contextmanager
def _no_remote_code(config: Mapping[str, Any]) -> Iterator[None]:
    """transformers asks on the terminal whether to run a repository's code; with no time to answer it refuses."""
    if not {"hf_model_name", "hf_tokenizer_name"} & set(config["text_cfg"]):
        yield
        return
    try:
        from transformers import dynamic_module_utils as dynamic
    except ModuleNotFoundError:  # whoever needs it says so
        yield
        return
    before = dynamic.TIME_OUT_REMOTE_CODE
    dynamic.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic.TIME_OUT_REMOTE_CODE = before


@contextlib.contextmanager
def hub_access() -> Iterator[None]:
    """Quiet, and quick to say no.

    open_clip and the hub client log every step and retry; errors reach the user through exceptions instead. Where the
    hub's name cannot be resolved (and no proxy is set), only the local cache is asked: the client itself would retry
    for a minute.
    """
    proxied = bool(urllib.request.getproxies())
    offline = hub.HF_HUB_OFFLINE
    logging.disable(logging.CRITICAL)
    try:
        if not offline and not proxied:
            try:
                socket.getaddrinfo(urllib.parse.urlparse(hub.ENDPOINT).hostname, 443)
            except OSError:
                hub.HF_HUB_OFFLINE = True
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        logging.disable(logging.NOTSET)
