"""Small tokenizers of every kind that open_clip's configs name, and texts that tokenizers stumble over.

The real vocabularies lie on the hub; what matters here is what happens around a vocabulary: cleaning, special tokens,
truncation and padding.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CONTEXT = 24
AWKWARD = (
    "",
    "   ",
    "\n\n\t",
    "\u3000\u2003\u00a0",
    "a photo of a cat.",
    "A PHOTO OF THE DOG",
    "two\nlines\r\nand\ttabs",
    "line\u2028separator\u2029paragraph\x85next",
    "\x1cfile\x1dgroup\x1erecord\x1funit",
    "“curly” ‘quotes’ don’t",
    "rock &amp; roll",
    "rock &amp;amp; roll &amp;amp;amp;lt; x",
    "5 &lt; 6 &#39;x&#x27; &nbsp; &eacute; &notanentity; &copy",
    "<b>bold</b> &amp; e&#769;",
    "full，width，commas！ＡＢＣ１２３",
    "ﬁne ﬂuﬃer ﬀ ĳ",
    "\ufeffbyte order mark",
    "zero\u200bwidth\u200djoiner",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ",
    "İstanbul ISTANBUL ı ſtraße STRASSE",
    "cafe\u0301 café",
    "Ünïcödé ÆØÅ",
    "schÃ¶n mojibake â€œquotesâ€\x9d",
    "<|endoftext|> inside <|startoftext|>",
    "<end_of_text> inside !<start_of_text> <START_OF_TEXT>",
    "<ſtart_of_text>",
    "[SEP] [CLS] [PAD] [MASK] <s> </s> <pad> <unk> <eos> <bos>",
    "[sep][cls]",
    "😀 🏳️‍🌈 👩‍👩‍👧‍👦 🇩🇪 ☃",
    "一只猫的照片，很可爱。",
    "猫の写真 ﾈｺ 고양이",
    "صورة قطة भारत ไทย",
    "snake_case __init__ a_b",
    "!!! ... ?!#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "it's we're I'll 'S 'ſ you'd",
    "1234567890 ½ ² ③ Ⅷ",
    "x" * 300,
    "word " * 300,
    "one, two. " * 40,
    "\x1b[31mred\x1b[0m \x00 \x07",
    "\ud800 lone surrogate",
    "▁under▁block Ġbyte</w>",
    "\U00010570 \ua7dc new capitals \u1c89",
    "a" * 22,
    "a b c d e f g h i j k l m n o p q r s t u",
    "a b c d e f g h i j k l m n o p q r s t u v",
    "a b c d e f g h i j k l m n o p q r s t u v w",
)
"""What users have typed, and worse."""

_PIECES = st.sampled_from(
    [*AWKWARD[:-8], "&amp;", "&#", ";", "Σ", "’", "\ufeff", "<|endoftext|>", "[SEP]", "</s>", "_"]
)
any_text = st.one_of(st.text(max_size=60), st.lists(st.one_of(_PIECES, st.text(max_size=8)), max_size=5).map("".join))
"""Any text at all, and awkward pieces beside one another."""

_WORDS = (
    "a",
    "photo",
    "of",
    "the",
    "cat",
    "dog",
    "two",
    "lines",
    "rock",
    "roll",
    "bold",
    "full",
    "width",
    "fine",
    "red",
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip(**options: Any) -> Any:
    """open_clip's own byte-pair tokenizer."""
    return open_clip.SimpleTokenizer(context_length=CONTEXT, **options)


def wrapped(tokenizer: Tokenizer, folder: Path, names: dict[str, str], options: dict[str, Any]) -> Any:
    """open_clip's wrapper of a Hugging Face tokenizer that lies in a folder."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    return HFTokenizer(str(folder), context_length=CONTEXT, **options)


def bert(folder: Path, **options: Any) -> Any:
    """WordPiece as bert-base-uncased (CLIPA): [CLS] text [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *dict.fromkeys([*_WORDS, *_LETTERS, *"!?.,;:'\"#$%&()*+-/<=>@[\\]^_`{|}~0123456789猫"])]
    words += [f"##{letter}" for letter in _LETTERS]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return wrapped(tokenizer, folder, names | {"mask_token": "[MASK]"}, options)


def clips(folder: Path, **options: Any) -> Any:
    """WordPiece with CLIPS' own ends: start, text, end, padding, class token last."""
    inner = bert(folder / "plain", **options)
    names = {"bos_token": "[MASK]", "eos_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    return wrapped(inner.tokenizer.backend_tokenizer, folder / "clips", names, {"tokenizer_mode": "clips", **options})


def unigram(folder: Path, **options: Any) -> Any:
    """Sentencepiece's unigram as T5 (SigLIP, mT5): text </s>."""
    return _sentencepiece(folder, ["<pad>", "</s>", "<unk>"], "$A </s>", options)


def xlm_roberta(folder: Path, **options: Any) -> Any:
    """Sentencepiece's unigram as XLM-R and XLM-V: <s> text </s>, padding that is no zero."""
    return _sentencepiece(folder, ["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", options)


def nllb(folder: Path, **options: Any) -> Any:
    """Pieces as NLLB: language text </s>, the language behind all others."""
    return _sentencepiece(folder, ["<s>", "<pad>", "</s>", "<unk>"], "eng_Latn $A </s>", options, ["eng_Latn"])


def _sentencepiece(
    folder: Path, special: list[str], single: str, options: dict[str, Any], behind: Sequence[str] = ()
) -> Any:
    pieces = [(name, 0.0) for name in special] + [("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in _WORDS if len(word) > 1]
    pieces += [(letter, -6.0) for letter in [*_LETTERS, *_LETTERS.upper(), *".,!'\"&<>_;#0123456789猫éσς"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*special, *behind])
    ends = [(name, tokenizer.token_to_id(name)) for name in (*special, *behind)]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return wrapped(tokenizer, folder, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, options)


def bytes_bpe(folder: Path, **options: Any) -> Any:
    """Byte-level pairs as roberta-base: <s> text </s>, padding that is no zero."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return wrapped(tokenizer, folder, names | {"sep_token": "</s>", "cls_token": "<s>"}, options)


def gemma(folder: Path, **options: Any) -> Any:
    """Pairs of characters with bytes to fall back on as Gemma (SigLIP2): text <eos>, filled up in front by default."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *_LETTERS]
    model = models.BPE({word: i for i, word in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return wrapped(tokenizer, folder, names | {"padding_side": "left"}, options)


KINDS: dict[str, Callable[[Path], Any]] = {
    "clip": lambda folder: clip(),
    "clip, whitespace": lambda folder: clip(clean="whitespace"),
    "clip, canonicalize": lambda folder: clip(clean="canonicalize"),
    "clip, more special tokens": lambda folder: clip(additional_special_tokens=["<image>", "###"]),
    "bert": bert,
    "clipa": lambda folder: bert(folder, strip_sep_token=True),
    "clipa, lower": lambda folder: bert(folder, strip_sep_token=True, clean="lower"),
    "clips": lambda folder: clips(folder, clean="canonicalize"),
    "siglip": lambda folder: unigram(folder, clean="canonicalize"),
    "mt5": unigram,
    "xlm-roberta": xlm_roberta,
    "nllb": nllb,
    "siglip2": lambda folder: gemma(folder, clean="canonicalize"),
    "roberta": bytes_bpe,
    "roberta, stripped": lambda folder: bytes_bpe(folder, strip_sep_token=True),
}
"""What makes each, in a folder of its own."""

_OF_REPOSITORY: dict[str, Callable[..., Any]] = {
    r"bert-base-uncased": bert,
    r"google/mt5-.*|timm/.*SigLIP(-.*)?": unigram,
    r"xlm-roberta-.*|facebook/xlm-v-.*": xlm_roberta,
    r"facebook/nllb-.*": nllb,
    r"roberta-.*": bytes_bpe,
    r"timm/.*SigLIP2(-.*)?": gemma,
}


def stand_in(repository: str) -> Callable[..., Any]:
    """What makes a tokenizer of the same kind as a repository's on the hub.

    Raises:
        KeyError: nobody has said yet what kind that is.
    """
    for pattern, make in _OF_REPOSITORY.items():
        if re.fullmatch(pattern, repository):
            return make
    raise KeyError(repository)
