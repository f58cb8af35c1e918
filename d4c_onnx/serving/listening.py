"""The socket: uvicorn, and a clock for clients who do not say what they want."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from d4c_onnx.serving.limits import Limits


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        port: 0: any that is free.

    Raises:
        OSError: the address is taken, or none of this machine's.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=1024)


def serve_forever(app: FastAPI, listener: socket.socket, limits: Limits) -> None:
    """Answer until the process is told to end; requests that are under way get their answers first."""
    with contextlib.suppress(KeyboardInterrupt), listener:  # uvicorn raises the signal again when all is done
        server_of(app, limits).run(sockets=[listener])


def server_of(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """uvicorn, with our limits."""
    config = uvicorn.Config(
        app,
        http=_timed(limits.arrive_seconds),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=limits.idle_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=10,
    )
    return uvicorn.Server(config)


def _timed(seconds: float) -> type[H11Protocol]:
    """HTTP/1.1 as uvicorn speaks it, for which a request's head must be here in so many seconds.

    uvicorn itself waits for ever: connections that send a letter a minute would keep all others out.
    """

    class Timed(H11Protocol):
        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wind()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop()
            elif self._clock is None:  # the beginning of a further request
                self._wind()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _wind(self) -> None:
            self._clock = self.loop.call_later(seconds, self.transport.close)

        def _stop(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

    return Timed
