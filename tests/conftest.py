"""Shared fixtures: real models, real files, real onnxruntime; each made once per session."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.calibration import CalibrationSet, open_calibration_set
from d4c_onnx.recipe import Recipe
from d4c_onnx.recipe_file import load_recipe

# Before torch is loaded, here and in the processes that tests start: threads that wait for each other in a loop took up
# to thirty times as long where something else wanted the processor, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# pytest -n: the cores are busy with the other tests already.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes, or the drawing of one, says how busy the machine is, and nothing about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: each worker takes up to 3 GB, so that there are never more than four."""
    return min(4, len(os.sched_getaffinity(0)))


TINY = ("synthesis.images=8", "synthesis.held_out=4", "synthesis.batch=4", "synthesis.steps=3", "text.prompts=24")
TINY_TEXT = ("text.held_out=8",)
Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """A recipe that a test can afford."""
    return load_recipe(None, [*TINY, *TINY_TEXT])


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two models of one block a tower, the second one's images wider, to be loaded with random weights: in a moment."""
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    for name, width in (("tiny-one", 32), ("tiny-two", 64)):
        config = {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": width, "head_width": 16, "patch_size": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return "tiny-one", "tiny-two"


@pytest.fixture(scope="session")
def mini_vit():
    from d4c_onnx.models.load import load_model

    return load_model("mini-vit")


@pytest.fixture(scope="session")
def mini_rn():
    from d4c_onnx.models.load import load_model

    return load_model("mini-rn")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`made_once(name, make)`: a folder that one of the workers of `pytest -n` makes, and a copy of it for each."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"
    shared.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                make(shared / f"{name}-partial" / name)
                (shared / f"{name}-partial" / name).rename(shared / name)
        copy = tmp_path_factory.mktemp("copies") / name
        return Path(shutil.copytree(shared / name, copy))

    return once


def _exported(request: pytest.FixtureRequest, mini: str) -> Bundle:
    def export(folder: Path) -> None:
        from d4c_onnx.export import export_fp32

        export_fp32(request.getfixturevalue(mini.replace("-", "_")), folder, seed=0)

    return open_bundle(request.getfixturevalue("made_once")(mini, export))


@pytest.fixture(scope="session")
def vit_bundle(request: pytest.FixtureRequest) -> Bundle:
    """The FP32 mini-vit; tests copy what they change."""
    return _exported(request, "mini-vit")


@pytest.fixture(scope="session")
def rn_bundle(request: pytest.FixtureRequest) -> Bundle:
    return _exported(request, "mini-rn")


@pytest.fixture
def own(tmp_path: Path, vit_bundle: Bundle) -> Path:
    """A copy of the FP32 mini-vit alone, without what other tests put into its folder."""
    ignored = shutil.ignore_patterns("w*", "fp16", "calib*", ".*")
    return Path(shutil.copytree(vit_bundle.path, tmp_path / "mini-vit", ignore=ignored))


def _synthesized(request: pytest.FixtureRequest, mini: str) -> Path:
    def make(folder: Path) -> None:
        from d4c_onnx.synthesis import synthesize

        model = request.getfixturevalue(mini.replace("-", "_"))
        recipe: Recipe = request.getfixturevalue("tiny_recipe")
        synthesize(model, folder, recipe.synthesis, recipe.text, model.embedded.nouns, seed=0)

    made: Path = request.getfixturevalue("made_once")(f"{mini}-set", make)
    return made


@pytest.fixture(scope="session")
def vit_calibration(request: pytest.FixtureRequest) -> tuple[Path, CalibrationSet]:
    folder = _synthesized(request, "mini-vit")
    return folder, open_calibration_set(folder)


@pytest.fixture(scope="session")
def rn_calibration(request: pytest.FixtureRequest) -> Path:
    return _synthesized(request, "mini-rn")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
