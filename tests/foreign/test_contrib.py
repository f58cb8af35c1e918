"""Operators that onnxruntime's optimisers write: onnxruntime's own kernels against their formulas, on random input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_open_clip, export_transformers, open_clip_model, transformers_model, write_configs
from graphs import parse

from d4c_onnx import pipeline
from d4c_onnx.errors import ModelError
from d4c_onnx.foreign import ForeignFiles
from d4c_onnx.foreign.contrib import expand_contrib
from d4c_onnx.graph.attention import find_attentions
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.session import EncoderSession

X = "float[b, s, 8] x"
MASK = "counts = ReduceSum <keepdims = 0> (given, axis)  lengths = Cast <to = 6> (counts)"
VECTORS = {"gain": 8, "shift": 8, "bias": 8}
GRAPHS = {
    "Gelu": f"g ({X}) => (float[b, s, 8] y) {{ y = com.microsoft.Gelu (x) }}",
    "BiasGelu": f"g ({X}) => (float[b, s, 8] y) {{ y = com.microsoft.BiasGelu (x, bias) }}",
    "FastGelu": f"g ({X}) => (float[b, s, 8] y) {{ y = com.microsoft.FastGelu (x) }}",
    "FastGelu, bias": f"g ({X}) => (float[b, s, 8] y) {{ y = com.microsoft.FastGelu (x, bias) }}",
    "QuickGelu": f"g ({X}) => (float[b, s, 8] y) {{ y = com.microsoft.QuickGelu <alpha = 1.3> (x) }}",
    "SkipLayerNormalization": f"""g ({X}) => (float[b, s, 8] y) {{
        skip = Relu (x)
        y = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (x, skip, gain, shift) }}""",
    "SkipLayerNormalization, sum": f"""g ({X}) => (float[b, s, 8] y) {{
        skip = Relu (x)
        n, _1, _2, total = com.microsoft.SkipLayerNormalization <epsilon = 0.01> (x, skip, gain, shift, bias)
        y = Mul (n, total) }}""",
    "FusedMatMul": f"""g ({X}) => (float[b, s, s] y) {{
        y = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (x, x) }}""",
    "FusedMatMul, constant": f"""g ({X}) => (float[b, s, 5] y) {{
        y = com.microsoft.FusedMatMul <transB = 1> (x, matrix) }}""",
    "Attention": f"g ({X}) => (float[b, s, 8] y) {{ y = com.microsoft.Attention <num_heads = 2> (x, packed, thirds) }}",
    "Attention, causal": f"""g ({X}) => (float[b, s, 8] y) {{
        y = com.microsoft.Attention <num_heads = 2, unidirectional = 1, scale = 0.3> (x, packed, thirds) }}""",
    "Attention, sizes": f"""g ({X}) => (float[b, s, 4] y) {{
        y = com.microsoft.Attention <num_heads = 2, qkv_hidden_sizes = [8, 8, 4]> (x, narrow, twenty) }}""",
    "Attention, mask": f"""g ({X}, int64[b, s] given) => (float[b, s, 8] y) {{
        mask = Cast <to = 6> (given)
        y = com.microsoft.Attention <num_heads = 4> (x, packed, thirds, mask) }}""",
    "Attention, lengths": f"""g ({X}, int64[b, s] given) => (float[b, s, 8] y) {{
        {MASK}
        y = com.microsoft.Attention <num_heads = 2, mask_filter_value = -3e4> (x, packed, thirds, lengths) }}""",
    "Attention, added": f"""g ({X}) => (float[b, s, 8] y) {{
        y = com.microsoft.Attention <num_heads = 2> (x, packed, thirds, , , extra) }}""",
    "MultiHeadAttention": f"""g ({X}) => (float[b, s, 8] y) {{
        k = Relu (x)  v = Neg (x)
        y = com.microsoft.MultiHeadAttention <num_heads = 2> (x, k, v) }}""",
    "MultiHeadAttention, bias and mask": f"""g ({X}, int64[b, s] given) => (float[b, s, 8] y) {{
        k = Relu (x)  v = Neg (x)  mask = Cast <to = 6> (given)
        y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.2> (x, k, v, thirds, mask) }}""",
    "EmbedLayerNormalization": """g (float[b, s, 8] x, int64[b, s] given) => (float[b, s, 8] y) {
        ids = Cast <to = 6> (given)
        n, index, total = com.microsoft.EmbedLayerNormalization <epsilon = 0.01> (
            ids, ids, words, places, kinds, gain, shift)
        sum = Add (n, total)
        y = Add (sum, x) }""",
    "EmbedLayerNormalization, tokens": """g (float[b, s, 8] x, int64[b, s] given) => (float[b, s, 8] y) {
        ids = Cast <to = 6> (given)
        n, index = com.microsoft.EmbedLayerNormalization (ids, , words, places, , gain, shift)
        y = Add (n, x) }""",
}


def _constants(text: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes: dict[str, Any] = {name: (size,) for name, size in VECTORS.items()}
    shapes |= {"packed": (8, 24), "thirds": (24,), "narrow": (8, 20), "twenty": (20,), "matrix": (5, 8)}
    shapes |= {"extra": (1, 2, 5, 5), "words": (6, 8), "places": (9, 8), "kinds": (2, 8)}
    found = {name: rng.normal(size=shape) for name, shape in shapes.items() if name in text}
    return found | ({"axis": np.array([1])} if "axis" in text else {})


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_formula_is_what_onnxruntime_computes(kind: str, rng: np.random.Generator) -> None:
    text = GRAPHS[kind]
    constants = _constants(text, rng)
    model = parse(text, 20, **constants)
    plain = model.clone()
    expand_contrib(plain, Path("theirs.onnx"))
    assert {node.domain for node in plain.graph} == {""}
    assert set(plain.graph.opset_imports) == {""}
    lengths = np.array([5, 2, 3])
    given = (np.arange(5) < lengths[:, None]).astype(np.int64)
    feed = {"x": rng.normal(size=(3, 5, 8)).astype(np.float32), "given": given}
    answers = []
    for one in (model, plain):
        session = EncoderSession(ir.to_proto(one).SerializeToString(), threads=1)
        [answer] = session.run_named({name: feed[name] for name in session.input_names}).values()
        answers.append(answer)
    assert np.allclose(answers[0], answers[1], atol=2e-6, rtol=1e-5)
    assert np.abs(answers[0]).max() > 0.1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"g ({X}, float[2, b, 2, p, 4] past) => (float[b, s, 8] y) {{"
         " y = com.microsoft.Attention <num_heads = 2> (x, packed, thirds, , past) }", "with an input 4"),
        (f"g ({X}) => (float[b, s, 8] y) {{"
         " y = com.microsoft.Attention <num_heads = 2, do_rotary = 1> (x, packed, thirds) }", "with rotary positions"),
        (f"g ({X}, float[8, 24] packed) => (float[b, s, 8] y) {{"
         " y = com.microsoft.Attention <num_heads = 2> (x, packed, thirds) }", "whose projections are no constants"),
        (f"g ({X}, int32[b, s, s] mask) => (float[b, s, 8] y) {{"
         " y = com.microsoft.Attention <num_heads = 2> (x, packed, thirds, mask) }", "with a mask of 3 axes"),
        (f"g ({X}, int32[c] mask) => (float[b, s, 8] y) {{"
         " y = com.microsoft.Attention <num_heads = 2> (x, packed, thirds, mask) }", "with a mask of 1 axes"),
        (f"g ({X}) => (float[b, s, 8] y) {{"
         " n, y = com.microsoft.SkipLayerNormalization (x, x, gain, shift) }", "with an output 1"),
        (f"g ({X}) => (float[b, s, 8] y) {{ y = com.microsoft.MultiHeadAttention <num_heads = 2> (x) }}",
         "without its input 1"),
    ],
)  # fmt: skip
def test_what_a_formula_does_not_cover(text: str, reason: str, rng: np.random.Generator) -> None:
    names = text.split("=>")[0]
    constants = {name: values for name, values in _constants(text, rng).items() if name not in names}
    with pytest.raises(ModelError, match=rf"theirs\.onnx: '\w+' is com\.microsoft:\w+ {reason}\."):
        expand_contrib(parse(text, 20, **constants), Path("theirs.onnx"))


@pytest.mark.parametrize("kind", ["open_clip", "transformers"])
def test_files_that_onnxruntimes_optimiser_wrote(kind: str, tmp_path: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    pytest.importorskip("transformers")
    if kind == "open_clip":
        files = export_open_clip(tmp_path, open_clip_model(layers=1), False, 17)
    else:
        files = export_transformers(tmp_path, transformers_model("eager", layers=1), False, 17)
    seen = set()
    for path in (files.image, files.text):
        fused = optimizer.optimize_model(str(path), model_type="clip", num_heads=2, hidden_size=32, opt_level=0)
        fused.save_model_to_file(str(path))
        seen |= {node.op_type for node in load_model(path).graph if node.domain == "com.microsoft"}
    assert seen >= ({"QuickGelu"} if kind == "open_clip" else {"Attention", "BiasGelu", "SkipLayerNormalization"})
    bundle = pipeline.import_bundle(
        ForeignFiles(files.image, files.text), tmp_path / "out", load_recipe(), name="theirs"
    )
    assert max((bundle.manifest.parity_max_abs_difference or {}).values()) < 1e-6
    assert bundle.manifest.model.quick_gelu == (kind == "open_clip")
    for path in bundle.encoders.values():
        found, refused = find_attentions(load_model(path).graph)
        assert (len(found), refused) == (1, [])


TEXT = """textual (int64[batch, length] ids, int64[{rows}, length] position_ids) => (float[batch, 5] text_embeds) {{
    tokens = Gather (table, ids)
    places = Gather (places_table, position_ids)
    both = Add (tokens, places)
    first = ReduceMax <keepdims = 0> (both, axis)
    text_embeds = MatMul (first, text_weight)
}}"""
IMAGE = """visual (float[batch, 3, 4, 4] image) => (float[batch, 5] image_embeds) {
    flat = Flatten (image)
    image_embeds = MatMul (flat, image_weight)
}"""


@pytest.mark.parametrize("rows", ["batch", "1"])
def test_positions_as_an_input(rows: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """They are 0, 1, ... for CLIP and BERT; where a config says that they are RoBERTa's, the file is refused."""
    write_configs(tmp_path, pad="<pad>")
    pixels = {"size": [4, 4], "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bicubic"}
    (tmp_path / "preprocess_cfg.json").write_text(json.dumps(pixels))
    table = rng.normal(size=(99, 6))
    table[:3] = -99
    constants = {"table": table, "places_table": rng.normal(size=(12, 6)), "axis": np.array([1])}
    constants["text_weight"] = rng.normal(size=(6, 5))
    save_model(parse(TEXT.format(rows=rows), 18, **constants), tmp_path / "textual.onnx")
    save_model(parse(IMAGE, 18, image_weight=rng.normal(size=(48, 5))), tmp_path / "visual.onnx")
    files = ForeignFiles(tmp_path / "visual.onnx", tmp_path / "textual.onnx")
    bundle = pipeline.import_bundle(files, tmp_path / "out", load_recipe(), name="theirs")
    ids = np.array([[97, 3, 4, 98], [97, 5, 6, 98]])
    positions = np.arange(4)[None].repeat(2 if rows == "batch" else 1, 0)
    theirs = EncoderSession(files.text).run_named({"ids": ids, "position_ids": positions})["text_embeds"]
    assert np.allclose(EncoderSession(bundle.text_encoder).run(ids), theirs, atol=1e-6)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"model_type": "xlm-roberta"}}))
    with pytest.raises(ModelError, match=r"counts them as RoBERTa does.*Export it without position_ids"):
        pipeline.import_bundle(files, tmp_path / "out", load_recipe(), name="other")
