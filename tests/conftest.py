"""Shared fixtures: real models, real files, real onnxruntime; each made once per session."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.recipe import Recipe
from d4c_onnx.recipe_file import load_recipe

# Before torch is loaded, here and in the processes that tests start: threads that wait for each other in a loop took up
# to thirty times as long where something else wanted the processor, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# How long an example takes, or the drawing of one, says how busy the machine is, and nothing about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TINY = ("synthesis.images=8", "synthesis.held_out=4", "synthesis.batch=4", "synthesis.steps=3", "text.prompts=24")
TINY_TEXT = ("text.held_out=8",)


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
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with both minis exported; tests copy what they change."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="session")
def vit_bundle(exported: Path, mini_vit) -> Bundle:
    from d4c_onnx.export import export_fp32

    return export_fp32(mini_vit, exported / "mini-vit", seed=0)


@pytest.fixture
def own(tmp_path: Path, vit_bundle: Bundle) -> Path:
    """A copy of the FP32 mini-vit alone, without what other tests put into its folder."""
    ignored = shutil.ignore_patterns("w*", "fp16", "calib*", ".*")
    return Path(shutil.copytree(vit_bundle.path, tmp_path / "mini-vit", ignore=ignored))


@pytest.fixture(scope="session")
def rn_bundle(exported: Path, mini_rn) -> Bundle:
    from d4c_onnx.export import export_fp32

    return export_fp32(mini_rn, exported / "mini-rn", seed=0)


@pytest.fixture(scope="session")
def vit_calibration(
    tmp_path_factory: pytest.TempPathFactory, mini_vit, tiny_recipe: Recipe
) -> tuple[Path, CalibrationSet]:
    from d4c_onnx.synthesis import synthesize

    target = tmp_path_factory.mktemp("sets") / "mini-vit"
    made = synthesize(mini_vit, target, tiny_recipe.synthesis, tiny_recipe.text, mini_vit.embedded.nouns, seed=0)
    return target, made


@pytest.fixture(scope="session")
def rn_calibration(tmp_path_factory: pytest.TempPathFactory, mini_rn, tiny_recipe: Recipe) -> Path:
    from d4c_onnx.synthesis import synthesize

    target = tmp_path_factory.mktemp("sets") / "mini-rn"
    synthesize(mini_rn, target, tiny_recipe.synthesis, tiny_recipe.text, mini_rn.embedded.nouns, seed=0)
    return target


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
