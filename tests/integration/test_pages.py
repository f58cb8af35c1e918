"""The page in a real browser: asked from `d4c-onnx serve`, and from `package --target web`, which needs only files.

    pytest -m integration tests/integration/test_pages.py

Screenshots are kept in `$D4C_SCREENSHOTS` where that names a folder.
"""

import functools
import http.server
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoders import material, quantized_bundle
from environments import chromium, environment
from PIL import Image

from d4c_onnx.bundle import Bundle
from d4c_onnx.packaging import package_bundle
from d4c_onnx.runtime import ClipSession

pytest.importorskip("fastapi", reason="the extra serve is not installed")
import servers

from d4c_onnx.serving.app import create_app
from d4c_onnx.serving.limits import Limits

pytestmark = pytest.mark.integration

LABELS = ["cat", "ship", "automobile"]


@pytest.fixture(scope="module")
def bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """A mini at w4a8, and its original."""
    source, calibration = material(request, "vit")
    folder = tmp_path_factory.mktemp("pages") / "w4a8"
    return quantized_bundle(source, calibration, folder, "rounding=nearest"), source


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A large picture, wide, and a small one, high."""
    folder = tmp_path_factory.mktemp("photos")
    for name, (height, width) in {"wide": (300, 450), "high": (61, 40)}.items():
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        bands = [np.sin(9 * x) ** 2, np.cos(7 * y) ** 2, (x - 0.5) ** 2 + (y - 0.4) ** 2 < 0.1]
        Image.fromarray((np.stack(bands, -1) * 255).astype(np.uint8)).save(folder / f"{name}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def browser() -> tuple[str, Path]:
    """Chromium, and the packages that drive it."""
    return chromium(), environment("page")


@pytest.fixture
def served(bundles: tuple[Bundle, Bundle]) -> Iterator[str]:
    """The address of `d4c-onnx serve`."""
    with servers.served(create_app(*map(ClipSession, bundles)), Limits()) as (host, port):
        yield f"http://{host}:{port}/"


@pytest.fixture
def packaged(bundles: tuple[Bundle, Bundle], browser: tuple[str, Path], tmp_path: Path) -> Iterator[str]:
    """The address of a server of files, with both bundles' packages side by side."""
    for bundle, name in zip(bundles, ("quantised", "original"), strict=True):
        package_bundle(bundle.path, "web", tmp_path / name)
        (tmp_path / name / "node_modules").symlink_to(browser[1] / "node_modules")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/quantised/?beside=../original"
        server.shutdown()
        thread.join(30)


def _driven(browser: tuple[str, Path], url: str, photos: list[Path], name: str, tmp_path: Path) -> dict[str, Any]:
    """What the page showed."""
    program, place = browser
    folder = Path(os.environ.get("D4C_SCREENSHOTS", tmp_path))
    screenshots = [str(folder / f"{name}-{width}.png") for width in ("wide", "narrow")]
    asked = {"url": url, "photos": list(map(str, photos)), "labels": LABELS, "screenshots": screenshots}
    command = ["node", Path(__file__).with_name("page.mjs"), place, program, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("engine", "percent"), [("served", 0.051), ("packaged", 0.5)])
def test_a_person_sees_both_bundles_scores(
    engine: str,
    percent: float,
    bundles: tuple[Bundle, Bundle],
    browser: tuple[str, Path],
    photos: list[Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    url = request.getfixturevalue(engine)
    found = _driven(browser, url, photos, engine, tmp_path)
    assert found["faults"] == []
    assert set(found["asked"]) - {"null"} == {url[: url.index("/", 8)]}  # null: pictures and the icon, from memory
    assert found["model"] == "mini-vit, w4a8 beside fp32"
    assert "picture" in found["without"]
    expected = [ClipSession(bundle).zero_shot(photos, LABELS) for bundle in bundles]
    for number, (shown, photo) in enumerate(zip(found["chosen"], photos, strict=True)):
        assert shown["name"] == photo.name
        assert shown["shown"]
        assert shown["head"] == ["Label", "w4a8", "fp32"]
        rows = {label: [float(cell.rstrip(" %")) for cell in cells] for label, *cells in shown["rows"]}
        assert list(rows) == [LABELS[index] for index in np.argsort(-expected[0][number])]
        for index, label in enumerate(LABELS):
            assert rows[label] == pytest.approx([100 * one[number][index] for one in expected], abs=percent)
    assert found["status"].count("ms for the pictures") == 2
    assert len(found["typed"][0]["rows"]) == len(LABELS) + 1
    assert [shown["name"] for shown in found["dropped"]] == ["<b>dropped</b>.png"]
    assert "image" in found["refused"] or "picture" in found["refused"]
    assert found["overflow"] <= 0
