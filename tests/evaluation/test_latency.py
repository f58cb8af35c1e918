"""Latency: every contender is run, ratios are against the first, and a peer that fails is named, not hidden."""

from pathlib import Path

import numpy as np
import pytest

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.evaluation.latency import Contender, describe_machine, drawn_feeds, measure_latency
from d4c_onnx.evaluation.peers import build_peers, loads
from d4c_onnx.runtime.session import EncoderSession


def test_rows_hold_every_contender_and_batch(vit_bundle: Bundle) -> None:
    feeds = drawn_feeds(vit_bundle, [1, 3], 12)
    assert feeds["image"][3].shape == (3, 3, 48, 48)
    assert feeds["text"][3].shape == (3, 12)
    assert (feeds["text"][3][:, 0] == 49406).all()
    assert (feeds["text"][3].argmax(1) == 11).all()  # pooled at the end token, as a real prompt
    steps = []
    one, same = Contender("one", vit_bundle.encoders), Contender("same", {"text": vit_bundle.text_encoder})
    result = measure_latency(
        [one, same], feeds, rounds=5, threads=1, on_step=lambda stage, done, total, values: steps.append((done, total))
    )
    assert [row.name for row in result["image"]] == ["one"]
    assert [row.name for row in result["text"]] == ["one", "same"]
    assert steps[-1] == (20, 20)
    for row in result["text"]:
        for found in row.batches.values():
            assert 0 < found.low_ms <= found.median_ms <= found.high_ms
        assert row.size_bytes == vit_bundle.text_encoder.stat().st_size
        assert row.loading.loaded_bytes >= row.loading.held_bytes > 1e6
        assert row.loading.load_ms > 0
        assert row.loading.first_ms > 0
        assert row.loading.loaded_bytes < row.loading.peak_bytes < 500e6  # of its own process, not of this large one
    assert result["text"][0].batches[3].speed_up == 1


def test_every_round_has_an_order_of_its_own(vit_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no contender always finds the caches as the same other one left them."""
    ran: list[int] = []
    run = EncoderSession.run

    def noted(session: EncoderSession, batch: np.ndarray) -> np.ndarray:
        ran.append(id(session))
        return run(session, batch)

    monkeypatch.setattr(EncoderSession, "run", noted)
    racing = [Contender(name, {"text": vit_bundle.text_encoder}) for name in "abc"]
    feeds = {"text": drawn_feeds(vit_bundle, [1], 8)["text"]}
    measure_latency(racing, feeds, rounds=8, threads=1)
    rounds = [tuple(ran[start : start + 3]) for start in range(0, len(ran), 3)][-8:]
    assert all(len(set(order)) == 3 for order in rounds)
    assert len(set(rounds)) > 3


def test_nothing_of_the_current_folder_is_run(
    vit_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark may be started in a folder of downloaded things."""
    for name in ("numpy", "json", "onnxruntime", "d4c_onnx", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    feeds = {"text": drawn_feeds(vit_bundle, [1], 8)["text"]}
    measure_latency([Contender("one", vit_bundle.encoders)], feeds, rounds=1, threads=1)
    assert not (tmp_path / "executed").exists()


def test_a_broken_contender_is_an_error_of_ours(vit_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    broken = Contender("broken", {"text": tmp_path / "broken.onnx"})
    with pytest.raises(BundleError, match=r"broken\.onnx"):
        measure_latency([broken], {"text": {1: np.ones((1, 4), np.int64)}}, rounds=1)
    assert "broken.onnx" in loads(tmp_path / "broken.onnx")


@pytest.mark.slow
def test_peers_are_real_files_that_answer(vit_bundle: Bundle, tmp_path: Path) -> None:
    feed = drawn_feeds(vit_bundle, [2], 8)["image"][2]
    made = build_peers(vit_bundle.image_encoder, tmp_path, "pixel_values", feed)
    assert set(made) == {"quantize_dynamic int8", "quantize_static W8A8", "quantize_static QInt4", "MatMulNBits 4 bit"}
    expected = EncoderSession(vit_bundle.image_encoder).run(feed)
    for name, path in made.items():
        assert isinstance(path, Path), (name, path)
        assert loads(path) == ""
        assert path.stat().st_size < vit_bundle.image_encoder.stat().st_size / 2
        assert float((EncoderSession(path).run(feed) * expected).sum(1).min()) > 0.5


def test_the_machine_is_described() -> None:
    described = describe_machine("cpu", 2)
    assert described.threads == 2
    assert described.cpu
    assert f"{described.cpu}, 2 threads, cpu, onnxruntime" in described.title
    assert "onnxruntime's choice of threads" in describe_machine("cpu", 0).title
