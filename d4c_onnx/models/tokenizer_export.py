"""open_clip's tokenizers as a Hugging Face `tokenizer.json` and what the manifest says beside it.

CLIP's is built offline from open_clip's own vocabulary, a wrapped one is what the wrapper holds. The cleaning that
open_clip does in Python stands in the file as normalizers, as far as `tokenizers` can express it, and by name in the
manifest: `runtime.tokenizer` does it to the letter.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from d4c_onnx.manifest import CLEANINGS, TokenizerInfo
from d4c_onnx.models.cleaning_normalizers import cleaning_normalizers
from d4c_onnx.models.folder_tokenizer import FolderTokenizer

# Whatever the case: of a long s, which is no capital and stays, too
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_READ_AS_EXPRESSION = set(r"\.^$*+?{}[]|()")


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
    special = [tokenizer.decoder[index] for index in tokenizer.all_special_ids]
    clean, words = _cleaning(tokenizer)
    info = TokenizerInfo("clip-bpe", context_length, words, sot, eot, pad_id=0, clean=clean)
    refused = _why_not(tokenizer, special)
    if refused or clean is None:
        return replace(info, has_file=False, cleaning=refused or words)
    fast = Tokenizer(models.BPE(vocab, list(tokenizer.bpe_ranks), end_of_word_suffix="</w>", unk_token=special[1]))
    fast.normalizer = cleaning_normalizers(clean)
    split = pre_tokenizers.Split(Regex(_PATTERN), "removed", invert=True)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.BPEDecoder(suffix="</w>")
    # normalized: open_clip looks for them in the cleaned text, so that a user's own count, too, in capitals as well
    fast.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in special])
    fast.post_processor = processors.TemplateProcessing(
        single=[special[0], "$A", special[1]], special_tokens=[(special[0], sot), (special[1], eot)]
    )
    fast.enable_truncation(context_length)
    fast.enable_padding(length=context_length if fixed else None, pad_id=0, pad_token=fast.id_to_token(0))
    path.write_text(fast.to_str(pretty=True), "utf-8")
    return info


def _why_not(tokenizer: Any, special: list[str]) -> str | None:
    """Why ids are not to be had without open_clip: masks that draw at random leave texts that fit alone."""
    reduction = getattr(tokenizer, "reduction_fn", None)
    if getattr(reduction, "__name__", "") == "syntax_mask_tokenize":
        return "the client's: open_clip's syntax mask asks nltk, which tokenizer.json cannot"
    odd = next((token for token in special if _READ_AS_EXPRESSION & set(token)), None)
    return odd and f"the client's: open_clip reads its special token {odd[:50]!r} as a regular expression"


def _write_wrapped(tokenizer: Any, context_length: int, path: Path, fixed: bool) -> TokenizerInfo:
    inner = getattr(tokenizer, "tokenizer", None)
    fast = getattr(inner, "backend_tokenizer", None)
    clean, words = _cleaning(tokenizer)
    info = TokenizerInfo(type(tokenizer).__name__, context_length, words)
    if inner is None or fast is None:  # a slow tokenizer has no tokenizer.json form; the manifest says so
        return replace(info, has_file=False)
    last = inner.cls_token_id if getattr(tokenizer, "tokenizer_mode", "") == "clips" else None
    zeroed = inner.sep_token_id if getattr(tokenizer, "strip_sep_token", False) and last is None else None
    fast = Tokenizer.from_str(_with_cleaning(fast, clean, zeroed))  # a copy: the model's own stays as it is
    if last is not None:
        ends = [(inner.bos_token, inner.bos_token_id), (inner.eos_token, inner.eos_token_id)]
        single = [inner.bos_token, "$A", inner.eos_token]
        fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    length = context_length - (last is not None)
    fast.enable_truncation(length, direction=getattr(inner, "truncation_side", "right"))
    pad = getattr(inner, "pad_token_id", 0) or 0
    side = "right" if last is not None else getattr(inner, "padding_side", "right")
    wanted = length if fixed or last is not None else None
    fast.enable_padding(direction=side, length=wanted, pad_id=pad, pad_token=fast.id_to_token(pad))
    path.write_text(fast.to_str(pretty=True), "utf-8")
    eot = getattr(inner, "eos_token_id", None)
    return replace(info, pad_id=pad, eot_id=eot, clean=clean, zeroed_id=zeroed, last_id=last)


def _with_cleaning(fast: Tokenizer, clean: str | None, zeroed: int | None) -> str:
    """A tokenizer.json with the cleaning before its own normalizer, and 0 where it would end texts with `zeroed`."""
    content = json.loads(fast.to_str())
    if clean is not None:
        cleaner = Tokenizer(models.BPE())
        cleaner.normalizer = cleaning_normalizers(clean)
        first, own = json.loads(cleaner.to_str())["normalizer"], content["normalizer"]
        content["normalizer"] = {"type": "Sequence", "normalizers": [first, *([own] if own else [])]}
    if zeroed is not None:
        content["post_processor"] = _zeroed(content["post_processor"], zeroed, fast.id_to_token(0) or "")
    return json.dumps(content)


def _zeroed(node: Any, token: int, zero: str) -> Any:
    """A post-processor's description whose ends of that id are 0."""
    if isinstance(node, list):
        if len(node) == 2 and node[1] == token and isinstance(node[0], str):  # Bert's and Roberta's pairs
            return [zero, 0]
        return [_zeroed(part, token, zero) for part in node]
    if not isinstance(node, dict):
        return node
    if node.get("ids") == [token]:  # a template's
        return {**node, "ids": [0], "tokens": [zero]}
    return {key: _zeroed(value, token, zero) for key, value in node.items()}


def _cleaning(tokenizer: Any) -> tuple[str | None, str]:
    """open_clip's name of what a tokenizer does to a text first, and a sentence; no name where it is another's."""
    import open_clip.tokenizer as own

    name: str | None = None
    if isinstance(tokenizer, FolderTokenizer):
        return None, "none: transformers' tokenizers are all in tokenizer.json"
    if isinstance(tokenizer, own.SigLipTokenizer):
        name = "canonicalize"
    elif isinstance(tokenizer, own.HFTokenizer | own.SimpleTokenizer):
        get: Callable[[str], Any] = own.get_clean_fn
        name = next((known for known in CLEANINGS if get(known) is tokenizer.clean_fn), None)
    if name is None:
        return None, "the client's"
    return name, f"open_clip's {name}, by d4c_onnx.runtime.tokenizer; tokenizer.json alone does most of it"
