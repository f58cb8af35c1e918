"""Every key of a recipe in words, for the command that prints them and the document that lists them."""

from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from d4c_onnx.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RecipeKey:
    """One key of a recipe.

    Attributes:
        name: section and key, as `--set` takes them.
        default: its value where a recipe does not name it.
        takes: a type, a range, or the choices.
        help: one sentence.
    """

    name: str
    default: object
    takes: str
    help: str

    @property
    def shown_default(self) -> str:
        """As YAML would have it."""
        return str(yaml.safe_dump(self.default, default_flow_style=True)).removesuffix("\n...\n").strip()


def recipe_keys() -> list[RecipeKey]:
    """Every key, in the order of the sections."""
    keys = []
    for name, entry in Recipe.model_fields.items():
        inner = entry.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += _keys_of(inner, f"{name}.")
    return [key for key in _keys_of(Recipe, "") if key.name == "seed"] + keys


def _keys_of(model: type[BaseModel], prefix: str) -> list[RecipeKey]:
    schemas = model.model_json_schema()["properties"]
    return [
        RecipeKey(prefix + name, field.default, _takes(schemas[name]), field.description or "")
        for name, field in model.model_fields.items()
    ]


def _takes(schema: dict[str, Any]) -> str:
    """A type in words: choices, or a kind of number and its limits."""
    if "anyOf" in schema:
        return " or ".join(_takes(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(str(choice) for choice in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    words = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "text", "null": "none"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[limit]:,}" for limit, sign in signs.items() if limit in schema]
    return " ".join([words.get(schema.get("type", ""), "values"), *limits])
