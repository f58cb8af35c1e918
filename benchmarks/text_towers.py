"""What open_clip's configs would fetch from the hub, made here: text towers' `config.json`, and small tokenizers.

The towers have the published sizes, with random weights. The tokenizers are of the same kind as the published ones with
a vocabulary of some hundred words (tests/tokenizer_kinds.py): what can go wrong is around the vocabulary.
"""

import json
import sys
from pathlib import Path
from typing import Any

import open_clip
from few_blocks import text_tower_of, with_few_blocks

from d4c_onnx.models.model_options import ModelOptions

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from tokenizer_kinds import stand_in

_ROBERTA = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_XLM_ROBERTA = {**_ROBERTA, "model_type": "xlm-roberta", "vocab_size": 250002}
_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
_MT5 = {
    "model_type": "mt5",
    "is_encoder_decoder": True,
    "vocab_size": 250112,
    "d_model": 768,
    "d_ff": 2048,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_NLLB = {
    "model_type": "m2m_100",
    "is_encoder_decoder": True,
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "decoder_ffn_dim": 4096,
    "activation_function": "relu",
    "scale_embedding": True,
    "max_position_embeddings": 1024,
    "decoder_start_token_id": 2,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
_NLLB_LARGE = {"encoder_layers": 24, "decoder_layers": 24, "encoder_ffn_dim": 8192, "decoder_ffn_dim": 8192}
TEXT_TOWERS: dict[str, dict[str, Any]] = {
    "roberta-base": {**_ROBERTA, "model_type": "roberta", "vocab_size": 50265},
    "xlm-roberta-base": _XLM_ROBERTA,
    "xlm-roberta-large": {**_XLM_ROBERTA, **_LARGE},
    "google/mt5-base": _MT5,
    "google/mt5-xl": {**_MT5, "d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24},
    "facebook/nllb-200-distilled-600M": _NLLB,
    "facebook/nllb-200-distilled-1.3B": {**_NLLB, **_NLLB_LARGE},
}
"""The hub's repositories that open_clip's configs name as text towers, and their `config.json`."""


def options_of(name: str, folder: Path, blocks: int | None = None) -> ModelOptions:
    """How an architecture is to be taken where the hub is not asked: its stand-ins lie in `folder` afterwards.

    Pixels and GELU are those of its first published tag, where it has one.

    Args:
        name: open_clip's.
        folder: for what is made.
        blocks: the most that a tower has; None: as published.

    Raises:
        KeyError: a text tower or a tokenizer that no stand-in is known of.
    """
    config = open_clip.get_model_config(name)
    config = config if blocks is None else with_few_blocks(config, blocks)
    text = config["text_cfg"]
    tags = open_clip.list_pretrained_tags_by_model(name)
    like, tokenizer, file = f"{name}:{tags[0]}" if tags else None, None, None
    if repository := text.get("hf_tokenizer_name"):
        tokenizer = folder / "tokenizers" / _plain(repository)
        if not tokenizer.is_dir():
            stand_in(repository)(tokenizer)
    if tower := text.get("hf_model_name"):
        inner = folder / "towers" / _plain(tower)
        inner.mkdir(parents=True, exist_ok=True)
        described = TEXT_TOWERS[tower]
        (inner / "config.json").write_text(
            json.dumps(described if blocks is None else text_tower_of(described, blocks))
        )
        config = {**config, "text_cfg": {**text, "hf_model_name": str(inner)}}
    if tower or blocks is not None:
        file = folder / f"{name}.json"
        file.write_text(json.dumps(config))
    return ModelOptions(like=like, tokenizer=tokenizer, config=file)


def _plain(repository: str) -> str:
    return repository.replace("/", "--")
