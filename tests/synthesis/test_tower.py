"""What the tower says of images: its statistics, its patches, and when it has seen enough."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from d4c_onnx.calibration.method import D4C, LIGHT, PUBLISHED, Method
from d4c_onnx.errors import RecipeError
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.synthesis import synthesize
from d4c_onnx.synthesis.early_stop import InputStatistics
from d4c_onnx.synthesis.hooks import norm_distance, patch_entropy


def test_batch_norm_distance_is_zero_for_matching_statistics_and_grows_away_from_them() -> None:
    norm = torch.nn.BatchNorm2d(3)
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    norm.running_mean, norm.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    near = norm_distance(norm, x)
    assert float(near) == pytest.approx(0, abs=1e-8)
    assert float(norm_distance(norm, x + 0.5)) == pytest.approx(0.25 / 1.01, rel=0.02)
    assert float(norm_distance(norm, x + 1)) > float(norm_distance(norm, x + 0.5))


def test_patch_entropy_tells_pictures_from_uniform_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.ones(2, 36, 16) + 0.01 * torch.randn(2, 36, 16, generator=generator)
    halves = same * torch.where(torch.arange(36)[None, :, None] < 18, 1.0, -1.0)
    spread = torch.randn(2, 36, 4, generator=generator)
    assert float(patch_entropy(same)) < float(patch_entropy(halves)) < float(patch_entropy(spread))
    still = torch.ones(1, 9, 4, requires_grad=True)
    patch_entropy(still).backward()
    assert still.grad is not None
    assert bool(still.grad.isfinite().all())


@pytest.mark.parametrize(("model", "name"), [("mini_vit", "pse"), ("mini_rn", "bns")])
def test_baselines_lower_their_own_loss(tmp_path: Path, model: str, name: str, request) -> None:
    loaded = request.getfixturevalue(model)
    keys = (f"method={name}", "images=4", "held_out=0", "batch=4", "steps=12")
    recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])
    made = synthesize(loaded, tmp_path / "set", recipe.synthesis, recipe.text, loaded.embedded.nouns, seed=0)
    [losses] = made.losses
    assert sorted(losses) == sorted(["loss", name, "tv"])
    assert len(losses[name]) == 12
    assert losses[name][-1] < losses[name][0]
    assert made.labels == ()


@pytest.mark.parametrize(("model", "expected"), [("mini_vit", False), ("mini_rn", True)])
def test_towers_that_keep_statistics_are_asked_for_them(tmp_path: Path, model: str, expected: bool, request) -> None:
    loaded = request.getfixturevalue(model)
    keys = ("images=2", "held_out=0", "batch=2", "steps=2")
    recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])

    numbers = count()

    def terms(method: Method) -> set[str]:
        target = tmp_path / f"set-{next(numbers)}"
        nouns = loaded.embedded.nouns
        made = synthesize(loaded, target, recipe.synthesis, recipe.text, nouns, seed=0, method=method)
        return set(made.losses[0])

    assert ("bns" in terms(D4C)) is expected
    assert "bns" not in terms(replace(D4C, bns_weight=0.0))
    assert "bns" not in terms(PUBLISHED)


def test_a_vit_that_looks_at_fewer_patches_guides_images_of_full_size(tmp_path: Path, mini_vit) -> None:
    keys = ("images=4", "held_out=0", "batch=4", "steps=12")
    recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])
    nouns = mini_vit.embedded.nouns
    before = mini_vit.model.visual.positional_embedding.shape
    found = {}
    for patches in (0, 3, 6):  # mini-vit has 6 a side
        method = replace(LIGHT, patches=patches)
        made = synthesize(
            mini_vit, tmp_path / f"{patches}", recipe.synthesis, recipe.text, nouns, seed=0, method=method
        )
        found[patches] = made.pixel_values
        assert made.pixel_values.shape == (4, 3, 48, 48)
        assert made.losses[0]["pgsi_whole"][-1] < made.losses[0]["pgsi_whole"][0]
    assert (found[0] == found[6]).all()
    assert (found[0] != found[3]).any()
    assert mini_vit.model.visual.positional_embedding.shape == before


@pytest.mark.parametrize(("model", "name"), [("mini_vit", "bns"), ("mini_rn", "pse")])
def test_baselines_refuse_towers_without_what_they_match(tmp_path: Path, model: str, name: str, request) -> None:
    loaded = request.getfixturevalue(model)
    recipe = load_recipe(None, [f"synthesis.method={name}"])
    with pytest.raises(RecipeError, match=f"synthesis, {name}: this image tower"):
        synthesize(loaded, tmp_path / "set", recipe.synthesis, recipe.text, ("a", "b"), seed=0)


def test_input_statistics_see_what_calibration_would_see() -> None:
    """Nothing changes when a batch comes again; another batch changes the spectrum, a larger one the range."""
    generator = torch.Generator().manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    batch = torch.randn(6, 3, 8, 8, generator=generator)
    statistics = InputStatistics(tower)
    assert statistics.update(tower, batch) == float("inf")
    assert statistics.update(tower, batch) == pytest.approx(0, abs=1e-6)
    flat = batch.mean((2, 3), keepdim=True).expand_as(batch)
    assert statistics.update(tower, flat) > 1e-3
    assert statistics.update(tower, 3 * batch) > 0.3
    assert not any(module._forward_pre_hooks for module in tower.modules())  # torch's; the tower is left as it was
