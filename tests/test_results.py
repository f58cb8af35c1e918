"""Reports as JSON: the keys that scripts read stay as they are."""

from pathlib import Path

import pytest

from d4c_onnx.errors import CheckFailed
from d4c_onnx.evaluation.benchmark_report import (
    BatchTiming,
    BenchmarkReport,
    FailedPeer,
    LatencyRow,
    Loading,
    MachineDescription,
)
from d4c_onnx.manifest import EncoderRecord, Refusal, RewriteRecord, Signature, TensorInfo
from d4c_onnx.measure.accuracy import check_limits
from d4c_onnx.measure.content import BundleInspection
from d4c_onnx.pipeline import BeforeAfter, QuantizeReport
from d4c_onnx.pipeline.quantize_report import CalibratedWith
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.results import Accuracy, BundleAccuracy, PairedDifference, Versus
from d4c_onnx.runtime.inspection import InspectedLayer, Inspection

ZERO_SHOT = Accuracy(
    "zero-shot",
    100,
    (
        BundleAccuracy("fp32", 70.0, 99.0),
        BundleAccuracy("w4a8", 69.0, 98.0, Versus(97.0, 0.99, 0.98, 0.01, PairedDifference(-1.0, -2.0, 0.0))),
    ),
    dataset="cifar10",
)
FIDELITY = Accuracy(
    "fidelity",
    4,
    (
        BundleAccuracy("fp32"),
        BundleAccuracy("w4a8", versus_first=Versus(97.0, 0.99, 0.98, 0.01, None, 0.9, 0.8)),
    ),
    prompts=8,
)


def test_zero_shot() -> None:
    assert ZERO_SHOT.as_dict() == {
        "kind": "zero-shot",
        "dataset": "cifar10",
        "images": 100,
        "bundles": [
            {"bundle": "fp32", "top1": 70.0, "top5": 99.0},
            {
                "bundle": "w4a8",
                "top1": 69.0,
                "top5": 98.0,
                "versus_first": {
                    "top1_difference": {"points": -1.0, "low": -2.0, "high": 0.0},
                    "agreement": 97.0,
                    "cosine_image": 0.99,
                    "cosine_text": 0.98,
                    "similarity_rmse": 0.01,
                },
            },
        ],
    }


def test_fidelity() -> None:
    assert FIDELITY.as_dict() == {
        "kind": "fidelity",
        "images": 4,
        "prompts": 8,
        "bundles": [
            {"bundle": "fp32"},
            {
                "bundle": "w4a8",
                "versus_first": {
                    "agreement": 97.0,
                    "cosine_image": 0.99,
                    "cosine_image_least": 0.9,
                    "cosine_text": 0.98,
                    "cosine_text_least": 0.8,
                    "similarity_rmse": 0.01,
                },
            },
        ],
    }


def test_quantize() -> None:
    sizes = {"image": 1, "text": 2, "total": 3}
    report = QuantizeReport(
        model="mini-vit",
        pretrained="embedded",
        bits="w4a8",
        bundle=Path("out") / "w4a8",
        calibration="11a60481b5ab",
        calibrated_with=CalibratedWith(16, "d4c", 32, own_texts=False),
        accuracy_mode_only=False,
        target="cpu",
        target_note="",
        weight_bits_average=4.1,
        size_bytes=BeforeAfter(sizes, sizes),
        size_ratio={"image": 1.0, "text": 1.0, "total": 1.0},
        top1=BeforeAfter(None, None),
        accuracy=FIDELITY,
        seconds={"export": 0.1},
    )
    assert report.as_dict() == {
        "model": "mini-vit",
        "pretrained": "embedded",
        "bits": "w4a8",
        "bundle": str(Path("out") / "w4a8"),
        "calibration": "11a60481b5ab",
        "calibrated_with": {"images": 16, "method": "d4c", "texts": 32, "own_texts": False},
        "accuracy_mode_only": False,
        "target": "cpu",
        "target_note": "",
        "weight_bits_average": 4.1,
        "size_bytes": {"fp32": sizes, "quantized": sizes},
        "size_ratio": {"image": 1.0, "text": 1.0, "total": 1.0},
        "top1": {"fp32": None, "quantized": None},
        "accuracy": FIDELITY.as_dict(),
        "seconds": {"export": 0.1},
    }


def test_benchmark() -> None:
    timing = BatchTiming(1.0, 0.9, 1.1, 1000.0, 1.0)
    row = LatencyRow("mini-vit fp32", 10, Loading(5.0, 1.0, 6, 4, 9, None), {8: timing})
    machine = MachineDescription("a CPU", None, 2, "cpu", "1.32.0")
    report = BenchmarkReport(machine, 15, {"image": [row]}, [FailedPeer("blocks", "image", "why")])
    assert report.as_dict() == {
        "machine": {"cpu": "a CPU", "gpu": None, "threads": 2, "provider": "cpu", "onnxruntime": "1.32.0"},
        "rounds": 15,
        "towers": {
            "image": [
                {
                    "name": "mini-vit fp32",
                    "size_bytes": 10,
                    "load_ms": 5.0,
                    "first_ms": 1.0,
                    "loaded_bytes": 6,
                    "held_bytes": 4,
                    "peak_bytes": 9,
                    "gpu_bytes": None,
                    "batches": {
                        8: {"median_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1, "per_second": 1000.0, "speed_up": 1.0}
                    },
                }
            ]
        },
        "failed": [{"name": "blocks", "tower": "image", "reason": "why"}],
    }


def test_inspect() -> None:
    io = Signature((TensorInfo("x", "float32", ("N", 4)),), (TensorInfo("y", "float32", ("N", 2)),), 21)
    layer = InspectedLayer("a", "MatMul", (4, 2), 4, "uint8", (-1.0, 1.0), (0.1, 0.2), "MatMulInteger", True, "")
    encoder = Inspection((layer,), (), io, "1 of 1")
    refused = (Refusal("softmax", "why"),)
    rewrites = (RewriteRecord("fused", 2, refused),)
    record = EncoderRecord({}, None, 3, {}, False, "1.23", rewrites)
    report = BundleInspection(
        "mini-vit", "w4a8", "1.23", 4.0, {"image_encoder.onnx": encoder}, {"image_encoder.onnx": record}
    )
    assert report.as_dict() == {
        "model": "mini-vit",
        "bits": "w4a8",
        "minimum_onnxruntime": "1.23",
        "weight_bits_average": 4.0,
        "encoders": {
            "image_encoder.onnx": {
                "layers": [
                    {
                        "node": "a",
                        "op": "MatMul",
                        "shape": (4, 2),
                        "bits": 4,
                        "activation": "uint8",
                        "activation_range": (-1.0, 1.0),
                        "weight_scales": (0.1, 0.2),
                        "kernel": "MatMulInteger",
                        "int8": True,
                        "reason": "",
                    }
                ],
                "weight_bits_average": 0.0,
                "summary": "1 of 1",
                "io": {
                    "inputs": ({"name": "x", "dtype": "float32", "shape": ("N", 4)},),
                    "outputs": ({"name": "y", "dtype": "float32", "shape": ("N", 2)},),
                    "opset": 21,
                },
                "rewrites": [
                    {"name": "fused", "count": 2, "refused": ({"place": "softmax", "reason": "why"},)},
                ],
            }
        },
    }


@pytest.mark.parametrize(
    "keys", [("max_drop=0.5", ZERO_SHOT), ("min_cosine=0.985", FIDELITY)], ids=lambda keys: keys[0]
)
def test_a_limit_that_is_passed_carries_the_report(keys: tuple[str, Accuracy]) -> None:
    key, measured = keys
    recipe = load_recipe(None, [f"evaluation.{key}"])
    with pytest.raises(CheckFailed, match=f"w4a8.*{key.partition('=')[0]}") as failed:
        check_limits(measured, recipe, measured)
    assert failed.value.report is measured
    check_limits(measured, load_recipe(None, ["evaluation.max_drop=1.5", "evaluation.min_cosine=0.9"]), measured)
