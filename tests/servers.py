"""`d4c-onnx serve` in a thread of the tests' own process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import FastAPI

from d4c_onnx.serving.limits import Limits
from d4c_onnx.serving.listening import listen, server_of


@contextmanager
def served(app: FastAPI, limits: Limits) -> Iterator[tuple[str, int]]:
    """The address of a server of this app, which ends with the block."""
    listener = listen("127.0.0.1", 0)
    server = server_of(app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
