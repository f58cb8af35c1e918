"""Hugging Face text towers: padding is hidden, so any length that holds a text gives the same embedding."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration import open_calibration_set
from d4c_onnx.errors import CheckFailed
from d4c_onnx.evaluation.latency import drawn_feeds
from d4c_onnx.export import export_fp32, fp32_bundle
from d4c_onnx.graph.attention import find_attentions
from d4c_onnx.graph.model import load_model as load_onnx
from d4c_onnx.models.load import LoadedModel, load_model
from d4c_onnx.models.random_phrases import random_phrases
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.clip_session import ClipSession
from d4c_onnx.runtime.golden import read_golden
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "pad_token_id": 0, "max_position_embeddings": 32, **SIZE},
    # positions count from its padding on, which is no zero
    "xlm-roberta": {"model_type": "xlm-roberta", "pad_token_id": 1, "max_position_embeddings": 34, **SIZE},
}
POOLERS = {"bert": "cls_pooler", "xlm-roberta": "mean_pooler"}
SPECIAL = {"bert": ["<pad>", "<s>", "</s>", "<unk>"], "xlm-roberta": ["<s>", "<pad>", "</s>", "<unk>"]}
VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TEXTS = ["two", "a photo of a cat.", "x " * 100]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ENCODERS])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A CLIP of random weights with a small encoder of a type, and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp(request.param)
    special = SPECIAL[request.param]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    ends = [(name, letters.index(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, **names}))
    (folder / "config.json").write_text(json.dumps({**ENCODERS[request.param], "vocab_size": len(letters)}))
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 32}
    text |= {"hf_proj_type": "linear", "hf_pooler_type": POOLERS[request.param]}
    name = f"tiny-{request.param}"
    (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 48, "vision_cfg": VIT, "text_cfg": text}))
    open_clip.add_model_config(folder / f"{name}.json")
    return load_model(name, "random")


def _expected(loaded: LoadedModel, texts: list[str]) -> np.ndarray:
    with torch.no_grad():
        return loaded.model.encode_text(torch.from_numpy(loaded.tokenize(texts)), normalize=True).numpy()


def test_any_length_gives_torchs_answer(tmp_path: Path, loaded: LoadedModel) -> None:
    bundle = export_fp32(loaded, tmp_path / "bundle", seed=0)
    pad = 1 if "xlm" in loaded.name else 0
    told = bundle.manifest.tokenizer
    assert (told.causal, told.dynamic_sequence, told.pad_id, told.why_fixed) == (False, True, pad, None)
    assert max(bundle.manifest.parity_max_abs_difference.values()) <= 1e-4
    session = EncoderSession(bundle.text_encoder)
    assert session.fixed_length is None
    ids, expected = loaded.tokenize(TEXTS), _expected(loaded, TEXTS)
    for number, row in enumerate(loaded.cut(ids)):
        assert pad not in row
        for length in sorted({len(row), min(len(row) + 3, 32), 32}):
            assert np.abs(session.run(ids[number, None, :length]) - expected[number]).max() <= 1e-5
    assert np.abs(session.run(ids) - expected).max() <= 1e-5
    tokenized = TextTokenizer(bundle.tokenizer)(TEXTS[:2])
    assert tokenized.shape == (2, len(loaded.cut(ids)[1]))
    assert np.array_equal(tokenized, ids[:2, : tokenized.shape[1]])
    assert np.abs(ClipSession(bundle).embed_texts(TEXTS) - expected).max() <= 1e-5
    golden = read_golden(bundle.path)
    assert [one.input_ids for one in golden.texts] == list(
        loaded.cut(loaded.tokenize([one.text for one in golden.texts]))
    )
    [feed] = drawn_feeds(bundle, [2], 16)["text"].values()
    assert feed.shape == (2, 16)
    assert pad not in feed  # what is timed is no padding


def test_attention_is_plain(tmp_path: Path, loaded: LoadedModel) -> None:
    found, refused = find_attentions(load_onnx(export_fp32(loaded, tmp_path / "bundle", seed=0).text_encoder).graph)
    assert (len(found), refused) == (2, [])
    assert all(attention.mask is not None for attention in found)


def test_a_tower_that_fails_at_short_lengths_is_fixed(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fp32_bundle.check_texts

    def shown(model: LoadedModel, file: Path, seed: int) -> float:
        if EncoderSession(file).fixed_length is None:
            raise CheckFailed("text encoder, batch 1: ONNX and torch differ by 1.00e+00.")
        return real(model, file, seed)

    monkeypatch.setattr(fp32_bundle, "check_texts", shown)
    bundle = open_bundle(export_fp32(loaded, tmp_path / "bundle", seed=0).path)
    told = bundle.manifest.tokenizer
    assert (told.causal, told.dynamic_sequence) == (False, False)
    assert told.why_fixed is not None
    assert "differ by 1.00e+00" in told.why_fixed
    assert EncoderSession(bundle.text_encoder).fixed_length == 32
    assert TextTokenizer(bundle.tokenizer)(TEXTS[:2]).shape == (2, 32)
    assert np.abs(ClipSession(bundle).embed_texts(TEXTS) - _expected(loaded, TEXTS)).max() <= 1e-5


def test_a_tower_that_hides_another_id_is_fixed(loaded: LoadedModel) -> None:
    """open_clip hides the encoder's own padding, not another id's, and positions count from the first token on."""
    assert loaded.dynamic_sequence
    for name, value in (("pad_token", "<unk>"), ("padding_side", "left")):
        tokenizer = type(loaded.tokenizer)(loaded.model.text.config.name_or_path, context_length=32)
        setattr(tokenizer.tokenizer, name, value)
        other = dataclasses.replace(loaded, tokenizer=tokenizer)
        assert not other.dynamic_sequence
        assert {len(row) for row in other.cut(other.tokenize(TEXTS))} == {32}


def test_random_phrases_come_from_its_tokenizer(loaded: LoadedModel) -> None:
    phrases = random_phrases(loaded.tokenizer, 20, np.random.default_rng(0))
    assert len(phrases) == 20
    special = [loaded.tokenizer.tokenizer.unk_token_id, loaded.pad_id]
    assert not set(special) & {token for row in loaded.cut(loaded.tokenize(phrases)) for token in row}


def test_quantised_on_prompts_without_padding(tmp_path: Path, loaded: LoadedModel) -> None:
    keys = ("method=noise", "images=4", "held_out=2")
    rest = ("text.prompts=16", "text.held_out=4", "quantization.rounding=nearest", "evaluation.dataset=fidelity")
    recipe = load_recipe(None, [*(f"synthesis.{key}" for key in keys), *rest])
    report = pipeline.quantize_bundle(loaded.name, recipe, output=tmp_path, pretrained="random")
    original, quantized = open_bundle(tmp_path / loaded.name), open_bundle(report.bundle)
    record = quantized.manifest.quantization.encoders["text_encoder.onnx"]
    assert record.applied(FUSE_ATTENTION.name) == 2
    assert not record.start_token_pinned  # it is seen by those behind it, and sees them
    [folder] = (tmp_path / loaded.name).glob("calibration-*")
    made = open_calibration_set(folder)
    assert all(original.manifest.tokenizer.pad_id not in row for row in made.input_ids)
    ids = TextTokenizer(quantized.tokenizer)(TEXTS)
    float_embeds, embeds = (EncoderSession(bundle.text_encoder).run(ids) for bundle in (original, quantized))
    assert (float_embeds * embeds).sum(1).min() > 0.9
