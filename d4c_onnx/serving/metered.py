"""Every request is counted and timed, and none ends without an answer."""

from __future__ import annotations

import logging
import time

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d4c_onnx.serving.meters import Meters

_LOG = logging.getLogger(__name__)


class Metered:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp, meters: Meters, paths: frozenset[str]) -> None:
        """Count.

        Args:
            paths: by which requests are counted; those of any other are one kind, or clients could invent thousands.
        """
        self._app, self._meters, self._paths = app, meters, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:  # a fault of ours, or an encoder's: the server goes on
            _LOG.exception("%s failed", path)
            if not status:
                failed = JSONResponse({"error": "The server failed at this request; its log says why."}, 500)
                await failed(scope, receive, noted)
        if status:  # else the client went away
            self._meters.answered(path, status, time.perf_counter() - begun)
