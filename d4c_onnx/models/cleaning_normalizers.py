"""open_clip's cleaning of texts as normalizers of a `tokenizer.json`, as far as `tokenizers` can express it.

For programs that read the file without d4c_onnx. Not expressed: mojibake, HTML entities but the most frequent, Python's
own folding of letters to lower case, and that special tokens are looked for before any normalizer.
"""

from typing import Any

from tokenizers import Regex, normalizers

_ENTITIES = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&#39;": "'", "&#x27;": "'", "&nbsp;": "\u00a0"}
_AMPERSANDS = 3  # ftfy unescapes once, open_clip twice


def cleaning_normalizers(name: str) -> normalizers.Sequence:
    """The normalizers of a cleaning of open_clip's: `lower`, `canonicalize` or `whitespace`."""
    parts = [*_repairs(), *_entities(), normalizers.NFC()]
    if name == "canonicalize":
        parts += [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    if name in ("lower", "canonicalize"):
        final_sigma = normalizers.Replace(Regex(r"(?<=\p{L})Σ(?!\p{L})"), "ς")
        parts += [final_sigma, normalizers.Lowercase()]
    parts += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence(parts)


def _repairs() -> list[Any]:
    """ftfy's, of single characters and of escapes."""
    from ftfy import chardata

    single = chardata.LIGATURES | chardata.WIDTH_MAP
    control = "".join(f"\\x{{{code:x}}}" for code in sorted(chardata.CONTROL_CHARS))
    return [
        normalizers.Replace(Regex(r"\x1b\[[\d;]*[a-zA-Z]"), ""),
        *(normalizers.Replace(chr(code), letters) for code, letters in single.items()),
        normalizers.Replace(Regex(chardata.SINGLE_QUOTE_RE.pattern), "'"),
        normalizers.Replace(Regex(chardata.DOUBLE_QUOTE_RE.pattern), '"'),
        normalizers.Replace(Regex(r"\r\n?|[\x{2028}\x{2029}\x{85}]"), "\n"),
        normalizers.Replace(Regex(f"[{control}]"), ""),
    ]


def _entities() -> list[Any]:
    replaced = [("&amp;", "&")] * _AMPERSANDS + list(_ENTITIES.items())
    return [normalizers.Replace(entity, letter) for entity, letter in replaced]
