"""Synthesis: pixels stay valid, equal seeds give equal files, interrupted runs resume."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.calibration.method import D4C, PUBLISHED, Method
from d4c_onnx.dead_leaves import dead_leaves
from d4c_onnx.errors import CalibrationError, RecipeError
from d4c_onnx.files import sha256
from d4c_onnx.progress import OnStep
from d4c_onnx.recipe import Recipe
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.preprocess import denormalize
from d4c_onnx.synthesis import ProcessGroup, synthesize


def test_set_on_disk(vit_calibration: tuple[Path, CalibrationSet], mini_vit, tiny_recipe: Recipe) -> None:
    path, made = vit_calibration
    config = tiny_recipe.synthesis
    assert made.pixel_values.shape == (config.images, 3, 48, 48)
    assert made.held_out.shape == (config.held_out, 3, 48, 48)
    assert len(made.labels) == config.images + config.held_out
    mean, std = (np.array(values)[:, None, None] for values in (mini_vit.preprocess.mean, mini_vit.preprocess.std))
    pixels = np.asarray(made.pixel_values) * std + mean
    assert pixels.min() >= -1e-5
    assert pixels.max() <= 1 + 1e-5
    assert pixels.std() > 0.02
    assert all(row[0] == 49406 and row[-1] == 49407 for row in made.input_ids)
    with Image.open(path / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 96
    assert made.manifest.key.nouns == mini_vit.embedded.nouns
    assert not path.with_name(f".work-{path.name}").exists()


def _stop_at(call: int | None) -> Callable[..., None]:
    """A progress callable that interrupts the run at its n-th call."""
    calls = itertools.count(1)

    def on_step(*_: object) -> None:
        if next(calls) == call:
            raise KeyboardInterrupt

    return on_step


def _told() -> tuple[list[tuple[int, int, float]], OnStep]:
    """What a progress callable is told, as it comes: steps done, of how many, and images."""
    seen: list[tuple[int, int, float]] = []

    def on_step(_: str, done: int, total: int, values: Mapping[str, float]) -> None:
        seen.append((done, total, values["images"]))

    return seen, on_step


def _hashes(path: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(path.iterdir())}


@pytest.mark.parametrize("extra", ["method=d4c", "method=d4c-published"])
def test_interrupted_run_resumes_to_the_same_files(
    tmp_path: Path, mini_vit, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d4c_onnx.synthesis.loop.CHECKPOINT_STEPS", 1)
    keys = ("images=4", "held_out=2", "batch=3", "steps=4", extra)
    recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])
    nouns = mini_vit.embedded.nouns

    def run(name: str, stop_at: int | None = None) -> None:
        target = tmp_path / name
        synthesize(mini_vit, target, recipe.synthesis, recipe.text, nouns, seed=1, on_step=_stop_at(stop_at))

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop_at=3)
    assert not (tmp_path / "parts").exists()
    assert list((tmp_path / ".work-parts").glob("unit-*.pt"))
    run("parts")
    assert _hashes(tmp_path / "whole") == _hashes(tmp_path / "parts")
    assert not list(tmp_path.glob(".*"))


def _generator_of_another_kind(path: Path) -> None:
    """All is sound but what comes last: nothing of it may be taken."""
    state = torch.load(path, weights_only=True)
    torch.save(state | {"generator": torch.zeros(3, dtype=torch.uint8)}, path)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("unit-*.pt", lambda path: path.write_bytes(b"PK\x03\x04")),
        ("unit-*.pt", lambda path: torch.save({"step": 1}, path)),
        ("unit-*.pt", _generator_of_another_kind),
        ("unit-*.npz", lambda path: path.write_bytes(path.read_bytes()[:-50])),
    ],
    ids=["no state", "half a state", "other generator", "half a unit"],
)
def test_what_is_damaged_begins_anew(
    tmp_path: Path, mini_vit, kind: str, damage: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d4c_onnx.synthesis.loop.CHECKPOINT_STEPS", 1)
    keys = ("images=2", "held_out=1", "batch=1", "steps=3")
    recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])

    def run(name: str, stop_at: int | None = None) -> None:
        nouns, target = mini_vit.embedded.nouns, tmp_path / name
        synthesize(mini_vit, target, recipe.synthesis, recipe.text, nouns, seed=1, on_step=_stop_at(stop_at))

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop_at=6)  # in the second unit
    [file] = (tmp_path / ".work-parts").glob(kind)
    damage(file)
    run("parts")
    assert _hashes(tmp_path / "whole") == _hashes(tmp_path / "parts")


@pytest.mark.parametrize("method", ["d4c", "d4c-light", "d4c-published", "leaves"])
def test_what_is_held_out_changes_no_calibration_image(tmp_path: Path, mini_vit, method: str) -> None:
    """Neither through a batch that is not full, nor through an Adam for all: `paper` may hold images out."""
    made = []
    for held_out in (0, 3):
        keys = ("images=3", f"held_out={held_out}", "batch=2", "steps=3", f"method={method}")
        recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])
        target = tmp_path / str(held_out)
        made.append(synthesize(mini_vit, target, recipe.synthesis, recipe.text, mini_vit.embedded.nouns, seed=0))
    without, with_held_out = made
    assert len(with_held_out.held_out) == 3
    np.testing.assert_array_equal(without.pixel_values, with_held_out.pixel_values)


@pytest.mark.parametrize("method", ["noise", "leaves"])
def test_seed_decides_the_files(tmp_path: Path, mini_vit, method: str) -> None:
    recipe = load_recipe(
        None, [f"synthesis.method={method}", "synthesis.images=2", "synthesis.held_out=1", "text.prompts=4"]
    )
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthesize(mini_vit, tmp_path / name, recipe.synthesis, recipe.text, mini_vit.embedded.nouns, seed=seed)
    assert _hashes(tmp_path / "a") == _hashes(tmp_path / "b") != _hashes(tmp_path / "c")


def test_leaves_are_pictures_in_the_models_own_space(tmp_path: Path, mini_vit) -> None:
    recipe = load_recipe(
        None, ["synthesis.method=leaves", "synthesis.images=2", "synthesis.held_out=1", "text.prompts=4"]
    )
    made = synthesize(mini_vit, tmp_path / "set", recipe.synthesis, recipe.text, mini_vit.embedded.nouns, seed=5)
    pictures = dead_leaves(3, mini_vit.preprocess.size, 5)
    shown = denormalize(np.concatenate([made.pixel_values, made.held_out]), mini_vit.preprocess)
    np.testing.assert_allclose(shown, pictures, atol=1e-6)
    assert made.labels == ()
    assert made.losses == ()


@pytest.mark.slow
def test_images_carry_their_class(vit_calibration: tuple[Path, CalibrationSet], mini_vit) -> None:
    recipe = load_recipe(
        None, ["synthesis.images=10", "synthesis.held_out=0", "synthesis.batch=10", "synthesis.steps=25"]
    )
    nouns = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    path = vit_calibration[0].with_name("classes")
    made = synthesize(mini_vit, path, recipe.synthesis, recipe.text, nouns, seed=0)
    with torch.no_grad():
        images = mini_vit.model.encode_image(torch.from_numpy(np.array(made.pixel_values)), normalize=True)
        texts = mini_vit.model.encode_text(
            torch.from_numpy(mini_vit.tokenize([f"a photo of a {noun}." for noun in nouns])), normalize=True
        )
    answers = [nouns[index] for index in (images @ texts.T).argmax(1)]
    assert sum(answer == label for answer, label in zip(answers, made.labels, strict=True)) >= 9


def test_damaged_set_is_refused(vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(vit_calibration[0], tmp_path / "set"))
    data = json.loads((path / "prompts.json").read_text())
    (path / "prompts.json").write_text(json.dumps({**data, "texts": []}))
    with pytest.raises(CalibrationError, match=r"prompts\.json.*SHA-256"):
        open_calibration_set(path)
    (path / "pixel_values.npy").unlink()
    with pytest.raises(CalibrationError, match="not a complete"):
        open_calibration_set(path)


_CHANGES: dict[str, Method | str] = {
    "pixel": replace(D4C, image="pixel"),
    "no whole image": replace(D4C, whole_image_weight=0.0),
    "random labels": replace(D4C, labels="random"),
    "temperature": replace(D4C, temperature=0.2),
    "no scg": replace(D4C, scg=False),
    "no pae": replace(D4C, pae=False),
    "total variation": replace(D4C, tv_weight=1.0),
    "smaller boxes": replace(D4C, box_area=(0.2, 0.3)),
    "background noise": replace(D4C, background_noise=0.5),
    "learning rate": replace(D4C, learning_rate=0.2),
    "one Adam": replace(D4C, shared_optimizer=True),
    "start": replace(D4C, start="noise"),
    "fewer patches": replace(D4C, patches=3),
    "precision": "precision=bfloat16",
}


def _ten_steps(loaded, target: Path, method: Method, *keys: str) -> CalibrationSet:
    keys = ("images=4", "held_out=0", "batch=2", "steps=10", "precision=float32", *keys)
    recipe = load_recipe(None, [*(f"synthesis.{item}" for item in keys), "text.prompts=4"])
    nouns = loaded.embedded.nouns
    return synthesize(loaded, target, recipe.synthesis, recipe.text, nouns, seed=0, method=method)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, mini_vit) -> CalibrationSet:
    return _ten_steps(mini_vit, tmp_path_factory.mktemp("choices") / "plain", D4C)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "precision" else ()) for name in _CHANGES]
)
def test_every_choice_changes_the_images_and_they_still_learn(
    tmp_path: Path, name: str, mini_vit, plain: CalibrationSet
) -> None:
    change = _CHANGES[name]
    method, keys = (D4C, (change,)) if isinstance(change, str) else (change, ())
    changed = _ten_steps(mini_vit, tmp_path / "changed", method, *keys)
    assert not np.array_equal(plain.pixel_values, changed.pixel_values)
    assert plain.manifest.key.id != changed.manifest.key.id
    assert len(changed.losses) == (1 if name == "one Adam" else 2)
    for losses in changed.losses:
        assert np.mean(losses["loss"][-3:]) < np.mean(losses["loss"][:3])


def test_what_binds_batches_is_refused_to_several_processes(tmp_path: Path, mini_vit) -> None:
    for key, named in (("method=d4c-published", "method"), ("early_stop_tolerance=0.1", "early_stop_tolerance")):
        recipe = load_recipe(None, [f"synthesis.{key}"])
        with pytest.raises(RecipeError, match=rf"synthesis\.{named}: makes batches depend"):
            synthesize(
                mini_vit, tmp_path / "x", recipe.synthesis, recipe.text, ("a", "b"), seed=0, group=ProcessGroup(1, 2)
            )


def test_an_early_stop_needs_batches_that_end_one_by_one(tmp_path: Path, mini_vit) -> None:
    """By the recipe's own method and by one that is given."""
    with pytest.raises(RecipeError, match=r"recipe default, synthesis\.early_stop_tolerance: needs batches"):
        load_recipe(None, ["synthesis.early_stop_tolerance=0.01", "synthesis.method=d4c-published"])
    recipe = load_recipe(None, ["synthesis.early_stop_tolerance=0.01"])
    with pytest.raises(RecipeError, match=r"synthesis\.early_stop_tolerance: needs batches"):
        synthesize(mini_vit, tmp_path / "x", recipe.synthesis, recipe.text, ("a", "b"), seed=0, method=PUBLISHED)


def test_an_early_stop_ends_the_calibration_images(tmp_path: Path, mini_vit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images that are made are those of the full run, held-out ones included; an interrupted run decides alike."""
    monkeypatch.setattr("d4c_onnx.synthesis.loop.CHECKPOINT_STEPS", 1)
    nouns = mini_vit.embedded.nouns

    def run(name: str, tolerance: float, stop_at: int | None = None) -> CalibrationSet:
        keys = ("images=8", "held_out=2", "batch=2", "steps=2", f"early_stop_tolerance={tolerance:.7f}")
        recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])
        target, on_step = tmp_path / name, _stop_at(stop_at)
        return synthesize(mini_vit, target, recipe.synthesis, recipe.text, nouns, seed=0, on_step=on_step)

    full, stopped = run("full", 1e-7), run("stopped", 1.0)
    assert len(full.pixel_values) == 8
    assert len(stopped.pixel_values) == 4  # the first batch moves everything, the second less than all of it
    assert np.array_equal(stopped.pixel_values, full.pixel_values[:4])
    assert np.array_equal(stopped.held_out, full.held_out)
    assert stopped.labels == full.labels[:4] + full.labels[8:]
    assert len(stopped.losses) == 3
    with pytest.raises(KeyboardInterrupt):
        run("parts", 1.0, stop_at=4)
    run("parts", 1.0)
    assert _hashes(tmp_path / "parts") == _hashes(tmp_path / "stopped")


def test_progress_ends_with_the_images_that_were_made(tmp_path: Path, mini_vit) -> None:
    keys = ("images=8", "held_out=2", "batch=2", "steps=2", "early_stop_tolerance=1.0")
    recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])
    seen, on_step = _told()
    synthesize(
        mini_vit, tmp_path / "set", recipe.synthesis, recipe.text, mini_vit.embedded.nouns, seed=0, on_step=on_step
    )
    assert seen[-1] == (20, 20, 6)  # four calibration images were enough, two are held out
    assert [images for _, _, images in seen] == sorted(images for _, _, images in seen)


def test_progress_of_a_process_group_counts_what_is_there(
    tmp_path: Path, mini_vit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process makes the first and the third batch; the second one's is not there until it has come."""
    keys = ("images=6", "held_out=0", "batch=2", "steps=2")
    recipe = load_recipe(None, [f"synthesis.{key}" for key in keys] + ["text.prompts=4"])
    seen, on_step = _told()
    monkeypatch.setattr(
        ProcessGroup, "barrier", lambda self: None
    )  # nobody else is there: the first one makes what is missing
    config, target = recipe.synthesis, tmp_path / "set"
    synthesize(mini_vit, target, config, recipe.text, ("cat", "dog"), seed=0, group=ProcessGroup(0, 2), on_step=on_step)
    assert seen[:4] == [(2, 12, 0), (4, 12, 2), (6, 12, 2), (8, 12, 4)]
    assert seen[-1] == (12, 12, 6)
