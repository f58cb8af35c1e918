"""What an account meets that may not read or write everything: a script of `test_accounts.py`, which runs it as one.

Prints a JSON object: what was tried -> the error's class and its message, None where there was none.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

HOLDS = "import sys; from pathlib import Path; from d4c_onnx.files import claimed\n"
HOLDS += "with claimed(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
Told = dict[str, list[str] | None]


def _try(work: Callable[[], object]) -> list[str] | None:
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


def reads(place: Path) -> Told:
    """Every kind of file, taken away from this account one by one."""
    import hostile_origin

    from d4c_onnx import measure, pipeline
    from d4c_onnx.embedding import embed_source
    from d4c_onnx.foreign import ForeignFiles
    from d4c_onnx.models.checkpoint import read_checkpoint
    from d4c_onnx.packaging import package_bundle
    from d4c_onnx.recipe_file import load_recipe
    from d4c_onnx.vocabulary import read_nouns

    origin = place / "origin"
    hostile_origin.make(origin)
    toy, toy_set, foreign = origin / "toy", origin / "toy-set", origin / "foreign"
    (origin / "recipe.yaml").write_text("seed: 1\n")

    def fidelity() -> object:
        return measure.evaluate_bundles([toy], load_recipe(None, ["evaluation.dataset=fidelity"]), calibration=toy_set)

    def labelled() -> object:
        recipe = load_recipe(None, [f"evaluation.dataset={origin / 'labelled.parquet'}"])
        return measure.evaluate_bundles([toy], recipe)

    def brought() -> object:
        given = ForeignFiles(foreign / "visual.onnx", foreign / "textual.onnx")
        return pipeline.import_bundle(given, place, load_recipe(), name="imported")

    def texts() -> object:
        return embed_source(toy, origin / "texts.txt", place / "texts.npy")

    uses: dict[str, Callable[[], object]] = {
        "toy/manifest.json": lambda: measure.inspect_bundle(toy),
        "toy/image_encoder.onnx": fidelity,
        "toy/golden": lambda: package_bundle(toy, "onnxruntime", place / "package"),
        "toy-set/manifest.json": fidelity,
        "toy-set/held_out.npy": fidelity,
        "labelled.parquet": labelled,
        "texts.txt": texts,
        "weights/tiny.safetensors": lambda: read_checkpoint(origin / "weights" / "tiny.safetensors"),
        "weights/tiny.pt": lambda: read_checkpoint(origin / "weights" / "tiny.pt"),
        "foreign/textual.onnx": brought,
        "foreign/tokenizer.json": brought,
        "foreign/preprocess_cfg.json": brought,
        "recipe.yaml": lambda: load_recipe(str(origin / "recipe.yaml")),
        "nouns.txt": lambda: read_nouns(origin / "nouns.txt"),
    }
    told: Told = {}
    for name, use in uses.items():
        mode = (origin / name).stat().st_mode
        (origin / name).chmod(0)
        told[name] = _try(use)
        (origin / name).chmod(mode)
    (origin / "images" / "rgb.png").chmod(0)
    broken = embed_source(toy, origin / "images", place / "images.npy").first_broken
    told["images/rgb.png"] = ["listed", *(reason for name, reason in broken if name == "rgb.png")]
    told["left"] = ["", " ".join(sorted(path.name for path in place.iterdir()))]
    return told


def writes(place: Path) -> Told:
    """A folder that may not be written, and a file in the way that may not be replaced."""
    from toys import Toy, bundle_of

    from d4c_onnx.embedding import embed_source
    from d4c_onnx.files import staged_folder

    toy = bundle_of(place / "toy", Toy()).path
    (place / "texts.txt").write_text("a\nth\n")
    (place / "closed").mkdir(0o555)
    (place / "theirs.npy").write_bytes(b"theirs")
    (place / "theirs.npy").chmod(0o444)

    def embed(output: Path) -> object:
        return embed_source(toy, place / "texts.txt", output, overwrite=True)

    def stage(target: Path) -> None:
        with staged_folder(target):
            raise AssertionError("the work has begun")

    return {
        "a folder": _try(lambda: stage(place / "closed" / "mini-vit")),
        "a folder below": _try(lambda: stage(place / "closed" / "a" / "b")),
        "vectors": _try(lambda: embed(place / "closed" / "v.npy")),
        "vectors in the way": _try(lambda: embed(place / "theirs.npy")),
        "left": ["", " ".join(sorted(path.name for path in place.iterdir()))],
    }


def locks(place: Path) -> Told:
    """The lock of a run of another account, alive and killed: a file that this one may not write."""
    from d4c_onnx.files import claimed

    def claim() -> None:
        with claimed(place / "mini-vit"):
            pass

    told: Told = {}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(place / "mini-vit")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        (place / ".lock-mini-vit").chmod(0o444)
        told["alive"] = _try(claim)
        process.kill()
    told["killed"] = _try(claim)
    os.mkfifo(place / ".lock-mini-vit", 0o444)
    told["a pipe"] = _try(claim)
    (place / ".lock-mini-vit").touch(0o444)
    (place / ".lock-mini-vit").chmod(0)
    told["silent"] = _try(claim)
    return told


if __name__ == "__main__":
    made = {"reads": reads, "writes": writes, "locks": locks}[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(f"{json.dumps(made)}\n")
