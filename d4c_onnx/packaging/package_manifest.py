"""`d4c-package.json`: what a package says of itself; its one writer, its one reader.

Packages travel as bundles do, so nothing in it is taken on trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from d4c_onnx.bundle import EXTERNAL_DATA, GOLDEN, Bundle, check_inside
from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256, write_json
from d4c_onnx.manifest import FileRecord, Preprocess, Signature, TokenizerInfo
from d4c_onnx.manifest_file import MANIFEST, file_name, file_of, preprocess_of, tensor_of, tokenizer_of
from d4c_onnx.ownership import PACKAGE
from d4c_onnx.untrusted_json import Node, integer, mapping, one_of, read_json, sequence, sha256_text, text

FORMAT = 1
AGAIN = "Package the bundle again."
_TYPES = ("float32", "float16", "int64", "int32")  # of inputs and outputs
_DEEPEST = 12  # folders above a file


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One .onnx of a package.

    Attributes:
        file: below the package's folder.
        towers: image, text, or both in one file.
        edits: what was done to it, in words.
        io: what it takes and gives now.
    """

    file: str
    towers: tuple[str, ...]
    edits: tuple[str, ...]
    io: Signature


@dataclass(frozen=True, slots=True)
class PackageContent:
    """What a package holds.

    Attributes:
        target: the stack.
        models: each .onnx, and what was done at its boundary.
        files: by path below the folder, the package's own manifest not counted.
        remarks: what the stack does badly, and what is left to the user.
        use: how the stack is pointed to the folder.
    """

    target: str
    models: tuple[PackagedModel, ...]
    files: Mapping[str, FileRecord]
    remarks: tuple[str, ...]
    use: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "target": self.target,
            "models": [asdict(model) for model in self.models],
            "files": {name: asdict(record) for name, record in self.files.items()},
            "remarks": list(self.remarks),
            "use": self.use,
        }


@dataclass(frozen=True, slots=True)
class PackageManifest:
    """What a package says of itself: no times, no machine's paths.

    Attributes:
        model, bits, bundle_manifest_sha256: of the bundle that it was made of.
        preprocess, tokenizer: the model's, as its bundle said; the stack's own configs must say the same.
        content: what the package holds.
    """

    model: str
    bits: str
    bundle_manifest_sha256: str
    preprocess: Preprocess
    tokenizer: TokenizerInfo
    content: PackageContent

    def as_dict(self) -> dict[str, object]:
        """For JSON, in which the fields of the content stand beside the others."""
        return {
            "format": FORMAT,
            "kind": "package",
            "model": self.model,
            "bits": self.bits,
            "bundle_manifest_sha256": self.bundle_manifest_sha256,
            "golden": GOLDEN,
            "preprocess": asdict(self.preprocess),
            "tokenizer": self.tokenizer.as_dict(),
            **self.content.as_dict(),
        }


def recorded(folder: Path) -> dict[str, FileRecord]:
    """Hash and size of every file below a folder."""
    return {
        file.relative_to(folder).as_posix(): FileRecord(sha256(file), file.stat().st_size)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def write_package(folder: Path, bundle: Bundle, content: PackageContent) -> None:
    """Write the manifest of a package that was made of a bundle."""
    told = bundle.manifest
    manifest = PackageManifest(
        model=told.model.name,
        bits=told.bits,
        bundle_manifest_sha256=sha256(bundle.path / MANIFEST),
        preprocess=told.preprocess,
        tokenizer=told.tokenizer,
        content=content,
    )
    write_json(folder / PACKAGE, manifest.as_dict())


def is_package(folder: Path) -> bool:
    """Whether a folder is a package, perhaps a damaged one."""
    return (folder / PACKAGE).is_file()


def read_package(folder: Path) -> PackageManifest:
    """A package's manifest; whether the files are as it says is not looked at.

    Raises:
        BundleError: it cannot be read, is of a newer format, a field is not what it may be, or what would be read all
            the same is not on its list.
    """
    check_inside(folder, PACKAGE)
    top = read_json(folder / PACKAGE, mend=AGAIN)
    written_in = top.take("format", integer(1))
    if written_in > FORMAT:
        raise BundleError(f"{top.file}: format {written_in}, this d4c-onnx reads up to {FORMAT}: update d4c-onnx.")
    top.take("kind", one_of("package"))
    found = PackageContent(
        target=top.take("target", text),
        models=top.take("models", sequence(_model)),
        files=top.take("files", mapping(file_of, _path)),
        remarks=top.take("remarks", sequence(text)),
        use=top.take("use", text),
    )
    if not found.models:
        raise top.below("models", []).wrong("at least one model")
    beside = [model.file + EXTERNAL_DATA for model in found.models if (folder / (model.file + EXTERNAL_DATA)).exists()]
    for name in (GOLDEN, *(model.file for model in found.models), *beside):
        if name not in found.files:
            raise top.below("files", {}).wrong(f"an object with {name}")
    for name in found.files:
        check_inside(folder, name)
    return PackageManifest(
        model=top.take("model", text),
        bits=top.take("bits", text),
        bundle_manifest_sha256=top.take("bundle_manifest_sha256", sha256_text),
        preprocess=top.take("preprocess", preprocess_of),
        tokenizer=top.take("tokenizer", tokenizer_of),
        content=found,
    )


def _path(node: Node) -> str:
    """A file below the package's folder."""
    parts = str(node.value).split("/")
    if len(parts) > _DEEPEST:
        raise node.wrong(f"a path of at most {_DEEPEST} folders")
    for part in parts:
        file_name(replace(node, value=part))
    return text(node)


def _model(node: Node) -> PackagedModel:
    towers = node.take("towers", sequence(one_of("image", "text")))
    if towers not in (("image",), ("text",), ("image", "text")):
        raise node.wrong("a model of one tower, or of both")
    return PackagedModel(
        node.take("file", _path), towers, node.take("edits", sequence(text)), node.take("io", _signature)
    )


def _signature(node: Node) -> Signature:
    io = Signature(
        node.take("inputs", sequence(tensor_of)),
        node.take("outputs", sequence(tensor_of)),
        node.take("opset", integer(1)),
    )
    types = {entry.dtype for entry in (*io.inputs, *io.outputs)}
    if not io.inputs or not io.outputs or not types <= set(_TYPES):
        raise node.wrong(f"inputs and outputs of {', '.join(_TYPES)}")
    return io
