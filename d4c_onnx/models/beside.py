"""Configs that lie beside a checkpoint, as open_clip and Hugging Face publish them: what they say of preprocessing.

They come with the weights and are not trusted: every value has a type and a range.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import INTERPOLATIONS, LARGEST_SIDE, MEAN_LIMITS, PUBLISHED_PIXELS, RESIZE_MODES, STD_LIMITS
from d4c_onnx.models.settings import ModelSettings, Source
from d4c_onnx.untrusted_json import Node, flag, integer, nullable, number, one_of, read_json, real, sequence

_MEND = "Mend it, or move it away and say --mean, --std, --interpolation, --resize-mode and --image-size."
_BYTE = 1 / 255
# pillow's numbers, as `resample` has them
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    "pytorch_model.bin",
)

CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")  # how names of files of weights end
_side = integer(1, LARGEST_SIDE)
_mean, _std = real(*MEAN_LIMITS), real(*STD_LIMITS)


def configs_beside(checkpoint: Path) -> list[Source]:
    """Name and settings of each config in a checkpoint's folder, the nearest to open_clip first.

    Raises:
        ModelError: a config is damaged, or says what a bundle cannot.
    """
    found = []
    for name, read in _READERS.items():
        file = checkpoint.parent / name
        if file.is_file():
            found.append((name, read(read_json(file, ModelError, _MEND))))
    return found


def config_of(file: Path) -> tuple[dict[str, Any], ModelSettings]:
    """An architecture, open_clip's `model_cfg`, and what its file says of preprocessing.

    Args:
        file: open_clip's: an architecture alone, or in an `open_clip_config.json`.

    Raises:
        ModelError: it cannot be read, or describes none.
    """
    mend = "It takes what open_clip's model_configs hold: embed_dim, vision_cfg and text_cfg."
    top = read_json(file, ModelError, mend)
    model = top.take("model_cfg", _object, top)
    model.take("embed_dim", integer(1))
    for tower in ("vision_cfg", "text_cfg"):
        model.take(tower, _object)
    return dict(model.value), _open_clip(top)


def weights_in(folder: Path) -> Path:
    """The one file of weights in a folder, by the names that open_clip and transformers publish, or the only one.

    Raises:
        ModelError: there is none, or no telling which.
    """
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    others = sorted(file for file in folder.iterdir() if file.suffix in CHECKPOINTS)
    if len(others) != 1:
        found = "several files of weights" if others else "no weights"
        raise ModelError(f"{folder}: holds {found}. Name the one to take {_WEIGHTS[0]}, or {_WEIGHTS[1]}.")
    return others[0]


def _open_clip(top: Node) -> ModelSettings:
    """`open_clip_config.json`: what `preprocess_cfg` leaves out is open_clip's default, as open_clip has it."""
    mean, std = PUBLISHED_PIXELS["OpenAI"]
    settings = ModelSettings()
    if "preprocess_cfg" in _object(top).value:
        cfg = top.take("preprocess_cfg", _without_nulls)
        settings = ModelSettings(
            size=cfg.take("size", _size, None),
            mean=cfg.take("mean", sequence(_mean, 3), mean),
            std=cfg.take("std", sequence(_std, 3), std),
            interpolation=cfg.take("interpolation", one_of(*INTERPOLATIONS), "bicubic"),
            resize_mode=cfg.take("resize_mode", one_of(*RESIZE_MODES), "shortest"),
            fill_color=cfg.take("fill_color", integer(0, 255), 0),
        )
    model = top.take("model_cfg", _object, top)
    if "vision_cfg" in model.value:  # an architecture, and the size that open_clip goes by
        size = model.take("vision_cfg", _object).take("image_size", nullable(_size), None)
        own = ModelSettings(size=size, quick_gelu=model.take("quick_gelu", flag, False))
        settings = own.over(settings)
    return settings


def _preprocess_cfg(top: Node) -> ModelSettings:
    """`preprocess_cfg.json`: open_clip's settings alone, as Immich writes them beside its ONNX files."""
    return _open_clip(Node({"preprocess_cfg": _object(top).value}, top.file, top.place, top.error, top.mend))


def _hugging_face(top: Node) -> ModelSettings:
    """`preprocessor_config.json` of CLIP's, SigLIP's and other image processors."""
    if not top.take("do_resize", flag, True):
        _cannot(top, "does not resize images")
    if not top.take("do_rescale", flag, True) or abs(top.take("rescale_factor", number, _BYTE) / _BYTE - 1) > 1e-6:
        _cannot(top, "scales pixels otherwise than by 1/255")
    size, resize_mode = _resizing(top)
    normalized = top.take("do_normalize", flag, True)
    resample = top.take("resample", nullable(integer(0, max(_RESAMPLE))), None)
    return ModelSettings(
        size=size,
        mean=top.take("image_mean", nullable(_channels(_mean)), None) if normalized else (0.0, 0.0, 0.0),
        std=top.take("image_std", nullable(_channels(_std)), None) if normalized else (1.0, 1.0, 1.0),
        interpolation=None if resample is None else _RESAMPLE[resample],
        resize_mode=resize_mode,
    )


def _processor(top: Node) -> ModelSettings:
    """`processor_config.json`, in which newer releases of transformers keep the image processor's."""
    inner = top.take("image_processor", nullable(_object), None)
    return ModelSettings() if inner is None else _hugging_face(inner)


def _resizing(top: Node) -> tuple[tuple[int, int] | None, str | None]:
    """Size and mode: the short side and a crop of that size, or both sides and no crop."""
    crops = top.take("do_center_crop", nullable(flag), None)
    if crops is None:  # a processor that knows no crop writes neither key
        crops = top.take("crop_size", nullable(_sides), None) is not None
    size = top.take("size", nullable(_sides), None)
    crop = top.take("crop_size", nullable(_sides), None) if crops else None
    if size is None:
        return None, None
    whole = "height" in size or (not crops and "only" in size)
    wanted = (size["height"], size["width"]) if "height" in size else (_one(top, size),) * 2
    cropped = wanted if crop is None else (crop.get("height", _one(top, crop)), crop.get("width", _one(top, crop)))
    if wanted != cropped:
        shown = [" x ".join(str(side) for side in sides) for sides in (wanted, cropped)]
        _cannot(top, f"resizes to {shown[0]} and crops {shown[1]}")
    if not whole and not crops:
        _cannot(top, "resizes the short side and does not crop, so that images have any shape")
    return wanted, "squash" if whole else "shortest"


def _one(top: Node, sides: dict[str, int]) -> int:
    for key in ("shortest_edge", "only", "width"):
        if key in sides:
            return sides[key]
    _cannot(top, "gives a size by neither height and width nor shortest_edge")


def _cannot(top: Node, what: str) -> NoReturn:
    raise ModelError(f"{top.file}: {what}, which a bundle cannot say. {_MEND}")


def _sides(node: Node) -> dict[str, int]:
    """A size: `only` one number, the `shortest_edge`, or `height` and `width`."""
    if isinstance(node.value, int):
        return {"only": _side(node)}
    return {key: node.take(key, _side) for key in ("height", "width", "shortest_edge") if key in _object(node).value}


def _size(node: Node) -> tuple[int, int]:
    """One number, or height and width."""
    if isinstance(node.value, list):
        height, width = sequence(_side, 2)(node)
        return height, width
    side = _side(node)
    return side, side


def _channels(read: Callable[[Node], float]) -> Callable[[Node], tuple[float, ...]]:
    """One number for each of three channels, or one for all."""
    return lambda node: sequence(read, 3)(node) if isinstance(node.value, list) else (read(node),) * 3


def _object(node: Node) -> Node:
    if not isinstance(node.value, dict):
        raise node.wrong("an object")
    return node


def _without_nulls(node: Node) -> Node:
    """open_clip takes null for not said."""
    kept = {key: value for key, value in _object(node).value.items() if value is not None}
    return Node(kept, node.file, node.place, node.error, node.mend)


_READERS: dict[str, Callable[[Node], ModelSettings]] = {
    "open_clip_config.json": _open_clip,
    "preprocessor_config.json": _hugging_face,
    "processor_config.json": _processor,
    "preprocess_cfg.json": _preprocess_cfg,
}
