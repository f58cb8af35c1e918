"""Options that several commands share, and what they become."""

import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

F = TypeVar("F", bound=Callable[..., Any])


def model_argument(function: F) -> F:
    return click.argument("model", default="mini-vit")(function)


def pretrained_option(function: F) -> F:
    return click.option("--pretrained", metavar="TAG|FILE|random", help="Which weights, for open_clip architectures.")(
        function
    )


class Numbers(click.ParamType):
    """Numbers by commas; one alone stands for all of them."""

    def __init__(self, kind: type[int] | type[float], count: int) -> None:
        self.kind, self.count = kind, count
        self.name = ",".join(["N"] * count)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """One value or so many."""
        try:
            found = tuple(self.kind(part) for part in str(value).split(","))
        except ValueError:
            found = ()
        if len(found) not in (1, self.count):
            self.fail(f"{value!r} is neither one number nor {self.count}, separated by commas.", param, ctx)
        return found * (self.count // len(found))


def weights_options(function: F) -> F:
    """What weights do not say themselves, as one `model_options`."""
    place = click.Path(path_type=Path)
    given = (
        click.option(
            "--tokenizer", type=place, metavar="FOLDER", help="Files of the tokenizer, in place of the hub's."
        ),
        click.option("--config", type=place, metavar="FILE", help="Your own architecture, as open_clip's configs are."),
        click.option("--strict", is_flag=True, help="Refuse weights whose positions would have to be resampled."),
        click.option(
            "--quick-gelu/--no-quick-gelu", default=None, help="Whether the weights were trained with QuickGELU."
        ),
        *_pixel_options(),
    )
    return _model_options(function, ("like", *_PIXELS, "quick_gelu", "strict", "config", "tokenizer"), given)


def pixels_options(function: F) -> F:
    """What an ONNX file does not say itself, as one `model_options`."""
    return _model_options(function, ("like", *_PIXELS), _pixel_options())


_PIXELS = ("mean", "std", "interpolation", "resize_mode", "image_size")


def _model_options(function: F, names: tuple[str, ...], given: Iterable[Callable[..., Any]]) -> F:
    from d4c_onnx.models.model_options import ModelOptions

    @functools.wraps(function)
    def command(**found: Any) -> Any:
        if "config" in names and found["config"] is not None and _is_default("model"):
            found["model"] = found["config"].stem
        return function(model_options=ModelOptions(**{name: found.pop(name) for name in names}), **found)

    for option in given:
        command = option(command)
    return cast(F, command)


def _pixel_options() -> tuple[Callable[..., Any], ...]:
    from d4c_onnx.manifest import INTERPOLATIONS, RESIZE_MODES

    channels, filters = Numbers(float, 3), [name for name in INTERPOLATIONS if name != "random"]
    return (
        click.option("--image-size", type=Numbers(int, 2), metavar="N|H,W", help="Pixels that the weights take."),
        click.option("--resize-mode", type=click.Choice(RESIZE_MODES), help="shortest crops, longest pads."),
        click.option("--interpolation", type=click.Choice(filters), help="The filter that resizes images."),
        click.option("--std", type=channels, metavar="S|R,G,B", help="What they are divided by then."),
        click.option("--mean", type=channels, metavar="M|R,G,B", help="What is subtracted from pixels of 0..1."),
        click.option("--like", metavar="TAG", help="A published tag whose pixels and GELU the weights are for."),
    )


def _is_default(parameter: str) -> bool:
    source = click.get_current_context().get_parameter_source(parameter)
    return source is click.core.ParameterSource.DEFAULT


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
    return click.option(
        "--overwrite", is_flag=True, help="Replace an existing result, and all inside it that is d4c-onnx's."
    )(function)


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
