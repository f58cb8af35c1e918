"""Bundles that anybody may have written, hashes and all: whole ones are served, others end in one message."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import spoilt_graphs
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import spoilt_bytes, spoilt_json
from spoilt_values import rehash
from toys import Toy, bundle_of

from d4c_onnx import measure, packaging
from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration.observers import quant_params
from d4c_onnx.errors import BundleError, CalibrationError, D4CError, GraphError
from d4c_onnx.graph.door import check_source
from d4c_onnx.runtime import ClipSession
from d4c_onnx.runtime.verify import read_answers, verify_bundle

IMAGE, TEXT = "image_encoder.onnx", "text_encoder.onnx"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("hostile") / "toy", Toy(bits="fp32")).path


@pytest.fixture
def copy(toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy, tmp_path / "toy"))


def _change(folder: Path, name: str, how: str, seed: int = 0) -> None:
    file = folder / name
    file.write_bytes(spoilt_graphs.changed(file.read_bytes(), how, random.Random(seed)))
    rehash(folder)


def _swap(folder: Path) -> None:
    one, other = (folder / name for name in (IMAGE, TEXT))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    rehash(folder)


def _serve(folder: Path) -> None:
    session = ClipSession(folder)
    session.embed_images(np.zeros((3, 8, 8, 3), np.uint8))
    session.embed_texts(["a", "in the", "th"])


def _package(folder: Path) -> None:
    packaging.package_bundle(folder, "onnxruntime", folder.parent / "package")


USES: dict[str, Callable[[Path], object]] = {
    "serve": _serve,
    "inspect": measure.inspect_bundle,
    "package": _package,
}


def _refused(use: Callable[[Path], object], folder: Path) -> str:
    """The message, which is short and can be shown."""
    with pytest.raises(D4CError) as refused:
        use(folder)
    message = str(refused.value)
    assert len(message) < 1000
    assert message.isprintable()
    return message


@pytest.mark.parametrize("use", USES)
def test_what_is_whole_is_used(copy: Path, use: str) -> None:
    USES[use](copy)
    assert verify_bundle(copy).ok


@pytest.mark.parametrize("use", USES)
def test_encoders_that_changed_places(copy: Path, use: str) -> None:
    _swap(copy)
    assert "the manifest says" in _refused(USES[use], copy)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", [IMAGE, TEXT])
@pytest.mark.parametrize("how", ["input added", "output added", "batch fixed", "output renamed"])
def test_graphs_that_are_not_as_the_manifest_says(copy: Path, name: str, how: str, use: str) -> None:
    _change(copy, name, how)
    assert name in _refused(USES[use], copy)
    verified = verify_bundle(copy)
    assert not verified.ok
    assert all(len(check.detail) < 1000 for check in verified.checks)


@pytest.mark.parametrize("use", ["inspect", "package"])
def test_weights_that_are_no_numbers(copy: Path, use: str) -> None:
    _change(copy, TEXT, "not a number")
    assert "holds NaN" in _refused(USES[use], copy)


@pytest.mark.parametrize("how", ["node names doubled", "versions", "nodes turned"])
def test_names_and_order_of_nodes_end_in_no_traceback(copy: Path, how: str) -> None:
    for seed in range(2):
        _change(copy, IMAGE, how, seed)
        for use in USES.values():
            message = ""
            try:
                use(copy)
            except D4CError as error:
                message = str(error)
            assert len(message) < 1000
            shutil.rmtree(copy.parent / "package", ignore_errors=True)


def _wrong_width(io: dict) -> None:
    io[TEXT]["outputs"][0]["shape"][1] = 5


def _wrong_size(io: dict) -> None:
    io[IMAGE]["inputs"][0]["shape"][2] = 9


def _wrong_length(io: dict) -> None:
    io[TEXT]["inputs"][0]["shape"][1] = 3


def _wrong_type(io: dict) -> None:
    io[TEXT]["inputs"][0]["dtype"] = "float32"


def _fixed(io: dict) -> None:
    io[IMAGE]["outputs"][0]["shape"][0] = 1


@pytest.mark.parametrize("spoil", [_wrong_width, _wrong_size, _wrong_length, _wrong_type, _fixed])
def test_manifests_whose_parts_do_not_fit(copy: Path, spoil: Callable[[dict], None]) -> None:
    content = json.loads((copy / "manifest.json").read_bytes())
    spoil(content["io"])
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="is damaged at io"):
        open_bundle(copy)


@pytest.mark.parametrize(("key", "value"), [("mean", 1e308), ("mean", -1e7), ("std", 1e308), ("std", 1e-300)])
def test_pixels_that_float32_would_not_hold(copy: Path, key: str, value: float) -> None:
    content = json.loads((copy / "manifest.json").read_bytes())
    content["preprocess"][key][1] = value
    (copy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=rf"preprocess\.{key}\.1: expected a number from"):
        open_bundle(copy)


def _any_end(folder: Path) -> None:
    """Each use ends in an answer or in one message; and none changes the bundle."""
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    for use in (verify_bundle, _serve):
        message = ""
        try:
            use(folder)
        except D4CError as error:
            message = str(error)
        assert len(message) < 1000
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _fresh(toy: Path) -> Path:
    target = toy.with_name("spoilt")
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(toy, target))


@settings(max_examples=15)
@given(st.data())
def test_spoilt_manifests(toy: Path, data: st.DataObject) -> None:
    folder = _fresh(toy)
    content = data.draw(spoilt_json(json.loads((folder / "manifest.json").read_bytes())))
    (folder / "manifest.json").write_text(json.dumps(content))
    _any_end(folder)


@settings(max_examples=25)
@given(st.sampled_from([IMAGE, TEXT]), st.sampled_from(list(spoilt_graphs.CHANGES)), st.integers(0, 2**31))
def test_spoilt_graphs(toy: Path, name: str, how: str, seed: int) -> None:
    folder = _fresh(toy)
    _change(folder, name, how, seed)
    _any_end(folder)


@settings(max_examples=12)
@given(st.data())
def test_spoilt_bytes_of_graphs(toy: Path, data: st.DataObject) -> None:
    folder = _fresh(toy)
    file = folder / data.draw(st.sampled_from([IMAGE, TEXT]))
    file.write_bytes(data.draw(spoilt_bytes(file.read_bytes())))
    rehash(folder)
    _any_end(folder)


@settings(max_examples=15)
@given(st.data())
def test_spoilt_tokenizers(toy: Path, data: st.DataObject) -> None:
    folder = _fresh(toy)
    content = data.draw(spoilt_json(json.loads((folder / "tokenizer.json").read_bytes())))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    rehash(folder)
    _any_end(folder)


@settings(max_examples=10)
@given(st.data())
def test_spoilt_golden_vectors(toy: Path, data: st.DataObject) -> None:
    folder = _fresh(toy)
    file = folder / "golden" / "golden.json"
    file.write_text(json.dumps(data.draw(spoilt_json(json.loads(file.read_bytes())))))
    rehash(folder)
    _any_end(folder)


def test_answers_whose_header_tells_of_terabytes(tmp_path: Path) -> None:
    file = tmp_path / "answers.npy"
    np.save(file, np.zeros((2, 4)))
    file.write_bytes(file.read_bytes().replace(b"(2, 4), }" + b" " * 15, b"(959999999999, 4), }    ", 1))
    with pytest.raises(BundleError, match=r"no \.npy file"):
        read_answers(file, None)


@pytest.mark.parametrize("low", [-np.inf, np.nan, -3e38])
def test_ranges_that_are_no_numbers(low: float) -> None:
    with pytest.raises(CalibrationError, match="not finite in float32"):
        quant_params(low, 3e38, 8)


def test_a_source_that_breaks_onnx_rules_is_not_taken_apart(copy: Path) -> None:
    told = open_bundle(copy).manifest.io[IMAGE]
    model = onnx.load(copy / IMAGE)
    model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, copy / IMAGE)
    with pytest.raises(GraphError, match="ONNX's rules"):
        check_source(copy / IMAGE, told)
