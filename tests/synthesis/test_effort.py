"""--effort: which keys it sets, and how long it says that images will take, by a clock that this test turns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from d4c_onnx.calibration import open_calibration_set
from d4c_onnx.calibration.ahead import control_ahead
from d4c_onnx.calibration.method import D4C
from d4c_onnx.cli.main import group
from d4c_onnx.recipe import EFFORTS, SynthesisConfig
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.synthesis.estimate import units_ahead
from d4c_onnx.synthesis.guide import build_guide
from d4c_onnx.synthesis.param import start_images
from d4c_onnx.synthesis.units import divide

TINY = ("images=4", "held_out=2", "batch=2", "steps=2")


class Clock:
    """Seconds between one look and the next, in turn."""

    def __init__(self, *spans: float) -> None:
        self._times = [0.0, *np.cumsum(spans)]

    def __call__(self) -> float:
        return float(self._times.pop(0))


def test_a_step_of_the_first_batch_is_multiplied(mini_vit) -> None:
    config = SynthesisConfig(images=5, held_out=2, batch=2, steps=3)
    guide = build_guide(mini_vit, D4C, config, ("cat", "ship"), torch.device("cpu"), torch.float32)
    mean, std = mini_vit.normalization()
    start = start_images("fourier", (2, 3, 48, 48), mean, std, torch.Generator().manual_seed(0))
    before = start.values.clone()
    units, labels = divide(5, 2, 2), torch.tensor([0, 1])
    state = torch.random.get_rng_state()
    # the first step warms up in 100 seconds, the second takes 8 for two images
    found = units_ahead(config, units, start, labels, guide, clock=Clock(100, 1, 8))
    assert (found.images, found.steps, found.seconds) == (7, 3, 8 / 2 * 7 * 3)
    assert units_ahead(config, units[1:], start, labels, guide, 2, Clock(9, 9, 8)).seconds == 8 / 2 * 5 * 3 / 2
    assert torch.equal(start.values, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_picture_is_multiplied() -> None:
    config = SynthesisConfig(method="leaves", images=8, held_out=2)
    assert control_ahead(config, (16, 16), Clock(0.25)).seconds == 2.5
    assert control_ahead(SynthesisConfig(method="noise"), (16, 16), Clock()).seconds == 0
    assert control_ahead(SynthesisConfig(method="real", source="x"), (16, 16), Clock()).seconds is None


def test_presets_are_recipe_keys() -> None:
    made = {
        name: load_recipe(None, [f"{key}={value}" for key, value in keys.items()]) for name, keys in EFFORTS.items()
    }
    assert made["default"] == load_recipe()
    assert made["quick"].synthesis.method == "leaves"
    assert made["best"].synthesis.images > made["default"].synthesis.images
    assert made["best"].synthesis.steps > made["default"].synthesis.steps


def test_it_is_said_before_and_set_wins(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["synthesize", "-o", str(own.parent), "--effort"]
    few = [word for key in TINY for word in ("--set", f"synthesis.{key}")]
    done = CliRunner().invoke(group, [*command, "best", *few, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said, told = json.loads(done.stdout), done.stderr
    assert said["images"] == 4
    assert said["effort"]["keys"] == {"synthesis.images": 512, "synthesis.steps": 100}
    assert said["effort"]["estimated_seconds"] >= 0
    assert not said["effort"]["finished"]
    assert "effort best (synthesis.images=512, synthesis.steps=100): 6 d4c images, 2 steps each, about" in told
    again = CliRunner().invoke(group, [*command, "best", *few, "--json"])
    assert json.loads(again.stdout)["effort"]["finished"]
    assert "the calibration images are there already" in again.stderr
    quick = CliRunner().invoke(group, [*command, "quick", *few, "--json"])
    assert "effort quick (synthesis.method=leaves): 6 leaves images" in quick.stderr
    refused = CliRunner().invoke(group, ["quantize", "--effort", "quick", "--calibration", said["calibration"]])
    assert refused.exit_code == 2
    assert "Leave one of them out" in refused.output


@pytest.mark.slow
def test_timing_a_step_makes_no_other_images(own: Path) -> None:
    few, made = [word for key in TINY for word in ("--set", f"synthesis.{key}")], []
    for words in (["--effort", "default"], []):
        folder = own.parent / f"run{len(words)}"
        shutil.copytree(own, folder / "mini-vit")
        done = CliRunner().invoke(group, ["synthesize", "-o", str(folder), *few, *words, "--json"])
        said = json.loads(done.stdout)
        assert ("effort" in said) == bool(words)
        made.append(open_calibration_set(said["calibration"]))
    assert made[0].manifest.key == made[1].manifest.key
    assert np.array_equal(made[0].pixel_values, made[1].pixel_values)
