"""Run by an account that may not read or write everything: it is told what it may not, before the work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
# a superuser is stopped by no permission unless these are given up
AS_ANYBODY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if ROOT else []
pytestmark = pytest.mark.skipif(
    os.name != "posix" or (ROOT and shutil.which("setpriv") is None), reason="nobody whom permissions stop"
)


def _told(what: str, place: Path) -> dict[str, list[str] | None]:
    script = Path(__file__).with_name("other_account.py")
    done = subprocess.run(
        [*AS_ANYBODY, sys.executable, str(script), what, str(place)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    told = _told("reads", tmp_path)
    assert told.pop("left") == ["", "images.npy images.npy.broken.jsonl images.npy.names.jsonl origin"]
    kinds = {
        "toy": "BundleError",
        "toy-set": "CalibrationError",
        "labelled.parquet": "DatasetError",
        "texts.txt": "DatasetError",
        "weights": "ModelError",
        "foreign": "ModelError",
        "recipe.yaml": "RecipeError",
        "nouns.txt": "RecipeError",
        "images": "listed",
    }
    for name, found in told.items():
        assert found is not None, name
        kind, message = found
        assert kind == kinds[name.split("/")[0]], (name, found)
        assert "this account may not read it" in message, name
        assert Path(name).name in message


def test_what_may_not_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    told = _told("writes", tmp_path)
    assert told.pop("left") == ["", "closed texts.txt theirs.npy toy"]
    assert (tmp_path / "theirs.npy").read_bytes() == b"theirs"
    assert len(told) == 4
    for name, found in told.items():
        assert found is not None, name
        assert found[0] == "BundleError", (name, found)
        assert ("may not be written" if "in the way" in name else "read-only here") in found[1]
        assert "--output" in found[1]


def test_another_accounts_lock_holds_while_its_run_lives(tmp_path: Path) -> None:
    told = _told("locks", tmp_path)
    assert told["alive"] is not None
    assert "another run is writing there (host" in told["alive"][1]
    assert told["killed"] is told["a pipe"] is None  # the file could be removed
    assert told["silent"] is not None  # whether its run lives cannot be asked
    assert ".lock-mini-vit belongs to a run of another account" in told["silent"][1]
