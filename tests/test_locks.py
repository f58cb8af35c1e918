"""One run at a time in a folder: who comes second is told who was first, and a killed run holds nothing."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d4c_onnx.errors import BundleError
from d4c_onnx.files import claimed, staged_folder

HOLDS = (
    "import sys; from pathlib import Path; from d4c_onnx.files import claimed\n"
    "with claimed(Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds `<tmp_path>/out/mini-vit`."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "out" / "mini-vit")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_second_run_is_refused_by_the_firsts_name(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    folder = tmp_path / "out" / "mini-vit"
    said = (
        rf"mini-vit: another run is writing there \(host {re.escape(socket.gethostname())}, process {other.pid}, since"
    )
    with pytest.raises(BundleError, match=said), claimed(folder):
        raise AssertionError
    with pytest.raises(BundleError, match="another run is writing there"), staged_folder(folder):
        raise AssertionError
    with claimed(folder.with_name("mini-rn")):  # another folder is nobody's business
        pass
    other.communicate()  # it ends
    with claimed(folder):
        pass
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_a_killed_run_holds_nothing(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    """Whatever its process id was: in a container the next run has the same."""
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert os.listdir(tmp_path / "out") == [".lock-mini-vit"]
    (tmp_path / "out" / ".lock-mini-vit").write_text(f'{{"process": "{os.getpid()}"}}')
    with claimed(tmp_path / "out" / "mini-vit"):
        pass
    assert not os.listdir(tmp_path / "out")


def test_what_another_run_says_is_not_trusted(tmp_path: Path, other: subprocess.Popen[bytes]) -> None:
    (tmp_path / "out" / ".lock-mini-vit").write_text(
        '{"host": "\\u001b[31m' + "x" * 3000 + '", "process": 1, "since": [], "command": {}}'
    )
    with pytest.raises(BundleError) as refused, claimed(tmp_path / "out" / "mini-vit"):
        raise AssertionError
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1000


def test_a_thread_may_hold_what_it_holds_and_another_may_not(tmp_path: Path) -> None:
    folder = tmp_path / "mini-vit"
    refused: list[BundleError] = []

    def claim() -> None:
        try:
            with claimed(folder):
                pass
        except BundleError as error:
            refused.append(error)

    with claimed(folder), claimed(folder), claimed(folder / "w4a8"):
        thread = threading.Thread(target=claim)
        thread.start()
        thread.join()
        assert os.listdir(tmp_path) == [".lock-mini-vit"]
    assert len(refused) == 1
    assert not os.listdir(tmp_path)


def test_a_refused_run_leaves_no_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path / "a" / "b" / "mini-vit"):
        raise RuntimeError
    assert not os.listdir(tmp_path)
