"""Manifests: what is written is read back, and nothing that a stranger could write gets past the door."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.manifest import (
    EXACT_PRODUCTS,
    FORMAT,
    EncoderRecord,
    LayerRecord,
    Manifest,
    ModelInfo,
    OptimizerRecord,
    Preprocess,
    Quantization,
    Refusal,
    Resampled,
    RewriteRecord,
    Session,
    Signature,
    TensorInfo,
    TokenizerInfo,
)
from d4c_onnx.manifest_file import read_manifest, write_manifest
from d4c_onnx.results import Accuracy, BundleAccuracy, PairedDifference, Versus
from d4c_onnx.runtime.golden import read_golden

FILES = ("image_encoder.onnx", "text_encoder.onnx")
RECORD = EncoderRecord(
    layers={"/blocks.0/fc/MatMul": LayerRecord("MatMul", 4, 4096)},
    token_table_bits=4,
    quantized_activations=12,
    smoothing_alpha={"node_mul": 0.5},
    start_token_pinned=True,
    minimum_onnxruntime="1.23",
    rewrites=(
        RewriteRecord("fused_attention", 3),
        RewriteRecord("pooled_row_only", 0, (Refusal("node_Gather_7", "the pooled row is not the last block's"),)),
    ),
)
VERSUS = Versus(99.0, 0.99, 0.98, 0.01, PairedDifference(-0.5, -1.0, 0.0))
FP32 = Manifest(
    model=ModelInfo("tiny", "random", "0" * 64, False, 14.3, None, True, 77, 49407, None),
    preprocess=Preprocess((48, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    tokenizer=TokenizerInfo("clip-bpe", 77, "the client's", 49406, 49407, 0, causal=True, dynamic_sequence=True),
    io={
        name: Signature((given,), (TensorInfo("embeds", "float32", ("batch", 8)),), 18)
        for name, given in zip(
            FILES,
            (
                TensorInfo("pixel_values", "float32", ("batch", 3, 48, 32)),
                TensorInfo("input_ids", "int64", ("batch", "sequence")),
            ),
            strict=True,
        )
    },
    seed=0,
    parity_max_abs_difference={"image": 1e-7, "text": 2e-7},
)
QUANTIZED = replace(
    FP32,
    parity_max_abs_difference=None,
    quantization=Quantization(
        bits="w4a8",
        target="cpu",
        target_note="fast",
        recipe={"seed": 0, "synthesis": {"method": "noise", "box_area": [0.4, 0.7]}},
        minimum_onnxruntime="1.23",
        accuracy_mode_only=False,
        source_files=dict.fromkeys(FILES, "a" * 64),
        session=Session(config_entries=EXACT_PRODUCTS),
        optimizer_effect=dict.fromkeys(FILES, OptimizerRecord(0.1, 0.2, 0.3, 1.0, 1.1)),
        weight_bits_average=4.25,
        encoders=dict.fromkeys(FILES, RECORD),
        calibration="11a60481b5ab",
        calibration_seed=3,
    ),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of a bundle; what is in them does not matter here."""
    made = tmp_path / "bundle"
    (made / "golden").mkdir(parents=True)
    for name in (*FILES, "tokenizer.json", "golden/golden.json", "golden/image.png"):
        (made / name).write_text(f"content of {name}")
    (made / "w8a8").mkdir()  # another width's bundle is not this one's
    (made / "w8a8" / "image_encoder.onnx").write_text("other")
    return made


def _change(folder: Path, place: str, value: object, manifest: Manifest = QUANTIZED) -> None:
    """Write a manifest, then put another value at a place such as `model.name` of its JSON."""
    write_manifest(folder, manifest)
    content = json.loads((folder / "manifest.json").read_text())
    part = content
    *above, last = place.split("/")
    for key in above:
        part = part[int(key) if isinstance(part, list) else key]
    part[last] = value
    (folder / "manifest.json").write_text(json.dumps(content))


CLEANED = replace(FP32, tokenizer=replace(FP32.tokenizer, clean="canonicalize", zeroed_id=102, last_id=101))


def test_who_said_what_is_kept_and_may_be_missing(folder: Path) -> None:
    told = replace(FP32.model, sources={"mean": "--mean"}, resampled=(Resampled("positional_embedding", 248, 77),))
    written = write_manifest(folder, replace(FP32, model=told))
    assert read_manifest(folder).model == told
    content = json.loads((folder / "manifest.json").read_text())
    del content["model"]["sources"], content["model"]["resampled"]  # as before they were recorded
    (folder / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(folder) == replace(written, model=FP32.model)


@pytest.mark.parametrize("manifest", [FP32, QUANTIZED, CLEANED], ids=["fp32", "quantized", "cleaned"])
def test_what_is_written_is_read_back(folder: Path, manifest: Manifest) -> None:
    written = write_manifest(folder, manifest)
    assert read_manifest(folder) == written
    assert replace(written, files={}, versions={}) == manifest
    assert sorted(written.files) == sorted(
        ["golden/golden.json", "golden/image.png", *FILES, "tokenizer.json"]
    )  # and nothing of other widths
    assert "onnxruntime" in written.versions
    assert open_bundle(folder) == Bundle(folder, written)
    before = (folder / "manifest.json").read_bytes()
    write_manifest(folder, written)
    assert (folder / "manifest.json").read_bytes() == before


def test_measured_accuracy_is_kept(folder: Path) -> None:
    nan = float("nan")
    rows = (BundleAccuracy("fp32", 70.0, 99.0), BundleAccuracy("w4a8", 69.5, 99.0, VERSUS))
    accuracy = Accuracy("zero-shot", 100, rows, dataset="cifar10")
    made = write_manifest(folder, write_manifest(folder, QUANTIZED).measured(accuracy))
    assert made.quantization is not None
    assert made.quantization.accuracy == accuracy
    # a broken file may be measured, too: its manifest is read all the same
    odd = BundleAccuracy("w4a8", versus_first=replace(VERSUS, agreement=nan))
    again = write_manifest(folder, made.measured(Accuracy("fidelity", 4, (BundleAccuracy("fp32"), odd))))
    assert again.quantization is not None
    assert again.quantization.accuracy is not None
    versus = again.quantization.accuracy.bundles[1].versus_first
    assert versus is not None
    assert versus.agreement != versus.agreement


def test_a_record_tells_what_applied_and_what_did_not(folder: Path) -> None:
    read = write_manifest(folder, QUANTIZED)
    assert read.quantization is not None
    record = read.quantization.encoders["image_encoder.onnx"]
    assert record == RECORD
    assert (record.applied("fused_attention"), record.applied("pooled_row_only"), record.applied("other")) == (3, 0, 0)


def test_an_older_format_is_read(folder: Path) -> None:
    """Format 1 had a key for each of four rewrites, one of them true or false."""
    _change(folder, "format", 1)
    content = json.loads((folder / "manifest.json").read_text())
    for entry in content["encoders"].values():
        del entry["rewrites"]
        entry |= {"pooled_row_only": True, "fused_attention": 6, "fused_biases": 0, "fused_qkv": 0}
    (folder / "manifest.json").write_text(json.dumps(content))
    read = read_manifest(folder)
    assert read.quantization is not None
    for record in read.quantization.encoders.values():
        assert record.rewrites == (RewriteRecord("pooled_row_only", 1), RewriteRecord("fused_attention", 6))
    assert write_manifest(folder, read).quantization == read.quantization
    assert json.loads((folder / "manifest.json").read_text())["format"] == FORMAT


def test_a_newer_format_is_refused_by_name(folder: Path) -> None:
    _change(folder, "format", FORMAT + 1)
    with pytest.raises(BundleError, match=f"format {FORMAT + 1}, this d4c-onnx reads up to {FORMAT}: update d4c-onnx"):
        open_bundle(folder)


def test_keys_that_are_not_known_are_passed_over(folder: Path) -> None:
    _change(folder, "model/licence", "of a later release")
    assert open_bundle(folder).manifest == write_manifest(folder, QUANTIZED)


DEEP: Any = 0
for _ in range(20):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format", "2"),
        ("format", 0),
        ("format", True),
        ("format", 10**400),
        ("kind", "int8"),
        ("model", None),
        ("model", []),
        ("model/name", 7),
        ("model/name", "a\u001b[2Jb"),
        ("model/name", "\ud800"),
        ("model/name", "a" * 10_000),
        ("model/weights_sha256", "0" * 63),
        ("model/weights_sha256", "Z" * 64),
        ("model/context_length", 2**40),
        ("model/logit_scale", float("nan")),
        ("model/logit_scale", 10**400),
        ("preprocess/size", [48]),
        ("preprocess/size", [48, 0]),
        ("preprocess/size", [48, -1]),
        ("preprocess/size", [48.0, 48]),
        ("preprocess/size", ["48", 48]),
        ("preprocess/size", [True, 48]),
        ("preprocess/size", [48, 10**9]),
        ("preprocess/mean", [0.5, 0.5]),
        ("preprocess/std", [0.5, 0.5, 0.0]),
        ("preprocess/std", [0.5, 0.5, float("inf")]),
        ("preprocess/resize_mode", "stretch"),
        ("preprocess/interpolation", ["bicubic"]),
        ("preprocess/fill_color", 256),
        ("tokenizer/pad_id", -1),
        ("tokenizer/clean", "upper"),
        ("tokenizer/zeroed_id", "[SEP]"),
        ("tokenizer/last_id", -1),
        ("tokenizer/dynamic_sequence", 1),
        ("io", {}),
        ("io/image_encoder.onnx/inputs", []),
        ("io/image_encoder.onnx/inputs/0/shape", [[1]]),
        ("seed", -1),
        ("recipe", []),
        ("recipe/synthesis", DEEP),
        ("recipe/template", "\ud800"),
        ("bits", None),
        ("source_files", {"../image_encoder.onnx": "a" * 64}),
        ("session", None),
        ("session/config_entries", None),
        ("optimizer_effect/image_encoder.onnx/ratio", "1"),
        ("encoders/image_encoder.onnx/layers", {"node": {"op": "MatMul", "bits": 0, "weights": 1}}),
        ("encoders/image_encoder.onnx/rewrites", [{"name": "a", "count": -1}]),
        ("encoders/image_encoder.onnx/rewrites", [{"name": "a", "count": 1, "refused": [{"place": "b"}]}]),
        ("accuracy", {"kind": "guess", "images": 1, "bundles": []}),
        ("accuracy", {"kind": "fidelity", "images": 1, "bundles": [{"bundle": "x", "versus_first": 1}]}),
        ("versions", {"onnx": 1}),
        ("files", None),
        ("files", []),
        ("files", {}),
        ("files/image_encoder.onnx", "a" * 64),
        ("files/image_encoder.onnx", {"sha256": "a" * 64, "size_bytes": -1}),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "backslashreplace").decode(),
)
def test_a_field_that_is_not_what_it_may_be_is_refused(folder: Path, place: str, value: object) -> None:
    _change(folder, place, value)
    with pytest.raises(BundleError, match=r"manifest\.json") as refused:
        open_bundle(folder)
    assert len(str(refused.value)) < len(str(folder)) + 800  # it does not repeat all of a stranger's text
    str(refused.value).encode()  # and can be printed
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("place", ["model", "preprocess/size", "tokenizer/causal", "encoders/text_encoder.onnx/layers"])
def test_a_field_that_is_missing_is_named(folder: Path, place: str) -> None:
    write_manifest(folder, QUANTIZED)
    content = json.loads((folder / "manifest.json").read_text())
    *above, last = place.split("/")
    part = content
    for key in above:
        part = part[key]
    del part[last]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=f"an object with {last}"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../victim",
        "/etc/passwd",
        "golden/../../victim",
        "golden/deeper/file",
        "golden/",
        "other/file",
        "..",
        ".",
        "",
        "a\\b",
        "C:file",
        "a\u0000b",
        "a" * 300,
        "golden",
        "w8a8",
        "w8a8/image_encoder.onnx",
    ],
    ids=repr,
)
def test_files_lie_in_the_bundle(folder: Path, name: str) -> None:
    (folder.parent / "victim").write_text("precious")
    _change(folder, "kind", "quantized")
    content = json.loads((folder / "manifest.json").read_text())
    content["files"][name] = content["files"]["tokenizer.json"]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError):
        open_bundle(folder, verify=False)


@pytest.mark.parametrize("name", ["image_encoder.onnx", "tokenizer.json", "manifest.json", "golden"])
def test_links_do_not_lead_out(folder: Path, name: str) -> None:
    write_manifest(folder, QUANTIZED)
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(BundleError, match="link out of the bundle"):
        open_bundle(folder)


def test_links_inside_and_to_the_bundle_are_followed(folder: Path) -> None:
    written = write_manifest(folder, QUANTIZED)
    (folder / "text_encoder.onnx").rename(folder / "weights")
    (folder / "text_encoder.onnx").symlink_to("weights")
    (folder.parent / "link").symlink_to(folder)
    assert open_bundle(folder.parent / "link").manifest == written
    (folder / "text_encoder.onnx").unlink()
    (folder / "text_encoder.onnx").symlink_to("text_encoder.onnx")
    with pytest.raises(BundleError):
        open_bundle(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "golden/golden.json", "image_encoder.onnx.data"])
def test_a_manifest_keeps_silent_about_nothing_that_is_read(folder: Path, name: str) -> None:
    _change(folder, "seed", 0)
    content = json.loads((folder / "manifest.json").read_text())
    content["files"].pop(name, None)
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / name).write_text("not looked at")
    with pytest.raises(BundleError, match="is not in the manifest"):
        open_bundle(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'"text"',
        b'{"format": "\xff"}',
        b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(folder)


def test_a_writer_refuses_what_its_reader_would(folder: Path) -> None:
    written = write_manifest(folder, QUANTIZED)
    odd = replace(QUANTIZED, preprocess=replace(QUANTIZED.preprocess, resize_mode="stretch"))
    with pytest.raises(BundleError, match="resize_mode"):
        write_manifest(folder, odd)
    assert read_manifest(folder) == written


@pytest.mark.parametrize(
    "spoil",
    [
        lambda golden: golden.update(image="../victim.png"),
        lambda golden: golden.update(input_ids=[1.5]),
        lambda golden: golden.update(image_embeds=["a"]),
        lambda golden: golden.update(tolerance=float("nan")),
        lambda golden: golden.pop("text"),
    ],
)
def test_golden_vectors_are_not_trusted_either(folder: Path, spoil: Callable[[dict[str, Any]], object]) -> None:
    golden = {
        "image": "image.png",
        "text": "a boat",
        "input_ids": [1, 2],
        "image_embeds": [0.5],
        "text_embeds": [0.5],
        "tolerance": 1e-4,
    }
    (folder / "golden" / "golden.json").write_text(json.dumps(golden))
    older = read_golden(folder)
    assert (older.older, older.texts[0].input_ids, older.images[0].file) == (True, (1, 2), "image.png")
    spoil(golden)
    (folder / "golden" / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(BundleError, match=r"golden\.json"):
        read_golden(folder)
