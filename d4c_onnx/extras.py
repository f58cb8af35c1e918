"""What `pip install d4c-onnx` leaves out, and what to say where it is needed."""

from importlib.util import find_spec

from d4c_onnx.errors import MissingExtra

_EXTRAS = {
    "export": ("torch", "open_clip", "torchvision", "safetensors"),
    "serve": ("fastapi", "prometheus_client", "python_multipart", "uvicorn"),
}


def need_extra(extra: str, what: str) -> None:
    """Refuse work whose packages were not installed.

    Args:
        extra: its name, such as `export`.
        what: needs it: the beginning of the message.

    Raises:
        MissingExtra: a package of it is not there; the message is the command that installs it.
    """
    missing = [package for package in _EXTRAS[extra] if find_spec(package) is None]
    if missing:
        raise MissingExtra(
            f"{what} needs {', '.join(missing)}, not installed here. Run: pip install 'd4c-onnx[{extra}]'"
        )
