"""Documents say what the result files say; result files say how to make them again; documents stay short."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import numpy as np
import pytest

from d4c_onnx.bundle import Bundle

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LENGTHS = {"README.md": 180, "docs/performance.md": 150, "docs/fidelity.md": 150, "docs/design.md": 100}


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("document")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


def test_documents_are_what_the_result_files_say() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "document.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_number_changed_by_hand_is_seen(document: ModuleType) -> None:
    path = ROOT / "docs" / "performance.md"
    text = path.read_text("utf-8")
    changed = text.replace("3.13x", "3.14x", 1)
    assert changed != text
    assert document.renewed(changed, path.parent) == text


def test_a_table_of_nothing_is_refused(document: ModuleType) -> None:
    for ask, reason in (("plain no-such-file", "no-such-file"), ("no-such-view minis-zen3", "no-such-view")):
        with pytest.raises(SystemExit, match=reason):
            document.renewed(f"<!-- table {ask} -->\n<!-- /table -->\n", ROOT)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_file_says_how_to_make_it_again_and_is_shown(path: Path, document: ModuleType) -> None:
    found = json.loads(path.read_text("utf-8"))
    assert found["machine"]["cpu"]
    assert found["commit"]
    assert found["command"]
    assert found["rows"]
    assert any(path.stem in document.results_used(other.read_text("utf-8")) for other in DOCUMENTS)


def test_a_benchmark_report_becomes_a_result_file(results: ModuleType, tmp_path: Path) -> None:
    machine = {"cpu": "a processor", "gpu": None, "threads": 2, "provider": "cpu", "onnxruntime": "1.32.0"}
    batches = {"1": {"median_ms": 2.0, "low_ms": 1.9, "high_ms": 2.1, "per_second": 500.0, "speed_up": 1.0}}
    rows = [{"name": "mini fp32", "size_bytes": 1000, "load_ms": 1.0, "batches": batches}]
    report = {"machine": machine, "rounds": 3, "towers": {"image": rows}, "failed": []}
    made = results.of_benchmark(report, "d4c-onnx benchmark A --json")
    made.write(tmp_path / "mine.json")
    back = results.read_results("mine", tmp_path)
    assert back == made
    assert back.machine == {"cpu": "a processor", "threads": 2, "provider": "cpu"}
    assert back.versions["onnxruntime"] == "1.32.0"
    assert back.rows == [{"tower": "image", **rows[0]}]


@pytest.mark.parametrize("name", LENGTHS)
def test_documents_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text("utf-8").splitlines()) <= LENGTHS[name]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", path.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)#:]+)\)|<img [^>]*src=\"([^\":]+)\"", text):
        assert (path.parent / "".join(target)).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_recipe_keys_in_documents_exist(path: Path) -> None:
    from d4c_onnx.recipe import Recipe

    sections = {name: field.annotation for name, field in Recipe.model_fields.items() if name != "seed"}
    named = rf"(?:--set |`)({'|'.join(sections)})\.(\w+)"
    for section, key in re.findall(named, path.read_text("utf-8")):
        assert key in sections[section].model_fields, f"{section}.{key}"


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)


def test_the_readme_serves_a_bundle(vit_bundle: Bundle) -> None:
    serving = python_blocks(ROOT / "README.md")[0].replace("exported/mini-vit/w4a8", str(vit_bundle.path))
    photo = vit_bundle.path / "golden" / "photo.png"
    names: dict[str, object] = {"photo": photo}
    exec(compile(serving, "README.md", "exec"), names)
    assert np.asarray(names["image_embeds"]).shape[0] == 1
    assert np.asarray(names["text_embeds"]).shape[0] == 2


def test_the_readme_imports_what_is_there() -> None:
    for block in python_blocks(ROOT / "README.md"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, name.name) for name in node.names), node.module


def test_a_line_of_the_design_fits_on_a_screen() -> None:
    """One page is no page where its lines have no end."""
    assert max(map(len, (ROOT / "docs" / "design.md").read_text("utf-8").splitlines())) <= 140


def test_design_says_how_large_the_library_is() -> None:
    design = (ROOT / "docs" / "design.md").read_text("utf-8")
    said = re.search(r"([\d,]+) now\.", design)
    assert said is not None
    lines = sum(len(file.read_text("utf-8").splitlines()) for file in ROOT.glob("d4c_onnx/**/*.py"))
    assert int(said[1].replace(",", "")) == pytest.approx(lines, rel=0.03)


def test_documents_name_every_target() -> None:
    from d4c_onnx.recipe import QuantizationConfig

    targets = get_args(QuantizationConfig.model_fields["target"].annotation)
    assert targets
    for path in (ROOT / "README.md", ROOT / "docs" / "targets.md"):
        named = re.findall(r"^\| `(\w+)`(?: \(default\))? \|", path.read_text("utf-8"), re.MULTILINE)
        assert sorted(named) == sorted(targets), path


def test_rows_measured_seed_by_seed_become_a_line(results: ModuleType, tmp_path: Path) -> None:
    fidelity, tables = importlib.import_module("fidelity"), importlib.import_module("tables")
    cache = {}
    for seed, points in enumerate((-0.10, -0.30)):
        measured = {"agreement": 99.0 - seed, "cosine_image": 0.5, "cosine_text": 0.5, "similarity_rmse": 0.25}
        top1 = {"points": points, "low": points - 0.1 * (seed + 1), "high": points + 0.1}
        cache[f"mini-vit|w4a8|d4c|1||{seed}"] = {**measured, "top1_difference": top1, "bits": 4.1, "seconds": 2.0}
    results.measured_here(fidelity.summarize(cache)).write(tmp_path / "mine.json")
    [_, line] = tables.fidelity([results.read_results("mine", tmp_path)])
    seeds, interval = "**-0.20** (-0.10, -0.30)", "[-0.50, -0.20]"
    assert line == ["mini-vit", "w4a8", "d4c", seeds, interval, "98.50", "0.50000", "0.25000", "4.10"]


def test_documents_and_help_name_every_stack() -> None:
    from d4c_onnx.cli.package import command
    from d4c_onnx.packaging import STACKS

    [target] = [option for option in command.params if option.name == "target"]
    headings = re.findall(r"^## .*\(`(\w+)`\)$", (ROOT / "docs" / "serving.md").read_text("utf-8"), re.MULTILINE)
    assert headings == list(STACKS)
    assert all(re.search(rf"\b{name}\b", target.help) for name in STACKS)
