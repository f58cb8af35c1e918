"""The bundle: a folder with two ONNX encoders and everything a server needs to use them.

    <bundle>/
      image_encoder.onnx   pixel_values float32 [batch, 3, H, W]  -> image_embeds float32 [batch, D]
      text_encoder.onnx    input_ids    int64   [batch, sequence] -> text_embeds  float32 [batch, D]
      tokenizer.json       Hugging Face `tokenizers` format
      golden/              images, texts and the embeddings they must give
      manifest.json        model, preprocess, tokenizer, I/O, versions, seeds, recipe, SHA-256, measured accuracy

A quantised variant is a bundle of the same form in a sub-folder (`<bundle>/w4a8/`).
"""

from dataclasses import dataclass
from pathlib import Path

from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256
from d4c_onnx.manifest import IMPORTED, FileRecord, Manifest
from d4c_onnx.manifest_file import GOLDEN_FOLDER, MANIFEST, read_manifest
from d4c_onnx.untrusted_json import check_readable, short

IMAGE_ENCODER = "image_encoder.onnx"
TEXT_ENCODER = "text_encoder.onnx"
TOKENIZER = "tokenizer.json"
GOLDEN = f"{GOLDEN_FOLDER}/golden.json"
EXTERNAL_DATA = ".data"  # behind an encoder's name: the file that holds its weights where they lie beside the graph


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle folder and its manifest."""

    path: Path
    manifest: Manifest

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
        return self.manifest.model.name

    @property
    def weights_sha256(self) -> str:
        """Of the torch weights it was made from: the same for every width of a model."""
        return self.manifest.model.weights_sha256

    @property
    def session_entries(self) -> dict[str, str]:
        """The session config entries that its sessions need, beside onnxruntime's defaults."""
        quantization = self.manifest.quantization
        return dict(quantization.session.config_entries) if quantization else {}

    @property
    def imported(self) -> bool:
        """Whether ONNX files of others became it: there are no torch weights behind it."""
        return self.manifest.model.pretrained == IMPORTED

    @property
    def quantized(self) -> bool:
        return self.manifest.quantization is not None


def is_bundle(path: Path) -> bool:
    """Whether `path` looks like a bundle folder, perhaps a damaged one."""
    return (path / MANIFEST).is_file() and any((path / name).is_file() for name in (IMAGE_ENCODER, TEXT_ENCODER))


def open_bundle(path: str | Path, verify: bool = True) -> Bundle:
    """Read a bundle.

    Args:
        path: the folder.
        verify: compare every file with the SHA-256 in the manifest.

    Raises:
        BundleError: the folder, its manifest or one of its files is missing, damaged or of a newer format, or leads
            out of the folder.
    """
    path = Path(path)
    check_readable(path / MANIFEST)
    if not (path / MANIFEST).is_file():
        raise BundleError(f"{path}: not a bundle (no {MANIFEST}). Make one with d4c-onnx export.")
    check_inside(path, MANIFEST)
    manifest = read_manifest(path)
    for name in (IMAGE_ENCODER, TEXT_ENCODER):
        if name not in manifest.files or name not in manifest.io:
            raise BundleError(
                f"{path / MANIFEST}: is damaged: files or io lack {name}. Export or quantise the bundle again."
            )
    _check_contract(path / MANIFEST, manifest)
    # what is read all the same must not pass unchecked because the manifest keeps silent about it
    beside = (TOKENIZER, GOLDEN, *(name + EXTERNAL_DATA for name in (IMAGE_ENCODER, TEXT_ENCODER)))
    for name in beside:
        if name not in manifest.files and (path / name).exists():
            raise BundleError(f"{path / name}: is not in the manifest. Export or quantise the bundle again.")
    for name, record in manifest.files.items():
        _check_file(path, name, record, verify)
    return Bundle(path, manifest)


def _check_contract(file: Path, manifest: Manifest) -> None:
    """Refuse encoders that no client of a bundle could feed, whatever their graphs are."""
    height, width = manifest.preprocess.size
    image, text = manifest.io[IMAGE_ENCODER], manifest.io[TEXT_ENCODER]
    [pixels], [ids], [image_embeds], [text_embeds] = image.inputs, text.inputs, image.outputs, text.outputs
    dimensions = image_embeds.sizes[-1:]
    context = manifest.tokenizer.context_length
    faults = {
        f"{pixels}; expected float32 [any, 3, {height}, {width}]": (
            pixels.dtype == "float32" and pixels.sizes == (None, 3, height, width)
        ),
        f"{ids}; expected int64 [any, any or {context}]": (
            ids.dtype == "int64" and ids.sizes in ((None, None), (None, context))
        ),
        f"{image_embeds} and {text_embeds}; expected float32 [any, so many] of both": (
            image_embeds.dtype == text_embeds.dtype == "float32"
            and image_embeds.sizes == text_embeds.sizes == (None, *dimensions)
        ),
    }
    wrong = [fault for fault, right in faults.items() if not right]
    if wrong:
        raise BundleError(f"{file}: is damaged at io: {short(wrong[0])}. Export or quantise the bundle again.")


def _check_file(folder: Path, name: str, record: FileRecord, verify: bool) -> None:
    check_inside(folder, name)
    file = folder / name
    check_readable(file)
    if not file.is_file():
        raise BundleError(f"{file}: is missing. Export or quantise the bundle again.")
    if verify and sha256(file) != record.sha256:
        raise BundleError(f"{file}: differs from the manifest's SHA-256. Export or quantise the bundle again.")


def check_inside(folder: Path, name: str) -> None:
    """Refuse a link that leads out of a bundle or package.

    Raises:
        BundleError: it does.
    """
    try:
        inside = (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links that go in circles
        inside = False
    if not inside:
        raise BundleError(
            f"{folder / name}: is a link out of the bundle. Copy the bundle with what its links lead to (cp -rL)."
        )


def file_size_bytes(path: Path) -> int:
    """Bytes on disk of one encoder, external data included."""
    parts = (path, path.with_name(path.name + EXTERNAL_DATA))
    return sum(file.stat().st_size for file in parts if file.exists())


def encoder_size_bytes(bundle: Bundle) -> dict[str, int]:
    """Bytes on disk per tower and in total, external data included."""
    sizes = {tower: file_size_bytes(path) for tower, path in bundle.encoders.items()}
    return {**sizes, "total": sum(sizes.values())}
