"""Loading and re-expressing towers: exactness, and clear refusals."""

import copy
import dataclasses
import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from d4c_onnx.errors import ModelError
from d4c_onnx.models.catalogue import embedded_models
from d4c_onnx.models.compact import pack_token_table, unpack_token_table
from d4c_onnx.models.load import hash_weights, load_model
from d4c_onnx.models.plain_attention import plain_attention, replace_attention
from d4c_onnx.models.random_phrases import random_phrases
from d4c_onnx.models.tokenizer_export import write_tokenizer


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.sampled_from(["none", "one", "each"]))
@settings(max_examples=30, deadline=None)
def test_plain_attention_is_exact(heads: int, length: int, batch: int, masked: str) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(heads * 8, heads, batch_first=True).eval()
    nn.init.normal_(original.in_proj_bias)
    plain = plain_attention(original)
    assert plain is not None
    x = torch.randn(batch, length, heads * 8)
    mask = None if masked == "none" else torch.full((length, length), float("-inf")).triu(1)
    if mask is not None and masked == "each":
        mask = mask + torch.randn(batch * heads, length, length)
    expected = original(x, x, x, need_weights=False, attn_mask=mask)[0]
    assert torch.allclose(plain(x, attn_mask=mask)[0], expected, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_plain_timm_attention_is_exact(bias: bool) -> None:
    torch.manual_seed(0)
    original = nn.Sequential(timm.layers.Attention(24, 3, qkv_bias=bias, proj_bias=bias)).eval()
    plain = copy.deepcopy(original)
    assert replace_attention(plain) == 1
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert torch.allclose(plain(x), original(x), atol=1e-6)


@pytest.mark.parametrize(
    "attention",
    [
        nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True),
        timm.layers.Attention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm),
    ],
)
def test_attention_without_a_plain_form_is_left_alone(attention: nn.Module) -> None:
    module = nn.Sequential(attention)
    assert replace_attention(module) == 0
    assert module[0] is attention


@pytest.mark.parametrize("fixture", ["mini_vit", "mini_rn"])
def test_deployed_towers_equal_the_model(fixture: str, request: pytest.FixtureRequest) -> None:
    loaded = request.getfixturevalue(fixture)
    image, text = loaded.deployed_towers()
    pixels = torch.randn(3, 3, *loaded.preprocess.size)
    ids = torch.from_numpy(loaded.tokenize(["a photo of a cat.", "two"]))
    with torch.no_grad():
        assert torch.allclose(image(pixels), loaded.model.encode_image(pixels, normalize=True), atol=1e-5)
        expected = loaded.model.encode_text(ids, normalize=True)
        assert torch.allclose(text(ids), expected, atol=1e-5)
        assert torch.allclose(text(ids[:, :9]), expected, atol=1e-5)  # what follows the end token is irrelevant
    assert any(isinstance(module, nn.MultiheadAttention) for module in loaded.model.modules()) or fixture == "mini_rn"


@pytest.mark.parametrize("fixture", ["mini_vit", "mini_rn"])
def test_deployed_towers_share_memory_and_leave_the_model_alone(fixture: str, request: pytest.FixtureRequest) -> None:
    """A large model is in memory once; another device, layout or type of a tower is the tower's own."""
    loaded = request.getfixturevalue(fixture)
    image, text = loaded.deployed_towers()
    own = {value.data_ptr() for value in loaded.model.parameters()}
    deployed = [*image.parameters(), *text.parameters()]
    shared = sum(value.numel() for value in deployed if value.data_ptr() in own)
    assert shared > 0.5 * sum(value.numel() for value in deployed)
    assert not any(value.requires_grad for value in deployed)
    pixels = torch.randn(2, 3, *loaded.preprocess.size)
    before = loaded.model.encode_image(pixels)
    image.to(torch.float64)  # as a move to a GPU would, it gives every parameter other memory
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.model.encode_image(pixels), before)


def test_raw_towers_are_not_normalised(mini_vit) -> None:
    image, _ = mini_vit.deployed_towers(normalize=False)
    pixels = torch.randn(2, 3, *mini_vit.preprocess.size)
    assert torch.allclose(image(pixels), mini_vit.model.encode_image(pixels), atol=1e-4)


def test_embedded_models_are_trained_and_repeatable(mini_vit) -> None:
    assert set(embedded_models()) == {"mini-rn", "mini-vit"}
    assert load_model("mini-vit").weights_sha256 == mini_vit.weights_sha256
    assert mini_vit.quick_gelu
    assert mini_vit.context_length == 77


def test_token_table_packs_and_unpacks() -> None:
    table = torch.zeros(50, 4)
    table[[3, 7, 49]] = torch.randn(3, 4)
    state = {"token_embedding.weight": table, "other": torch.ones(2)}
    packed = pack_token_table(state)
    assert packed["token_embedding.rows"].shape == (3, 4)
    again = unpack_token_table(packed)
    assert torch.equal(again["token_embedding.weight"], table)
    assert torch.equal(again["other"], state["other"])
    assert unpack_token_table(state) is state


def test_random_weights_depend_on_the_seed(tiny_models: tuple[str, str]) -> None:
    a, b, c = (load_model(tiny_models[0], "random", seed).weights_sha256 for seed in (1, 1, 2))
    assert a == b != c


def test_the_hash_leaves_out_what_no_tower_reads(tmp_path: Path) -> None:
    """CoCa's captioner has a projection that open_clip never writes to: whatever the memory held before."""
    size = {"width": 32, "layers": 1}
    words = {"context_length": 16, "vocab_size": 512, "heads": 2, **size}
    pooled = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    config = {
        "embed_dim": 32,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "head_width": 16, "patch_size": 16, **pooled, **size},
        "text_cfg": {"embed_cls": True, "output_tokens": True, **words},
        "multimodal_cfg": words,
    }
    (tmp_path / "tiny-coca.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    made = load_model("tiny-coca", "random", 5)
    state = made.model.state_dict()
    assert any(name.startswith("text_decoder.") for name in state)
    for name, value in state.items():
        before = value.clone()
        value.fill_(torch.nan)
        assert (hash_weights(made.model) == made.weights_sha256) == name.startswith("text_decoder."), name
        value.copy_(before)
    assert hash_weights(made.model) == made.weights_sha256


def test_local_checkpoint_round_trip(tmp_path: Path, tiny_models: tuple[str, str]) -> None:
    name, other = tiny_models
    made = load_model(name, "random", 5)
    save_file({k: v.contiguous() for k, v in made.model.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save({"state_dict": made.model.state_dict()}, tmp_path / "w.pt")
    for file in ("w.safetensors", "w.pt"):
        loaded = load_model(name, str(tmp_path / file))
        assert loaded.weights_sha256 == made.weights_sha256
        assert loaded.pretrained == file
    with pytest.raises(ModelError, match=rf"w\.safetensors.*do not fit {other}"):
        load_model(other, str(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("VIT-B32", None, "no such model.*ViT-B-32"),
        ("ViT-B-32", None, "which weights.*openai"),
        ("ViT-B-32", "no_such_tag", "neither a tag"),
        ("ViT-B-32", "nowhere.safetensors", "no such file"),
        ("mini-vit", "openai", "ships with its weights"),
        ("hf-hub:a/b", "openai", "names its own weights"),
    ],
)
def test_bad_names_are_refused(name: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(name, pretrained)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_damaged_checkpoint_is_refused(tmp_path: Path, suffix: str, tiny_models: tuple[str, str]) -> None:
    file = tmp_path / f"w{suffix}"
    file.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 broken")
    with pytest.raises(ModelError, match=f"w{suffix}"):
        load_model(tiny_models[0], str(file))


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/d4c-onnx-evil"),))


def test_a_pickle_is_never_executed(tmp_path: Path, tiny_models: tuple[str, str]) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ModelError, match=r"w\.pt"):
        load_model(tiny_models[0], str(file))
    torch.save({"weight": _Evil()}, file)
    with pytest.raises(ModelError, match=r"w\.pt: holds more than tensors: reading it would call 'getattr', so it"):
        load_model(tiny_models[0], str(file))
    assert not Path("/tmp/d4c-onnx-evil").exists()


def test_unreachable_hub_names_three_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", refuse)
    with pytest.raises(ModelError, match=r"unreachable.*Three ways out.*--pretrained FILE.*random"):
        load_model("ViT-B-32", "openai")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's tokenizer and Hugging Face text towers need transformers."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(open_clip, "get_tokenizer", refuse)
    with pytest.raises(ModelError, match=r"needs the Python package transformers.*pip install 'd4c-onnx\[hf\]'"):
        load_model("ViT-S-32", "random")


def test_prompts_are_cut_to_the_end_token(mini_vit) -> None:
    end = mini_vit.tokenizer.eot_token_id
    rows = np.array([[1, 5, end, 0], [1, end, end, end], [1, 2, 3, 4]])
    assert mini_vit.cut(rows) == ((1, 5, end), (1, end), (1, 2, 3, 4))


def test_random_phrases_are_text_of_ordinary_tokens(mini_vit) -> None:
    phrases, again = (random_phrases(mini_vit.tokenizer, 200, np.random.default_rng(1)) for _ in range(2))
    assert len(phrases) == 200
    assert phrases == again != random_phrases(mini_vit.tokenizer, 200, np.random.default_rng(2))
    ids = mini_vit.cut(mini_vit.tokenize(phrases))
    sot, eot = mini_vit.tokenizer.all_special_ids
    assert all(row[0] == sot and row[-1] == eot and not {sot, eot} & set(row[1:-1]) for row in ids)
    assert len({token for row in ids for token in row}) > 300
    assert random_phrases(object(), 3, np.random.default_rng(0)) == []


def test_texts_are_as_long_as_tower_and_tokenizer_both_take(mini_vit) -> None:
    """XLM-RoBERTa has 514 positions; open_clip's tokenizer for it cuts at 77."""
    long = copy.copy(mini_vit.model)
    long.context_length = 514
    assert dataclasses.replace(mini_vit, model=long).context_length == mini_vit.context_length
    short = open_clip.SimpleTokenizer(context_length=9)
    assert dataclasses.replace(mini_vit, tokenizer=short).context_length == 9


def test_a_hub_without_a_name_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No DNS, no proxy: the hub client is put offline for the call (and only for it), so the answer comes at once."""
    import socket

    from huggingface_hub import constants

    seen = []

    def no_name(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def download(*args: object, **kwargs: object) -> None:
        seen.append(constants.HF_HUB_OFFLINE)
        raise OSError("not in the cache")

    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", download)
    with pytest.raises(ModelError, match="Three ways out"):
        load_model("ViT-B-32", "openai")
    assert seen == [True]
    assert constants.HF_HUB_OFFLINE is False


@pytest.fixture(scope="module")
def fast_tokenizer(tmp_path_factory: pytest.TempPathFactory):
    reference = open_clip.SimpleTokenizer(context_length=77)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    info = write_tokenizer(reference, 77, path)
    assert (info.sot_id, info.eot_id) == (49406, 49407)
    return reference, Tokenizer.from_file(str(path))


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=0x24F, exclude_characters="&<>"), max_size=60))
@settings(max_examples=150, deadline=None)
def test_tokenizer_json_gives_open_clip_ids(fast_tokenizer, text: str) -> None:
    reference, fast = fast_tokenizer
    from open_clip.tokenizer import basic_clean

    text = basic_clean(text)  # of ftfy the file holds but a part; tests/runtime/test_tokenizer.py has the whole
    # a code point that Unicode has not assigned, or only lately, is a letter in one library and none in another
    assume(all(unicodedata.category(character) != "Cn" for character in text))
    expected = reference([text])[0].numpy()
    ids = np.array(fast.encode(text).ids)
    assert np.array_equal(ids, expected[: len(ids)])
    assert not expected[len(ids) :].any()


def test_tokenizer_truncates_to_the_context(fast_tokenizer) -> None:
    reference, fast = fast_tokenizer
    text = "one two three " * 60
    assert fast.encode(text).ids == reference([text])[0].tolist()
