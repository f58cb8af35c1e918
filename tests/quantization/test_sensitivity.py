"""What each layer costs, and what a bit budget buys."""

from dataclasses import replace

import pytest
from encoders import config_of, material, reader_of
from graphs import snapshot
from hypothesis import given
from hypothesis import strategies as st

from d4c_onnx.errors import RecipeError
from d4c_onnx.graph.model import load_model
from d4c_onnx.progress import silent
from d4c_onnx.quantization.bit_budget import spend_budget
from d4c_onnx.quantization.calibration_batches import calibration_readers
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.sensitivity import LayerCost, least_bits, measure_costs, spend


def test_budget_buys_the_layers_with_the_largest_error_per_weight() -> None:
    costs = [
        LayerCost("image", "first", 100, 8, 0.0),
        LayerCost("image", "a", 400, 4, 4.0),
        LayerCost("image", "b", 400, 4, 1.0),
        LayerCost("text", "c", 100, 4, 2.0),
    ]
    base = (100 * 8 + 900 * 4) / 1000
    assert spend(costs, base) == {"image": {}, "text": {}}
    assert spend(costs, base + 0.4) == {"image": {}, "text": {"c": 8}}
    assert spend(costs, base + 2.0) == {"image": {"a": 8}, "text": {"c": 8}}
    assert spend(costs, 8) == {"image": {"a": 8, "b": 8}, "text": {"c": 8}}
    with pytest.raises(RecipeError, match="boundary_bits"):
        spend(costs, base - 0.1)


def test_in_groups_bits_move_from_layers_that_stand_it_to_those_that_do_not() -> None:
    costs = [LayerCost("image", name, 1000, 4.25, error, 16) for name, error in (("a", 9.0), ("b", 1.0), ("c", 0.1))]
    assert spend(costs, 4.25) == {"image": {"a": 5, "c": 3}}
    assert spend(costs, 3.25) == {"image": {"a": 3, "b": 3, "c": 3}}
    assert spend(costs, 8) == {"image": {"a": 8, "b": 8, "c": 8}}
    alike = [replace(cost, error=error) for cost, error in zip(costs, (3.0, 2.0, 1.0), strict=True)]
    assert spend(alike, 4.25) == {"image": {}}  # 3 bits cost four times the error, 5 save three quarters of it
    assert least_bits(costs) == 3.25
    with pytest.raises(RecipeError, match="reachable"):
        spend(costs, 3.2)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(1e-9, 10)), min_size=1, max_size=12), st.floats(3.3, 8))
def test_a_budget_is_never_passed_and_more_of_it_is_never_worse(layers: list[tuple[int, float]], budget: float) -> None:
    costs = [LayerCost("image", str(number), size, 4.25, error, 16) for number, (size, error) in enumerate(layers)]

    def spent(average: float) -> tuple[float, float]:
        """Stored bits a weight, and the error that is left."""
        [widths] = spend(costs, average).values()
        own = [next(one for one in cost.choices if one[0] == widths.get(cost.node, 4)) for cost in costs]
        bits = sum(cost.elements * bits for cost, (_, bits, _) in zip(costs, own, strict=True))
        return bits / sum(cost.elements for cost in costs), sum(error for _, _, error in own)

    bits, error = spent(budget)
    assert bits <= budget + 1e-9
    assert spent(8)[1] <= error * (1 + 1e-9)


def test_measured_costs_name_every_layer_and_only_4_bit_ones_hurt(request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, "vit")
    model = load_model(bundle.text_encoder)
    before = snapshot(model)
    plan = make_plan(model.graph, config_of())
    costs = measure_costs("text", model, plan, reader_of("text", dataset))
    assert [cost.node for cost in costs] == [*(layer.node for layer in plan.layers), *plan.in_float]
    assert all((cost.error > 0) == (cost.bits < 5) for cost in costs)
    assert snapshot(model) == before  # nothing was left behind in the graph


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "rn"])
def test_w4a8_spends_its_bits_where_they_are_needed(request: pytest.FixtureRequest, kind: str) -> None:
    bundle, dataset = material(request, kind)
    readers = calibration_readers(bundle, dataset)

    def widths(*keys: str) -> dict[str, int]:
        placed = {"provider": "cpu", "threads": 0, "on_step": silent}
        spent = spend_budget(bundle, readers, config_of(*keys), **placed)
        return {node: width for found in spent.values() for node, width in found.items()}

    spent = widths()
    assert {3} < set(spent.values()) <= {3, 5, 8}
    for keys in (("bits=w8a8",), ("group=0",), ("target=openvino",)):
        assert not widths(*keys)
    if kind == "vit":
        more = widths("average_bits=5")
        assert all(more.get(node, 4) >= width for node, width in spent.items())
        assert more != spent == widths("average_bits=4.5")
