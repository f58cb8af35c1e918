"""Bundles: what is written is what is read, and damage is noticed."""

import json
from pathlib import Path

import pytest

from d4c_onnx.bundle import Bundle, encoder_size_bytes, is_bundle, open_bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.measure import inspect_bundle


def test_reads_back(vit_bundle: Bundle) -> None:
    again = open_bundle(vit_bundle.path)
    assert again == vit_bundle
    assert is_bundle(again.path)
    assert not again.quantized
    sizes = encoder_size_bytes(again)
    assert sizes["total"] == sizes["image"] + sizes["text"] == sum(f.stat().st_size for f in again.encoders.values())


def test_changed_file_is_noticed(own: Path) -> None:
    blob = bytearray((own / "text_encoder.onnx").read_bytes())
    blob[-100] ^= 1
    (own / "text_encoder.onnx").write_bytes(bytes(blob))
    with pytest.raises(BundleError, match=r"text_encoder\.onnx.*SHA-256"):
        open_bundle(own)


def test_missing_file_is_noticed(own: Path) -> None:
    (own / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"tokenizer\.json.*missing"):
        open_bundle(own)


@pytest.mark.parametrize(
    "entries",
    [
        {"session.optimized_model_external_initializers_file_name": "../../victim"},
        {"session.x64quantprecision": "0"},
        {"session.x64quantprecision": None},
        {"ep.context_file_path": "/tmp/x"},
        ["session.x64quantprecision"],
        "session.x64quantprecision",
    ],
)
def test_session_entries_that_we_do_not_write_are_refused(own: Path, entries: object) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps({**manifest, "session": {"config_entries": entries}}))
    with pytest.raises(BundleError, match="session"):
        open_bundle(own)


def test_a_bundle_writes_nothing_outside_itself(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would write initialisers of an optimised graph wherever a session entry says."""
    outside = own.parent / "victim"
    outside.write_text("precious")
    monkeypatch.chdir(own)
    manifest = json.loads((own / "manifest.json").read_text())
    for name in ("../victim", str(outside), "../../victim"):
        entries = {
            "session.optimized_model_external_initializers_file_name": name,
            "session.optimized_model_external_initializers_min_size_in_bytes": "0",
        }
        (own / "manifest.json").write_text(json.dumps({**manifest, "session": {"config_entries": entries}}))
        with pytest.raises(BundleError, match="may be harmful"):
            inspect_bundle(own)
    assert outside.read_text() == "precious"
    assert not (own.parent.parent / "victim").exists()


def test_a_bundle_without_an_encoder_is_a_damaged_bundle(own: Path) -> None:
    (own / "image_encoder.onnx").unlink()
    assert is_bundle(own)
    with pytest.raises(BundleError, match=r"image_encoder\.onnx: is missing"):
        open_bundle(own)


def test_a_plain_folder_is_no_bundle(tmp_path: Path) -> None:
    assert not is_bundle(tmp_path)
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(tmp_path)
