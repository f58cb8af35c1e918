"""A toy for every stack, and every stack's package of it, made once."""

import pytest
from toys import Toy, bundle_of, fitting

from d4c_onnx.bundle import Bundle
from d4c_onnx.packaging import STACKS, PackageReport, package_bundle


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """By stack a bundle that fits it."""
    folder = tmp_path_factory.mktemp("toys")
    plain = bundle_of(folder / "plain", Toy())
    return {name: plain if fitting(name) == Toy() else bundle_of(folder / name, fitting(name)) for name in STACKS}


@pytest.fixture(scope="session")
def packages(toys: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackageReport]:
    """Every stack's package of its toy."""
    folder = tmp_path_factory.mktemp("packages")
    return {name: package_bundle(bundle.path, name, folder / name) for name, bundle in toys.items()}
