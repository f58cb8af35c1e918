"""CLIP's BPE tokenizer as a Hugging Face `tokenizer.json`, built offline from open_clip's own vocabulary.

open_clip first repairs text with ftfy and unescapes HTML; `tokenizers` cannot express that, so those two steps are
left to the client (recorded as `cleaning` in the manifest). Ids are equal for all other text.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from d4c_onnx.manifest import TokenizerInfo

SOT, EOT = "<|startoftext|>", "<|endoftext|>"  # the field's names for open_clip's <start_of_text>, <end_of_text>
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_tokenizer(tokenizer: Any, context_length: int, path: Path, fixed: bool = False) -> TokenizerInfo:
    """Write `tokenizer.json`, where the tokenizer has that form, and return what the manifest says of it.

    Args:
        tokenizer: open_clip's SimpleTokenizer, or its wrapper of a Hugging Face tokenizer.
        context_length: what longer texts are cut to.
        path: of the file.
        fixed: pad every text to that length (the text encoder takes no other), not only to the longest of a batch.
    """
    if hasattr(tokenizer, "bpe_ranks"):
        return _write_clip(tokenizer, context_length, path, fixed)
    return _write_wrapped(tokenizer, context_length, path, fixed)


def _write_clip(tokenizer: Any, context_length: int, path: Path, fixed: bool) -> TokenizerInfo:
    vocab = dict(tokenizer.encoder)
    sot, eot = tokenizer.sot_token_id, tokenizer.eot_token_id
    vocab = {token: index for token, index in vocab.items() if index not in (sot, eot)} | {SOT: sot, EOT: eot}
    fast = Tokenizer(models.BPE(vocab, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>", unk_token=EOT))
    fast.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_PATTERN), "removed", invert=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.BPEDecoder(suffix="</w>")
    fast.add_special_tokens([SOT, EOT])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{SOT} $A {EOT}", special_tokens=[(SOT, sot), (EOT, eot)]
    )
    fast.enable_truncation(context_length)
    fast.enable_padding(length=context_length if fixed else None, pad_id=0, pad_token=fast.id_to_token(0))
    path.write_text(fast.to_str(pretty=True), "utf-8")
    return TokenizerInfo(
        type="clip-bpe",
        context_length=context_length,
        cleaning="lower case, white space folded (open_clip's ftfy and HTML unescape are the client's)",
        sot_id=sot,
        eot_id=eot,
        pad_id=0,
    )


def _write_wrapped(tokenizer: Any, context_length: int, path: Path, fixed: bool) -> TokenizerInfo:
    inner = getattr(tokenizer, "tokenizer", None)
    fast = getattr(inner, "backend_tokenizer", None)
    info = TokenizerInfo(type(tokenizer).__name__, context_length, cleaning="the client's")
    if fast is None:  # SigLIP's sentencepiece: no tokenizer.json form; the manifest says so
        return replace(info, has_file=False)
    fast.enable_truncation(context_length)
    pad = getattr(inner, "pad_token_id", 0) or 0
    length = context_length if fixed else None
    fast.enable_padding(length=length, pad_id=pad, pad_token=fast.id_to_token(pad))
    path.write_text(fast.to_str(pretty=True), "utf-8")
    return replace(info, pad_id=pad, eot_id=getattr(inner, "eos_token_id", None))
