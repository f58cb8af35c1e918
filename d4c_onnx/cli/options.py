"""Options that several commands share, and what they become."""

import functools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from d4c_onnx.choices import TARGETS, in_words

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
            "--tokenizer",
            type=place,
            metavar="FOLDER",
            help="Files of the tokenizer, in place of the hub's; with --image a tokenizer.json.",
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
        if "config" in names and found["config"] is not None and is_default("model"):
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


def is_default(parameter: str) -> bool:
    """Whether a parameter of the command that runs was left out."""
    source = click.get_current_context().get_parameter_source(parameter)
    return source is click.core.ParameterSource.DEFAULT


def files_options(function: F, required: bool = False) -> F:
    """ONNX files that others exported, as one `files`, None where none are named, and the model's `name`."""
    file = click.Path(dir_okay=False, path_type=Path)
    given = (
        click.option("--name", help="The files' model.  [the name of the folder that both lie in]"),
        click.option("--pad-token", metavar="TOKEN", help="What fills texts up, where the tower sees it."),
        click.option("--context-length", type=_context_length(), help="Token ids of the longest text."),
        click.option("--text-output", metavar="NAME", help="Its embedding, where the file has several outputs."),
        click.option("--image-output", metavar="NAME", help="Its embedding, where the file has several outputs."),
        click.option("--text", type=file, required=required, help="The text tower's file; or the same file again."),
        click.option("--image", type=file, required=required, help="The image tower's file; or one with both towers."),
    )

    @functools.wraps(function)
    def command(**found: Any) -> Any:
        said = {name: found.pop(name) for name in _FILES}
        towers = said["image"], said["text"]
        if None in towers:
            named = [name for name in (*_FILES, "name") if (said | found)[name] is not None]
            if named:
                raise click.UsageError(f"--{named[0].replace('_', '-')} belongs to --image FILE and --text FILE.")
            return function(files=None, **found)
        from d4c_onnx.foreign import ForeignFiles

        return function(files=ForeignFiles(**said), **found)

    for option in given:
        command = option(command)
    return cast(F, command)


_FILES = ("image", "text", "image_output", "text_output", "context_length", "pad_token")


def _context_length() -> click.IntRange:
    from d4c_onnx.manifest import LONGEST_CONTEXT

    return click.IntRange(2, LONGEST_CONTEXT)


def exif_option(function: F) -> F:
    return click.option(
        "--exif-rotation",
        is_flag=True,
        default=None,
        help="Turn real images upright first, as their EXIF entry says; open_clip does not.",
    )(function)


def texts_option(function: F) -> F:
    return click.option(
        "--texts",
        type=click.Path(path_type=Path),
        help="Your own texts, one a line, as clients send them, to calibrate with in place of nouns in templates.",
    )(function)


@dataclass(frozen=True, slots=True)
class Calibrate:
    """What a quantisation is to calibrate with; None: not said.

    Attributes:
        images: a folder of real images, or a .parquet file.
        prompts, texts: files of nouns, and of whole texts.
        exif_rotation: whether real images are turned upright, here and where accuracy is measured.
        calibration: a set that is there.
    """

    images: str | None
    prompts: Path | None
    texts: Path | None
    calibration: Path | None
    exif_rotation: bool | None

    def keys(self) -> dict[str, object]:
        """The recipe's keys that this decides."""
        return {
            "synthesis.method": "real" if self.images else None,
            "synthesis.source": self.images,
            "evaluation.exif_rotation": self.exif_rotation,
        }


def calibrate_options(function: F) -> F:
    """What calibrates, as one `calibrate`."""

    @functools.wraps(function)
    def command(images: str | None, calibration: Path | None, **found: Any) -> Any:
        if images and calibration:
            raise click.UsageError(
                "--images makes a calibration set, --calibration names one. Leave one of the two out."
            )
        words = {name: found.pop(name) for name in ("prompts", "texts", "exif_rotation")}
        return function(calibrate=Calibrate(images, calibration=calibration, **words), **found)

    images = click.option(
        "--images",
        type=click.Path(exists=True, path_type=str),
        metavar="FOLDER",
        help="Calibrate with real images, a folder of them or a .parquet file, in place of synthetic ones.",
    )
    return cast(F, images(prompts_option(texts_option(calibration_option(exif_option(command))))))


def machine_options(function: F) -> F:
    """Where things run, as one `machine`."""

    @functools.wraps(function)
    def command(provider: str, device: str, threads: int, **found: Any) -> Any:
        from d4c_onnx.measure import Machine

        return function(machine=Machine(provider, device, threads), **found)

    return cast(F, provider_option(device_option(threads_option(command))))


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


def target_option(function: F) -> F:
    return click.option(
        "--target",
        metavar="NAME",
        help=f"Where the files are served. {in_words(TARGETS)}.  [recipe: cpu]",
    )(function)


def overwrite_option(function: F) -> F:
    return click.option(
        "--overwrite", is_flag=True, help="Replace an existing result, and all inside it that is d4c-onnx's."
    )(function)


def prompts_option(function: F) -> F:
    return click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        help="Vocabulary, for templates: one noun a line.  [the model's own, or 192 nouns]",
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
    name: str,
    overrides: tuple[str, ...],
    seed: int | None,
    extra: dict[str, object] | None = None,
    preset: dict[str, object] | None = None,
) -> Any:
    """The recipe of a command line; options win over --set, --set over a preset, that over the file."""
    from d4c_onnx.recipe_file import load_recipe

    return load_recipe(name, [*_words(preset or {}), *overrides, *_words({"seed": seed, **(extra or {})})])


def _words(keys: dict[str, object]) -> list[str]:
    return [f"{key}={_literal(value)}" for key, value in keys.items() if value is not None]


def _literal(value: object) -> str:
    """YAML that means this very value: a path may hold ` #`, start with a bracket, or look like a number."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
