"""Every config that open_clip lists, with random weights: exported, compared, quantised and run; one process a config.

    python benchmarks/coverage.py --minutes 60                # smallest first; a rerun goes on where this one stopped
    python benchmarks/coverage.py --only "^RN50$" --again     # measure anew
    python benchmarks/coverage.py --blocks 2 --bits w4a8      # two blocks a tower, into coverage-blocks.json

A config is covered when both towers are as torch's within 1e-4, the bundle's tokenizer and pixels are open_clip's own
on awkward texts and odd images, and the files of w8a8 and w4a8 run at batches of 1 and 5 (and at two lengths, where the
sequence is dynamic) with at least 90 % of the products with weights in int8. Accuracy is no matter here: weights are
random, the calibration is a handful of noise, and weights are rounded to nearest, since GPTAQ and YAQA take minutes
(the tests round each family's miniature by the default). What the hub would be asked for is made here
(benchmarks/text_towers.py).

The result file is written anew after each config, and holds a row of every one: what has not run says so. Which configs
need more memory than `--limit-gb` is estimated from their parameters before; the limit holds for the process, too.

With `--blocks`, towers keep so few blocks, at their own widths, images and vocabularies (benchmarks/few_blocks.py).
That takes a fraction of the time and of the memory, and a result file of its own; each family's smallest config comes
first, then each one's second.
"""

import argparse
import dataclasses
import json
import math
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from coverage_process import Forked
from results import FOLDER, ResultFile, measured_here, read_results

Row = dict[str, Any]
# float32 weights in torch, those of a tower being traced and written, and of a graph beside its float original
NEED, NEED_BYTES = 3.0, 1.5e9
# what Python, torch and onnxruntime say where the limit is met all the same
_NO_MEMORY = re.compile(r"MemoryError|no memory left|bad_?alloc|can't allocate memory|Failed to allocate memory")
FAMILIES = {
    "CoCa": r"coca_",
    "ConvNeXt": r"convnext_",
    "EVA, EVA02": r"EVA",
    "MobileCLIP2": r"MobileCLIP2",
    "MobileCLIP": r"MobileCLIP-",
    "ViT, mT5 text tower": r"mt5-",
    "NLLB-CLIP, SigLIP's image tower": r"nllb-.*siglip",
    "NLLB-CLIP": r"nllb-",
    "PE": r"PE-",
    "ResNet (OpenAI)": r"RN",
    "ViT, RoBERTa text tower": r"roberta-",
    "ViT, XLM-R text tower": r"xlm-roberta-",
    "SigLIP2": r".*SigLIP2",
    "SigLIP": r".*SigLIP",
    "CLIPA": r".*CLIPA",
    "ViT, worldwide": r".*worldwide",
    "ViTamin": r"ViTamin",
    "other timm towers": r"swin_|vit_",
    "ViT (OpenAI, LAION, DFN, MetaCLIP)": r"ViT-",
}
"""A family's name and what its configs are called; the first that fits."""
_BITS, _ROUNDING = "w8a8,w4a8", "nearest"  # as --bits and --rounding take them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression over the configs' names")
    parser.add_argument("--smallest-first", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no config after this many")
    parser.add_argument("--config-minutes", type=float, default=120, help="the most that one config may take")
    parser.add_argument("--limit-gb", type=float, default=20, help="memory of one process, in GB")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--configs", type=Path, help="a folder of further open_clip configs")
    parser.add_argument("--work", type=Path, help="where bundles lie meanwhile (default: a temporary folder)")
    parser.add_argument("--blocks", type=int, metavar="N", help="the most that a tower has (default: as published)")
    parser.add_argument("--bits", default=_BITS, help="the widths, by commas")
    parser.add_argument("--rounding", default=_ROUNDING, help="the recipe's")
    parser.add_argument("--results", type=Path, help="default: coverage.json, or with --blocks coverage-blocks.json")
    args = parser.parse_args()
    args.results = args.results or FOLDER / ("coverage-blocks.json" if args.blocks else "coverage.json")
    # at the commit as it is before this file changes; many runs make one file
    file = dataclasses.replace(measured_here([]), command=[_command(args)])
    rows = {row["config"]: row for row in _rows_of(args.results)}
    names = _names(args.configs)
    end = time.monotonic() + args.minutes * 60
    forked = Forked(int(args.limit_gb * 1e9), args.config_minutes * 60)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for name, millions in _to_do(names, rows, args, Path(work)):
            if time.monotonic() >= end:
                break
            kept = {key: rows[name][key] for key in ("config", "family", "millions")}
            rows[name] = kept | _measure(name, millions, args, Path(work) / name, forked) | {"commit": file.commit}
            _write(file, names, rows, args.results)
            print(f"{name}: {rows[name]['status']} {rows[name]['reason']}".rstrip(), flush=True)
    _write(file, names, rows, args.results)


def _command(args: argparse.Namespace) -> str:
    usual = {"blocks": None, "bits": _BITS, "rounding": _ROUNDING}
    asked = (f" --{key} {getattr(args, key)}" for key, value in usual.items() if getattr(args, key) != value)
    return f"python benchmarks/coverage.py{''.join(asked)}"


def family(name: str) -> str:
    """Which family a config belongs to."""
    return next((known for known, pattern in FAMILIES.items() if re.match(pattern, name)), "others")


def _names(configs: Path | None) -> list[str]:
    import open_clip

    if configs:
        open_clip.add_model_config(configs)
    return sorted(open_clip.list_models())


def _rows_of(results: Path) -> Sequence[Row]:
    """What an earlier run left."""
    return read_results(results.stem, results.parent).rows if results.exists() else []


def _to_do(names: list[str], rows: dict[str, Row], args: argparse.Namespace, work: Path) -> list[tuple[str, float]]:
    """The configs that are to be measured, in order, each with its millions of parameters."""
    wanted = []
    for name in names:
        row = rows.setdefault(name, {"config": name, "family": family(name), "status": "not run", "reason": ""})
        if re.search(args.only, name) and (args.again or row["status"] == "not run"):
            row["millions"] = row.get("millions") or millions_of(name, work / "sizes", args.blocks)
            wanted.append((name, row["millions"]))
    if args.smallest_first:
        wanted.sort(key=lambda pair: pair[1])
    if args.blocks:
        wanted.sort(key=lambda pair: _smaller_ones(rows[pair[0]], rows))
    return wanted


def _smaller_ones(row: Row, rows: dict[str, Row]) -> int:
    """How many of the same family are smaller, or as small and named before."""
    own = row["millions"], row["config"]
    others = (other for other in rows.values() if other["family"] == row["family"] and "millions" in other)
    return sum((other["millions"], other["config"]) < own for other in others)


def millions_of(name: str, folder: Path, blocks: int | None = None) -> float:
    """Parameters of both towers and what is trained beside them, counted without making them."""
    return round(sum(map(math.prod, shapes_of(name, folder, blocks).values())) / 1e6, 1)


def shapes_of(name: str, folder: Path, blocks: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter."""
    import open_clip
    import torch
    from text_towers import options_of

    from d4c_onnx.models.creation import hub_access

    folder.mkdir(parents=True, exist_ok=True)
    config = options_of(name, folder, blocks).config
    known = name
    if config is not None:
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": json.loads(config.read_text())}))
        known = f"local-dir:{folder}"
    with warnings.catch_warnings(action="ignore"), hub_access(), torch.device("meta"):
        model = open_clip.create_model(known, load_weights=False, pretrained_text=False, device="meta")
    return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def _measure(name: str, millions: float, args: argparse.Namespace, folder: Path, forked: Forked) -> Row:
    """What came of one config, in a process of its own; its files are gone afterwards."""
    need = (NEED * millions * 4e6 + NEED_BYTES) / 1e9
    if need > args.limit_gb:
        reason = (
            f"needs about {need:.0f} GB of memory, the limit is {args.limit_gb:g} ({4e-3 * millions:.1f} of weights)"
        )
        return {"status": "too large", "reason": reason}
    folder.mkdir()
    asked = {"name": name, "folder": folder, "configs": args.configs, "blocks": args.blocks, "rounding": args.rounding}
    stopped = forked.run(folder, asked | {"widths": tuple(args.bits.split(","))})
    record = folder / "record.json"
    found = json.loads(record.read_text("utf-8")) if record.exists() else {}
    shutil.rmtree(folder)
    return outcome(found, stopped)


def outcome(record: Row, stopped: str = "") -> Row:
    """A row's rest: what was measured, whether that is all, and else why.

    Args:
        record: what the process wrote down; `reason` is there when it came to its end.
        stopped: why it did not.
    """
    at, reason = record.get("at", "start"), record.get("reason")
    if reason is None:
        reason = stopped or "ended without a word"
    words = f"{at}: {reason}" if at and reason else reason
    status = "too large" if _NO_MEMORY.search(reason) else "failed" if reason else "covered"
    return {**record, "status": status, "reason": words.replace("\n", " ")[:300]}


def _write(file: ResultFile, names: Iterable[str], rows: dict[str, Row], path: Path) -> None:
    """A row of every config, in the order of their names."""
    dataclasses.replace(file, rows=[rows[name] for name in names]).write(path)


if __name__ == "__main__":
    main()
