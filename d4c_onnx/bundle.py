"""The bundle: a folder with two ONNX encoders and everything a server needs to use them.

    <bundle>/
      image_encoder.onnx   pixel_values float32 [batch, 3, H, W]  -> image_embeds float32 [batch, D]
      text_encoder.onnx    input_ids    int64   [batch, sequence] -> text_embeds  float32 [batch, D]
      tokenizer.json       Hugging Face `tokenizers` format
      golden/              a test image, a test text and the embeddings they must give
      manifest.json        model, preprocess, tokenizer, I/O, versions, seeds, recipe, SHA-256, measured accuracy

A quantised variant is a bundle of the same form in a sub-folder (`<bundle>/w4a8/`).
"""

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256, write_json

IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
TOKENIZER = "tokenizer.json"
MANIFEST = "manifest.json"
FORMAT = 1
# The one session config entry that a bundle may ask for, and its value. A manifest is not trusted, and entries are not
# harmless: `session.optimized_model_external_initializers_file_name`, for one, makes onnxruntime write any file.
# On x86 without VNNI sums of uint8 x int8 products saturate in 16 bits; with this entry onnxruntime multiplies weights
# outside [-64, 63] by a slower kernel there. It changes nothing for others, nor on processors with VNNI.
EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
_REQUIRED = ("format", "kind", "model", "preprocess", "tokenizer", "files")
_VERSIONED = ("d4c-onnx", "torch", "open_clip_torch", "onnx", "onnxruntime", "onnxscript", "numpy", "tokenizers")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle folder and its parsed manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def image_encoder(self) -> Path:
        return self.path / IMAGE_ENCODER

    @property
    def text_encoder(self) -> Path:
        return self.path / TEXT_ENCODER

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    @property
    def encoders(self) -> dict[str, Path]:
        """Tower name -> file."""
        return {"image": self.image_encoder, "text": self.text_encoder}

    @property
    def model_name(self) -> str:
        return str(self.manifest["model"]["name"])

    @property
    def weights_sha256(self) -> str:
        """Of the torch weights it was made from: the same for every width of a model."""
        return str(self.manifest["model"]["weights_sha256"])

    @property
    def content(self) -> dict[str, Any]:
        """What `write_manifest` was given: the manifest without what it adds itself."""
        return {key: value for key, value in self.manifest.items() if key not in ("format", "files", "versions")}

    @property
    def session_entries(self) -> dict[str, str]:
        """The session config entries that its sessions need, beside onnxruntime's defaults."""
        return dict(self.manifest.get("session", {}).get("config_entries", {}))

    @property
    def quantized(self) -> bool:
        return self.manifest["kind"] == "quantized"


def is_bundle(path: Path) -> bool:
    """Whether `path` looks like a bundle folder, perhaps a damaged one."""
    return (path / MANIFEST).is_file() and any((path / name).is_file() for name in (IMAGE_ENCODER, TEXT_ENCODER))


def open_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Read a bundle.

    Args:
        path: the folder.
        verify: compare every file with the SHA-256 in the manifest.

    Raises:
        BundleError: the folder, its manifest or one of its files is missing, damaged or of another format.
    """
    path = Path(path)
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(f"{path}: not a bundle (no {MANIFEST}). Make one with d4c-onnx export.")
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{file}: cannot be read ({error}). Export the bundle again.") from error
    missing = [key for key in _REQUIRED if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise BundleError(f"{file}: lacks {', '.join(missing)}. Export the bundle again.")
    if manifest["format"] != FORMAT:
        raise BundleError(
            f"{file}: format {manifest['format']}, this d4c-onnx reads {FORMAT}. Export the bundle again."
        )
    files = manifest["files"]
    if not (
        isinstance(files, dict)
        and {IMAGE_ENCODER, TEXT_ENCODER} <= files.keys()
        and all(isinstance(entry, dict) and "sha256" in entry for entry in files.values())
        and all(isinstance(manifest[key], dict) for key in ("model", "preprocess", "tokenizer"))
    ):
        raise BundleError(f"{file}: is damaged (model, preprocess, tokenizer or files). Export the bundle again.")
    _check_session(file, manifest.get("session", {}))
    for name, entry in files.items():
        if not (path / name).is_file():
            raise BundleError(f"{path / name}: is missing. Export the bundle again.")
        if verify and sha256(path / name) != entry["sha256"]:
            raise BundleError(f"{path / name}: differs from the manifest's SHA-256. Export the bundle again.")
    return Bundle(path, manifest)


def _check_session(file: Path, session: Any) -> None:
    """Let through only what d4c-onnx itself writes.

    Raises:
        BundleError: the manifest asks sessions for anything else.
    """
    entries = session.get("config_entries", {}) if isinstance(session, dict) else None
    if not isinstance(entries, dict):
        raise BundleError(f"{file}: session is damaged. Export or quantise the bundle again.")
    for key, value in entries.items():
        if EXACT_PRODUCTS.get(key) != value:
            asked = f"{key}: {value!r}"[:200]
            raise BundleError(
                f"{file}, session.config_entries: {asked} is nothing that d4c-onnx writes, and may be harmful "
                f"(allowed: {EXACT_PRODUCTS}). Do not use this bundle, or remove the entry if you know why it is there."
            )


def write_manifest(folder: Path, content: dict[str, Any]) -> Bundle:
    """List and hash every file of `folder`, then write the manifest.

    Args:
        folder: a bundle folder whose other files are complete.
        content: kind, model, preprocess, tokenizer and whatever else describes the bundle.
    """
    files = {
        str(file.relative_to(folder)): {"sha256": sha256(file), "size_bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {"format": FORMAT, **content, "versions": versions(), "files": files}
    write_json(folder / MANIFEST, manifest)
    return Bundle(folder, manifest)


def file_size_bytes(path: Path) -> int:
    """Bytes on disk of one encoder, external data included."""
    return sum(file.stat().st_size for file in (path, path.with_name(path.name + ".data")) if file.exists())


def encoder_size_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes on disk per tower and in total, external data included."""
    sizes = {tower: file_size_bytes(path) for tower, path in bundle.encoders.items()}
    return {**sizes, "total": sum(sizes.values())}


def versions() -> dict[str, str]:
    """Versions of the packages that shape the files; read from metadata, nothing is imported."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
