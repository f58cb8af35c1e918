"""A long campaign of spoilt inputs: each must end in an answer or in one message.

    python benchmarks/hostile.py --cases 2000 --minutes 20 --keep failures/

Every case is a command of its own process, forked from one that has loaded everything. A failure is a traceback, an
exit code beyond 0, 1 and 2, more than 60 seconds or 2 GB, exit code 0 on what cannot be right, an input that changed,
or anything left beside it. Failing inputs are kept. Exit code 1 when there are failures.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import onnxruntime  # noqa: F401  (loaded once, for all children)

from d4c_onnx import measure, pipeline
from d4c_onnx.cli.main import group
from d4c_onnx.recipe import load_recipe

SECONDS, KILOBYTES = 60, 2 * 2**20
TINY = ("synthesis.method=noise", "synthesis.images=4", "synthesis.held_out=4", "text.prompts=8", "text.held_out=4")
DEEP = "@deep@"  # stands for brackets in brackets, which json cannot write
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**31,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../..",
    "[/x]",
    "\x1b",
    [],
    {},
    DEEP,
]
SCALARS = ("2024-13-45", "0b_", "9" * 5000, "[" * 3000, ".inf", ".nan", "&a [*a]", "{a: 1", "\x00", "-1", "1e999")

Spoil = Callable[[Path, random.Random], list[str]]


def _json(name: str, part: str, command: list[str]) -> Spoil:
    """A value of a JSON file is replaced; the manifest's hashes are right."""

    def spoil(place: Path, draw: random.Random) -> list[str]:
        file = place / part / name
        content = json.loads(file.read_bytes())
        for _ in range(draw.randint(1, 3)):
            _replace(content, draw)
        file.write_text(json.dumps(content).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000))
        if name != "manifest.json":
            _rehash(place / part)
        return [word.format(place=place) for word in command]

    return spoil


def _replace(content: Any, draw: random.Random) -> None:
    part = content
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(part[key], dict | list) and part[key] and draw.random() < 0.8:
            part = part[key]
            continue
        if draw.random() < 0.2:
            del part[key]
        else:
            part[key] = draw.choice(ODD)
        return


def _bytes(name: str, part: str, command: list[str], right_hashes: bool) -> Spoil:
    """Bytes of a file are changed, cut or doubled."""

    def spoil(place: Path, draw: random.Random) -> list[str]:
        file = place / part / name
        content = bytearray(file.read_bytes())
        for _ in range(draw.randint(1, 8)):
            at = draw.randrange(max(1, len(content)))
            kind = draw.random()
            if kind < 0.7 and content:
                content[at] ^= 1 << draw.randrange(8)
            elif kind < 0.85:
                del content[at:]
            else:
                content[at:at] = content[:at][-1000:]
        file.write_bytes(content)
        if right_hashes:
            _rehash(place / part)
        return [word.format(place=place) for word in command]

    return spoil


def _rehash(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, record in manifest["files"].items():
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        manifest["files"][name] = {**record, "sha256": digest} if isinstance(record, dict) else digest
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _recipe(place: Path, draw: random.Random) -> list[str]:
    key = draw.choice(
        ["seed", "synthesis.steps", "synthesis.template", "quantization.bits", "evaluation.max_drop", "x.y"]
    )
    return ["evaluate", f"{place}/mini-vit", "--set", f"{key}={draw.choice(SCALARS)}", "--dataset", "fidelity"]


INSPECT = ["inspect", "{place}/mini-vit"]
FIDELITY = ["evaluate", "{place}/mini-vit", "--dataset", "fidelity", "--calibration", "{place}/set"]
KINDS: dict[str, Spoil] = {
    "manifest": _json("manifest.json", "mini-vit", INSPECT),
    "manifest, evaluated": _json("manifest.json", "mini-vit", FIDELITY),
    "graph": _bytes("image_encoder.onnx", "mini-vit", INSPECT, right_hashes=True),
    "graph, evaluated": _bytes("text_encoder.onnx", "mini-vit", FIDELITY, right_hashes=True),
    "graph, wrong hash": _bytes("image_encoder.onnx", "mini-vit", INSPECT, right_hashes=False),
    "tokenizer": _bytes("tokenizer.json", "mini-vit", FIDELITY, right_hashes=True),
    "set's manifest": _json("manifest.json", "set", FIDELITY),
    "set's prompts": _json("prompts.json", "set", FIDELITY),
    "set's losses": _json("losses.json", "set", FIDELITY),
    "set's images": _bytes("held_out.npy", "set", FIDELITY, right_hashes=True),
    "recipe": _recipe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where failing inputs go")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        origin = _prepare(Path(folder) / "origin")
        tried, codes, failed, end = Counter(), Counter(), Counter(), time.monotonic() + 60 * args.minutes
        for number in range(args.cases):
            if time.monotonic() > end:
                break
            kind = list(KINDS)[number % len(KINDS)]
            wrong, code = _case(Path(folder), origin, kind, random.Random(f"{args.seed} {number}"))
            tried[kind] += 1
            codes[code] += 1
            if wrong:
                failed[kind] += 1
                print(f"case {number} ({kind}): {wrong}", flush=True)
                if args.keep:
                    shutil.copytree(Path(folder) / "case", args.keep / str(number), dirs_exist_ok=True)
    for kind, count in tried.items():
        print(f"{kind}: {count} tried, {failed[kind]} failed")
    print(f"{sum(tried.values())} cases, exit codes {dict(codes)}, {sum(failed.values())} failures")
    sys.exit(bool(failed))


def _prepare(origin: Path) -> Path:
    """A bundle and a set, made in a child: sessions start threads, and what forks must not have any."""
    child = os.fork()
    if child == 0:
        recipe = load_recipe(None, TINY)
        machine = measure.Machine("cpu", "cpu", 1)
        made, _ = pipeline.synthesize_calibration_set("mini-vit", recipe, output=origin, machine=machine)
        made.rename(origin / "set")
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit("the bundle could not be made")
    return origin


def _case(folder: Path, origin: Path, kind: str, draw: random.Random) -> tuple[str, int]:
    """What was wrong with one case, and its exit code."""
    place = folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(origin, place)
    command = KINDS[kind](place, draw)
    before = _content(place)
    code, said, kilobytes = _run([*command, "--json", "--quiet"], folder / "said")
    changed = [name for name, digest in _content(place).items() if before.get(name) != digest]
    faults = {
        "traceback": "Traceback" in said,
        f"exit code {code}": code not in (0, 1, 2),
        f"{kilobytes // 1024} MB": kilobytes > KILOBYTES,
        "exit code 0 on garbage": code == 0 and ("NaN" in said or kind == "graph, wrong hash"),
        f"changed {changed[:3]}": bool(changed) or len(before) != len(_content(place)),
    }
    tail = said.strip().splitlines()[-1][:200] if said.strip() else ""
    wrong = ", ".join(name for name, found in faults.items() if found)
    return (f"{wrong}: {tail}" if wrong else "", code)


def _run(command: list[str], said: Path) -> tuple[int, str, int]:
    child = os.fork()
    if child == 0:
        told = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.argv = ["d4c-onnx", *command]
        code = 99
        try:
            group(command, prog_name="d4c-onnx")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 98
        except BaseException:
            import traceback

            traceback.print_exc()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    end = time.monotonic() + SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), said.read_text("utf-8", "replace"), usage.ru_maxrss
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)


def _content(place: Path) -> dict[str, str]:
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in place.rglob("*")
        if path.is_file()
    }


if __name__ == "__main__":
    main()
