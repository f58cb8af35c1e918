"""benchmarks/coverage.py: a config in a process of its own, results that a rerun goes on from, and their tables."""

import dataclasses
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
COVERED = {
    "steps": {"export": {"seconds": 20.0, "peak_gb": 1.5}, "w8a8": {"seconds": 30.0, "peak_gb": 2.0}},
    "at": "",
    "reason": "",
    "parity": {"image": 2e-7, "text": 3e-7},
    "dynamic": True,
    "w8a8": {"ratio": 3.9, "int8": 133, "products": 135, "cosine": 0.998},
    "w4a8": {"ratio": 7.1, "int8": 133, "products": 135, "cosine": 0.98},
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """By its path: a package of that name may be installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_of_coverage", BENCHMARKS / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder with a config that takes no time."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "covered-config.json").write_text(json.dumps(CONFIG))
    return folder


def _rows(results: Path) -> dict[str, dict[str, Any]]:
    return {row["config"]: row for row in json.loads(results.read_text("utf-8"))["rows"]}


@pytest.fixture
def run(benchmark: ModuleType, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the script on that config; the result file's rows."""
    results = tmp_path / "coverage.json"

    def call(*more: str) -> dict[str, dict[str, Any]]:
        given = {"--only": "^covered-config$", "--configs": configs, "--work": tmp_path, "--results": results}
        words = [str(word) for pair in given.items() for word in pair]
        monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "coverage.py"), *words, *more])
        benchmark.main()
        return _rows(results)

    return call


def test_a_config_above_the_limit_is_named_and_none_is_left_out(run: Callable[..., Any]) -> None:
    rows = run("--limit-gb", "1")
    assert rows.keys() >= set(open_clip.list_models())
    row = rows["covered-config"]
    assert row["status"] == "too large"
    assert re.fullmatch(r"needs about 2 GB of memory, the limit is 1 \(0\.0 of weights\)", row["reason"])
    assert {row["status"] for name, row in rows.items() if name != "covered-config"} == {"not run"}
    assert run() == rows  # what has a row is not tried again


@pytest.mark.slow
def test_a_miniature_is_covered(run: Callable[..., Any], tmp_path: Path) -> None:
    row = run()["covered-config"]
    assert (row["status"], row["reason"]) == ("covered", "")
    assert list(row["steps"]) == ["export", "inputs", "calibrate", "w8a8", "run w8a8", "w4a8", "run w4a8"]
    assert all(step["peak_gb"] > 0.1 for step in row["steps"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "coverage.json"]


@pytest.mark.slow
def test_a_config_that_takes_too_long_is_stopped(run: Callable[..., Any]) -> None:
    row = run("--config-minutes", "0.001")["covered-config"]
    assert (row["status"], row["reason"]) == ("failed", "start: stopped after 0.001 minutes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32",
        "RN50",
        "coca_ViT-B-32",
        "convnext_tiny",
        "swin_base_patch4_window7_224",
        "EVA02-B-16",
        "MobileCLIP-B",
        "MobileCLIP-S1",
        "MobileCLIP2-S3",
        "vit_relpos_medium_patch16_cls_224",
        "ViT-B-16-SigLIP",
        "ViTamin-S",
        "roberta-ViT-B-32",
        "mt5-base-ViT-B-32",
        "nllb-clip-base",
    ],
)
def test_few_blocks_are_of_the_same_widths(benchmark: ModuleType, tmp_path: Path, name: str) -> None:
    """Of every parameter that is left, the shape is as published; and most blocks are gone."""
    whole, few = (benchmark.shapes_of(name, tmp_path / str(blocks), blocks) for blocks in (None, 2))
    assert len(few) < 0.8 * len(whole)
    assert {key: whole.get(key) for key in few} == few


def test_what_a_process_wrote_down_becomes_an_outcome(benchmark: ModuleType) -> None:
    covered = benchmark.outcome(COVERED)
    assert (covered["status"], covered["reason"]) == ("covered", "")
    refused = benchmark.outcome({"at": "export", "reason": "torch cannot\nexport it"})
    assert (refused["status"], refused["reason"]) == ("failed", "export: torch cannot export it")
    killed = benchmark.outcome({"at": "w4a8"}, "ended with -9: ")
    assert (killed["status"], killed["reason"]) == ("failed", "w4a8: ended with -9: ")
    assert benchmark.outcome({})["status"] == "failed"
    full = benchmark.outcome({"at": "export", "reason": "RuntimeError: DefaultCPUAllocator: can't allocate memory"})
    assert full["status"] == "too large"


def test_every_config_has_a_family_and_what_it_wants_of_the_hub(benchmark: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options_of = importlib.import_module("text_towers").options_of
    published = [path.stem for path in Path(open_clip.__file__).with_name("model_configs").glob("*.json")]
    assert len(published) >= 144
    assert {benchmark.family(name) for name in published} == benchmark.FAMILIES.keys()
    for name in published:
        text, options = open_clip.get_model_config(name)["text_cfg"], options_of(name, tmp_path)
        assert ("hf_tokenizer_name" in text) == (options.tokenizer is not None)
        assert ("hf_model_name" in text) == (options.config is not None)


def test_the_tables_say_what_was_covered(benchmark: ModuleType) -> None:
    tables, results = importlib.import_module("tables"), importlib.import_module("results")
    rows = [
        {"config": "A", "family": "ViT", "millions": 42.4} | benchmark.outcome(COVERED),
        {"config": "B", "family": "ViT", "millions": 5000.0, "status": "too large", "reason": "needs 60 GB"},
        {"config": "C", "family": "CoCa", "millions": 9.0} | benchmark.outcome({"at": "export", "reason": "a | b"}),
        {"config": "D", "family": "CoCa", "status": "not run", "reason": ""},
    ]
    file = results.ResultFile({"cpu": "one"}, {}, "1234567", ["python"], rows)
    assert tables.coverage_families([file])[1:] == [
        ["CoCa", "2", "0", "1", "0", "1"],
        ["ViT", "2", "1", "0", "1", "0"],
        ["all", "4", "1", "1", "1", "1"],
    ]
    few = dataclasses.replace(file, rows=[row | {"status": "covered"} for row in rows])
    assert tables.coverage_families([file, few])[-1] == ["all", "4", "1", "1", "1", "1", "4", "0", "0", "0"]
    assert len(tables.coverage_families([file, few])[0]) == 10
    one_width = [{key: value for key, value in rows[0].items() if key != "w8a8"}]
    assert "least cosine, w4a8" in tables.coverage([dataclasses.replace(file, rows=one_width)])[0]
    nothing = [""] * 7
    assert tables.coverage([file])[1:] == [
        ["C", "9", *nothing, "export: a \\| b"],
        [
            "A",
            "42",
            "3e-07",
            "any length",
            "0.998, 0.980",
            "3.9, 7.1",
            "99% of 135, 99% of 135",
            "50",
            "2.0",
            "covered",
        ],
        ["B", "5000", *nothing, "needs 60 GB"],
    ]
    assert tables.coverage_absent([file])[1:] == [["CoCa", "D"]]
