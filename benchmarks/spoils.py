"""The kinds of input that `hostile.py` spoils: for each how, and the commands that are given the result.

A kind spoils a copy of its parts (`hostile_origin`) and gives a command line. What is certainly wrong, and must not end
with exit code 0, is said so.
"""

import io
import json
import pickle
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import spoilt_graphs
from spoilt_values import dumped, rehash, replace_value, spoilt_bytes

SCALARS = (
    *("2024-13-45", "0b_", "9" * 5000, "[" * 3000, ".inf", ".nan", "&a [*a]", "{a: 1", "\x00", "-1", "1e999", "null"),
    *("true", "''", "[]", "{}", "!!python/name:os.system", "é", "0x_", "1_0", "~"),
)
RECIPE = """seed: 1
synthesis: {images: 4, steps: 2, template: a photo of a {}.}
quantization: {bits: w8a8, rounding: nearest}
evaluation: {dataset: fidelity}
"""
RECIPE_KEYS = (
    *("seed", "synthesis.steps", "synthesis.template", "synthesis.learning_rate", "quantization.bits"),
    *("quantization.average_bits", "evaluation.max_drop", "evaluation.min_cosine", "text.prompts", "x.y"),
)


@dataclass(frozen=True)
class Spoilt:
    """What is run on a spoilt copy.

    Attributes:
        command: words behind `d4c-onnx`; `{place}` is the copy, `{out}` a folder that is not there.
        wrong: whether exit code 0 is a failure.
    """

    command: list[str]
    wrong: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        parts: what of the origin it needs.
        spoil: changes the copy, and gives the command.
    """

    parts: tuple[str, ...]
    spoil: Callable[[Path, random.Random], Spoilt]


INSPECT = ["inspect", "{place}/toy"]
VERIFY = ["verify", "{place}/toy"]
FIDELITY = ["evaluate", "{place}/toy", "--dataset", "fidelity", "--calibration", "{place}/toy-set"]
LABELLED = ["evaluate", "{place}/toy", "--dataset", "{place}/labelled.parquet"]
IMAGES = ["embed", "{place}/toy", "{place}/images", "-o", "{out}/v.npy"]
TAR = ["embed", "{place}/toy", "{place}/images.tar", "-o", "{out}/v.npy"]
TEXTS = ["embed", "{place}/toy", "{place}/texts.txt", "-o", "{out}/v.parquet"]
PACKAGE = ["package", "{place}/toy", "--target", "onnxruntime", "-o", "{out}/package"]
QUANTIZE = ["quantize", "{place}/imported", "--calibration", "{place}/imported-set", "-o", "{out}"]
QUANTIZE += [part for key in ("bits=w8a8", "rounding=nearest") for part in ("--set", f"quantization.{key}")]
IMPORT = ["import", "--image", "{place}/foreign/visual.onnx", "--text", "{place}/foreign/textual.onnx", "-o", "{out}"]
EXPORT = ["export", "tiny", "--config", "{place}/weights/tiny.json", "-o", "{out}", "--mean", "0.5", "--std", "0.5"]
EXPORT += ["--interpolation", "bicubic", "--resize-mode", "shortest", "--no-quick-gelu"]
EXPORT += ["--pretrained", "{place}/weights/tiny.safetensors"]
SCRIPT = [*EXPORT[:-1], "{place}/weights/script.pt"]
MODEL_FOLDER = ["export", "{place}/folder", "-o", "{out}"]
PUBLISHED = ["export", "{place}/published", "-o", "{out}"]
NOUNS = ["synthesize", "{place}/imported", "--prompts", "{place}/nouns.txt", "-o", "{out}"]
NOUNS += ["--images", "2", "--method", "noise", "--set", "synthesis.held_out=1", "--set", "text.prompts=2"]
RUNNING = (VERIFY, FIDELITY, IMAGES, TEXTS, PACKAGE)
COMMANDS = (*RUNNING, INSPECT, LABELLED, QUANTIZE, IMPORT, EXPORT, SCRIPT, TAR, MODEL_FOLDER, PUBLISHED, NOUNS)


def _json(file: str, *commands: list[str]) -> Callable[[Path, random.Random], Spoilt]:
    """Values of a JSON file are replaced, dropped or doubled; the hashes are right."""

    def spoil(place: Path, draw: random.Random) -> Spoilt:
        path = place / file
        content = json.loads(path.read_bytes())
        for _ in range(draw.randint(1, 3)):
            replace_value(content, draw)
        path.write_text(dumped(content))
        rehash(place / Path(file).parts[0])
        return Spoilt(draw.choice(commands))

    return spoil


def _bytes(
    names: tuple[str, ...], *commands: list[str], right_hashes: bool = True, head: int | None = None
) -> Callable[[Path, random.Random], Spoilt]:
    """Bytes of a file are changed, cut or doubled; with wrong hashes nothing may be made of it."""

    def spoil(place: Path, draw: random.Random) -> Spoilt:
        file = place / draw.choice(names)
        before = file.read_bytes()
        content = spoilt_bytes(before, draw, head)
        file.write_bytes(content)
        if right_hashes:
            rehash(place / file.relative_to(place).parts[0])
        return Spoilt(draw.choice(commands), wrong=not right_hashes and content != before)

    return spoil


def _graph(folder: str, files: tuple[str, str], *commands: list[str]) -> Callable[[Path, random.Random], Spoilt]:
    """A graph is changed as `spoilt_graphs` can, or the two change places."""
    names = [*spoilt_graphs.CHANGES, "swapped"]

    def spoil(place: Path, draw: random.Random) -> Spoilt:
        one, other = (place / folder / name for name in draw.sample(files, 2))
        how = draw.choice(names)
        if how == "swapped":
            first, second = one.read_bytes(), other.read_bytes()
            one.write_bytes(second)
            other.write_bytes(first)
        else:
            one.write_bytes(spoilt_graphs.changed(one.read_bytes(), how, draw))
        rehash(place / folder)
        command = draw.choice(commands)
        return Spoilt(command, folder != "foreign" and _must_be_refused(how, command, one.name))

    return spoil


def _must_be_refused(how: str, command: list[str], spoilt: str) -> bool:
    if how not in (*spoilt_graphs.WRONG, "swapped"):
        return False
    if how == "not a number":  # a token's row that nobody asks for changes no answer
        return command in (INSPECT, QUANTIZE, PACKAGE)
    unread = "text" if command == IMAGES else "image" if command == TEXTS else ""
    return how == "swapped" or not (unread and spoilt.startswith(unread))


def _array(place: Path, draw: random.Random) -> Spoilt:
    """A set's images, or a client's answers, as other arrays."""
    pixels = np.load(place / "toy-set" / "held_out.npy")
    odd = pixels.copy()
    odd.reshape(-1)[0] = draw.choice((np.nan, np.inf, 1e38))
    arrays = [
        *(pixels.astype(">f4"), pixels.astype(np.float64), pixels[:0], pixels[:, :2], pixels[..., :3], pixels[0], odd),
        *(np.zeros((2**20, 3, 0, 8), np.float32), np.array([{}], object), np.array(["x"]), np.float32(1)),
    ]
    buffer = io.BytesIO()
    np.save(buffer, draw.choice(arrays), allow_pickle=True)
    content = buffer.getvalue()
    if draw.random() < 0.3:
        content = content.replace(b"(", draw.choice((b"[", b"(9999999999, ", b"(-1, ", b"(" * 500)), 1)
    file = place / draw.choice(("toy-set/held_out.npy", "toy-set/pixel_values.npy", "answers.npy"))
    file.write_bytes(content)
    rehash(place / "toy-set")
    client = [*VERIFY, draw.choice(("--images", "--texts")), "{place}/answers.npy"]
    return Spoilt(client if file.name == "answers.npy" else FIDELITY)


def _recipe(place: Path, draw: random.Random) -> Spoilt:
    """A file, or an override."""
    if draw.random() < 0.5:
        (place / "r.yaml").write_bytes(spoilt_bytes(RECIPE.encode(), draw))
        return Spoilt([*FIDELITY, "--recipe", "{place}/r.yaml"])
    value = f"{draw.choice(RECIPE_KEYS)}={draw.choice(SCALARS)}".replace("\x00", "\x01")
    return Spoilt([*FIDELITY, "--set", value.replace("{", "{{").replace("}", "}}")])


def _parquet(place: Path, draw: random.Random) -> Spoilt:
    """Other columns, other types, broken images, labels beyond the classes."""
    file = place / "labelled.parquet"
    if draw.random() < 0.4:
        file.write_bytes(spoilt_bytes(file.read_bytes(), draw))
        return Spoilt(LABELLED)
    table = pq.read_table(file)
    images, labels = table["image"].to_pylist(), table["label"]
    change = draw.randrange(6)
    if change == 0:
        images[0] = draw.choice((None, {"bytes": None, "path": "x"}, {"bytes": b"", "path": "x"}))
    elif change == 1:
        images[1]["bytes"] = spoilt_bytes(images[1]["bytes"], draw)
    elif change == 2:
        numbers = draw.choice(([0, None, 1], [-1, 0, 1], [7, 0, 1], [2**63 - 1, 0, 1]))
        labels = pa.array(numbers, pa.int64())
    elif change == 3:
        kinds = ((pa.uint64(), [2**64 - 1, 0, 1]), (pa.string(), ["a", "b", "c"]), (pa.float64(), [0.0, 1.0, 0.5]))
        kind, values = draw.choice(kinds)
        labels = pa.array(values, kind)
    metadata = dict(table.schema.metadata or {})
    if change == 4:
        told = draw.choice((b"[" * 3000, b"\xff", b"{}", b'{"info": {"features": {"label": {"names": [1]}}}}', b"5"))
        metadata[b"huggingface"] = told
    (place / "labelled.parquet.classes.txt").unlink(missing_ok=True)
    columns = {"image": images, "label": labels}
    if change == 5:
        columns.pop(draw.choice(("image", "label")))
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), file)
    return Spoilt(LABELLED)


def _checkpoint(place: Path, draw: random.Random) -> Spoilt:
    """A header of safetensors with other values, a pickle that runs code, bytes."""
    file = place / "weights" / draw.choice(("tiny.safetensors", "tiny.pt", "script.pt"))
    how = draw.random()
    if file.suffix == ".safetensors" and how < 0.6:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        replace_value(header, draw)
        told = dumped(header).encode()
        file.write_bytes(len(told).to_bytes(8, "little") + told + content[8 + length :])
    elif file.suffix == ".pt" and how < 0.3:
        file.write_bytes(pickle.dumps(_Runs(place / "ran")))
    else:
        file.write_bytes(spoilt_bytes(file.read_bytes(), draw, head=3000))
    return Spoilt([*EXPORT[:-1], f"{{place}}/weights/{file.name}"])


class _Runs:
    """Unpickled carelessly, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _config(place: Path, draw: random.Random) -> Spoilt:
    """The config of an architecture, or of a tokenizer or pixels beside foreign files."""
    names = ("weights/tiny.json", "foreign/tokenizer_config.json", "foreign/preprocess_cfg.json")
    file = draw.choice((*names, "foreign/tokenizer.json"))
    return _json(file, EXPORT if "tiny" in file else IMPORT)(place, draw)


def _picture(place: Path, draw: random.Random) -> Spoilt:
    """An image of a folder is broken: it is listed, and the others are embedded."""
    files = sorted((place / "images").iterdir())
    for file in draw.sample(files, draw.randint(1, len(files))):
        file.write_bytes(spoilt_bytes(file.read_bytes(), draw, head=200))
    return Spoilt(IMAGES)


def _text_file(place: Path, draw: random.Random) -> Spoilt:
    file = place / "texts.txt"
    odd = (b"\xff\xfe", b"\x00" * 100, b"x" * 10**6, b"\r\n" * 1000, "\u202e\ud83d".encode("utf-8", "surrogatepass"))
    file.write_bytes(spoilt_bytes(file.read_bytes(), draw) + draw.choice((b"", *odd)))
    return Spoilt(TEXTS)


def _lines(file: str, command: list[str]) -> Callable[[Path, random.Random], Spoilt]:
    """A text file of one entry a line."""

    def spoil(place: Path, draw: random.Random) -> Spoilt:
        odd = (
            b"\n\n",
            b"\xff\n",
            b"\x00\n",
            b"x" * 10**6,
            b"cat\n" * 3000,
            b"\x1b[2J\n",
            b"{}\n",
            b"\xef\xbb\xbf",
            b"#\n",
        )
        before = (place / file).read_bytes()
        content = spoilt_bytes(before, draw) if draw.random() < 0.5 else draw.choice((b"", before)) + draw.choice(odd)
        (place / file).write_bytes(content)
        return Spoilt(command)

    return spoil


def _of_a_folder(folder: str, weights: str, command: list[str]) -> Callable[[Path, random.Random], Spoilt]:
    """Configs, tokenizers or weights of a model that is a folder; now and then one of them is not there."""

    def spoil(place: Path, draw: random.Random) -> Spoilt:
        told = sorted(path.name for path in (place / folder).glob("*.json"))
        how = draw.random()
        if how < 0.1:
            (place / folder / draw.choice((*told, weights))).unlink()
        elif how < 0.3:
            return _bytes((f"{folder}/{weights}",), command, head=3000)(place, draw)
        else:
            return _json(f"{folder}/{draw.choice(told)}", command)(place, draw)
        return Spoilt(command)

    return spoil


TOY, SET = ("toy",), ("toy", "toy-set")
ALL = ("toy", "toy-set", "images", "texts.txt")
ENCODERS, FOREIGN = ("image_encoder.onnx", "text_encoder.onnx"), ("visual.onnx", "textual.onnx")
IMPORTED = ("imported", "imported-set")
KINDS: dict[str, Kind] = {
    "bundle: manifest": Kind(ALL, _json("toy/manifest.json", INSPECT, *RUNNING)),
    "bundle: graph": Kind(ALL, _graph("toy", ENCODERS, INSPECT, *RUNNING)),
    "bundle: graph's bytes": Kind(ALL, _bytes(tuple(f"toy/{name}" for name in ENCODERS), INSPECT, *RUNNING)),
    "bundle: wrong hash": Kind(
        ALL, _bytes(("toy/image_encoder.onnx", "toy/tokenizer.json"), INSPECT, *RUNNING, right_hashes=False)
    ),
    "bundle: tokenizer": Kind(ALL, _json("toy/tokenizer.json", VERIFY, TEXTS, PACKAGE)),
    "bundle: tokenizer's bytes": Kind(ALL, _bytes(("toy/tokenizer.json",), VERIFY, TEXTS)),
    "bundle: golden vectors": Kind(TOY, _json("toy/golden/golden.json", VERIFY, PACKAGE)),
    "bundle: golden images": Kind(
        TOY, _bytes(tuple(f"toy/golden/{name}.png" for name in ("photo", "portrait", "grey")), VERIFY, PACKAGE, head=99)
    ),
    "quantize: graph": Kind(IMPORTED, _graph("imported", ENCODERS, QUANTIZE)),
    "quantize: manifest": Kind(IMPORTED, _json("imported/manifest.json", QUANTIZE)),
    "quantize: set": Kind(IMPORTED, _json("imported-set/manifest.json", QUANTIZE)),
    "set: manifest": Kind(SET, _json("toy-set/manifest.json", FIDELITY)),
    "set: prompts": Kind(SET, _json("toy-set/prompts.json", FIDELITY)),
    "set: losses": Kind(SET, _json("toy-set/losses.json", FIDELITY)),
    "set: images' bytes": Kind(SET, _bytes(("toy-set/held_out.npy", "toy-set/pixel_values.npy"), FIDELITY, head=130)),
    "arrays": Kind(SET, _array),
    "recipes": Kind(SET, _recipe),
    "parquet": Kind(("toy", "labelled.parquet"), _parquet),
    "class names": Kind(
        ("toy", "labelled.parquet", "labelled.parquet.classes.txt"), _lines("labelled.parquet.classes.txt", LABELLED)
    ),
    "tar": Kind(("toy", "images.tar"), _bytes(("images.tar",), TAR)),
    "images": Kind(("toy", "images"), _picture),
    "texts": Kind(("toy", "texts.txt"), _text_file),
    "foreign graph": Kind(("foreign",), _graph("foreign", FOREIGN, IMPORT)),
    "foreign graph's bytes": Kind(("foreign",), _bytes(tuple(f"foreign/{name}" for name in FOREIGN), IMPORT)),
    "configs": Kind(("foreign", "weights"), _config),
    "checkpoints": Kind(("weights",), _checkpoint),
    "open_clip's folder": Kind(("folder",), _of_a_folder("folder", "open_clip_model.safetensors", MODEL_FOLDER)),
    "transformers' folder": Kind(("published",), _of_a_folder("published", "model.safetensors", PUBLISHED)),
    "nouns": Kind(("imported", "nouns.txt"), _lines("nouns.txt", NOUNS)),
}
SLOW = (
    *("quantize: graph", "quantize: manifest", "quantize: set", "foreign graph", "foreign graph's bytes", "configs"),
    *("checkpoints", "open_clip's folder", "transformers' folder", "nouns"),
)


def order(seed: int) -> Iterator[tuple[str, random.Random]]:
    """Cases without an end: the slow kinds take one turn where the others take three."""
    turn = [name for name in KINDS for _ in range(1 if name in SLOW else 3)]
    number = 0
    while True:
        yield turn[number % len(turn)], random.Random(f"{seed} {number}")
        number += 1
