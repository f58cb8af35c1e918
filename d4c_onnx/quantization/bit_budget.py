"""One budget of bits for both encoders of a bundle."""

from collections.abc import Mapping

from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.model import load_model
from d4c_onnx.progress import OnStep
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.sensitivity import RESERVE, LayerCost, measure_costs, spend
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.recipe import QuantizationSection


def spend_budget(
    bundle: Bundle,
    readers: Mapping[str, CalibrationDataReader],
    section: QuantizationSection,
    *,
    provider: str,
    threads: int,
    on_step: OnStep,
) -> Mapping[str, frozenset[str]]:
    """Per encoder file the nodes that `average_bits` raises to 8 bits: one budget for both encoders."""
    if section.average_bits is None:
        return {}
    costs: list[LayerCost] = []
    target = target_of(section)
    for name, reader in readers.items():
        model = load_model(bundle.path / name)
        plan = make_plan(model.graph, section, reduce_range=target.reduce_range, grouped=target.grouped)
        costs += measure_costs(name, model, plan, reader, provider=provider, threads=threads, on_step=on_step)
    return spend(costs, section.average_bits, RESERVE)
