"""Strategies that spoil what a stranger may have written: JSON of a known form, and bytes of a known file."""

import copy
from typing import Any

from hypothesis import strategies as st

DEEP: Any = 0
for _ in range(500):
    DEEP = [DEEP]

ODD = st.sampled_from(
    [
        *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
        *("", "x", "\ud800", "\x00", "\x1b[31m", "[/x]", "../..", "/etc/passwd", "é" * 5000, "{0.__class__}", "{}{}"),
        *([], {}, [[]], [None], {"": None}, {"x": [1]}, DEEP),
    ]
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, by its keys."""
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))[:4] if _is_list(value) else []
    return [above, *(place for key in keys for place in places(value[key], (*above, key)))]


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


@st.composite
def spoilt_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three parts replaced, dropped or doubled."""
    found = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(found)))
        if not place:
            continue
        part = found
        for key in place[:-1]:
            part = part[key]
        action = draw(st.sampled_from(("replace", "replace", "replace", "drop", "double")))
        if action == "replace":
            part[place[-1]] = copy.deepcopy(draw(ODD))
        elif action == "drop":
            del part[place[-1]]
        else:
            part[place[-1]] = [part[place[-1]], part[place[-1]]]
    return found


@st.composite
def spoilt_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut off, changed, doubled or filled up."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(found) - 1)))
        action = draw(st.sampled_from(("flip", "cut", "insert", "double")))
        if action == "flip" and found:
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "cut":
            del found[at:]
        elif action == "insert":
            found[at:at] = draw(st.binary(max_size=20))
        else:
            found[at:at] = found[:at][:1000]
    return bytes(found)
