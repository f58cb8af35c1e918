"""Embedding of folders, tars and texts: what is broken is listed, interrupted work goes on, names are kept."""

import io
import json
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from d4c_onnx.bundle import Bundle
from d4c_onnx.cli.main import group
from d4c_onnx.embedding import embed_source, vectors
from d4c_onnx.errors import BundleError, D4CError, DatasetError
from d4c_onnx.runtime import ClipSession


def _png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images in two folders, one of them cut off, one that is none, and a file of another kind."""
    made = tmp_path / "photos"
    (made / "b").mkdir(parents=True)
    for number in range(7):
        (made / ("b" if number % 2 else ".") / f"{number}.png").write_bytes(_png(number))
    (made / "3-cut.png").write_bytes(_png(3)[:400])
    (made / "none.jpg").write_text("no image")
    (made / "notes.txt").write_text("not asked for")
    return made


def _lines(path: Path) -> list[object]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_folder_becomes_vectors_with_names(vit_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    report = embed_source(vit_bundle.path, folder, output, batch=3)
    names = _lines(tmp_path / "out.npy.names.jsonl")
    assert names == ["0.png", "2.png", "4.png", "6.png", "b/1.png", "b/3.png", "b/5.png"]
    vectors = np.load(output)
    assert vectors.dtype == np.float32
    assert (report.vectors, report.width, report.broken, report.resumed) == (7, vectors.shape[1], 2, 0)
    expected = ClipSession(vit_bundle).embed_images(folder / str(name) for name in names)
    assert np.abs(vectors - expected).max() < 1e-5
    broken = [entry["name"] for entry in _lines(tmp_path / "out.npy.broken.jsonl")]  # type: ignore[index]
    assert broken == ["3-cut.png", "none.jpg"]
    assert not list(tmp_path.glob("*.parts"))
    with pytest.raises(BundleError, match="--overwrite"):
        embed_source(vit_bundle.path, folder, output)


@pytest.mark.parametrize("name", ["photos.tar", "photos.tar.gz"])
def test_a_tar_gives_what_its_folder_gives(vit_bundle: Bundle, folder: Path, tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as tar:
        tar.add(folder, "photos")
    report = embed_source(vit_bundle.path, tmp_path / name, tmp_path / "out.parquet")
    assert (report.vectors, report.broken) == (7, 2)
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    expected = ClipSession(vit_bundle).embed_images(folder.parent / name for name in table["name"])
    assert np.abs(np.array(table["embedding"]) - expected).max() < 1e-5


def test_lines_of_a_file_are_texts(vit_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_bytes("\ufeffa cat\r\nzwei Hünde\n".encode() + b"\xff\xfe\n" + b"\nlast")
    report = embed_source(vit_bundle.path, tmp_path / "texts.txt", tmp_path / "out.npy")
    names = _lines(tmp_path / "out.npy.names.jsonl")
    assert names == ["a cat", "zwei Hünde", "", "last"]
    assert report.first_broken[0][0] == "line 3"
    assert np.abs(np.load(tmp_path / "out.npy") - ClipSession(vit_bundle).embed_texts(map(str, names))).max() < 1e-5


def test_an_interrupted_run_goes_on(
    vit_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "PART_ITEMS", 2)
    whole, output = tmp_path / "whole.npy", tmp_path / "out.npy"
    embed_source(vit_bundle.path, folder, whole)
    _interrupted(vit_bundle, folder, output, monkeypatch)
    assert not output.exists()
    report = embed_source(vit_bundle.path, folder, output)
    assert report.resumed == 4
    assert output.read_bytes() == whole.read_bytes()
    assert (tmp_path / "out.npy.names.jsonl").read_bytes() == (tmp_path / "whole.npy.names.jsonl").read_bytes()
    assert (report.vectors, report.broken) == (7, 2)


def _interrupted(bundle: Bundle, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of parts that a run left which was stopped after four of nine items."""
    monkeypatch.setattr(vectors, "PART_ITEMS", 2)
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_source(bundle.path, source, output, on_step=stop)
    return output.with_name(f"{output.name}.parts")


@pytest.mark.parametrize(
    ("file", "content", "resumed"),
    [
        ("00001.json", b"{", 2),
        ("00001.json", b'{"names": ["a", 7], "broken": []}', 2),
        ("00001.json", b'{"names": ["a", "b", "c"], "broken": []}', 2),
        ("00000.npy", b"\x93NUMPY", 0),
        ("ask.json", b"[" * 100_000, 0),
    ],
)
def test_parts_that_are_not_whole_are_embedded_again(
    file: str,
    content: bytes,
    resumed: int,
    vit_bundle: Bundle,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = _interrupted(vit_bundle, folder, tmp_path / "out.npy", monkeypatch)
    (parts / file).write_bytes(content)
    report = embed_source(vit_bundle.path, folder, tmp_path / "out.npy")
    assert (report.vectors, report.broken, report.resumed) == (7, 2, resumed)
    assert len(np.load(tmp_path / "out.npy")) == len(_lines(tmp_path / "out.npy.names.jsonl")) == 7


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes that have names")
def test_pipes_and_devices_are_listed_and_not_waited_for(vit_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    report = embed_source(vit_bundle.path, folder, tmp_path / "out.npy")
    assert (report.vectors, report.broken) == (7, 4)
    told = {entry["name"]: entry["reason"] for entry in _lines(tmp_path / "out.npy.broken.jsonl")}  # type: ignore[index]
    assert all("a pipe or a device" in told[name] for name in ("pipe.png", "device.png"))


def test_parts_of_a_finished_output_are_cleared_and_others_kept(
    vit_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.npy"
    parts = _interrupted(vit_bundle, folder, output, monkeypatch)
    newest = max(entry.stat().st_mtime_ns for entry in parts.iterdir())
    output.write_bytes(b"finished")
    for made, kept in ((newest - 1, True), (newest, False)):  # an old output that was to be replaced, and the new one
        os.utime(output, ns=(made, made))
        with pytest.raises(BundleError, match="already exists"):
            embed_source(vit_bundle.path, folder, output)
        assert parts.exists() == kept
    assert output.read_bytes() == b"finished"


def test_two_runs_do_not_share_parts(
    vit_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, refused = tmp_path / "out.npy", []

    def beside() -> None:
        try:
            embed_source(vit_bundle.path, folder, output)
        except BundleError as error:
            refused.append(str(error))

    def meanwhile(*_: object) -> None:
        if not refused:
            other = threading.Thread(target=beside)
            other.start()
            other.join()

    embed_source(vit_bundle.path, folder, output, on_step=meanwhile)
    assert "another run is writing there" in refused[0]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("photos", "out.npy", "out.npy.names.jsonl", "out.npy.broken.jsonl")
    }


def test_what_a_killed_run_left_is_cleared_and_nothing_else(
    vit_bundle: Bundle, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.npy"
    parts = _interrupted(vit_bundle, folder, output, monkeypatch)
    half = f"-{'0123456789abcdef'}"
    left = [
        parts / f".stage-00002.npy{half}",
        *(tmp_path / f".stage-out.npy{end}{half}" for end in ("", ".names.jsonl")),
    ]
    others = tmp_path / f".stage-other.npy{half}"
    for path in (*left, others):
        path.write_bytes(b"half")
    (parts / "mine.txt").write_text("precious")
    for _ in range(2):  # those of this ask, and of another
        with pytest.raises(BundleError, match=r"holds 'mine\.txt', which d4c-onnx did not write"):
            embed_source(vit_bundle.path, folder, output)
        assert (parts / "mine.txt").read_text() == "precious"
        (parts / "ask.json").write_text("{}")
    (parts / "mine.txt").unlink()
    assert embed_source(vit_bundle.path, folder, output).resumed == 0
    assert not any(path.exists() for path in (*left, parts))
    assert others.exists()


@pytest.mark.parametrize("name", ["out.npy", "out.npy.names.jsonl", "out.npy.broken.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_refused_first(name: str, folder: Path, tmp_path: Path) -> None:
    """Before the bundle is hashed, which takes its time: there is none here."""
    (tmp_path / name).mkdir()
    with pytest.raises(BundleError, match="is a folder"):
        embed_source(tmp_path / "no bundle", folder, tmp_path / "out.npy", overwrite=True)
    with pytest.raises(DatasetError, match="no such"):
        embed_source(tmp_path / "no bundle", tmp_path / "nothing", tmp_path / "other.npy")


def test_what_cannot_be_embedded_is_refused(vit_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "odd.tar").write_text("no tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    for source, output, match in (
        ("photos", "out.csv", r"\.npy or \.parquet"),
        ("nothing", "out.npy", "no such"),
        ("empty", "out.npy", "no image"),
        ("odd.tar", "out.npy", "no tar"),
        ("broken", "out.npy", "nothing in it"),
    ):
        with pytest.raises(D4CError, match=match):
            embed_source(vit_bundle.path, tmp_path / source, tmp_path / output)
    assert not (tmp_path / "out.npy").exists()


def test_the_command_says_what_it_left_out(vit_bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        group, ["embed", str(vit_bundle.path), str(folder), "-o", str(tmp_path / "out.npy"), "--quiet", "--json"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert (report["vectors"], report["broken"]) == (7, 2)


def test_decompression_bombs_are_refused_by_name(vit_bundle: Bundle) -> None:
    session = ClipSession(vit_bundle, most_pixels=1000)
    with pytest.raises(DatasetError, match=r"image 0: an image of 40 x 30 pixels, more than the 1,000"):
        session.embed_images([_png(0)])
    with pytest.raises(DatasetError, match="float64"):
        session.embed_images([np.zeros((4, 4, 3))])
