"""The bundle's tokenizer, written and compared with the model's own; a wrong one is not left behind."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from d4c_onnx.manifest import TokenizerInfo
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.models.tokenizer_export import write_tokenizer
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.untrusted_json import quoted

_AWKWARD = (
    "a photo of a cat.",
    "",
    " \n\u3000 ",
    "A “curly”\tquote, don’t &amp;amp; <b>5 &lt; 6</b>",
    "ΣΑΣ Σ，ＡＢＣ！ ﬁne \ufeffmark cafe\u0301 schÃ¶n",
    "snake_case !?#[]{}|~ <|endoftext|><end_of_text> [SEP] </s> <pad>",
    "😀🏳️‍🌈 一只猫的照片。 ½ ² 2024 'ſ",
    "word, and another. " * 100,
)


def write_checked_tokenizer(loaded: LoadedModel, path: Path, fixed: bool) -> TokenizerInfo:
    """Write `tokenizer.json` and return what the manifest says of it.

    Where the runtime would give a text other ids than the model's own tokenizer does, no file stays, and `cleaning`
    says why: whoever asks the bundle for ids is refused instead of answered wrongly.

    Args:
        loaded: the model.
        path: of the file.
        fixed: pad every text to the context length, not only to the longest of a batch.
    """
    info = write_tokenizer(loaded.tokenizer, loaded.context_length, path, fixed=fixed)
    if not info.has_file:
        return info
    # masks that draw at random give a long text other ids each time
    texts = list(_AWKWARD[:-1] if getattr(loaded.tokenizer, "reduction_fn", None) else _AWKWARD)
    expected, ids = loaded.tokenize(texts), TextTokenizer(path, info)(texts)
    behind = [(0, 0), (0, expected.shape[1] - ids.shape[1])]
    same = (np.pad(ids, behind, constant_values=info.pad_id or 0) == expected).all(1)
    if same.all():
        return info
    path.unlink()
    first = quoted(texts[int(np.flatnonzero(~same)[0])])
    why = f"the client's: tokenizer.json would give other ids than open_clip, first for {first}"
    return replace(info, has_file=False, cleaning=why, clean=None, zeroed_id=None, last_id=None)
