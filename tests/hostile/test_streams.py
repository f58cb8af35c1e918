"""What the command writes where: streams that are closed, full or of few letters, and names that no terminal has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from d4c_onnx.cli.main import group
from d4c_onnx.cli.show import table
from d4c_onnx.untrusted_json import printable

COMMAND = [sys.executable, "-P", "-c", "from d4c_onnx.cli import main; main()"]


def _shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run `$D ...` with the shell's redirections."""
    words = " ".join(f"'{word}'" for word in COMMAND)
    return subprocess.run(
        ["sh", "-c", line.replace("$D", words)], capture_output=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full disk at hand")
def test_a_full_or_closed_stdout_is_no_traceback(tmp_path: Path) -> None:
    cases = {
        "$D recipe --json > /dev/full": 2,
        "$D inspect /nowhere --json > /dev/full": 2,
        "$D recipe seed >&-": 0,
        "$D recipe seed <&- >&- 2>&-": 0,
    }
    for line, code in cases.items():
        done = _shell(line)
        assert done.returncode == code, (line, done)
        assert b"Traceback" not in done.stderr, line
        assert b"Exception ignored" not in done.stderr, line


def test_letters_that_a_terminal_does_not_have(tmp_path: Path) -> None:
    name = b"caf\xe9-\xf0\x9f\x8e\x88"
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    done = _shell(f'$D inspect "{folder}" --json', LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert json.loads(done.stdout)["type"] == "BundleError"


def test_names_are_no_markup_and_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    table("[/x] \x1b[31m", ["[bold]a", "b"], [["[/x]", "[link=file:///]"], ["\x1b[2J", "\ud800"]])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[/x]", "[bold]a", "[link=file:///]"))
    assert "\x1b[2J" not in shown
    assert printable("a\nb\x1b\ud800é") == "a\nb\\x1b\\ud800é"


def test_errors_move_no_cursor() -> None:
    shown = CliRunner().invoke(group, ["inspect", "/nowhere/\x1b[2J"])
    assert shown.exit_code == 2
    assert "\x1b" not in shown.output


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--batches", value) for value in ("", "0", "-1", "1,,2", "1.5", "9" * 5000, "10000000000", "x" * 10**5)),
        *((option, value) for option in ("--sequence", "--rounds") for value in ("0", "-1", "9" * 30, "nan")),
    ],
    ids=lambda arguments: f"{arguments[0]}={arguments[1][:12]}",
)
def test_bad_arguments_of_benchmark_are_refused(arguments: tuple[str, str]) -> None:
    shown = CliRunner().invoke(group, ["benchmark", "/nowhere", *arguments])
    assert shown.exit_code == 2
    assert arguments[0] in shown.output
    assert isinstance(shown.exception, SystemExit)
