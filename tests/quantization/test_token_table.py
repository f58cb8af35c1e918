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
    assert pack_halves(values).nbytes * 2 == values.size
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


@pytest.mark.parametrize(("bits", "width", "dtype"), [("w4a8", 4, ir.DataType.UINT8), ("w8a8", 8, ir.DataType.INT8)])
def test_token_table_rows_are_dequantised_one_by_one(
    bits: str, width: int, dtype: ir.DataType, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle, dataset = material(request, "vit")
    keys = (f"bits={bits}", "rounding=nearest")
    report, made = quantize(bundle.text_encoder, dataset, tmp_path / "q.onnx", *keys)
    tables = {
        value.dtype: [int(size) for size in value.const_value.shape.numpy()]
        for value in made.graph.initializers.values()
        if value.const_value is not None and value.const_value.size >= 49408
    }
    assert tables == {dtype: [49408, 64 * width // 8], ir.DataType.FLOAT: [49408, 1]}
    assert report.token_table_bits == width
    ids = np.array(dataset.input_ids[0], np.int64)[None]
    got, expected = EncoderSession(tmp_path / "q.onnx").run(ids), EncoderSession(bundle.text_encoder).run(ids)
    assert float((got * expected).sum()) > (0.98 if width == 4 else 0.999)


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
