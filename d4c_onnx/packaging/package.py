"""The story of a package: refuse, write, prove, list the files with their hashes; or leave nothing behind."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from d4c_onnx.bundle import open_bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.files import claimed, refuse_existing, staged_folder
from d4c_onnx.graph.door import check_graph
from d4c_onnx.manifest_file import GOLDEN_FOLDER
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.needs import remark_on_release, unit_vectors
from d4c_onnx.packaging.package_manifest import PackageContent, recorded, write_package
from d4c_onnx.packaging.proof import prove
from d4c_onnx.packaging.stacks import STACKS
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.untrusted_json import quoted


@dataclass(frozen=True, slots=True)
class PackageReport:
    """What was written, and the folder that it lies in."""

    path: Path
    content: PackageContent

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"package": str(self.path), **self.content.as_dict()}


def package_bundle(
    bundle: str | Path,
    target: str,
    output: str | Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> PackageReport:
    """Write a bundle as a serving stack wants it.

    Args:
        bundle: the folder of an FP32, FP16 or quantised bundle.
        target: one of `STACKS`.
        output: the package's folder.
        name: the model's, for stacks that know models by name.
        overwrite: replace a folder that is there.
        on_step: told after each of three steps.

    Raises:
        BundleError: the bundle is damaged, the stack cannot serve it (the message says why), a folder is in the way, or
            a written file answers otherwise than the bundle.
        GraphError: an encoder is not what the bundle's manifest says, or holds what is no number.
    """
    if target not in STACKS:
        raise BundleError(f"--target {quoted(target)}: is no stack that is known; one of {', '.join(STACKS)}.")
    folder, stack = Path(output), STACKS[target]
    own = Path(bundle).resolve()
    if folder.resolve() in (own / GOLDEN_FOLDER, own, *own.parents):
        raise BundleError(f"{folder}: is the bundle, or holds it, and would be replaced. Choose another --output.")
    with claimed(folder):  # what a killed run left goes, also where this one is refused
        refuse_existing(folder, overwrite)
    source = open_bundle(bundle)
    for file in source.encoders.values():
        check_graph(file, source.manifest.io[file.name])
    on_step("package", 0, 3, {})
    with staged_folder(folder, overwrite) as stage:
        job = Job(source, stage, target, name)
        unit_vectors(job)
        stack.write(job)
        remark_on_release(job)
        on_step("package", 1, 3, {})
        prove(source, stage, job.models)
        on_step("package", 2, 3, {})
        shutil.copytree(source.path / GOLDEN_FOLDER, stage / GOLDEN_FOLDER)
        content = _content(job, stack.use)
        write_package(stage, source, content)
    on_step("package", 3, 3, {})
    return PackageReport(folder, content)


def _content(job: Job, use: str) -> PackageContent:
    return PackageContent(job.target, tuple(job.models), recorded(job.folder), tuple(job.remarks), use)
