"""The text encoder's table: its rows are stored in half a byte a value, and looked up one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from encoders import material, quantize
from graphs import check, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxruntime.quantization import quantize_static

from d4c_onnx.quantization.rounding.base import WeightGrid
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.token_rows import round_token_rows
from d4c_onnx.quantization.storage.token_table import TokenTable, pack_halves, store_token_table
from d4c_onnx.runtime.session import EncoderSession


@given(hnp.arrays(np.int8, (6, 10), elements=st.integers(-8, 7)), st.lists(st.integers(0, 5), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_packed_token_rows_come_back_as_they_were(values: np.ndarray, ids: list[int]) -> None:
    """onnxruntime unpacks exactly the rows that are looked up; half a byte a value."""
    values[:, 0] = 7  # so that each row lies on a grid that the rounding finds again
    scale = np.linspace(0.5, 3, 6, dtype=np.float32)
    table = values * scale[:, None]
    model = parse("g (int64[n] ids) => (float[n, 10] rows) { [look_up] rows = Gather(table, ids) }", table=table)
    rounded = NearestRounding().round(table, WeightGrid(4))
    assert store_token_table(model, 4, TokenTable.PACKED) == 4
    check(model)
    assert pack_halves((values + 8).astype(np.uint8)).nbytes * 2 == values.size
    assert "table" not in model.graph.initializers
    assert np.array_equal(run(model, np.array(ids, np.int64)), rounded.dequantize()[ids])
    np.testing.assert_allclose(rounded.dequantize(), table, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("form", TokenTable)
@pytest.mark.parametrize(("width", "asked", "stored"), [(10, 4, 4), (10, 8, 8), (9, 4, None), (9, 8, 8)])
def test_token_tables_in_every_form(form: TokenTable, width: int, asked: int, stored: int | None) -> None:
    """A packed row has an even number of values, or 8 bits; a float table stays what it was."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((40, width)).astype(np.float32)
    model = parse(f"g (int64[n, m] ids) => (float[n, m, {width}] rows) {{ rows = Gather(table, ids) }}", table=table)
    ids = np.array([[1, 39, 1], [0, 7, 20]], np.int64)
    bits = store_token_table(model, asked, form)
    check(model)
    if form is TokenTable.FLOAT:
        assert bits is None
        assert np.array_equal(run(model, ids), table[ids])
        return
    assert bits == (stored if stored is not None else {TokenTable.PACKED: 8, TokenTable.FOLDED: 4}[form])
    assert np.array_equal(run(model, ids), NearestRounding().round(table, WeightGrid(bits)).dequantize()[ids])


@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize("learned", [False, True])
def test_groups_of_a_row_share_multipliers(group: int, learned: bool) -> None:
    """What onnxruntime looks up is what was rounded, whatever groups; along the gradients errors count for less."""
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((40, 64)) * rng.uniform(0.1, 3, (40, 1))).astype(np.float32)
    mixed = rng.standard_normal((64, 64)) * np.linspace(0.1, 3, 64)
    outputs = (mixed @ mixed.T)[None].astype(np.float32) if learned else None
    model = parse("g (int64[n, m] ids) => (float[n, m, 64] rows) { rows = Gather(table, ids) }", table=table)
    assert store_token_table(model, 4, TokenTable.PACKED, group, outputs) == 4 + 4 / group
    check(model)
    expected = round_token_rows(table, 4, group, outputs).dequantize()
    assert np.array_equal(run(model, np.arange(40).reshape(5, 8)), expected.reshape(5, 8, 64))
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.shape[0] == 40)
    assert stored == 40 * (64 * (4 + 4 / group) / 8 + 4)
    coarse = NearestRounding().round(table, WeightGrid(4)).dequantize()
    gram = np.eye(64) if outputs is None else outputs[0]
    error, plain = (np.einsum("ti,ij,tj", off, gram, off) for off in (expected - table, coarse - table))
    assert error < 0.7 * plain


def test_gradients_weigh_the_errors_of_looked_up_rows() -> None:
    """Wide tables have gradients in blocks; a row's errors are repaired within each."""
    rng = np.random.default_rng(1)
    table = rng.standard_normal((30, 64)).astype(np.float32)
    blocks = np.stack([part @ part.T for part in rng.standard_normal((2, 32, 8))]).astype(np.float32)
    whole = np.zeros((64, 64), np.float32)
    whole[:32, :32], whole[32:, 32:] = blocks
    one, two = (round_token_rows(table, 4, 16, moments) for moments in (whole[None], blocks))
    assert np.array_equal(one.integers, two.integers)
    error, plain = (round_token_rows(table, 4, 16, moments).dequantize() - table for moments in (blocks, None))
    assert np.einsum("ti,ij,tj", error, whole, error) < 0.7 * np.einsum("ti,ij,tj", plain, whole, plain)


@pytest.mark.parametrize(
    ("bits", "group", "width", "dtype"),
    [("w4a8", 16, 4.25, ir.DataType.UINT8), ("w4a8", 0, 4, ir.DataType.UINT8), ("w8a8", 16, 8, ir.DataType.INT8)],
)
def test_token_table_rows_are_dequantised_one_by_one(
    bits: str, group: int, width: float, dtype: ir.DataType, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle, dataset = material(request, "vit")
    keys = (f"bits={bits}", "rounding=nearest", f"group={group}")
    report, made = quantize(bundle.text_encoder, dataset, tmp_path / "q.onnx", *keys)
    tables = [
        value.const_value
        for value in made.graph.initializers.values()
        if value.const_value is not None and value.const_value.size >= 49408
    ]
    assert {table.dtype for table in tables} == {dtype, ir.DataType.FLOAT}
    assert sum(table.nbytes for table in tables) == 49408 * (64 * width / 8 + 4)
    assert report.token_table_bits == width
    ids = np.array(dataset.input_ids[0], np.int64)[None]
    got, expected = EncoderSession(tmp_path / "q.onnx").run(ids), EncoderSession(bundle.text_encoder).run(ids)
    assert float((got * expected).sum()) > (0.98 if width < 8 else 0.999)


def test_quantize_static_never_holds_the_whole_table(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes several copies of what it is given, and does nothing to the table."""
    given: list[int] = []

    def watched(source: str, *more: Any, **options: Any) -> None:
        given.append(sum(path.stat().st_size for path in Path(source).parent.iterdir()))
        quantize_static(source, *more, **options)

    monkeypatch.setattr("d4c_onnx.quantization.qdq.quantize_static", watched)
    bundle, dataset = material(request, "vit")
    quantize(bundle.text_encoder, dataset, tmp_path / "q.onnx", "bits=w8a8", "rounding=nearest")
    assert bundle.text_encoder.stat().st_size > 49408 * 64 * 4
    assert [size < 49408 * 64 for size in given] == [True]
