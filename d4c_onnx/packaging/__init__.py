"""Bundles as serving stacks want them: the same numbers under other names, in other folders. No torch.

A package is a boundary rewrite: what happens inside the encoders stays bit for bit what it was, and that is asserted
when a package is written.
"""

from d4c_onnx.packaging.package import PackageReport, package_bundle
from d4c_onnx.packaging.package_manifest import is_package
from d4c_onnx.packaging.stacks import STACKS
from d4c_onnx.packaging.verification import verify_package

__all__ = ["STACKS", "PackageReport", "is_package", "package_bundle", "verify_package"]
