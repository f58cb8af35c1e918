"""What is refused at the door, asked for, or told apart: small graphs, one reason each."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from exports import PIXELS, export, write_configs
from graphs import parse
from onnx import TensorProto, helper
from torch import nn

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import D4CError, GraphError, ModelError, RecipeError
from d4c_onnx.foreign import ForeignFiles
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer

IMAGE = """visual (float[batch, 3, 4, 4] image) => (float[batch, 5] image_embeds) {
    flat = Flatten (image)
    image_embeds = MatMul (flat, image_weight)
}"""
TEXT = """textual (int64[batch, length] text) => (float[batch, 5] text_embeds) {
    tokens = Gather (table, text)
    first = ReduceMax <keepdims = 0> (tokens, axis)
    text_embeds = MatMul (first, text_weight)
}"""
BOTH = """both (int64[batch, length] input_ids, float[batch, 3, 4, 4] pixel_values)
    => (float[a, b] logits_per_image, float[batch, 5] text_embeds, float[batch, 5] image_embeds) {
    flat = Flatten (pixel_values)
    image_embeds = MatMul (flat, image_weight)
    tokens = Gather (table, input_ids)
    first = ReduceMax <keepdims = 0> (tokens, axis)
    text_embeds = MatMul (first, text_weight)
    turned = Transpose (text_embeds)
    logits_per_image = MatMul (image_embeds, turned)
}"""


@pytest.fixture
def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"image_weight": rng.normal(size=(48, 5)), "text_weight": rng.normal(size=(6, 5))}


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator, weights: dict[str, np.ndarray]) -> Path:
    """A tower each, whose padding (token 0, all of it lowest) is hidden, with all configs."""
    write_configs(tmp_path, pad="<pad>")
    (tmp_path / "preprocess_cfg.json").write_text(json.dumps({**PIXELS, "size": [4, 4]}))
    table = rng.normal(size=(99, 6))
    table[:3] = -9
    constants = {"table": table, "axis": np.array([1]), **weights}
    for name, text, used in (
        ("visual", IMAGE, ["image_weight"]),
        ("textual", TEXT, ["table", "axis", "text_weight"]),
        ("both", BOTH, list(constants)),
    ):
        save_model(parse(text, 18, **{key: constants[key] for key in used}), tmp_path / f"{name}.onnx")
    return tmp_path


def _import(folder: Path, image: str = "visual.onnx", text: str = "textual.onnx", **said: object) -> Bundle:
    options = said.pop("options", None)
    files = ForeignFiles(folder / image, folder / text, **said)  # type: ignore[arg-type]
    return pipeline.import_bundle(files, folder / "out", load_recipe(), name="theirs", options=options)  # type: ignore[arg-type]


def _changed(folder: Path, name: str, change: object) -> None:
    proto = onnx.load(folder / name)
    change(proto)  # type: ignore[operator]
    onnx.save(proto, folder / name)


def _custom(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "ai.evil"
    proto.opset_import.append(helper.make_opsetid("ai.evil", 1))


def _quantized(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["stored", "scale"], ["image_weight"]))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.ones((48, 5), np.int8), "stored"),
            onnx.numpy_helper.from_array(np.array(1, np.float32), "scale"),
        ]
    )


def _half(proto: onnx.ModelProto) -> None:
    weight = onnx.numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float16)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "half"))
    proto.graph.node.insert(0, helper.make_node("Cast", ["half"], ["image_weight"], to=TensorProto.FLOAT))


def _old(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 12


def _wrong_types(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].input[1] = "nowhere"


def _one_image(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _channels_last(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 3


def _outside(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", "960")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _attribute_outside(proto: onnx.ModelProto) -> None:
    _outside(proto)
    tensor = onnx.TensorProto()
    tensor.CopyFrom(proto.graph.initializer[0])
    tensor.name = "value"
    del proto.graph.initializer[:]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["image_weight"], value=tensor))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_custom, "holds 'ai.evil:Flatten', which is no standard operator"),
        (_quantized, "quantised already"),
        (_half, "weights in float16"),
        (_old, "opset 12, understood are 13"),
        (_wrong_types, "breaks ONNX's rules|not an ONNX model"),
        (_one_image, "batches of 1 only"),
        (_channels_last, "takes 4 channels"),
        (_outside, "outside its folder"),
        (_attribute_outside, "outside its folder"),
    ],
)
def test_the_door_is_shut(folder: Path, change: object, reason: str) -> None:
    (folder.parent / "secret.bin").write_bytes(bytes(960))
    if change in (_outside, _attribute_outside):  # onnx itself would not write them
        proto = onnx.load(folder / "visual.onnx")
        change(proto)  # type: ignore[operator]
        (folder / "visual.onnx").write_bytes(proto.SerializeToString())
    else:
        _changed(folder, "visual.onnx", change)
    with pytest.raises((ModelError, GraphError), match=reason):
        _import(folder)
    assert not (folder / "out").exists() or not list((folder / "out").iterdir())


@pytest.mark.parametrize("length", [1, 2**40])
def test_a_length_that_no_text_has(folder: Path, length: int) -> None:
    def fix(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = length

    _changed(folder, "textual.onnx", fix)
    with pytest.raises(ModelError, match=f"takes texts of {length} ids, which the tokenizer cannot make"):
        _import(folder)


def test_what_is_no_model(folder: Path) -> None:
    (folder / "visual.onnx").write_text("no model")
    with pytest.raises(D4CError, match=r"visual\.onnx"):
        _import(folder)
    with pytest.raises(ModelError, match="no such file"):
        _import(folder, image="nothing.onnx")


def test_a_file_of_both_towers_is_cut(folder: Path, rng: np.random.Generator) -> None:
    bundle = _import(folder, "both.onnx", "both.onnx")
    images = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    apart = EncoderSession(folder / "visual.onnx")
    assert np.array_equal(EncoderSession(bundle.image_encoder).run(images), apart.run(images))
    assert [value.name for value in load_model(bundle.text_encoder).graph.inputs] == ["input_ids"]
    assert "image_weight" not in load_model(bundle.text_encoder).graph.initializers


def test_outputs_that_cannot_be_told(folder: Path) -> None:
    def more(proto: onnx.ModelProto) -> None:
        proto.graph.node[-1].output[0] = "one"
        proto.graph.output[0].name = "one"
        proto.graph.node.append(helper.make_node("Neg", ["one"], ["other"]))
        proto.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["batch", 5]))

    _changed(folder, "visual.onnx", more)
    with pytest.raises(ModelError, match=r"several outputs could be the image embedding .*--image-output"):
        _import(folder)
    with pytest.raises(ModelError, match="no such output"):
        _import(folder, image_output="neither")
    bundle = _import(folder, image_output="other")
    images = np.ones((1, 3, 4, 4), np.float32)
    theirs = EncoderSession(folder / "visual.onnx").run_all(images)["other"]
    assert np.array_equal(EncoderSession(bundle.image_encoder).run(images), theirs)


def test_pixels_are_asked_for(folder: Path) -> None:
    (folder / "preprocess_cfg.json").unlink()
    with pytest.raises(ModelError, match=r"nothing says which pixels.*--mean, --std, --interpolation, --resize-mode"):
        _import(folder)
    with pytest.raises(ModelError, match=r"takes images of 4 x 4, but tag ViT-B-32:openai, by --like says 224 x 224"):
        _import(folder, options=ModelOptions(like="ViT-B-32:openai"))
    bundle = _import(folder, options=ModelOptions(like="ViT-B-32:openai", image_size=(4, 4), mean=(0.1, 0.2, 0.3)))
    assert bundle.manifest.preprocess.mean == (0.1, 0.2, 0.3)
    assert bundle.manifest.preprocess.interpolation == "bicubic"
    assert bundle.manifest.model.sources["std"] == "tag ViT-B-32:openai, by --like"


def test_a_tokenizer_and_a_length_are_asked_for(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match="--context-length"):
        _import(folder)
    bundle = _import(folder, context_length=9)
    assert bundle.manifest.tokenizer.context_length == 9
    assert TextTokenizer(bundle.tokenizer)(["a " * 20]).shape == (1, 9)
    shutil.rmtree(folder / "out")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json lies beside it"):
        _import(folder)


def test_padding_that_the_tower_sees(folder: Path) -> None:
    """Texts are padded to the context length then, and with what is a question."""

    def lowest(proto: onnx.ModelProto) -> None:
        proto.graph.node[1].op_type = "ReduceMin"

    _changed(folder, "textual.onnx", lowest)
    bundle = _import(folder)
    assert not bundle.manifest.tokenizer.dynamic_sequence
    assert "sees padding" in (bundle.manifest.tokenizer.why_fixed or "")
    assert bundle.manifest.tokenizer.pad_id == 0
    assert TextTokenizer(bundle.tokenizer)(["a"]).shape == (1, 12)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 12}))
    (folder / "out" / "theirs").rename(folder / "before")
    with pytest.raises(ModelError, match="--pad-token"):
        _import(folder)
    assert (
        _import(folder, pad_token="<pad>").manifest.files["text_encoder.onnx"]
        == bundle.manifest.files["text_encoder.onnx"]
    )


class _Masked(nn.Module):
    """Attention in both directions over what a mask leaves, as in BERT, and a mean of it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out, self.project = nn.Embedding(99, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids, mask):  # type: ignore[no-untyped-def]
        tokens = self.table(ids)
        query, key, value = (
            layer(tokens).view(*ids.shape, 2, 8).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        hidden = (1.0 - mask[:, None, None, :].float()) * -1e9
        weights = (query @ key.transpose(-1, -2) / 8**0.5 + hidden).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(*ids.shape, 16)
        tokens = (tokens + self.out(mixed)) * mask[..., None]
        return self.project(tokens.sum(1) / mask.sum(1, keepdim=True))


def test_a_mask_becomes_a_thing_of_the_ids(folder: Path) -> None:
    import torch

    from d4c_onnx.graph.attention import find_attentions, mask_axes

    torch.manual_seed(0)
    axes = ["batch", "sequence"]
    ids = torch.tensor([[97, 4, 98, 0], [97, 5, 6, 98]])
    given = (ids, (ids != 0).long())
    path = folder / "textual.onnx"
    export(_Masked(), given, path, {"input_ids": axes, "attention_mask": axes}, "sentence_embedding", False, 17)
    bundle = _import(folder)
    tokenizer = bundle.manifest.tokenizer
    assert (tokenizer.dynamic_sequence, tokenizer.causal, tokenizer.pad_id) == (True, False, 0)
    found, refused = find_attentions(load_model(bundle.text_encoder).graph)
    assert len(found) == 1
    assert not refused
    assert found[0].mask is not None
    assert mask_axes(found[0].mask) in (4, None)
    session = EncoderSession(bundle.text_encoder)
    alone = np.concatenate([session.run(np.array([row])) for row in ([97, 4, 98], [97, 5, 98])])
    together = session.run(np.array([[97, 4, 98, 0, 0], [97, 5, 98, 0, 0]]))
    assert np.allclose(alone, together, atol=1e-5)


def test_methods_that_ask_the_weights(folder: Path) -> None:
    bundle = _import(folder)
    for method in ("bns", "pse"):
        with pytest.raises(RecipeError, match=f"synthesis.method {method}: needs torch weights"):
            pipeline.quantize_bundle(
                str(bundle.path), load_recipe(None, [f"synthesis.method={method}"]), output=folder / "out"
            )


def test_a_batch_that_is_fixed_inside(folder: Path) -> None:
    def two(proto: onnx.ModelProto) -> None:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 48]), "sizes"))
        proto.graph.node[0].CopyFrom(helper.make_node("Reshape", ["image", "sizes"], ["flat"]))

    _changed(folder, "visual.onnx", two)
    with pytest.raises(ModelError, match=r"visual\.onnx: does not run on float32 \[1, 3, 4, 4\]"):
        _import(folder)
