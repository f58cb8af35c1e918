"""One budget of bits for both encoders of a bundle."""

from collections.abc import Mapping

from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.model import load_model
from d4c_onnx.progress import OnStep
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.sensitivity import RESERVE, least_bits, measure_costs, spend, unmeasured_costs
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.recipe import QuantizationConfig

# What W4A8 spends where nothing is asked: of a ViT-S/14's 74 matrices four small ones make a fifth of the error.
_DEFAULT_BITS = 4.5


def spend_budget(
    bundle: Bundle,
    readers: Mapping[str, CalibrationDataReader],
    config: QuantizationConfig,
    *,
    provider: str,
    threads: int,
    on_step: OnStep,
) -> Mapping[str, Mapping[str, int]]:
    """Per encoder file the nodes whose weights have another width: one budget for both encoders.

    Raises:
        RecipeError: `average_bits` asks for less than what the first and last layers take.
    """
    target, asked = target_of(config), config.average_bits
    grouped = config.weight_bits == 4 and config.activation_bits == 8 and config.group_size and target.grouped
    if asked is None and not grouped:
        return {}
    models = {name: load_model(bundle.path / name) for name in readers}
    plans = {name: EncoderTask(config, target, readers[name]).plan(model.graph) for name, model in models.items()}
    known = [cost for name, model in models.items() for cost in unmeasured_costs(name, model, plans[name])]
    if asked is None and least_bits(known) + RESERVE > _DEFAULT_BITS:  # toys, whose first layers are most of them
        return {}
    costs = [
        cost
        for name, reader in readers.items()
        for cost in measure_costs(
            name, models[name], plans[name], reader, provider=provider, threads=threads, on_step=on_step
        )
    ]
    return spend(costs, asked or _DEFAULT_BITS, RESERVE)
