"""Folders of transformers: the same embeddings as transformers' own, from its files alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("transformers")

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from d4c_onnx import pipeline
from d4c_onnx.errors import ModelError
from d4c_onnx.models.load import load_model
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.models.transformers_folder import SIGLIP_TOWERS
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer

SIZE = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
LETTERS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
TEXT = {**SIZE, "vocab_size": len(LETTERS), "max_position_embeddings": 16, "bos_token_id": 2, "pad_token_id": 0}
VISION = {**SIZE, "image_size": 32, "patch_size": 16}
TEXTS = ["two", "a photo of a cat.", "x " * 40]
PIXELS = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
PIXELS |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 3}


def _clip(act: str = "quick_gelu", eos: int = 3, **more: Any) -> Any:
    text = {**TEXT, "hidden_act": act, "eos_token_id": eos, **more}
    config = transformers.CLIPConfig(text_config=text, vision_config={**VISION, "hidden_act": act, **more})
    config.projection_dim = 24
    return transformers.CLIPModel(config)


def _siglip(act: str) -> Any:
    text = {**TEXT, "eos_token_id": 3, "projection_size": 32, "hidden_act": act}
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text, vision_config={**VISION, "hidden_act": act})
    )


def _chinese() -> Any:
    config = transformers.ChineseCLIPConfig(text_config=dict(TEXT), vision_config=dict(VISION), projection_dim=24)
    return transformers.ChineseCLIPModel(config)


MODELS = {
    "clip, QuickGELU": _clip,
    "clip, GELU": lambda: _clip("gelu", layer_norm_eps=1e-3),
    "clip, tanh": lambda: _clip("gelu_new"),
    "clip, largest id": lambda: _clip(eos=2),
    "siglip": lambda: _siglip("gelu_pytorch_tanh"),
    "siglip, GELU": lambda: _siglip("gelu"),
    "chinese_clip": _chinese,
}


@pytest.fixture
def small_siglip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SigLIP tower of timm's that a test can afford."""

    def vit_small_test_patch16_siglip_32(pretrained: bool = False, **kwargs: Any) -> Any:
        own = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.25}
        asked = {name: kwargs[name] for name in ("num_classes", "global_pool")}
        return timm.models.VisionTransformer(**own, class_token=False, **asked)

    entry = vit_small_test_patch16_siglip_32
    monkeypatch.setitem(SIGLIP_TOWERS, (32, 2, 2, 72), "small_test")
    monkeypatch.setitem(timm.models._registry._model_entrypoints, entry.__name__, entry)


def _published(model: Any, folder: Path, **save: Any) -> Path:
    """As transformers saves it: no weight at zero or one, so that each of them counts."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.2 + (value.ndim == 1))
        model.logit_scale.fill_(1.5)
    model.save_pretrained(folder, **save)
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(LETTERS)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    ends = [(name, LETTERS.index(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps({**kind, **names}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    return folder


def _embeddings(model: Any, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As transformers answers, texts padded as its towers of that kind are trained."""
    mask = None if "Siglip" in type(model).__name__ else (ids != 0).long()
    with torch.no_grad():
        out = model.eval()(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    return out.image_embeds.numpy(), out.text_embeds.numpy()


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_answers_as_transformers_does(tmp_path: Path, small_siglip: None, kind: str) -> None:
    model = MODELS[kind]()
    folder = _published(model, tmp_path / "theirs")
    loaded = load_model(str(folder))
    assert (loaded.name, loaded.pretrained) == ("theirs", "folder")
    assert loaded.preprocess.mean == (0.1, 0.2, 0.3)
    assert loaded.sources["mean"] == "preprocessor_config.json beside the weights"
    assert loaded.quick_gelu is (kind in ("clip, QuickGELU", "clip, largest id", "chinese_clip"))
    given = transformers.AutoTokenizer.from_pretrained(folder)
    ids = given(TEXTS, return_tensors="pt", max_length=16, padding="max_length", truncation=True).input_ids
    assert np.array_equal(loaded.tokenize(TEXTS), ids.numpy())
    pixels = torch.randn(3, 3, 32, 32)
    expected = _embeddings(model, pixels, ids)
    with torch.no_grad():
        found = loaded.model.encode_image(pixels, normalize=True), loaded.model.encode_text(ids, normalize=True)
    for embeds, theirs in zip(found, expected, strict=True):
        assert np.abs(embeds.numpy() - theirs).max() <= 2e-6
    assert loaded.model.logit_scale.item() == 1.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip, largest id", "chinese_clip"])
def test_a_bundle_of_a_folder_answers_as_transformers_does(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind]()
    folder = _published(model, tmp_path / "theirs")
    bundle = pipeline.export_bundle(str(folder), tmp_path / "out", load_recipe(None, []))
    ids = TextTokenizer(bundle.tokenizer)(TEXTS)
    whole = torch.from_numpy(load_model(str(folder)).tokenize(TEXTS))
    pixels = torch.randn(3, 3, 32, 32)
    image, text = _embeddings(model, pixels, whole)
    assert np.abs(EncoderSession(bundle.image_encoder).run(pixels.numpy()) - image).max() <= 1e-5
    assert np.abs(EncoderSession(bundle.text_encoder).run(ids) - text).max() <= 1e-5


@pytest.mark.parametrize("form", ["shards", "half", "bin"])
def test_weights_lie_there_in_any_form(tmp_path: Path, form: str) -> None:
    model = _clip()
    expected = load_model(str(_published(model, tmp_path / "one"))).model.state_dict()
    folder = _published(model, tmp_path / "two", **({"max_shard_size": "20KB"} if form == "shards" else {}))
    if form == "shards":
        assert (folder / "model.safetensors.index.json").is_file()
    elif form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    else:
        model.half().save_pretrained(folder)
    for name, value in load_model(str(folder)).model.state_dict().items():
        assert torch.equal(value, expected[name].half().float() if form == "half" else expected[name])


def _change(file: str, **values: Any) -> Any:
    def spoil(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**found, **values}))

    return spoil


def _shard_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../x.safetensors"}}))


REFUSED = {
    "NaFlex": (_change("config.json", model_type="siglip2"), r"is a siglip2 model, which is not converted: .*NaFlex"),
    "another": (_change("config.json", model_type="blip"), "is a blip model, which is not converted: open_clip has no"),
    "width": (
        _change("config.json", vision_config={**VISION, "hidden_size": "x"}),
        "damaged at vision_config",
    ),
    "heads": (_change("config.json", text_config={**TEXT, "num_attention_heads": 3}), "does not part into 3 heads"),
    "act": (_change("config.json", text_config={**TEXT, "hidden_act": "relu"}), "one tower runs quick_gelu"),
    "acts": (
        _change(
            "config.json",
            **{f"{tower}_config": {**TEXT, **VISION, "hidden_act": "relu"} for tower in ("text", "vision")},
        ),
        "hidden_act 'relu' is one that open_clip's towers do not have",
    ),
    "sizes": (
        _change("config.json", projection_dim=23),
        "text_projection is 32 x 24, and 32 x 23 in the",
    ),
    "siglip": (_change("config.json", model_type="siglip"), "timm has no SigLIP tower of width 32"),
    "pixels": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "which mean, std, .* preprocessor_",
    ),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "holds no tokenizer that can.*--tokenizer",
    ),
    "weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
    "shards": (_shard_outside, "names '../x.safetensors', which is no file of weights"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "holds a LoRA adapter.*merged first"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_converted_is_named(tmp_path: Path, form: str) -> None:
    folder = _published(_clip(), tmp_path / "theirs")
    spoil, message = REFUSED[form]
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_a_tokenizer_that_opens_and_fails_is_named(tmp_path: Path) -> None:
    folder = _published(_clip(), tmp_path / "theirs")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "<nowhere>"
    del content["model"]["vocab"]["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"its tokenizer fails on texts .*--tokenizer FOLDER"):
        load_model(str(folder)).tokenize(["a cat"])


@pytest.mark.parametrize("kind", ["clip, GELU", "chinese_clip"])
def test_ids_that_the_text_tower_does_not_know_are_named(tmp_path: Path, kind: str) -> None:
    folder = _published(MODELS[kind](), tmp_path / "theirs")
    tokens = len(LETTERS)
    assert load_model(str(folder)).tokenize(["a cat"]).max() < tokens
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = tokens + 5
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"to {tokens + 5}, the text tower knows {tokens}"):
        load_model(str(folder)).tokenize(["a cat"])


def test_a_tokenizer_comes_from_another_folder(tmp_path: Path) -> None:
    folder, other = _published(_clip(), tmp_path / "theirs"), tmp_path / "other"
    other.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).rename(other / file)
    loaded = load_model(str(folder), options=ModelOptions(tokenizer=other))
    assert loaded.tokenize(["two"])[0, 0] == LETTERS.index("<s>")


def test_a_processors_config_says_pixels(tmp_path: Path) -> None:
    folder = _published(_clip(), tmp_path / "theirs")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PIXELS}))
    assert load_model(str(folder)).sources["mean"] == "processor_config.json beside the weights"
