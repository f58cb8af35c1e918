"""The runtime's tokenizer gives open_clip's ids on every text, for every tokenizer that open_clip has."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SigLipTokenizer, get_clean_fn
from tokenizer_kinds import AWKWARD, CONTEXT, KINDS, any_text, bert, clip
from tokenizers import Tokenizer, processors

from d4c_onnx.errors import BundleError
from d4c_onnx.manifest import CLEANINGS, TokenizerInfo
from d4c_onnx.models.tokenizer_export import write_tokenizer
from d4c_onnx.runtime.cleaning import clean
from d4c_onnx.runtime.tokenizer import TextTokenizer

Pair = tuple[Any, TextTokenizer]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """By kind: a tokenizer of open_clip's, and the runtime's of the file that was written from it."""
    made = {}
    for kind, make in KINDS.items():
        if find_spec("transformers") or kind.startswith("clip"):
            folder = tmp_path_factory.mktemp("tokenizer")
            reference = make(folder / "source")
            info = write_tokenizer(reference, CONTEXT, folder / "tokenizer.json", fixed=True)
            made[kind] = reference, TextTokenizer(folder / "tokenizer.json", info)
    return made


def _same(pair: Pair, texts: list[str]) -> None:
    reference, tokenizer = pair
    ids, expected = tokenizer(texts), reference(texts).numpy()
    assert ids.dtype == np.int64
    wrong = [text for text, row, other in zip(texts, ids, expected, strict=True) if not np.array_equal(row, other)]
    assert not wrong


def test_awkward_texts(pairs: dict[str, Pair]) -> None:
    for pair in pairs.values():
        _same(pair, list(AWKWARD))


@given(st.lists(any_text, min_size=5, max_size=8))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_five_hundred_texts_and_more(pairs: dict[str, Pair], texts: list[str]) -> None:
    for pair in pairs.values():
        _same(pair, texts)


def test_most_texts_need_no_runtime(pairs: dict[str, Pair]) -> None:
    """tokenizer.json alone, as other programs read it: all but mojibake, rare entities and special tokens."""
    plain = ("cat", "“curly”", "&amp; roll", "width", "fluf", "ΣΑΣ", "|endof", "\ufeff", "snake", "word word", "   ")
    for reference, tokenizer in pairs.values():
        alone, expected = Tokenizer.from_file(str(tokenizer.path)), reference(list(AWKWARD)).tolist()
        wrong = [
            text
            for text, ids in zip(AWKWARD, expected, strict=True)
            if "\ud800" in text or alone.encode(text).ids != ids
        ]
        if tokenizer.info.last_id is None:  # a token behind the padding is no business of tokenizer.json
            assert len(wrong) <= 9
            assert not [text for text in wrong if any(part in text for part in plain)]


def test_batches_are_as_long_as_their_longest(tmp_path: Path) -> None:
    reference = clip()
    info = write_tokenizer(reference, CONTEXT, tmp_path / "tokenizer.json")
    ids = TextTokenizer(tmp_path / "tokenizer.json", info)(["a", "a photo of a cat"])
    assert ids.tolist() == reference(["a", "a photo of a cat"])[:, :7].tolist()


@pytest.mark.parametrize("mask", ["simple", "random", "shuffle"])
def test_masks_that_draw_leave_short_texts_alone(tmp_path: Path, mask: str) -> None:
    """What they draw of a longer text is another one each time; the runtime keeps its beginning."""
    reference = clip(reduction_mask=mask)
    info = write_tokenizer(reference, CONTEXT, tmp_path / "tokenizer.json", fixed=True)
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json", info)
    short = [text for text in AWKWARD if len(reference.encode(text)) <= CONTEXT - 2]
    assert len(short) > 20
    _same((reference, tokenizer), short)
    reference.reduction_fn = None
    _same((reference, tokenizer), ["word " * 300])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"reduction_mask": "syntax"}, "nltk"),
        ({"additional_special_tokens": ["<|image|>"]}, "regular expression"),
        ({"additional_special_tokens": ["[IMG]"]}, "regular expression"),
    ],
)
def test_what_cannot_be_had_without_open_clip_has_no_file(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    info = write_tokenizer(clip(**options), CONTEXT, tmp_path / "tokenizer.json")
    assert not info.has_file
    assert why in info.cleaning
    with pytest.raises(BundleError, match="own tokenizer"):
        TextTokenizer(tmp_path / "tokenizer.json", info)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_truncation_is_kept(tmp_path: Path, side: str) -> None:
    pytest.importorskip("transformers")
    reference = bert(tmp_path / "source")
    reference.tokenizer.truncation_side = side
    info = write_tokenizer(reference, CONTEXT, tmp_path / "tokenizer.json", fixed=True)
    _same((reference, TextTokenizer(tmp_path / "tokenizer.json", info)), ["one two three four " * 20])


def test_the_models_own_tokenizer_is_left_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    reference = bert(tmp_path / "source", strip_sep_token=True, clean="canonicalize")
    before = reference.tokenizer.backend_tokenizer.to_str()
    write_tokenizer(reference, CONTEXT, tmp_path / "tokenizer.json", fixed=True)
    assert reference.tokenizer.backend_tokenizer.to_str() == before


def test_siglips_own_class_canonicalizes(tmp_path: Path) -> None:
    """It reads sentencepiece files from the hub; what it does around them is what counts."""
    pytest.importorskip("transformers")
    reference = SigLipTokenizer.__new__(SigLipTokenizer)
    reference.tokenizer = KINDS["siglip"](tmp_path / "source").tokenizer
    reference.context_length = CONTEXT
    info = write_tokenizer(reference, CONTEXT, tmp_path / "tokenizer.json", fixed=True)
    assert (info.type, info.clean) == ("SigLipTokenizer", "canonicalize")
    _same((reference, TextTokenizer(tmp_path / "tokenizer.json", info)), list(AWKWARD))


@given(any_text, st.sampled_from(CLEANINGS))
@settings(max_examples=200, deadline=None)
def test_cleaning_is_open_clips(text: str, name: str) -> None:
    assert clean(text, name) == get_clean_fn(name)(text)


def test_an_unknown_cleaning_is_refused() -> None:
    with pytest.raises(BundleError, match="unknown cleaning 'upper'"):
        clean("a", "upper")


def test_bundles_of_before_are_read_as_before(tmp_path: Path) -> None:
    """Without a name of a cleaning, texts reach the file as they are."""
    file = tmp_path / "tokenizer.json"
    info = write_tokenizer(clip(), CONTEXT, file)
    fast = Tokenizer.from_file(str(file))
    expected = [encoding.ids for encoding in fast.encode_batch(list(AWKWARD[:-20]))]
    for old in (None, replace(info, clean=None)):
        assert TextTokenizer(file, old)(list(AWKWARD[:-20])).tolist() == expected


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text("nonsense")
    with pytest.raises(BundleError, match=r"tokenizer\.json: is no tokenizer"):
        TextTokenizer(file)
    info = write_tokenizer(clip(), CONTEXT, file)
    content = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(content | {"added_tokens": []}), "utf-8")
    with pytest.raises(BundleError, match="start and end token"):
        TextTokenizer(file, info)(["a"])
    file.write_text(json.dumps(content | {"normalizer": {"type": "Lowercase"}}), "utf-8")
    with pytest.raises(BundleError, match="does not begin with the cleaning"):
        TextTokenizer(file, TokenizerInfo("HFTokenizer", CONTEXT, "", clean="lower"))


def test_no_torch_is_needed(tmp_path: Path) -> None:
    info = write_tokenizer(clip(), CONTEXT, tmp_path / "tokenizer.json")
    code = (
        "import sys; from pathlib import Path; from d4c_onnx.manifest import TokenizerInfo;"
        "from d4c_onnx.runtime.tokenizer import TextTokenizer;"
        f"info = TokenizerInfo('clip-bpe', {CONTEXT}, '', {info.sot_id}, {info.eot_id}, clean='lower');"
        "print(TextTokenizer(Path(sys.argv[1]), info)(['a “cat”']).tolist());"
        "assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    assert json.loads(done.stdout) == clip()(["a “cat”"])[:, :6].tolist()


@pytest.mark.parametrize("cut", [{"max_length": 5, "stride": 3}, {"max_length": 1, "stride": 0}])
def test_a_file_that_cuts_where_the_library_panics_is_refused(tmp_path: Path, cut: dict[str, int]) -> None:
    info = write_tokenizer(clip(), CONTEXT, tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert content["truncation"]["stride"] == 0
    content["truncation"] |= cut
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=f"cuts texts to {cut['max_length']} tokens"):
        TextTokenizer(tmp_path / "tokenizer.json", info)


def test_a_template_that_names_an_unknown_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    made = bert(tmp_path / "source").tokenizer.backend_tokenizer
    end = [("[SEP]", 1)]
    made.post_processor = processors.Sequence([processors.TemplateProcessing(single="$A [SEP]", special_tokens=end)])
    made.save(str(path))
    assert TextTokenizer(path, TokenizerInfo("tokenizer.json", 1, cleaning="none"))(["a"]).size
    content = json.loads(path.read_text("utf-8"))
    [template] = content["post_processor"]["processors"]
    template["special_tokens"]["[CLS]"] = template["special_tokens"].pop("[SEP]")
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"names the token '\[SEP\]', whose id"):
        TextTokenizer(path, TokenizerInfo("tokenizer.json", 1, cleaning="none"))
