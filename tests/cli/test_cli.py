"""The commands as a user runs them: exit codes, one JSON object, nothing half-written.

In processes of their own where that is the point, and else in this one: each process loads torch again."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from d4c_onnx.bundle import open_bundle
from d4c_onnx.cli import benchmark, show
from d4c_onnx.cli.main import COMMANDS, group
from d4c_onnx.evaluation.benchmark_report import (
    BatchTiming,
    BenchmarkReport,
    LatencyRow,
    Loading,
    MachineDescription,
)

TINY = [
    *("--set", "synthesis.images=4", "--set", "synthesis.held_out=2", "--set", "synthesis.batch=2"),
    *("--set", "synthesis.steps=2", "--set", "text.prompts=8", "--set", "text.held_out=4"),
]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from d4c_onnx.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _report(printed: dict[str, Any]) -> BenchmarkReport:
    """What a benchmark printed, as it was before."""
    towers = {}
    for tower, rows in printed["towers"].items():
        towers[tower] = [
            LatencyRow(
                row["name"],
                row["size_bytes"],
                Loading(**{entry.name: row[entry.name] for entry in dataclasses.fields(Loading)}),
                {size: BatchTiming(**found) for size, found in row["batches"].items()},
            )
            for row in rows
        ]
    return BenchmarkReport(MachineDescription(**printed["machine"]), printed["rounds"], towers)


def test_help_and_import_load_no_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; import d4c_onnx; from d4c_onnx.cli.main import group\n"
        "result = CliRunner().invoke(group, ['--help']); assert result.exit_code == 0, result.output\n"
        "result = CliRunner().invoke(group, ['quantize', '--help']); assert result.exit_code == 0, result.output\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'open_clip', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"serve"}))  # a server reports over HTTP
def test_every_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(group, [name, "--help"])
    assert result.exit_code == 0
    assert "--json" in result.output
    assert "--quiet" in result.output


@pytest.mark.slow
@pytest.mark.oldest
def test_quantize_json_is_one_object_with_the_promised_keys(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = _run("quantize", "--bits", "w4a8", "-o", str(own.parent), "--json", "--dataset", "fidelity", *TINY)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) >= {"model", "bits", "bundle", "weight_bits_average", "size_ratio", "top1", "seconds"}
    assert set(report["size_ratio"]) == {"image", "text", "total"}
    assert set(report["top1"]) == {"fp32", "quantized"}
    assert set(report["seconds"]) >= {"synthesize", "quantize", "evaluate"}
    bundle = open_bundle(Path(report["bundle"]))
    assert bundle.quantized
    assert bundle.manifest.quantization.accuracy.kind == "fidelity"
    assert bundle.manifest.io["image_encoder.onnx"].opset == 18
    assert bundle.manifest.quantization.minimum_onnxruntime == "1.20"
    assert str(own.parent) not in (bundle.path / "manifest.json").read_text()
    # a second width uses the same set and needs no torch
    code = (
        "import sys; sys.modules['torch'] = None; from click.testing import CliRunner\n"  # it cannot be imported
        "from d4c_onnx.cli.main import group\n"
        "result = CliRunner().invoke(group, sys.argv[1:]); assert result.exit_code == 0, result.output\n"
    )
    arguments = ["quantize", "--bits", "w8a8", "-o", str(own.parent), "--json", "--dataset", "fidelity", *TINY]
    again = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert len(list(own.glob("calibration-*"))) == 1
    # the result is in the way now
    third = _run("quantize", "--bits", "w8a8", "-o", str(own.parent), "--json", *TINY)
    assert third.returncode == 2
    assert "--overwrite" in json.loads(third.stdout)["error"]
    # evaluate measures both beside FP32
    sets = next(own.glob("calibration-*"))
    folders = [str(own), *(str(own / bits) for bits in ("w4a8", "w8a8"))]
    shown = _run("evaluate", *folders, "--dataset", "fidelity", "--calibration", str(sets), "--json")
    rows = json.loads(shown.stdout)["bundles"]
    # which of them is nearer on so few images is chance, but each answers as FP32 does, and as its manifest says
    assert all(row["versus_first"]["cosine_image"] > 0.999 for row in rows[1:])
    assert rows[1]["versus_first"]["cosine_image"] == pytest.approx(
        bundle.manifest.quantization.accuracy.bundles[-1].versus_first.cosine_image, abs=1e-6
    )
    # inspect counts the same bits from the files, and shows the signature
    inspected = json.loads(_run("inspect", folders[1], "--json").stdout)
    assert inspected["weight_bits_average"] == report["weight_bits_average"]
    assert inspected["minimum_onnxruntime"] == "1.20"
    # benchmark times both beside FP32, and the peers that onnxruntime's own tools make of it
    sizes, drawn = ("--batches", "1,2", "--rounds", "3"), own.parent / "speed.svg"
    timed = _run("benchmark", *folders, "--peers", *sizes, "--picture", str(drawn), "--provider", "cpu", "--json")
    assert timed.returncode == 0, timed.stderr
    raced = json.loads(timed.stdout)
    for rows in raced["towers"].values():
        names = [row["name"] for row in rows]
        assert names[:3] == ["mini-vit fp32", "mini-vit w4a8", "mini-vit w8a8"]
        assert len(names) + sum(entry["tower"] == "image" for entry in raced["failed"]) >= 6
        assert all(row["batches"]["1"]["median_ms"] > 0 for row in rows)
        assert rows[0]["batches"]["2"]["speed_up"] == 1
        assert rows[1]["size_bytes"] * 5 < rows[0]["size_bytes"]
    picture = drawn.read_text("utf-8")  # matplotlib draws letters as paths, and leaves the text in comments
    assert "<!-- times as fast as mini-vit fp32 -->" in picture
    assert "<!-- batch 2 -->" in picture
    for row in (row for rows in raced["towers"].values() for row in rows):
        row["batches"] = {int(size): found for size, found in row["batches"].items()}  # JSON's keys are strings
    benchmark.show_report(_report(raced), [1, 2])
    table = capsys.readouterr().out
    for expected in ("peak MB", "images per second", "texts per second", "/s", "mini-vit w4a8"):
        assert expected in " ".join(table.split())
    plain = _run("inspect", folders[1]).stdout
    assert "pixel_values float32 [batch, 3, 48, 48]" in plain
    assert "40 of 41 weighted products in int8, 6 attentions in one float kernel each" in plain


@pytest.mark.slow
def test_synthesize_exports_first_and_quantize_uses_both(tmp_path: Path) -> None:
    done = CliRunner().invoke(group, ["synthesize", "-o", str(tmp_path), "--quiet", "--json", *TINY])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["images"] == 4
    before = (tmp_path / "mini-vit" / "manifest.json").read_bytes()
    arguments = ("-o", str(tmp_path), "--bits", "w8a8", "--quiet", "--json", "--dataset", "fidelity", *TINY)
    report = json.loads(CliRunner().invoke(group, ["quantize", *arguments]).stdout)
    assert made["calibration"].endswith(report["calibration"])
    assert (tmp_path / "mini-vit" / "manifest.json").read_bytes() == before


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mini-vit").mkdir()
    (tmp_path / "mini-vit" / "mine.txt").write_text("x")
    done = _run("quantize", "-o", str(tmp_path), "--quiet", *TINY)
    assert done.returncode == 2
    assert "not a bundle" in done.stderr
    assert os.listdir(tmp_path / "mini-vit") == ["mine.txt"]


@pytest.mark.slow
def test_failed_check_is_exit_code_1(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("evaluation.min_cosine=1.0", "quantization.rounding=nearest")
    sets = [part for key in keys for part in ("--set", key)]
    arguments = ("-o", str(own.parent), "--dataset", "fidelity", *TINY, *sets)
    result = CliRunner().invoke(group, ["quantize", "--quiet", *arguments])
    assert result.exit_code == 1
    assert "min_cosine" in result.output
    assert "agreement" in result.output  # what was measured is shown all the same
    monkeypatch.setattr("sys.argv", ["d4c-onnx", "--json"])  # where errors find out how they are shown
    done = CliRunner().invoke(group, ["quantize", "--overwrite", "--json", *arguments])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["report"]["accuracy"]["kind"] == "fidelity"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "mini-wit"), "mini-vit"),
        (("quantize", "--bits", "w3a8"), "w4a8"),
        (("quantize", "--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("quantize", "--set", "synthesis.stepz=3"), "stepz"),
        (("quantize", "--dataset", "nowhere.parquet"), "nowhere.parquet"),
        (("quantize", "--prompts", "nowhere.txt"), "nowhere.txt"),
        (("quantize", "--calibration", "nowhere"), "nowhere"),
        (("export", "ViT-B-32"), "which weights"),
        (("export", "ViT-B-32", "--pretrained", "nowhere.safetensors"), "no such file"),
        (("evaluate", "nowhere"), "not a bundle"),
        (("inspect", "nowhere"), "not a bundle"),
        (("benchmark", "nowhere"), "not a bundle"),
        (("benchmark", "nowhere", "--batches", "1,x"), "--batches"),
        (("quantize", "--bits", "w8a8", "--average-bits", "5"), "average_bits"),
        (("quantize", "--set", "seed=2024-13-45"), "not valid YAML"),
        (("quantize", "--set", "synthesis.template=a {} {x}"), "exactly one"),
        (("quantize", "--dataset", "set #1.parquet"), "set #1.parquet"),
        (("quantize", "--dataset", "[a].parquet"), "[a].parquet"),
        (("quantize", "--dataset", "a" * 300 + ".parquet"), "too long"),
        (("inspect", "a" * 300), "too long"),
        (("evaluate", "nowhere", "--threads", "99999999999"), "--threads"),
        (("export", "--bad-option"), "--bad-option"),
        (("explode",), "explode"),
    ],
)
def test_bad_input_is_exit_code_2_without_traceback(
    tmp_path: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = (
        ()
        if arguments[0] in ("evaluate", "inspect", "benchmark", "explode") or "--bad-option" in arguments
        else ("-o", "out")
    )
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(group, [*arguments, *extra])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in result.output
    assert os.listdir(tmp_path) == []


def test_json_errors_are_objects(tmp_path: Path) -> None:
    done = _run("inspect", str(tmp_path), "--json")
    assert json.loads(done.stdout)["type"] == "BundleError"
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = _run("quantize", "--average-bits", "3", "--json")
    assert json.loads(done.stdout)["type"] == "BadParameter"
    assert done.returncode == 2


LONGER = [
    *(*TINY, "--set", "synthesis.images=8", "--set", "synthesis.steps=12"),  # four units, and one held out
    *("--quiet", "--json"),
]


def _files_of_the_set(printed: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in Path(json.loads(printed)["calibration"]).iterdir()}


# The command with a checkpoint after every fifth step, and a signal at one place of its work, however slow the machine:
# a checkpoint of unit N lies there, and the next file is about to be written. A suite that runs in the background of a
# script inherits an ignored SIGINT.
SIGNALLED = """
import os, signal, sys
from pathlib import Path
from d4c_onnx.cli import main
from d4c_onnx.synthesis import loop
loop.CHECKPOINT_STEPS = 5
number, model, checkpoint = int(sys.argv.pop(1)), Path(sys.argv.pop(1)), sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupt(event, arguments):
    global number
    if event == "open" and number and list(model.glob(checkpoint)):
        sent, number = number, 0
        os.kill(os.getpid(), sent)
sys.addaudithook(interrupt)
main()
"""


@pytest.mark.slow
def test_interrupted_runs_leave_no_half_result_and_end_with_the_same_files(own: Path, tmp_path: Path) -> None:
    """Ctrl-C, then a polite kill, then a rude one, each while another unit is under way."""
    shutil.copytree(own, tmp_path / "whole" / "mini-vit")
    whole = _run("synthesize", "-o", str(tmp_path / "whole"), *LONGER)
    assert whole.returncode == 0, whole.stderr
    for done, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), start=1):
        where = (str(int(number)), str(own), f".work-*/unit-{done:04}.pt")  # some units done, one begun
        command = [sys.executable, "-c", SIGNALLED, *where, "synthesize", "-o", str(own.parent), *LONGER]
        stopped = subprocess.run(command, capture_output=True, text=True, check=False)
        assert stopped.returncode == (-number if number == signal.SIGKILL else 1), stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert not list(own.glob("calibration-*"))
        # what was done is kept for the rerun
        assert len(list(own.glob(".work-*/unit-*.npz"))) == done
    rerun = _run("synthesize", "-o", str(own.parent), *LONGER)
    assert rerun.returncode == 0, rerun.stderr
    assert _files_of_the_set(rerun.stdout) == _files_of_the_set(whole.stdout)
    assert not list(own.glob(".work-*"))


def test_full_disk_is_exit_code_2_and_leaves_nothing(own: Path) -> None:
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from d4c_onnx.cli import main; main()\n"
    )
    made = ["--set", "synthesis.images=64", "--method", "noise"]
    arguments = ["synthesize", "-o", str(own.parent), "--quiet", *TINY, *made]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert not list(own.glob("calibration-*"))
    assert not list(own.glob(".stage-*"))


def test_models_lists_both_kinds() -> None:
    result = CliRunner().invoke(group, ["models", "ViT-B-32", "--json"])
    assert result.exit_code == 0, result.output
    listed = json.loads(result.stdout)
    assert "openai" in listed["open_clip"]["ViT-B-32"]
    result = CliRunner().invoke(group, ["models", "mini", "--json"])
    assert set(json.loads(result.stdout)["embedded"]) == {"mini-rn", "mini-vit"}


@pytest.mark.slow
def test_synthesize_report_shows_a_set_beside_others(tmp_path: Path) -> None:
    keys = ["--set", "synthesis.held_out=1", "--set", "synthesis.steps=2", "--set", "text.prompts=4"]
    common = ["synthesize", "mini-vit", "-o", str(tmp_path), "--images", "3", "--quiet", "--json", *keys]
    pink = json.loads(CliRunner().invoke(group, [*common, "--method", "pink"]).stdout)
    assert pink["report"] is None
    result = CliRunner().invoke(group, [*common, "--report", "--against", pink["calibration"]])
    assert result.exit_code == 0, result.output
    page = Path(json.loads(result.stdout)["report"]).read_text("utf-8")
    for expected in (Path(pink["calibration"]).name, "Gaussian noise", "a photo of a airplane.", "effective rank"):
        assert expected in page
    assert page.count("<figure>") == 3
    refused = CliRunner().invoke(group, [*common, "--against", pink["calibration"]])
    assert refused.exit_code == 2
    assert "--report" in refused.output


@pytest.mark.slow
def test_two_processes_make_the_files_of_one(own: Path, tmp_path: Path) -> None:
    """torch's own launcher: the work is shared, the set is that of a single process with as many threads."""
    call = ["-c", "from d4c_onnx.cli import main; main()", "synthesize", "--json", "--threads", "1", *TINY]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    sets = []
    for name, start in (("one", []), ("two", launcher)):
        shutil.copytree(own, tmp_path / name / "mini-vit")
        command = [*start, sys.executable, *call, "-o", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # one of the processes speaks
        sets.append(Path(json.loads(line)["calibration"]))
    one, two = ({file.name: file.read_bytes() for file in path.iterdir()} for path in sets)
    assert one == two
    assert not list(sets[1].parent.glob(".work-*"))


def test_a_narrow_terminal_shows_stage_rate_and_losses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with show.progress(quiet=False) as on_step:
        values = {"images": 16, "image steps/s": 412.5, "loss": 8.585, "scg": 5.294, "pgsi_whole": 3.241, "bns": 0.0367}
        on_step("synthesize", 16, 16, values)
        on_step("synthesize", 16, 16, {**values, "tv": 0.0921})  # said twice, it is still one stage
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.count("synthesize") == 1
    for expected in ("images 16", "image steps/s 412.5", "loss 8.585", "pgsi_whole 3.241", "bns 0.0367", "tv 0.0921"):
        assert expected in shown
