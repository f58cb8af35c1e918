"""Weights in a file beside the graph: of float sources and of what is written, and what is refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from encoders import material, quantize

from d4c_onnx.bundle import file_size_bytes
from d4c_onnx.errors import BundleError, GraphError
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.runtime.session import EncoderSession


def test_encoders_beyond_one_protobuf(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit that a mini passes: weights beside the graph on every way, and the same answers."""
    bundle, dataset = material(request, "vit")
    keys = ("bits=w8a8", "rounding=gptaq")
    quantize(bundle.text_encoder, dataset, tmp_path / "one.onnx", *keys)
    monkeypatch.setattr("d4c_onnx.graph.model.weight_bytes", lambda _: 2**32)  # sessions and files alike ask it
    monkeypatch.setattr("d4c_onnx.quantization.qdq.PROTOBUF_LIMIT_BYTES", 10_000)
    quantize(bundle.text_encoder, dataset, tmp_path / "large.onnx", *keys)
    assert (tmp_path / "large.onnx.data").stat().st_size > 10 * (tmp_path / "large.onnx").stat().st_size
    ids = np.array(dataset.input_ids[0], np.int64)[None]
    one, large = (EncoderSession(tmp_path / f"{name}.onnx").run(ids) for name in ("one", "large"))
    assert np.array_equal(one, large)


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["image", "text"])
def test_external_data_holds_the_weights_and_answers_the_same(
    tower: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle, dataset = material(request, "vit")
    for name, keys in (("one", ()), ("two", ("external_data=true",))):
        quantize(bundle.encoders[tower], dataset, tmp_path / f"{name}.onnx", "rounding=nearest", *keys)
    assert not (tmp_path / "one.onnx.data").exists()
    assert file_size_bytes(tmp_path / "two.onnx") <= 1.1 * (tmp_path / "one.onnx").stat().st_size  # tensors are aligned
    fed = np.array(dataset.pixel_values) if tower == "image" else np.array([dataset.input_ids[0]], np.int64)
    one, two = (EncoderSession(tmp_path / f"{name}.onnx").run(fed) for name in ("one", "two"))
    assert np.array_equal(one, two)
    (tmp_path / "two.onnx.data").unlink()
    with pytest.raises(BundleError, match="cannot load"):
        EncoderSession(tmp_path / "two.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(("bits=w4a8",), id="qdq"),
        pytest.param(("bits=w4a16", "target=cuda"), id="float16"),
    ],
)
def test_weights_beside_the_float_graph_are_read_wherever_they_are_wanted(
    keys: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """As in every encoder above 2 GB: the same file comes out, whatever the working directory."""
    bundle, dataset = material(request, "vit")
    save_model(load_model(bundle.text_encoder), tmp_path / "text_beside.onnx", limit_bytes=0)
    assert (tmp_path / "text_beside.onnx.data").exists()
    written = []
    for source in (bundle.text_encoder, tmp_path / "text_beside.onnx"):
        path = tmp_path / f"{source.stem}_quantised.onnx"
        quantize(source, dataset, path, *keys, tower="text")
        written.append(path.read_bytes())
    assert written[0] == written[1]
    (tmp_path / "text_beside.onnx.data").unlink()
    with pytest.raises(GraphError, match="are missing"):
        load_model(tmp_path / "text_beside.onnx")


def test_weights_outside_the_folder_are_refused(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bundle, _ = material(request, "vit")
    (tmp_path / "inside").mkdir()
    save_model(load_model(bundle.text_encoder), tmp_path / "m.onnx", limit_bytes=0)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = f"../{entry.value}" if entry.key == "location" else entry.value
    (tmp_path / "inside" / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match=r"outside|escapes|not an ONNX model"):
        load_model(tmp_path / "inside" / "m.onnx")
