"""Recipes as people write them: YAML files (`recipes/*.yaml`, or the user's) and `--set section.key=value`."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from d4c_onnx.errors import RecipeError
from d4c_onnx.recipe import Recipe
from d4c_onnx.untrusted_json import QUOTED, check_readable, quoted, short

_LARGEST, _DEEPEST = 2**20, 20  # bytes of a recipe, and levels


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(
        entry.name[:-5] for entry in resources.files("d4c_onnx.recipes").iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(name: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `section.key=value` overrides.

    Args:
        name: a shipped recipe's name (`default`, `paper`), or a YAML file's path; None means `default`.
        overrides: strings such as `synthesis.steps=100`; values are YAML scalars.

    Raises:
        RecipeError: the file is missing, is not YAML, or holds an unknown key or a bad value.
    """
    where, text = _read(str(name or "default"))
    data = _yaml(text, f"{where}: not valid YAML", "Mend the file.") or {}
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of sections, this is a {type(data).__name__}.")
    for override in overrides:
        _apply(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}, {_first_mistake(error)}.") from error
    return recipe


def _first_mistake(error: ValidationError) -> str:
    """`section.key: what is wrong with it`, without the full stop, and how many more there are."""
    first = error.errors()[0]
    key = short(".".join(str(part) for part in first["loc"]))
    if first["type"] == "value_error":  # a validator's own words
        message = short(first["ctx"]["error"]).removesuffix(".")
    else:
        message = f"{first['msg']}, got {quoted(first['input'])}"
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key}: {message}{more}"


def _read(name: str) -> tuple[str, str]:
    if name in recipe_names():
        return f"recipe {name}", (resources.files("d4c_onnx.recipes") / f"{name}.yaml").read_text("utf-8")
    path = Path(name)
    if not path.is_file():
        raise RecipeError(
            f"--recipe {short(name)}: no such recipe or file. Shipped recipes: {', '.join(recipe_names())}."
        )
    check_readable(path, RecipeError)
    try:
        if path.stat().st_size > _LARGEST:
            raise RecipeError(f"{path}: has {path.stat().st_size:,} bytes, which no recipe has.")
        return str(path), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text ({short(error)}).") from error


def _apply(data: dict[str, object], override: str) -> None:
    shown = override if len(override) <= QUOTED else f"{override[:QUOTED]}..."
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {shown}: use section.key=value, such as synthesis.steps=100.")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {shown}: {short(section)} is not a section.")
        data = inner
    data[last] = _yaml(value, f"--set {shown}: the value is not valid YAML", "Write it otherwise.")


class _Loader(yaml.SafeLoader):
    """Plain values, each written out: an alias of an alias of an alias is a text of any size in a few lines."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "a recipe has no aliases", self.peek_event().start_mark)
        self.depth += 1
        if self.depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _yaml(text: str, wrong: str, mend: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: it is none: `wrong`, why, `mend`.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, OverflowError) as error:
        # not only YAML's own: 2024-13-45 looks like a date, 0b_ like a number, and brackets in brackets have no end
        raise RecipeError(f"{wrong} ({short(error)}). {mend}") from error
