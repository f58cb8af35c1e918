"""What a package's own configs say of pixels and texts: they are what a stack reads, so they are looked at, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from d4c_onnx.manifest import LARGEST_SIDE, MEAN_LIMITS, RESIZE_MODES, STD_LIMITS, Preprocess, TokenizerInfo
from d4c_onnx.manifest_file import MANIFEST, preprocess_of
from d4c_onnx.packaging.configs import WEB_CONFIG
from d4c_onnx.packaging.package_manifest import AGAIN
from d4c_onnx.runtime.preprocess import FILTERS, filter_of
from d4c_onnx.untrusted_json import Node, flag, integer, one_of, read_json, real, sequence

_SIDE = integer(1, LARGEST_SIDE)
_MEAN, _STD = sequence(real(*MEAN_LIMITS), 3), sequence(real(*STD_LIMITS), 3)
_FILTERS = {int(number): name for name, number in FILTERS.items()}  # by pillow's numbers


@dataclass(frozen=True, slots=True)
class Stated:
    """What one file says.

    Attributes:
        preprocess: what it makes of images, as far as that can be said; None: it is not about images.
        differences: in words, from what the model wants.
    """

    preprocess: Preprocess | None
    differences: tuple[str, ...]


def stated(file: Path, preprocess: Preprocess, tokenizer: TokenizerInfo) -> Stated | None:
    """What a config says beside what the model wants; None: it is none that is known by its name.

    Args:
        preprocess, tokenizer: the model's.

    Raises:
        BundleError: a field is not what it may be.
    """
    if file.name == "tokenizer_config.json":
        return _texts(read_json(file, mend=AGAIN), tokenizer)
    if file.name not in _READERS:
        return None
    # a manifest is read by this very code; others are told the filter that comes of its settings
    wanted = preprocess if file.name == MANIFEST else replace(preprocess, interpolation=filter_of(preprocess))
    found, further = _READERS[file.name](read_json(file, mend=AGAIN), wanted)
    return Stated(found, (*_differences(found, wanted), *further))


def _texts(top: Node, tokenizer: TokenizerInfo) -> Stated:
    most, wanted = top.take("model_max_length", integer(1)), tokenizer.context_length
    return Stated(None, () if most == wanted else (f"cuts texts at {most} ids, and the model takes {wanted}",))


def _hugging_face(top: Node, wanted: Preprocess) -> tuple[Preprocess, tuple[str, ...]]:
    """CLIP's image processor; a factor is told as the mean and std that do the same, m / f and s / f."""
    height, width = top.take("crop_size", lambda node: (node.take("height", _SIDE), node.take("width", _SIDE)))
    cropped = top.take("do_center_crop", flag)
    factor = 255 * top.take("rescale_factor", real(*STD_LIMITS)) if top.take("do_rescale", flag) else 255.0
    mean, std = top.take("image_mean", _MEAN), top.take("image_std", _STD)
    if not top.take("do_normalize", flag):
        mean, std = (0.0,) * 3, (1.0,) * 3
    edge = top.take("size", lambda node: node.take("shortest_edge", _SIDE, None))
    further = [] if top.take("do_resize", flag) else ["does not resize"]
    if cropped and edge != min(height, width):
        further.append(f"resizes to {edge} before it crops to {min(height, width)}")
    found = replace(
        wanted,
        size=(height, width),
        mean=tuple(value / factor for value in mean),
        std=tuple(value / factor for value in std),
        interpolation=_FILTERS[top.take("resample", integer(0, max(_FILTERS)))],
        resize_mode="shortest" if cropped else "squash",
    )
    return found, tuple(further)


def _open_clip(top: Node, wanted: Preprocess) -> tuple[Preprocess, tuple[str, ...]]:
    """open_clip's own keys, which Immich reads."""
    height, width = top.take("size", sequence(_SIDE, 2))
    found = replace(
        wanted,
        size=(height, width),
        mean=top.take("mean", _MEAN),
        std=top.take("std", _STD),
        interpolation=top.take("interpolation", one_of(*FILTERS)),
        resize_mode=top.take("resize_mode", one_of(*RESIZE_MODES)),
        fill_color=top.take("fill_color", integer(0, 255)),
    )
    return found, ()


def _page(top: Node, wanted: Preprocess) -> tuple[Preprocess, tuple[str, ...]]:
    """The same keys, as the page in the browser has them."""
    return top.take("preprocess", lambda node: _open_clip(node, wanted))


def _bundle(top: Node, wanted: Preprocess) -> tuple[Preprocess, tuple[str, ...]]:
    """A bundle's manifest, which Triton's Python models read."""
    return top.take("preprocess", preprocess_of), ()


_READERS = {
    "preprocessor_config.json": _hugging_face,
    "preprocess_cfg.json": _open_clip,
    WEB_CONFIG: _page,
    MANIFEST: _bundle,
}


def _differences(found: Preprocess, wanted: Preprocess) -> list[str]:
    """Settings that are not the model's; numbers may be rounded."""
    said = []
    for name in ("size", "mean", "std", "interpolation", "resize_mode", "fill_color"):
        own, right = getattr(found, name), getattr(wanted, name)
        rounded = name in ("mean", "std") and max(abs(a - b) for a, b in zip(own, right, strict=True)) < 1e-6
        if own != right and not rounded:
            said.append(f"{name} is {_shown(own)}, and the model's is {_shown(right)}")
    return said


def _shown(value: object) -> str:
    return ", ".join(f"{part:.6g}" for part in value) if isinstance(value, tuple) else str(value)
