"""Bodies are read whole before anybody looks at them: bounded in size, in time, and all of them together."""

from __future__ import annotations

import asyncio
import io

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d4c_onnx.serving.limits import Limits
from d4c_onnx.serving.refused import Refused


class BoundedBodies:
    """ASGI middleware: the application behind it gets each body in one piece, or is not asked."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self._held = 0  # bytes of all bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = io.BytesIO()  # its value is its own buffer: a second copy would be held and not counted
        try:
            if await self._arrived(scope, receive, body):
                await self._app(scope, _replayed(body.getvalue(), receive), send)
        except Refused as error:
            await error.response()(scope, receive, send)
        finally:
            self._held -= body.tell()

    async def _arrived(self, scope: Scope, receive: Receive, body: io.BytesIO) -> bool:
        """Fill the body in time; False where the client went away."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length[:20]) > self._limits.body_bytes:  # it says so itself
            raise self._too_long()
        try:
            async with asyncio.timeout(self._limits.arrive_seconds):
                return await self._read(receive, body)
        except TimeoutError as error:
            raise Refused(408, "The request's body did not arrive in time.") from error

    async def _read(self, receive: Receive, body: io.BytesIO) -> bool:
        """Fill the body; False where the client went away."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            piece = message.get("body", b"")
            self._held += body.write(piece)
            if body.tell() > self._limits.body_bytes:
                raise self._too_long()
            if self._held > self._limits.bodies_bytes:
                raise Refused(503, "Too many large requests at once; try again in a moment.")
            if not message.get("more_body", False):
                return True

    def _too_long(self) -> Refused:
        return Refused(413, f"The request's body is longer than {self._limits.body_bytes:,} bytes.")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, in one piece; what comes after it is the client's going away."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
