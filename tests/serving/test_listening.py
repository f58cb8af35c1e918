"""The server as a process: its command, slow clients beside others, and its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from toys import Toy, bundle_of

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from servers import served

from d4c_onnx import extras
from d4c_onnx.bundle import Bundle
from d4c_onnx.cli.main import group
from d4c_onnx.runtime import ClipSession
from d4c_onnx.serving.app import create_app
from d4c_onnx.serving.limits import Limits


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(tmp_path_factory.mktemp("listening") / "toy", Toy())


@pytest.fixture
def address(toy: Bundle) -> Iterator[tuple[str, int]]:
    """Of a server that gives its clients a third of a second."""
    limits = Limits(arrive_seconds=0.3, idle_seconds=0.3)
    with served(create_app(ClipSession(toy), limits=limits), limits) as address:
        yield address


def _healthy(address: tuple[str, int]) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{address[1]}/healthz", timeout=20) as answer:
        return bool(json.load(answer)["status"] == "ok")


SLOW = {
    "says nothing": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\nHost: a\r\n",
    "half a body": b"POST /embed/text HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{",
    "a second request": b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nGET /heal",
    "no HTTP": b"\x16\x03\x01 hello\r\n\r\n",
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_keep_nobody_waiting_and_are_let_go(name: str, address: tuple[str, int]) -> None:
    slow = [socket.create_connection(address, timeout=20) for _ in range(20)]
    for connection in slow:
        connection.sendall(SLOW[name])
    assert _healthy(address)
    for connection in slow:
        while connection.recv(4096):  # until the server closes
            pass
        connection.close()
    assert _healthy(address)


def test_half_of_a_later_request_is_let_go(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20) as slow:
        slow.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        slow.sendall(b"GET /heal")
        while slow.recv(4096):
            pass
    assert _healthy(address)


def test_a_body_that_does_not_come_is_told(address: tuple[str, int]) -> None:
    with socket.create_connection(address, timeout=20) as slow:
        slow.sendall(SLOW["half a body"])
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_the_command_serves_and_ends(toy: Bundle) -> None:
    command = [sys.executable, "-c", "from d4c_onnx.cli import main; main()", "serve", str(toy.path), "--port", "0"]
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=unbuffered) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert found is not None
            assert _healthy(("127.0.0.1", int(found[1])))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_without_the_extra_it_is_named(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    done = CliRunner().invoke(group, ["serve", str(toy.path)])
    assert done.exit_code == 2
    assert "pip install 'd4c-onnx[serve]'" in done.output


def test_a_port_that_is_taken_is_named(toy: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = CliRunner().invoke(group, ["serve", str(toy.path), "--port", str(taken.getsockname()[1])])
    assert done.exit_code == 2
    assert "in use" in done.output


def test_a_host_of_nobody_is_told(toy: Bundle, tmp_path: Path) -> None:
    done = CliRunner().invoke(group, ["serve", str(toy.path), "--host", "no.such.host.invalid"])
    assert done.exit_code == 2
    assert "error" in done.output
