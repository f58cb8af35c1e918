"""Killed at any write, rename or removal: a rerun ends with the same bytes, and nothing is left or lost."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="children are forked")
def test_every_write_of_a_run_may_be_its_last(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    killed = Counter(line.split()[0] for line in lines)
    assert killed.keys() == {"export", "synthesize", "quantize", "replace", "kept"}
    assert all(count >= 10 for count in killed.values()), killed  # the hook sees what happens
    assert [line for line in lines if len(line.split()) > 2] == []
