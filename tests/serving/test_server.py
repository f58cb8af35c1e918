"""A server of a toy bundle, in one process: what it answers, what it refuses, and that it stays up."""

import asyncio
import base64
import io
import json
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toys import Toy, bundle_of, changed

pytest.importorskip("fastapi", reason="the extra serve is not installed")
from starlette.testclient import TestClient

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.runtime import ClipSession
from d4c_onnx.serving.app import create_app
from d4c_onnx.serving.bodies import BoundedBodies
from d4c_onnx.serving.limits import Limits

LIMITS = Limits(body_bytes=200_000, bodies_bytes=300_000, images=4, texts=8, letters=50, arrive_seconds=5.0)


def encoded(color: tuple[int, int, int] = (200, 30, 30), kind: str = "PNG", size: tuple[int, int] = (20, 12)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb_in_a_comment() -> bytes:
    """A small picture whose comment unfolds to 100 MB."""
    content = b"Comment\0\0" + zlib.compress(bytes(100 * 2**20), 9)
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    picture = encoded()
    return picture[:33] + chunk + picture[33:]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("served")
    return bundle_of(folder / "w4a8", Toy()), bundle_of(folder / "fp32", changed(Toy(), bits="fp32"))


@pytest.fixture(scope="module")
def session(bundles: tuple[Bundle, Bundle]) -> ClipSession:
    return ClipSession(bundles[0], most_pixels=1_000_000)


@pytest.fixture(scope="module")
def client(session: ClipSession, bundles: tuple[Bundle, Bundle]) -> Iterator[TestClient]:
    app = create_app(session, ClipSession(bundles[1], most_pixels=1_000_000), LIMITS)
    with TestClient(app) as made:
        yield made


def test_images_come_in_three_forms(client: TestClient, session: ClipSession) -> None:
    pictures = [encoded(), encoded((10, 200, 90), "JPEG")]
    expected = session.embed_images(pictures)
    files = [("images", ("../../etc/passwd", picture, "text/plain")) for picture in pictures]
    words = [base64.b64encode(pictures[0]).decode(), f"data:image/jpeg;base64,{base64.b64encode(pictures[1]).decode()}"]
    several = [client.post("/embed/image", files=files), client.post("/embed/image", json={"images": words})]
    for answer in several:
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(answer.json()["image_embeds"], expected, atol=1e-6)
    alone = client.post("/embed/image", content=pictures[1], headers={"Content-Type": "image/jpeg"})
    np.testing.assert_allclose(alone.json()["image_embeds"], expected[1:], atol=1e-6)


def test_texts_of_any_length_are_embedded(client: TestClient, session: ClipSession) -> None:
    texts = ["a", "the thin thing", "/etc/passwd", ""]
    answer = client.post("/embed/text", json={"texts": texts})
    assert answer.status_code == 200, answer.text
    alone = np.concatenate([session.embed_texts(text) for text in texts])
    np.testing.assert_allclose(answer.json()["text_embeds"], alone, atol=1e-6)


def test_zero_shot_scores_stand_side_by_side(client: TestClient, session: ClipSession) -> None:
    picture, labels, templates = encoded(), ["cat", "thing", "ship"], ["a {}", "the {}"]
    words = {"images": [base64.b64encode(picture).decode()], "labels": labels, "templates": templates}
    form = client.post("/zero-shot", files={"images": picture}, data={"labels": labels, "templates": templates})
    for answer in (form, client.post("/zero-shot", json=words)):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["labels"] == labels
        assert [result["bundle"] for result in found["results"]] == ["w4a8", "fp32"]
        np.testing.assert_allclose(
            found["results"][0]["scores"], session.zero_shot(picture, labels, templates), atol=1e-6
        )
        assert all(result["image_milliseconds"] > 0 for result in found["results"])


def test_it_says_what_it_is(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "model": "toy", "bundles": ["w4a8", "fp32"]}
    described = client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/embed/image", "/embed/text", "/zero-shot", "/healthz", "/metrics"}
    takes = described["paths"]["/zero-shot"]["post"]["requestBody"]["content"]
    assert set(takes) == {"multipart/form-data", "application/json"}


def test_the_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "//" not in answer.text.replace("// ", "")  # no address in it
    assert "/* engine */" not in answer.text


def test_prometheus_reads_counts(client: TestClient) -> None:
    client.post("/embed/text", json={"texts": ["a", "b"]})
    client.get("/no/such/path")
    read = client.get("/metrics").text
    assert 'd4c_requests_total{path="/embed/text",status="200"}' in read
    assert 'd4c_requests_total{path="other",status="404"}' in read
    assert 'd4c_batch_items_bucket{bundle="w4a8",encoder="text",le="2.0"}' in read
    assert "/no/such" not in read


PICTURE = encoded()
CUT = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n' + PICTURE[:40]

FIELD = b'--x\r\nContent-Disposition: form-data; name="labels"\r\n\r\na\r\n--x--\r\n'


def body(content: bytes, kind: str) -> dict[str, Any]:
    return {"content": content, "headers": {"Content-Type": kind}}


def image(content: bytes) -> tuple[str, dict[str, Any]]:
    return "/embed/image", body(content, "image/png")


def form(content: bytes, kind: str) -> tuple[str, dict[str, Any]]:
    return "/embed/image", body(content, kind)


def images(*found: object) -> tuple[str, dict[str, Any]]:
    return "/embed/image", {"json": {"images": found}}


def texts(*found: object) -> tuple[str, dict[str, Any]]:
    return "/embed/text", {"json": {"texts": found}}


def raw(content: bytes) -> tuple[str, dict[str, Any]]:
    return "/embed/text", body(content, "application/json")


def question(**fields: object) -> tuple[str, dict[str, Any]]:
    return "/zero-shot", {"files": {"images": PICTURE}, "data": fields}


HOSTILE: dict[str, tuple[int, tuple[str, dict[str, Any]]]] = {
    "no image": (400, image(b"hello")),
    "an empty body": (400, image(b"")),
    "half an image": (400, image(PICTURE[:60])),
    "100 megapixels": (400, image(png_of(10_000, 10_000))),
    "milliards of pixels": (400, image(png_of(60_000, 60_000))),
    "a bomb in a comment": (400, image(bomb_in_a_comment())),
    "a program": (400, image(b"%!PS-Adobe-3.0 EPSF-3.0\n")),
    "a text as an image": (415, form(b"a", "text/plain")),
    "no type": (415, ("/embed/image", {"content": PICTURE})),
    "a long type": (415, form(PICTURE, "x" * 5000)),
    "an image as a text": (415, ("/embed/text", body(PICTURE, "image/png"))),
    "a long body": (413, image(bytes(LIMITS.body_bytes + 1))),
    "a path as an image": (422, images("../../etc/passwd")),
    "a path that is base64": (400, images("/etc/passwd/")),
    "a number as an image": (422, images(7)),
    "five images": (422, images(*["AAAA"] * 5)),
    "five files": (400, ("/embed/image", {"files": [("images", ("a", PICTURE, "image/png"))] * 5})),
    "no files": (422, ("/zero-shot", body(FIELD, "multipart/form-data; boundary=x"))),
    "a form cut off": (400, form(CUT, "multipart/form-data; boundary=x")),
    "a form without a boundary": (400, form(CUT + b"\r\n--x--", "multipart/form-data")),
    "another boundary": (400, form(CUT + b"\r\n--x--", "multipart/form-data; boundary=y")),
    "an unknown field": (422, question(label="a")),
    "no labels": (422, question()),
    "no place for a label": (422, question(labels="a", templates="b")),
    "nine prompts": (422, question(labels=["a", "b", "c"], templates=["{}", "a {}", "b {}"])),
    "a long label, twice": (422, question(labels=["a", "b" * 30], templates="{} or {}")),
    "10,000 letters": (422, texts("a" * 10_000)),
    "10,000 letters of a label": (422, question(labels=["a" * 10_000])),
    "nine texts": (422, texts(*["a"] * 9)),
    "no texts": (422, texts()),
    "another key": (422, ("/embed/text", {"json": {"texts": ["a"], "model": "x"}})),
    "half a letter": (400, raw(b'{"texts": ["\\ud800"]}')),
    "half of JSON": (400, raw(b'{"texts": ["a')),
    "deep JSON": (400, raw(b"[" * 90_000)),
    "no UTF-8": (400, raw(b'{"texts": ["\xff"]}')),
    "no such path": (404, ("/embed/../../etc/passwd", {"json": {}})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_requests_get_a_sentence_and_the_server_goes_on(name: str, client: TestClient) -> None:
    status, (path, request) = HOSTILE[name]
    answer = client.post(path, **request)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert 10 < len(answer.json()["error"]) < 500
    assert client.post("/embed/text", json={"texts": ["a"]}).status_code == 200


def test_bodies_that_do_not_say_how_long_they_are_are_cut_off(client: TestClient) -> None:
    answer = client.post("/embed/image", content=iter([bytes(150_000)] * 9), headers={"Content-Type": "image/png"})
    assert answer.status_code == 413


def test_a_body_is_held_once() -> None:
    """What is counted is what is there."""
    pieces, held = 8, []

    async def receive() -> dict[str, Any]:
        nonlocal pieces
        pieces -= 1
        return {"type": "http.request", "body": bytes(2**18), "more_body": pieces > 0}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        held.append((len(message["body"]), tracemalloc.get_traced_memory()[0]))

    bodies = BoundedBodies(application, Limits())
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        asyncio.run(bodies({"type": "http", "headers": []}, receive, application))
    finally:
        tracemalloc.stop()
    [(length, now)] = held
    assert length == 2**21
    assert now - before < 1.5 * length


def test_an_encoders_fault_is_told_and_the_server_goes_on(
    client: TestClient, session: ClipSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(texts: list[str], batch: int) -> np.ndarray:
        raise BundleError("an encoder answers with NaN or infinity.")

    with monkeypatch.context() as patch:
        patch.setattr(session, "embed_texts", broken)
        answer = client.post("/embed/text", json={"texts": ["a"]})
    assert answer.status_code == 500
    assert "log" in answer.json()["error"]
    assert "NaN" in caplog.text
    assert client.post("/embed/text", json={"texts": ["a"]}).status_code == 200


def test_requests_that_arrive_together_are_encoded_together(bundles: tuple[Bundle, Bundle]) -> None:
    session = ClipSession(bundles[0])
    sizes: list[int] = []
    gate = threading.Event()
    encode = session.embed_pixels

    def counted(batches: list[np.ndarray]) -> np.ndarray:
        sizes.append(len(batches[0]))
        assert gate.wait(30)
        return encode(batches)

    app = create_app(session)
    session.embed_pixels = counted  # type: ignore[method-assign, assignment]
    pictures = [encoded((20 * number, 50, 90)) for number in range(9)]
    found: dict[int, list[float]] = {}
    with TestClient(app) as client:

        def ask(number: int) -> None:
            answer = client.post("/embed/image", content=pictures[number], headers={"Content-Type": "image/png"})
            [found[number]] = answer.json()["image_embeds"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
        threads[0].start()
        _until(lambda: sizes == [1])
        for thread in threads[1:]:
            thread.start()
        _until(lambda: 'd4c_waiting_items{bundle="w4a8",encoder="image"} 8.0' in client.get("/metrics").text)
        gate.set()
        for thread in threads:
            thread.join(30)
    assert sizes == [1, 8]
    expected = ClipSession(bundles[0]).embed_images(pictures)
    np.testing.assert_allclose([found[number] for number in range(9)], expected, atol=1e-6)


def _until(happened) -> None:
    """Wait for it, half a minute at most."""
    never = threading.Event()
    for _ in range(3000):
        if happened():
            return
        never.wait(0.01)
    raise AssertionError("did not happen")


def test_a_full_queue_is_told(bundles: tuple[Bundle, Bundle]) -> None:
    with TestClient(create_app(ClipSession(bundles[0]), limits=replace(LIMITS, waiting=2))) as client:
        answer = client.post("/embed/text", json={"texts": ["a", "b", "c"]})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert client.post("/embed/text", json={"texts": ["a", "b"]}).status_code == 200


def test_what_is_no_original_is_refused(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    served, original = (ClipSession(bundle) for bundle in bundles)
    wide = ClipSession(bundle_of(tmp_path / "wide", changed(Toy(), bits="fp32", side=(16, 16))))
    for first, second, reason in (
        (served, served, "FP32"),
        (original, original, "FP32"),
        (served, wide, "pixels"),
    ):
        with pytest.raises(BundleError, match=reason):
            create_app(first, second)


def test_answers_are_valid_json_for_anybody(client: TestClient) -> None:
    answer = client.post("/embed/text", json={"texts": ["a"]})
    vector = json.loads(answer.content)["text_embeds"][0]
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
