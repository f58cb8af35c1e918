"""Exports of other kinds: both towers in one file, SigLIP's pooling and GELU by tanh, tokens as the first axis."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import CONTEXT, END, SIDE, START, WORDS, Tower, export, transformers_model, write_configs
from torch import nn

pytest.importorskip("transformers")

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle
from d4c_onnx.foreign import ForeignFiles
from d4c_onnx.graph.attention import find_attentions, is_causal
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import attribute, nodes_of
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.session import EncoderSession

IDS = torch.tensor([[START, 3, 4, 5, END, END, END], [START, 6, 7, 8, 9, 10, END]])
PIXELS = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def _found(path: Path) -> list[Any]:
    found, refused = find_attentions(load_model(path).graph)
    assert not refused
    return found


def _import(image: Path, text: Path) -> Bundle:
    return pipeline.import_bundle(ForeignFiles(image, text), image.parent / "out", load_recipe(), name="theirs")


def test_both_towers_in_one_file_of_transformers(tmp_path: Path) -> None:
    """Of dynamic height and width, as optimum exports them."""

    def whole(clip: Any, ids: Any, pixels: Any, mask: Any) -> Any:
        made = clip(input_ids=ids, pixel_values=pixels, attention_mask=mask)
        return made.logits_per_image, made.logits_per_text, made.text_embeds, made.image_embeds

    write_configs(tmp_path)
    model, path = transformers_model(), tmp_path / "model.onnx"
    axes = {"input_ids": ["texts", "sequence"], "pixel_values": ["images", "channels", "height", "width"]}
    outputs = ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    given = (IDS, PIXELS, (IDS != END).long())
    export(Tower(model, whole), given, path, {**axes, "attention_mask": axes["input_ids"]}, outputs, False, 17)
    bundle = _import(path, path)
    assert [len(_found(encoder)) for encoder in bundle.encoders.values()] == [2, 2]
    assert bundle.manifest.model.normalized
    assert bundle.manifest.io["image_encoder.onnx"].inputs[0].shape == ("batch", 3, SIDE, SIDE)
    with torch.no_grad():
        expected = model.get_image_features(PIXELS).pooler_output.numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(EncoderSession(bundle.image_encoder).run(PIXELS.numpy()), expected, atol=1e-5)


@pytest.mark.slow
def test_siglip(tmp_path: Path) -> None:
    """Its pooling attends with one learned query, cut out of a packed weight; its GELU is that by tanh."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {**SIZE, "vocab_size": WORDS, "max_position_embeddings": CONTEXT, "projection_size": 32}
    config = SiglipConfig(text_config=text, vision_config={**SIZE, "image_size": SIDE, "patch_size": 8})
    model = SiglipModel._from_config(config, attn_implementation="sdpa").eval()
    write_configs(tmp_path, pad="<pad>")
    for name, part, given, axes in (
        ("vision_model", "vision_model", PIXELS, {"pixel_values": ["batch"]}),
        ("text_model", "text_model", IDS, {"input_ids": ["batch", "sequence"]}),
    ):

        def call(siglip: Any, value: Any, part: str = part) -> Any:
            made = getattr(siglip, part)(value)
            return made.last_hidden_state, made.pooler_output

        outputs = ["last_hidden_state", "pooler_output"]
        export(Tower(model, call), (given,), tmp_path / f"{name}.onnx", axes, outputs, False, 18)
    bundle = _import(tmp_path / "vision_model.onnx", tmp_path / "text_model.onnx")
    assert [len(_found(encoder)) for encoder in bundle.encoders.values()] == [3, 2]
    for encoder, count in ((bundle.image_encoder, 3), (bundle.text_encoder, 2)):
        gelus = list(nodes_of(load_model(encoder).graph, "Gelu"))
        assert [attribute(gelu, "approximate") for gelu in gelus] == ["tanh"] * count
    assert not bundle.manifest.tokenizer.dynamic_sequence  # it sees padding
    few = ("synthesis.images=4", "synthesis.held_out=2", "text.prompts=8", "text.held_out=4")
    report = pipeline.quantize_bundle(str(bundle.path), load_recipe(None, few), output=tmp_path)
    versus = report.accuracy.bundles[1].versus_first
    assert versus is not None
    assert min(versus.cosine_image, versus.cosine_text) > 0.9  # 4 bits, random weights


class _Block(nn.Module):
    """A block of OpenAI's own code."""

    def __init__(self, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.attn, self.ln_1, self.ln_2 = nn.MultiheadAttention(32, 2), nn.LayerNorm(32), nn.LayerNorm(32)
        self.c_fc, self.c_proj, self.mask = nn.Linear(32, 64), nn.Linear(64, 32), mask
        nn.init.normal_(self.attn.in_proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [length, batch, 32]."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.mask)[0]
        hidden = self.c_fc(self.ln_2(x))
        return x + self.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class _Tokens(nn.Module):
    """OpenAI's text tower; of an image, its patches are the tokens."""

    def __init__(self, image: bool) -> None:
        super().__init__()
        length = 16 if image else CONTEXT
        mask = None if image else torch.full((length, length), float("-inf")).triu(1)
        self.stem = nn.Conv2d(3, 32, 8, 8, bias=False) if image else nn.Embedding(WORDS, 32)
        self.positions = nn.Parameter(torch.randn(length, 32))
        self.blocks, self.projection = nn.Sequential(_Block(mask), _Block(mask)), nn.Parameter(torch.randn(32, 16))

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        x = self.stem(given)
        x = x.reshape(x.shape[0], 32, -1).permute(0, 2, 1) if x.ndim == 4 else x
        x = self.blocks((x + self.positions).permute(1, 0, 2)).permute(1, 0, 2)
        first = x[:, 0] if given.ndim == 4 else x[torch.arange(x.shape[0]), given.argmax(-1)]
        return first @ self.projection


def test_tokens_as_the_first_axis(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_configs(tmp_path)
    ids = nn.functional.pad(IDS, (0, CONTEXT - IDS.shape[1]))
    for name, image, given in (("visual", True, PIXELS), ("textual", False, ids)):
        export(_Tokens(image).eval(), (given,), tmp_path / f"{name}.onnx", {"input": ["batch"]}, "output", False, 14)
    bundle = _import(tmp_path / "visual.onnx", tmp_path / "textual.onnx")
    image, text = (_found(path) for path in bundle.encoders.values())
    assert len(image) == len(text) == 2
    assert all(is_causal(attention.mask) for attention in text)
    assert bundle.manifest.model.quick_gelu


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_a_mean_of_tokens_of_an_encoder(kind: str, tmp_path: Path) -> None:
    """As scripts around sentence-transformers export it: padding is hidden by its id then."""
    from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    shared = {"vocab_size": WORDS, "pad_token_id": 0, "max_position_embeddings": CONTEXT}
    if kind == "bert":
        encoder: Any = BertModel._from_config(BertConfig(**shared, **SIZE), attn_implementation="sdpa").eval()
    else:
        size = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
        encoder = DistilBertModel._from_config(DistilBertConfig(**shared, **size), attn_implementation="eager").eval()
    encoder.project = nn.Linear(32, 16)

    def call(model: Any, ids: Any, mask: Any) -> Any:
        hidden, weights = model(input_ids=ids, attention_mask=mask).last_hidden_state, mask[..., None].float()
        return model.project((hidden * weights).sum(1) / weights.sum(1)), hidden

    write_configs(tmp_path, pad="<pad>")
    ids = torch.tensor([[START, 3, 4, END, 0, 0, 0], [START, 6, 7, 8, 9, 10, END]])
    axes = {name: ["batch", "sequence"] for name in ("input_ids", "attention_mask")}
    outputs = ["sentence_embedding", "token_embeddings"]
    export(Tower(encoder, call), (ids, (ids != 0).long()), tmp_path / "model.onnx", axes, outputs, False, 17)
    export(_Tokens(True).eval(), (PIXELS,), tmp_path / "visual.onnx", {"input": ["batch"]}, "output", False, 14)
    bundle = _import(tmp_path / "visual.onnx", tmp_path / "model.onnx")
    tokenizer = bundle.manifest.tokenizer
    assert (tokenizer.dynamic_sequence, tokenizer.causal, tokenizer.pad_id) == (True, False, 0)
    assert len(_found(bundle.text_encoder)) == 2
    with torch.no_grad():
        expected = call(encoder, ids, (ids != 0).long())[0].numpy()
    assert np.allclose(EncoderSession(bundle.text_encoder).run(ids.numpy()), expected, atol=1e-5)
