"""The tensors of a TorchScript archive, such as OpenAI's, read without running any of it.

An archive is a zip of code, of `data.pkl`, which says what the module's attributes are, and of the bytes of each
storage. torch reads it by compiling the code. Here `data.pkl` is walked operation by operation as data: a class that it
names is a word, an object that it makes is a dictionary of its attributes, a call is remembered and not made. Only what
would be a tensor is looked at; the code is never opened.
"""

import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from d4c_onnx.errors import ModelError
from d4c_onnx.untrusted_json import quoted

_PICKLE, _CONSTANTS = "data.pkl", "constants.pkl"
_LARGEST_PICKLE = 64 * 2**20  # OpenAI's largest has a hundredth of it
_DEEPEST = 32
_KINDS = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch BoolStorage": torch.bool,
}
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_REBUILD = "torch._utils _rebuild_tensor_v2"


@dataclass(slots=True)
class _Global:
    """A name that would be imported."""

    name: str


@dataclass(slots=True)
class _Call:
    """What would be called, and with what."""

    function: Any
    arguments: Any


@dataclass(slots=True)
class _Stored:
    """What lies outside the pickle: a storage."""

    key: Any


@dataclass(slots=True)
class _Object:
    """An object and its state."""

    state: Any = None


def is_torchscript(file: Path) -> bool:
    """Whether a file is such an archive; what torch.save writes is a zip, too, but holds no constants."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    return any(name.endswith(f"/{_CONSTANTS}") for name in names)


def read_torchscript(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a module of the archive holds, by the path of its attributes.

    Raises:
        ModelError: the archive is damaged, in a form that is not known, or without tensors of its own (frozen).
    """
    try:
        with zipfile.ZipFile(file) as archive:
            root = next(name for name in archive.namelist() if name.endswith(f"/{_PICKLE}")).removesuffix(_PICKLE)
            if archive.getinfo(f"{root}{_PICKLE}").file_size > _LARGEST_PICKLE:
                raise ValueError(f"{_PICKLE} is too large")
            found = dict(_tensors(_walk(archive.read(f"{root}{_PICKLE}"))))
            state = {name: _tensor(archive, root, call) for name, call in found.items()}
    except Exception as error:  # whatever a file can make of zipfile, pickletools and torch
        raise ModelError(
            f"{file}: is a TorchScript archive that cannot be read ({quoted(str(error))}). {WAY_OUT}"
        ) from error
    if not state:
        raise ModelError(f"{file}: is a TorchScript archive without tensors of its own (a frozen one). {WAY_OUT}")
    return state


WAY_OUT = (
    "If it is OpenAI's, take the tag: --pretrained openai. Else, where you trust it, convert it once: "
    "m = torch.jit.load(FILE, map_location='cpu'); torch.save(dict(m.state_dict()), 'weights.pt'); and pass weights.pt."
)


def _walk(pickled: bytes) -> Any:
    """What a pickle describes, with nothing called or imported.

    Raises:
        ValueError: an operation that torch does not write.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        taken = stack[start:]
        del stack[start:]
        return taken

    for operation, argument, _ in pickletools.genops(pickled):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "GLOBAL":
                stack.append(_Global(str(argument)))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(_CONSTANT[operation.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE":
                stack.append(since_mark())
            case "APPENDS":
                added = since_mark()
                stack[-1].extend(added)
            case "SETITEMS":
                pairs = since_mark()
                stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                stack.append(_Stored(stack.pop()))
            case "NEWOBJ":
                stack[-2:] = [_Object()]
            case "REDUCE":
                stack[-2:] = [_Call(*stack[-2:])]
            case "BUILD":
                built = stack.pop()
                stack[-1].state = built
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"an operation that torch does not write: {other}")
    raise ValueError("no end")


def _tensors(top: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, _Call]]:
    """What would be tensors, by path."""
    if depth > _DEEPEST:
        raise ValueError("modules nested too deeply")
    for name, value in top.state.items() if isinstance(top, _Object) and isinstance(top.state, Mapping) else ():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, _Call) and isinstance(value.function, _Global) and value.function.name == _REBUILD:
            yield here, value
        elif isinstance(value, _Object):
            yield from _tensors(value, here, depth + 1)


def _tensor(archive: zipfile.ZipFile, root: str, call: _Call) -> torch.Tensor:
    """A tensor from the bytes of its storage; torch checks that its strides stay within them."""
    stored, offset, size, stride = call.arguments[:4]
    word, kind, key, _, _ = stored.key
    entry = archive.getinfo(f"{root}data/{key}")
    if word != "storage" or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"a storage of another form: {key}")
    if math.prod(size) * _KINDS[kind.name].itemsize > entry.file_size:
        raise ValueError(f"a tensor larger than its storage: {key}")
    storage = torch.frombuffer(bytearray(archive.read(entry)), dtype=_KINDS[kind.name])
    return storage.as_strided(size, stride, offset).clone()
