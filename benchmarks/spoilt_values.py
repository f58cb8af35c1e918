"""Changes of content: values of JSON, bytes, and the hashes that go with them."""

import copy
import json
import random
from pathlib import Path
from typing import Any

from d4c_onnx.files import sha256

DEEP = "@deep@"  # stands for brackets in brackets, which json cannot write
ODD: list[Any] = [
    *(None, True, 0, -1, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf"), 1e308, DEEP),
    *("", "x", "../..", "/etc/passwd", "[/x]", "\x1b", "\ud800", "é" * 5000, "{0.__class__}"),
    *([], {}, [[]], [None], {"": None}),
]


def dumped(content: Any) -> str:
    """As JSON, `DEEP` as the brackets that it stands for."""
    return json.dumps(content).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000)


def replace_value(content: Any, draw: random.Random) -> None:
    """One value of a JSON file's content is replaced, dropped or doubled, in place."""
    part = content
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            return
        key = draw.choice(keys)
        if isinstance(part[key], dict | list) and part[key] and draw.random() < 0.8:
            part = part[key]
            continue
        how = draw.random()
        if how < 0.2:
            del part[key]
        elif how < 0.3:
            part[key] = [part[key], part[key]]
        else:
            part[key] = copy.deepcopy(draw.choice(ODD))  # the next change may go into it
        return


def spoilt_bytes(before: bytes, draw: random.Random, head: int | None = None) -> bytes:
    """Bytes with a few changes, most of them in so many at the beginning."""
    content = bytearray(before)
    for _ in range(draw.randint(1, 8)):
        within = len(content) if head is None or draw.random() < 0.2 else min(head, len(content))
        at, how = draw.randrange(max(1, within)), draw.random()
        if how < 0.7 and at < len(content):
            content[at] ^= 1 << draw.randrange(8)
        elif how < 0.85:
            del content[at:]
        else:
            content[at:at] = content[:at][-1000:]
    return bytes(content)


def rehash(folder: Path) -> None:
    """Right hashes in a manifest, as far as it can be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        for name, record in manifest["files"].items():
            digest = sha256(folder / name)
            manifest["files"][name] = {**record, "sha256": digest} if isinstance(record, dict) else digest
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    (folder / "manifest.json").write_text(json.dumps(manifest))
