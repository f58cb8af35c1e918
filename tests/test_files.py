"""Atomic writing: an interrupted or failed run leaves nothing half-written."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d4c_onnx.errors import BundleError
from d4c_onnx.files import refuse_existing, sha256, staged_folder, write_json


def test_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with staged_folder(target) as stage:
        (stage / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"

    def broken() -> None:
        with staged_folder(target) as stage:
            (stage / "a").write_text("2")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["bundle"]


def test_replacing_swaps_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for name in ("old", "new"):
        with staged_folder(target) as stage:
            (stage / name).write_text(name)
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_stage_of_a_killed_run_is_cleared(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    code = (
        "import os, signal, sys; from pathlib import Path; from d4c_onnx.files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as stage:\n"
        "    (stage / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(os.listdir(tmp_path)) == 1  # the dead run's stage
    with staged_folder(target) as stage:
        (stage / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["bundle"]


def test_folder_lost_between_the_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".old-bundle").mkdir()
    (tmp_path / ".old-bundle" / "a").write_text("1")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "bundle"):
        raise RuntimeError
    assert (tmp_path / "bundle" / "a").read_text() == "1"


def test_full_disk_is_an_error_with_advice_and_leaves_nothing(tmp_path: Path) -> None:
    # A file-size limit makes the operating system refuse the write, as a full disk does.
    code = (
        "import resource, signal, sys; from pathlib import Path; from d4c_onnx.files import staged_folder\n"
        "from d4c_onnx.errors import BundleError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with staged_folder(Path(sys.argv[1])) as stage: (stage / 'big').write_bytes(b'x' * 100000)\n"
        "except BundleError as error: print(error); sys.exit(2)\n"
    )
    target = tmp_path / "bundle"
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stdout
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096


def test_existing_output_is_refused_before_work(tmp_path: Path) -> None:
    refuse_existing(tmp_path, overwrite=False)  # empty: fine
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="--overwrite"):
        refuse_existing(tmp_path, overwrite=False)
    refuse_existing(tmp_path, overwrite=True)
    with pytest.raises(BundleError, match="not a folder"):
        refuse_existing(tmp_path / "file", overwrite=True)
    with pytest.raises(BundleError, match="file is not a folder"):
        refuse_existing(tmp_path / "file" / "deeper" / "mini-vit", overwrite=True)


def test_read_only_output_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root
    with pytest.raises(BundleError, match="read-only"):
        refuse_existing(tmp_path / "deeper" / "mini-vit", overwrite=False)


def test_json_bytes_depend_on_the_value_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_json(tmp_path / name, {"x": [1, 2.5], "y": "ä"})
    assert sha256(tmp_path / "a") == sha256(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
