"""The house's rules: walls between rooms, public names, README and CI that say the same."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import d4c_onnx
from d4c_onnx import errors

ROOT = Path(__file__).resolve().parents[2]


def test_walls_stand() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [name for name in d4c_onnx.__all__ if not name.startswith("__")])
def test_public_names_resolve_and_are_documented(name: str) -> None:
    assert (getattr(d4c_onnx, name).__doc__ or "").strip()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError):
        _ = d4c_onnx.nothing


def test_every_error_is_in_the_family_and_in_its_tree() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(classes) > 5
    assert all(issubclass(entry, errors.D4CError) for entry in classes)
    assert all(entry.__name__ in (errors.__doc__ or "") for entry in classes)


def test_readme_and_ci_run_the_same_tests() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) >= 2
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    test_command = blocks[1].strip().splitlines()[-1].split("&&")[-1].strip()
    assert "pytest" in test_command
    assert test_command in ci


def test_the_oldest_versions_are_those_that_pyproject_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    tried = {}
    for line in (ROOT / "tests" / "oldest.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            tried[canonicalize_name(name)] = Version(version)
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *extras["export"])]
    wanted += [entry for entry in map(Requirement, extras["test"]) if entry.name in tried]
    oldest = {canonicalize_name(entry.name): Version(str(entry.specifier).removeprefix(">=")) for entry in wanted}
    assert tried == oldest


def test_readme_commands_exist() -> None:
    from d4c_onnx.cli.main import COMMANDS

    readme = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"d4c-onnx (\w[\w-]*)", readme))
    assert named - {"export"} <= set(COMMANDS)
    assert set(COMMANDS) <= named


def test_every_list_of_a_keys_words_is_the_same() -> None:
    """A recipe validates words without loading the rooms whose tables they name, and --help without loading recipes."""
    from d4c_onnx.calibration.method import METHODS
    from d4c_onnx.cli.quantize import command as quantize
    from d4c_onnx.cli.synthesize import command as synthesize
    from d4c_onnx.recipe_keys import recipe_keys

    words = {key.name: key.takes.split(", ") for key in recipe_keys()}
    assert words["synthesis.method"] == [*METHODS, "noise", "pink", "leaves", "real"]
    options = {option.name: option for command in (quantize, synthesize) for option in command.params}
    assert list(options["method"].type.choices) == words["synthesis.method"]


ONE_ROW_MORE = """
from dataclasses import replace
from d4c_onnx import choices

choices.ROUNDINGS["mine"] = replace(choices.ROUNDINGS["nearest"], clause="as nearest")
choices.TARGETS["mine"] = replace(
    choices.TARGETS["tensorrt"], clause="of a test", served_rewrites=("gelu.SEPARATE_GELU",), int4="cast"
)
from d4c_onnx.cli.quantize import command
from d4c_onnx.quantization import target_of
from d4c_onnx.quantization.rewrites.gelu import SEPARATE_GELU
from d4c_onnx.quantization.rounding import METHODS
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.recipe_keys import recipe_keys

config = load_recipe(None, ["quantization.target=mine", "quantization.rounding=mine"]).quantization
target = target_of(config)
assert target.served_rewrites == (SEPARATE_GELU,) and target.int4.name == "cast" and target.symmetric
assert METHODS[config.rounding_method] is METHODS["nearest"]
keys = {key.name: key for key in recipe_keys()}
for name, said in (("target", "mine: of a test"), ("rounding", "mine: as nearest")):
    key = keys[f"quantization.{name}"]
    assert "mine" in key.takes.split(", ") and said in key.help
assert any("mine: of a test" in (option.help or "") for option in command.params if option.name == "target")
"""


def test_a_target_and_a_rounding_are_one_row_each() -> None:
    """Recipes, the table of keys, `--help` and the rooms that do the work read one table: nothing else is touched."""
    done = subprocess.run([sys.executable, "-c", ONE_ROW_MORE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_source_file_holds_a_machine_path() -> None:
    recipes = [file for file in ROOT.glob("recipes/*") if file.is_file()]  # importing them leaves a cache folder
    for file in [*ROOT.glob("d4c_onnx/**/*.py"), *recipes, ROOT / "README.md"]:
        assert "/work/" not in file.read_text("utf-8"), file
