"""What each layer costs, and what a bit budget buys."""

import pytest
from encoders import material, reader_of, section_of
from graphs import snapshot

from d4c_onnx.errors import RecipeError
from d4c_onnx.graph.model import load_model
from d4c_onnx.progress import silent
from d4c_onnx.quantization.bit_budget import spend_budget
from d4c_onnx.quantization.calibration_batches import calibration_readers
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.sensitivity import LayerCost, buys_any, measure_costs, spend


def test_budget_buys_the_layers_with_the_largest_error_per_weight() -> None:
    costs = [
        LayerCost("image", "first", 100, 8, 0.0),
        LayerCost("image", "a", 400, 4, 4.0),
        LayerCost("image", "b", 400, 4, 1.0),
        LayerCost("text", "c", 100, 4, 2.0),
    ]
    base = (100 * 8 + 900 * 4) / 1000
    assert spend(costs, base) == {"image": frozenset(), "text": frozenset()}
    assert spend(costs, base + 0.4) == {"image": frozenset(), "text": frozenset({"c"})}
    assert spend(costs, base + 2.0) == {"image": frozenset({"a"}), "text": frozenset({"c"})}
    assert spend(costs, 8) == {"image": frozenset({"a", "b"}), "text": frozenset({"c"})}
    with pytest.raises(RecipeError, match="boundary_bits"):
        spend(costs, base - 0.1)


def test_measured_costs_name_every_layer_and_only_4_bit_ones_hurt(request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, "vit")
    model = load_model(bundle.text_encoder)
    before = snapshot(model)
    plan = make_plan(model.graph, section_of())
    costs = measure_costs("text", model, plan, reader_of("text", dataset))
    assert [cost.node for cost in costs] == [*(layer.node for layer in plan.layers), *plan.float16]
    assert all((cost.error > 0) == (cost.bits < 5) for cost in costs)
    assert snapshot(model) == before  # nothing was left behind in the graph


def test_a_budget_buys_when_it_holds_the_cheapest_layer() -> None:
    costs = [LayerCost("image", "first", 100, 8, 0.0), LayerCost("image", "a", 100, 4, 0.0)]
    assert not buys_any(costs, 7.9)
    assert buys_any(costs, 8)
    assert not buys_any(costs, 8, reserve=0.1)
    assert not buys_any(costs[:1], 8)


@pytest.mark.parametrize("kind", ["vit", pytest.param("rn", marks=pytest.mark.slow)])
def test_w4a8_spends_what_is_left_of_its_bits(request: pytest.FixtureRequest, kind: str) -> None:
    """The small ViT's first layer leaves nothing of 4.5 bits; the ResNet has room for some layers."""
    bundle, dataset = material(request, kind)
    readers = calibration_readers(bundle, dataset)

    def bought(*keys: str) -> set[str]:
        given = {"provider": "cpu", "threads": 0, "on_step": silent}
        return {node for nodes in spend_budget(bundle, readers, section_of(*keys), **given).values() for node in nodes}

    spent = bought()
    assert bool(spent) == (kind == "rn")
    for keys in (("bits=w8a8",), ("group=0",), ("target=openvino",)):
        assert not bought(*keys)
    more = bought("average_bits=5")
    assert len(more) > len(spent)
    if kind == "rn":
        assert spent == bought("average_bits=4.5") != more
