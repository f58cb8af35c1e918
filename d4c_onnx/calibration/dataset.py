"""The calibration set on disk.

<set>/
  pixel_values.npy      float32 [N, 3, H, W], normalised: exactly what the image encoder is fed
  held_out.npy          float32 [M, 3, H, W]: never calibrated on, for label-free fidelity
  losses.json           loss terms by name, one value per pass, a list for each unit that was optimised together
  prompts.json          texts, their input_ids without padding, held-out texts, image labels
  contact_sheet.png     all images, for a person to look at
  manifest.json         key (model weights, recipe, seed), versions, SHA-256 of each file
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from d4c_onnx.calibration.set_file import (
    MEND,
    SetManifest,
    check_regular,
    check_together,
    read_images,
    read_set_json,
    set_losses,
    set_manifest,
    set_texts,
)
from d4c_onnx.errors import CalibrationError
from d4c_onnx.files import sha256, staged_folder, write_json
from d4c_onnx.ownership import MANIFEST, WORK

PIXELS, HELD_OUT, LOSSES, PROMPTS, SHEET = (
    "pixel_values.npy",
    "held_out.npy",
    "losses.json",
    "prompts.json",
    "contact_sheet.png",
)


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """A calibration set.

    Attributes:
        pixel_values: float32 [N, 3, H, W]; memory-mapped when read from disk.
        held_out: float32 [M, 3, H, W].
        labels: the noun each image was made for, N + M entries; empty where they were made for none.
        texts: calibration prompts.
        input_ids: one list of ids per prompt, without what the tower does not look at (or at fixed length).
        held_out_texts: further prompts.
        manifest: what was asked for, and what it was made with.
        losses: for each unit of synthesis its loss terms by name, one value per pass; empty where none fell.
    """

    pixel_values: np.ndarray
    held_out: np.ndarray
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    input_ids: tuple[tuple[int, ...], ...]
    held_out_texts: tuple[str, ...]
    manifest: SetManifest
    losses: tuple[dict[str, list[float]], ...] = ()


def save_calibration_set(output_path: Path, content: CalibrationSet, preview: np.ndarray) -> CalibrationSet:
    """Write a set atomically and return it as read back.

    Args:
        output_path: the folder; replaced when it exists.
        content: arrays, texts, and the manifest's own entries.
        preview: float32 [N, 3, H, W] in 0..1, the images as a person should see them.

    Raises:
        CalibrationError: an image holds a value that is not finite.
        BundleError: the disk is full or the place cannot be written.
    """
    for name, array in (("pixel_values", content.pixel_values), ("held_out", content.held_out)):
        if not np.isfinite(array).all():
            raise CalibrationError(
                f"{output_path}: {name} holds NaN or infinity. Set synthesis.precision=float32; if that mends nothing, "
                "the model's own weights do not compute finite numbers."
            )
    with staged_folder(output_path) as stage:
        np.save(stage / PIXELS, np.ascontiguousarray(content.pixel_values, np.float32))
        np.save(stage / HELD_OUT, np.ascontiguousarray(content.held_out, np.float32))
        prompts = {
            "texts": content.texts,
            "input_ids": content.input_ids,
            "held_out_texts": content.held_out_texts,
            "image_labels": content.labels,
        }
        write_json(stage / PROMPTS, prompts)
        write_json(stage / LOSSES, content.losses)
        contact_sheet(preview).save(stage / SHEET)
        files = {file.name: sha256(file) for file in sorted(stage.iterdir())}
        write_json(stage / MANIFEST, replace(content.manifest, files=files).record())
    return open_calibration_set(output_path, verify=False)  # hashed and looked at a moment ago


def work_folder(output_path: Path) -> Path:
    """Where the units of a set that is being made lie until it is whole."""
    return output_path.with_name(f"{WORK}{output_path.name}")


def open_calibration_set(path: str | Path, verify: bool = True) -> CalibrationSet:
    """Read a set; images stay on disk until they are used.

    Raises:
        CalibrationError: the folder is not a set, or a file is missing, damaged or of another shape.
    """
    path = Path(path)
    manifest = read_set_json(path / MANIFEST, set_manifest)
    for name, digest in manifest.files.items():
        check_regular(path / name)
        if verify and sha256(path / name) != digest:
            raise CalibrationError(
                f"{path / name}: differs from the manifest's SHA-256. Delete the folder, and synthesise again."
            )
    missing = [name for name in (PIXELS, HELD_OUT, PROMPTS) if name not in manifest.files]
    if missing:
        raise CalibrationError(f"{path}: not a complete calibration set ({missing[0]} is not in its manifest). {MEND}")
    said = read_set_json(path / PROMPTS, set_texts)
    losses = read_set_json(path / LOSSES, set_losses) if (path / LOSSES).exists() else ()
    pixels, held_out = read_images(path / PIXELS), read_images(path / HELD_OUT)
    check_together(pixels, held_out, said.labels, path)
    return CalibrationSet(
        pixels, held_out, said.labels, said.texts, said.input_ids, said.held_out_texts, manifest, losses
    )


def contact_sheet(images: np.ndarray, thumb: int = 96, gap: int = 4) -> Image.Image:
    """All images on one near-square sheet.

    Args:
        images: float32 [N, 3, H, W] in 0..1.
        thumb: side of a thumbnail in pixels.
        gap: white space between thumbnails in pixels.
    """
    columns = max(1, math.ceil(math.sqrt(len(images) * 1.6)))
    rows = max(1, math.ceil(len(images) / columns))
    sheet = Image.new("RGB", (columns * (thumb + gap) + gap, rows * (thumb + gap) + gap), "white")
    for index, image in enumerate(images):
        pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
        tile = Image.fromarray(pixels).resize((thumb, thumb), Image.Resampling.LANCZOS)
        sheet.paste(tile, (gap + index % columns * (thumb + gap), gap + index // columns * (thumb + gap)))
    return sheet
