"""Options that several commands share, and what they become."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def model_argument(function: F) -> F:
    return click.argument("model", default="mini-vit")(function)


def pretrained_option(function: F) -> F:
    return click.option("--pretrained", metavar="TAG|FILE|random", help="Which weights, for open_clip architectures.")(
        function
    )


def recipe_options(function: F) -> F:
    function = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one recipe key.")(
        function
    )
    function = click.option("--seed", type=click.IntRange(0), help="Seed of every draw.  [recipe: 0]")(function)
    return click.option(
        "--recipe", "recipe_name", default="default", show_default=True, help="A shipped recipe or a file."
    )(function)


def output_option(function: F) -> F:
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        default=Path("exported"),
        show_default=True,
        help="Output folder.",
    )(function)


def overwrite_option(function: F) -> F:
    return click.option("--overwrite", is_flag=True, help="Replace an existing result, and all inside it.")(function)


def prompts_option(function: F) -> F:
    return click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        help="Vocabulary: one noun a line.  [the model's own, or 192 nouns]",
    )(function)


def calibration_option(function: F) -> F:
    return click.option("--calibration", type=click.Path(path_type=Path), help="An existing calibration set.")(function)


def threads_option(function: F) -> F:
    return click.option(
        "--threads", type=click.IntRange(0, 4096), default=0, help="CPU threads.  [0: the engine's choice]"
    )(function)


def provider_option(function: F) -> F:
    return click.option(
        "--provider",
        type=click.Choice(["cpu", "cuda", "auto"]),
        default="auto",
        show_default=True,
        help="onnxruntime's.",
    )(function)


def device_option(function: F) -> F:
    return click.option(
        "--device", type=click.Choice(["cpu", "cuda", "auto"]), default="auto", show_default=True, help="torch's."
    )(function)


def output_modes(function: F) -> F:
    function = click.option("--quiet", is_flag=True, help="No progress on stderr.")(function)
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr.")(
        function
    )


def launched() -> tuple[int, int, int]:
    """Rank, number of processes, and rank on this machine, from torch's launcher; (0, 1, 0) without one."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not all(value.isdigit() for value in found):
        return 0, 1, 0
    rank, world_size, local_rank = (int(value) for value in found)
    return rank, world_size, local_rank


def resolve_recipe(
    name: str, overrides: tuple[str, ...], seed: int | None, extra: dict[str, object] | None = None
) -> Any:
    """The recipe of a command line; options win over --set, --set over the file."""
    from d4c_onnx.recipe import load_recipe

    given = {"seed": seed, **(extra or {})}
    return load_recipe(
        name, [*overrides, *(f"{key}={_literal(value)}" for key, value in given.items() if value is not None)]
    )


def _literal(value: object) -> str:
    """YAML that means this very value: a path may hold ` #`, start with a bracket, or look like a number."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
