"""A serving stack as a value: what it is, how a bundle is written for it, how it is pointed to the folder."""

from collections.abc import Callable
from dataclasses import dataclass

from d4c_onnx.packaging.job import Job


@dataclass(frozen=True, slots=True)
class Stack:
    """A target of `d4c-onnx package`.

    Attributes:
        name: on the command line.
        write: fills a package; raises BundleError with the reason where the stack cannot serve the bundle.
        use: what to do with the folder, in a sentence.
    """

    name: str
    write: Callable[[Job], None]
    use: str
