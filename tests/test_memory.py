"""Freed memory goes back to the system where the C library can give it."""

import os
from pathlib import Path

import pytest

from d4c_onnx.memory import release_freed

STATM = Path("/proc/self/statm")


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists() or not release_freed(), reason="not glibc on Linux")
def test_what_lies_below_a_block_in_use_is_given_back() -> None:
    blocks = [bytes(4096) for _ in range(20_000)]
    top = blocks[-1]
    before = _resident()
    del blocks
    assert release_freed()
    assert _resident() < before - 40 * 2**20  # of 82 MB
    assert len(top) == 4096
