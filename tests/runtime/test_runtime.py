"""Serving side: sessions refuse clearly, kernels are counted."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from encoders import material, quantize, quantized_bundle
from graphs import stored_weights

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.errors import BundleError, ModelError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.runtime.gpu import gpu_name, gpu_used_bytes
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.kernels import count_kernels
from d4c_onnx.runtime.preprocess import denormalize, normalize
from d4c_onnx.runtime.session import EncoderSession, cuda_fault, resolve_provider
from d4c_onnx.runtime.tokenizer import TextTokenizer

CONFIG = Preprocess(size=(48, 48), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))


def test_normalize_round_trip(rng: np.random.Generator) -> None:
    pixels = rng.random((2, 3, 4, 4), dtype=np.float32)
    assert np.allclose(denormalize(normalize(pixels, CONFIG), CONFIG), pixels, atol=1e-6)


def test_tokenizer_pads_to_the_longest(vit_bundle: Bundle) -> None:
    ids = TextTokenizer(vit_bundle.tokenizer)(["a", "a photo of a very large cat"])
    assert ids.dtype == np.int64
    assert ids[0, 3:].tolist() == [0] * (ids.shape[1] - 3)


def test_float_file_runs_float_kernels(vit_bundle: Bundle) -> None:
    counts = count_kernels(vit_bundle.image_encoder)
    assert counts["int8"] == 0
    assert counts["float"] == 38 + 12


def test_unloadable_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match=r"x\.onnx.*cannot load"):
        EncoderSession(tmp_path / "x.onnx")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        TextTokenizer(tmp_path / "tokenizer.json")


@pytest.fixture
def cuda_untried() -> Iterator[None]:
    """What was found out about CUDA is forgotten before and after."""
    cuda_fault.cache_clear()
    yield
    cuda_fault.cache_clear()


@pytest.mark.usefixtures("cuda_untried")
def test_missing_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert resolve_provider("auto") == "cpu"
    with pytest.raises(ModelError, match="onnxruntime-gpu"):
        resolve_provider("cuda")


@pytest.mark.usefixtures("cuda_untried")
@pytest.mark.parametrize("started", [False, True])
def test_a_session_that_fell_back_to_the_cpu_is_not_called_cuda(
    started: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime-gpu lists CUDA on machines without a driver, and silently runs there on the CPU."""

    def preload() -> None:
        sys.stdout.write("Failed to load libcublasLt.so.13: no such file\n")

    def session(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider"] * started + ["CPUExecutionProvider"])

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.preload_dlls", preload, raising=False)
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    assert resolve_provider("auto") == ("cuda" if started else "cpu")
    if started:
        assert resolve_provider("cuda") == "cuda"
    else:
        with pytest.raises(ModelError, match=r"cannot load its CUDA provider \(Failed to load libcublasLt"):
            resolve_provider("cuda")
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("cuda_untried")
def test_a_broken_cuda_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("onnxruntime.InferenceSession", session)
    assert resolve_provider("auto") == "cpu"
    with pytest.raises(ModelError, match="no CUDA-capable device"):
        resolve_provider("cuda")


class _Driver:
    """libcuda's four calls: one device of 1000 bytes, 400 of them free."""

    def __init__(self, fault: int) -> None:
        self.fault = fault

    def cuInit(self, _: int) -> int:
        return self.fault

    def cuDeviceGetName(self, text: ctypes.Array, _: int, __: object) -> int:
        text.value = b"NVIDIA Test"
        return 0

    def cuDevicePrimaryCtxRetain(self, _: object, __: object) -> int:
        return 0

    def cuCtxSetCurrent(self, _: object) -> int:
        return 0

    def cuMemGetInfo_v2(self, free: object, total: object) -> int:
        free._obj.value, total._obj.value = 400, 1000  # type: ignore[attr-defined]
        return 0


def test_the_gpu_is_asked_through_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: _Driver(0))
    assert (gpu_name(), gpu_used_bytes()) == ("NVIDIA Test", 600)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: _Driver(100))
    assert (gpu_name(), gpu_used_bytes()) == (None, None)
    monkeypatch.undo()
    assert (gpu_name() is None) == (gpu_used_bytes() is None)


@pytest.mark.parametrize(
    ("model", "tower"),
    [
        ("vit", "text"),
        pytest.param("vit", "image", marks=pytest.mark.slow),
        pytest.param("rn", "image", marks=pytest.mark.slow),
    ],
)
def test_inspection_agrees_with_the_census(
    model: str, tower: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Layer by layer it must find the very kernels that are counted in the optimised graph, in float and in int8."""
    bundle, dataset = material(request, model)
    floating = inspect_encoder(bundle.encoders[tower])
    assert "unknown" not in {layer.kernel for layer in floating.layers}
    assert floating.as_dict()["weight_bits_average"] == 32
    assert not any(layer.int8 for layer in floating.layers)
    report, made = quantize(bundle.encoders[tower], dataset, tmp_path / "q.onnx", "rounding=nearest")
    inspected, counted = inspect_encoder(tmp_path / "q.onnx"), count_kernels(tmp_path / "q.onnx")
    products = stored_weights(made)
    assert len(products) >= len(report.layers)
    integer = sum(stored.num_bits <= 8 for stored in products)  # the projection and channels that left stay float
    assert sum(layer.int8 for layer in inspected.layers) == counted["int8"] == integer
    assert sum(not layer.int8 for layer in inspected.layers) == counted["float"]
    assert inspected.summary.startswith(f"{integer} of {len(products)} weighted products in int8")
    for layer in inspected.layers:
        assert bool(layer.reason) == (not layer.int8)
        if layer.shape and layer.int8:
            assert layer.bits in (4, 4.25, 8)
            assert layer.activation == "uint8"
            assert layer.activation_range[0] <= 0 < layer.activation_range[1]
            assert 0 < layer.weight_scales[0] <= layer.weight_scales[1]


@pytest.mark.slow
def test_inspection_opens_sessions_as_the_bundle_says(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    keys = ("bits=w8a8", "rounding=nearest")
    made = quantized_bundle(vit_bundle, vit_calibration[1], tmp_path / "w8a8", *keys)
    assert inspect_encoder(made.image_encoder, made.session_entries).summary.startswith("40 of 41 weighted")
    entries = {"session.disable_quant_qdq": "1"}  # quantisers are then left where they stand
    assert inspect_encoder(made.image_encoder, entries).summary.startswith("0 of 41 weighted")
