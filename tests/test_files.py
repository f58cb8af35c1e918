"""Atomic writing: an interrupted or failed run leaves nothing half-written."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d4c_onnx.errors import BundleError
from d4c_onnx.files import claimed, refuse_existing, sha256, staged_folder, temporary_folder, write_json


def test_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with staged_folder(target) as stage:
        _write(stage, "a", "1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"

    def broken() -> None:
        with staged_folder(target, overwrite=True) as stage:
            (stage / "a").write_text("2")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        broken()
    assert (target / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["bundle"]


def _write(folder: Path, name: str, text: str) -> None:
    """A folder as d4c-onnx writes them: its manifest names its files."""
    (folder / name).write_text(text)
    write_json(folder / "manifest.json", {"files": {name: "sha"}})


def test_replacing_swaps_the_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for name in ("old", "new"):
        with staged_folder(target, overwrite=True) as stage:
            _write(stage, name, name)
    assert sorted(os.listdir(target)) == ["manifest.json", "new"]
    assert os.listdir(tmp_path) == ["bundle"]


def test_finished_work_is_replaced_on_request_only(tmp_path: Path) -> None:
    target = tmp_path / "bundle"

    def finish_late() -> None:
        with staged_folder(target) as stage:
            _write(stage, "late", "2")
            target.mkdir()  # another program was faster
            _write(target, "early", "1")

    with pytest.raises(BundleError, match="--overwrite"):
        finish_late()
    assert sorted(os.listdir(target)) == ["early", "manifest.json"]
    with pytest.raises(BundleError, match="--overwrite"), staged_folder(target):
        raise AssertionError("no work is started that cannot end")
    assert os.listdir(tmp_path) == ["bundle"]


@pytest.mark.parametrize("name", ["notes.txt", "golden/mine.png", "photos/a.jpg", "w4a8/weights.bin", "link"])
def test_what_others_put_into_a_folder_is_never_removed(tmp_path: Path, name: str) -> None:
    target = tmp_path / "bundle"
    for folder in (target, target / "w4a8", target / "calibration-1"):
        (folder / "golden").mkdir(parents=True)
        (folder / "golden" / "image.png").write_text("x")
        write_json(folder / "manifest.json", {"files": {"golden/image.png": "sha"}})
    (target / "calibration-1.html").write_text("the set's page")
    refuse_existing(target, overwrite=True)
    (target / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (target / name).symlink_to(tmp_path)
    else:
        (target / name).write_text("the user's")
    shown = "photos" if name.startswith("photos") else name
    with pytest.raises(BundleError, match=f"holds '{shown}', which d4c-onnx did not write"):
        refuse_existing(target, overwrite=True)

    def replace() -> None:
        with staged_folder(target, overwrite=True):
            raise AssertionError("no work is started that cannot end")

    with pytest.raises(BundleError, match="did not write"):
        replace()
    assert (target / name).exists()


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
    assert len(os.listdir(tmp_path)) == 2  # the dead run's stage, and its lock
    with staged_folder(target) as stage:
        (stage / "whole").write_text("x")
    assert os.listdir(tmp_path) == ["bundle"]


def test_folder_lost_between_the_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".old-bundle").mkdir()
    _write(tmp_path / ".old-bundle", "a", "1")
    with pytest.raises(RuntimeError), staged_folder(tmp_path / "bundle", overwrite=True):
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
    with pytest.raises(BundleError, match="did not write"):
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


def test_leftovers_of_one_folder_are_not_anothers(tmp_path: Path) -> None:
    """mini-vit is the beginning of mini-vit-large, and of glob patterns nobody should think."""
    for name in (".stage-mini-vit-large-0123456789abcdef", ".stage-mini-vit-notes", ".old-mini-vit"):
        (tmp_path / name).mkdir()
    (tmp_path / ".stage-mini-vit-0123456789abcdef").symlink_to(tmp_path / ".old-mini-vit")  # planted
    (tmp_path / ".old-mini-vit" / "a").write_text("the user's own: no manifest names it")
    with claimed(tmp_path / "mini-vit"):
        pass
    assert sorted(os.listdir(tmp_path)) == [
        ".old-mini-vit",
        ".stage-mini-vit-large-0123456789abcdef",
        ".stage-mini-vit-notes",
    ]
    assert (tmp_path / ".old-mini-vit" / "a").exists()


def test_planted_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that others may write to a name could be guessed, and lead anywhere."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "0123456789abcdef")  # guessed
    (tmp_path / ".stage-a.json-0123456789abcdef").symlink_to(victim)
    (tmp_path / ".lock-bundle").symlink_to(victim)
    with pytest.raises(BundleError, match=r"a\.json: cannot be written"):
        write_json(tmp_path / "a.json", {})
    with pytest.raises(BundleError, match="bundle: cannot be written"), claimed(tmp_path / "bundle"):
        raise AssertionError
    assert victim.read_text() == "precious"


WRITES_TOO_MUCH = """
import resource, signal, sys
from pathlib import Path
from d4c_onnx.errors import BundleError
from d4c_onnx.files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
def save(file):  # as torch does
    try:
        file.write(b"x" * 2**20)
        file.flush()
    except OSError:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0") from None
try:
    write_file(Path(sys.argv[1]), save)
except BundleError as error:
    print(error)
    sys.exit(2)
"""


def test_a_full_disk_is_named_whatever_the_writer_makes_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITES_TOO_MUCH, str(tmp_path / "unit-0000.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "unit-0000.pt: no space left to write" in done.stdout
    assert "MB are needed" in done.stdout
    assert "what is finished is kept" in done.stdout
    assert os.listdir(tmp_path) == []


def test_a_full_place_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    named = rf"^{re.escape(str(tmp_path))}: "
    with pytest.raises(BundleError, match=named + r".* are needed there .*TMPDIR"), temporary_folder(10**18):
        raise AssertionError
    with pytest.raises(BundleError, match=named + r"no space left .*TMPDIR"), temporary_folder():
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="other"), temporary_folder():
        raise OSError(errno.EIO, "other")
    assert os.listdir(tmp_path) == []
