"""The documents' tables, made of result files. One function a table; `VIEWS` names them."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from results import ResultFile

from d4c_onnx.recipe_keys import recipe_keys as keys_of_recipes

_PEERS = ("quantize_dynamic", "quantize_static", "MatMulNBits")  # onnxruntime's own tools in `d4c-onnx benchmark`
_MEMORY = {"load ms": "load_ms", "RAM MB": "loaded_bytes", "in use MB": "held_bytes", "peak MB": "peak_bytes"}


def plain(files: Sequence[ResultFile]) -> list[list[str]]:
    """The rows as they are, under the file's own columns."""
    columns = files[0].columns
    rows = [[_plain_cell(row[key], form) for key, _, form in columns] for file in files for row in file.rows]
    return [[title for _, title, _ in columns], *rows]


def race(files: Sequence[ResultFile], tower: str) -> list[list[str]]:
    """One tower's contenders: size, and per batch the median and the speed-up over the first of its file.

    Contenders that an earlier file has are not shown again.
    """
    first: dict[str, dict[str, Any]] = {}
    for row in (row for file in files for row in file.rows if row["tower"] == tower):
        first.setdefault(row["name"], row)
    rows = list(first.values())
    sizes = sorted({int(size) for row in rows for size in row["batches"]})
    table = [[f"{tower} encoder", "MB", *(f"batch {size}" for size in sizes)]]
    for row in rows:
        cells = [row["batches"].get(str(size)) for size in sizes]
        table.append([row["name"], f"{row['size_bytes'] / 1e6:.1f}", *(_timed(cell) for cell in cells)])
    return table


def overview(files: Sequence[ResultFile], bundle: str) -> list[list[str]]:
    """A line per file and tower: how many times faster than FP32; in brackets the best of onnxruntime's own tools."""
    sizes = sorted({int(size) for file in files for row in file.rows for size in row["batches"]})
    head = ["processor", "encoder", "smaller", *(f"batch {size}" for size in sizes)]
    table = [head]
    for file in files:
        for tower in ("image", "text"):
            rows = [row for row in file.rows if row["tower"] == tower]
            [ours] = [row for row in rows if row["name"].split(" ", 1)[1] == bundle]
            smaller = rows[0]["size_bytes"] / ours["size_bytes"]
            cells = [_beside_peers(rows, ours, str(size)) for size in sizes]
            model = ours["name"].split(" ", 1)[0]
            table.append([_processor(file), f"{model} {tower}", f"{smaller:.1f}x", *cells])
    return table


def memory(files: Sequence[ResultFile], only: str = "") -> list[list[str]]:
    """What loading takes: time, what it adds to the resident memory, what of it is in use, the peak."""
    rows = [(file, row) for file in files for row in file.rows if re.search(only, row["name"])]
    shown = {title: key for title, key in _MEMORY.items() if any(key in row for _, row in rows)}
    table = [["processor", "encoder", *shown]]
    for file, row in rows:
        cells = [_memory_cell(row.get(key), key) for key in shown.values()]
        table.append([_processor(file), f"{row['name']}, {row['tower']}", *cells])
    return table


def forms(files: Sequence[ResultFile], batches: str, only: str = "") -> list[list[str]]:
    """Forms of one graph, in the first file's order: milliseconds, per processor, tower and batch."""
    names = dict.fromkeys(row["name"] for file in files for row in file.rows if re.search(only, row["name"]))
    columns = [(file, tower, size) for file in files for tower in ("image", "text") for size in batches.split(",")]
    table = [["ms", *(f"{_processor(file)}, {tower}, {size}" for file, tower, size in columns)]]
    for name in names:
        cells = []
        for file, tower, size in columns:
            found = [row["batches"][size] for row in file.rows if (row["name"], row["tower"]) == (name, tower)]
            cells.append(f"{found[0]['median_ms']:.1f}" if found else "-")
        table.append([name, *cells])
    return table


def runtimes(files: Sequence[ResultFile], tower: str) -> list[list[str]]:
    """A line per model and bundle: milliseconds of a batch of 8 in each runtime, and the least cosine anywhere."""
    rows = [row for file in files for row in file.rows if row["tower"] == tower]
    names = list(dict.fromkeys(row["runtime"] for row in rows))
    table = [["model", "bundle", "needs onnxruntime", *names, "least cosine"]]
    for model, bundle in dict.fromkeys((row["model"], row["bundle"]) for row in rows):
        found = {row["runtime"]: row for row in rows if (row["model"], row["bundle"]) == (model, bundle)}
        cells = [f"{row['batch8_ms']:.2f}" if "batch8_ms" in row else "refused" for row in found.values()]
        least = min(row["cosine"] for row in found.values() if "cosine" in row)
        table.append([model, bundle, next(iter(found.values()))["needs"], *cells, f"{least:.5f}"])
    return table


def fidelity(files: Sequence[ResultFile], only: str = "") -> list[list[str]]:
    """A line per model, bits, calibration, stress and overrides: differences to FP32, means over the seeds.

    Args:
        only: regular expression over `model|bits|calibration|stress|overrides`.
    """
    head = ["model", "bits", "calibration", "top-1 difference (each seed)", "widest 95 % interval"]
    table = [[*head, "agreement %", "cosine image", "similarity rmse", "bits a weight"]]
    for row in (row for file in files for row in file.rows):
        if not re.search(only, "|".join(str(row[key]) for key in _FIDELITY)):
            continue
        stress = f", stress {row['stress']}" if row["stress"] != 1 else ""
        sets = f", `{row['overrides']}`" if row["overrides"] else ""
        bits = f"{row['bits_average']:.2f}" if "bits_average" in row else ""
        cells = [row["model"], row["bits"], f"{row['calibration']}{stress}{sets}", each_seed(row["points"])]
        cells += [f"[{row['low']:+.2f}, {row['high']:+.2f}]", f"{_mean(row['agreement']):.2f}"]
        table.append([*cells, f"{_mean(row['cosine_image']):.5f}", f"{_mean(row['similarity_rmse']):.5f}", bits])
    return table


def synthesis(files: Sequence[ResultFile], only: str = "") -> list[list[str]]:
    """A line per model and kind of images: answers at W4A8 and W6A6, means over the seeds.

    Args:
        only: regular expression over `model|images`.
    """
    head = ["model", "images", "CPU s", "W4A8 top-1 difference (each seed)", "agreement %", "similarity rmse"]
    table = [[*head, "W6A6 top-1 difference", "agreement %"]]
    for row in (row for file in files for row in file.rows):
        if not re.search(only, f"{row['model']}|{row['images']}"):
            continue
        seconds = f"{np.median(row['cpu_seconds']):.0f}" if row["cpu_seconds"] else "-"
        four, six = row["w4a8"], row["w6a6"]
        cells = [row["model"], row["images"], seconds, each_seed(four["points"]), f"{_mean(four['agreement']):.2f}"]
        cells += [f"{_mean(four['similarity_rmse']):.5f}", f"{_mean(six['points']):+.2f}"]
        table.append([*cells, f"{_mean(six['agreement']):.2f}"])
    return table


def recipe_keys(_: Sequence[ResultFile], section: str) -> list[list[str]]:
    """Every key of a section: what it takes, its default, what it does."""
    found = [key for key in keys_of_recipes() if key.name == section or key.name.startswith(f"{section}.")]
    rows = [[f"`{key.name}`", key.takes, f"`{key.shown_default}`", key.help.replace("|", "\\|")] for key in found]
    return [["key", "takes", "default", "what it does"], *rows]


def coverage_families(files: Sequence[ResultFile]) -> list[list[str]]:
    """A line per family of open_clip's configs, and one for all: how many of those that fit are covered.

    Args:
        files: of whole configs; where there is a second one, of those with few blocks a tower.
    """
    outcomes = ["covered", "failed", "more memory than the limit", "not run yet"]
    head = [*outcomes, *(f"few blocks: {outcome}" for outcome in outcomes)][: len(outcomes) * len(files)]
    table = [["family", "configs", *head]]
    families = sorted({row["family"] for row in files[0].rows}, key=str.lower)
    for family in (*families, "all"):
        chosen = [[row for row in file.rows if family in (row["family"], "all")] for file in files]
        counts = [sum(row["status"] == status for row in rows) for rows in chosen for status in _OUTCOMES]
        table.append([family, *(str(count) for count in (len(chosen[0]), *counts))])
    return table


def coverage(files: Sequence[ResultFile]) -> list[list[str]]:
    """A line per config that was tried: what was measured of it, or why it is not covered."""
    [file] = files
    tried = [row for row in file.rows if row["status"] != "not run"]
    widths = [bits for bits in ("w8a8", "w4a8") if any(bits in row for row in tried)]
    of = " and ".join(widths)
    head = ["config", "M weights", "difference to torch", "short texts", f"least cosine, {of}"]
    table = [[*head, "times smaller", f"int8 products, {of}", "seconds", "peak GB", "outcome"]]
    for row in sorted(tried, key=lambda row: row.get("millions") or 0):
        both = [row[bits] for bits in widths if "cosine" in row.get(bits, ())]
        steps = row.get("steps", {}).values()
        parity = f"{max(row['parity'].values()):.0e}" if "parity" in row else ""
        lengths = "" if row.get("dynamic") is None else "any length" if row["dynamic"] else "padded"
        cells = [row["config"], f"{row['millions']:.0f}", parity, lengths]
        cells += [
            ", ".join(f"{width['cosine']:.3f}" for width in both),
            ", ".join(f"{one['ratio']:.1f}" for one in both),
        ]
        cells.append(", ".join(f"{width['int8'] / width['products']:.0%} of {width['products']}" for width in both))
        cells.append(f"{sum(step['seconds'] for step in steps):.0f}" if steps else "")
        cells.append(f"{max(step['peak_gb'] for step in steps):.1f}" if steps else "")
        table.append([*cells, row["reason"].replace("|", "\\|") or row["status"]])
    return table


def coverage_absent(files: Sequence[ResultFile]) -> list[list[str]]:
    """The configs that have not been run yet, by family."""
    [file] = files
    table = [["family", "not run yet"]]
    for family in sorted({row["family"] for row in file.rows}, key=str.lower):
        names = [row["config"] for row in file.rows if (row["family"], row["status"]) == (family, "not run")]
        if names:
            table.append([family, ", ".join(names)])
    return table


def packages(files: Sequence[ResultFile]) -> list[list[str]]:
    """A line per stack, a column per bundle: the package's size, or why there is none."""
    rows = {(row["target"], row["bundle"]): row for file in files for row in file.rows}
    targets, bundles = (list(dict.fromkeys(key[place] for key in rows)) for place in (0, 1))
    table = [["stack", *(f"{bundle}, MB" for bundle in bundles)]]
    for target in targets:
        found = [rows.get((target, bundle), {"refused": ""}) for bundle in bundles]
        cells = [row["refused"] if "refused" in row else f"{row['megabytes']:.1f}" for row in found]
        table.append([f"`{target}`", *cells])
    return table


def beside(files: Sequence[ResultFile]) -> list[list[str]]:
    """What the second contender of each file takes over what the first takes, per tower."""
    sizes = sorted({int(size) for file in files for row in file.rows for size in row["batches"]})
    costs = {"bytes": "size_bytes", **_MEMORY}
    table = [["processor", "encoder", *(title.removesuffix(" MB").removesuffix(" ms") for title in costs)]]
    table[0] += [f"batch {size}" for size in sizes]
    for file in files:
        for tower in ("image", "text"):
            first, second = [row for row in file.rows if row["tower"] == tower]
            ratios = [second[key] / first[key] for key in costs.values()]
            times = [row["batches"][str(size)]["median_ms"] for size in sizes for row in (second, first)]
            ratios += [ours / its for ours, its in zip(times[::2], times[1::2], strict=True)]
            model = first["name"].split(" ", 1)[0]
            table.append([_processor(file), f"{model} {tower}", *(f"{ratio:.2f}x" for ratio in ratios)])
    return table


def each_seed(points: Sequence[float]) -> str:
    """A cell: the mean in bold, then every seed."""
    return f"**{sum(points) / len(points):+.2f}** ({', '.join(f'{value:+.2f}' for value in points)})"


_OUTCOMES = ("covered", "failed", "too large", "not run")
_FIDELITY = ("model", "bits", "calibration", "stress", "overrides")
VIEWS: dict[str, Callable[..., list[list[str]]]] = {
    view.__name__: view
    for view in (
        plain,
        race,
        overview,
        memory,
        forms,
        runtimes,
        fidelity,
        synthesis,
        recipe_keys,
        coverage_families,
        coverage,
        coverage_absent,
        packages,
        beside,
    )
}


def _plain_cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _timed(cell: dict[str, float] | None) -> str:
    if cell is None:
        return ""
    median = cell["median_ms"]
    return f"{median:.1f} ms, {cell['speed_up']:.2f}x" if median >= 10 else f"{median:.3g} ms, {cell['speed_up']:.2f}x"


def _beside_peers(rows: Sequence[dict[str, Any]], ours: dict[str, Any], size: str) -> str:
    if size not in ours["batches"]:
        return ""
    peers = [row["batches"][size]["speed_up"] for row in rows if row["name"].startswith(_PEERS)]
    best = f" ({max(peers):.2f}x)" if peers else ""
    return f"{ours['batches'][size]['speed_up']:.2f}x{best}"


def _memory_cell(value: float | None, key: str) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.0f}" if key.endswith("bytes") else f"{value:.0f}"


def _processor(file: ResultFile) -> str:
    """A file's processor in a word or two: the name without its bracket."""
    name = file.machine.get("gpu") or file.machine["cpu"]
    inside = re.search(r"\((Zen \d|AMX)", name)
    return f"{name.partition(' (')[0]}{f', {inside[1]}' if inside else ''}"


def _mean(value: float | Sequence[float]) -> float:
    return float(np.mean(value))
