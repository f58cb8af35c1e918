"""Is the bundle that is there the one that these files, and what is said of them, would become?

A digest tells the files; which of their outputs were taken is seen in the answers, which are compared with the files'.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import BundleError, CheckFailed
from d4c_onnx.foreign.beside import read_tokenizer
from d4c_onnx.foreign.opening import ForeignFiles, OpenedTowers, open_towers
from d4c_onnx.foreign.original import OriginalTower, check_same
from d4c_onnx.manifest import IMPORTED
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.runtime.trial import TRIAL_TEXT, trial_pixels


def check_made_of(bundle: Bundle, files: ForeignFiles, options: ModelOptions) -> None:
    """Nothing, where an import would give this bundle again.

    Args:
        options: what the user says of preprocessing.

    Raises:
        BundleError: it is another model's, of other files, or was made with other settings.
        GraphError, ModelError: a file is not what it must be, or nobody says what it cannot say itself.
    """
    opened = open_towers(files, options)
    if bundle.manifest.model.pretrained != IMPORTED or bundle.weights_sha256 != opened.sha256:
        wrong = ["other weights"]
    else:
        wrong = _other_settings(bundle, files, opened) or _other_answers(bundle, opened)
    if wrong:
        words = ["d4c-onnx", "import", *files.words(), *options.words(), "--name", bundle.path.name]
        words += ["--output", str(bundle.path.parent), "--overwrite"]
        raise BundleError(
            f"{bundle.path}: is there, and was made with {', '.join(wrong)}. To replace it, and all inside it: "
            f"{shlex.join(words)} ; or choose another --name."
        )


def _other_settings(bundle: Bundle, files: ForeignFiles, opened: OpenedTowers) -> list[str]:
    known = bundle.manifest.tokenizer
    found, _ = read_tokenizer(files.text, files.tokenizer)
    pad = None if files.pad_token is None else found.token_to_id(files.pad_token)
    wrong = {
        "other pixels": bundle.manifest.preprocess != opened.preprocess,
        "another tokenizer": _bare(found) != _bare(Tokenizer.from_file(str(bundle.tokenizer))),
        "another context length": files.context_length not in (None, known.context_length),
        # a causal tower never sees padding, and may be given another one
        "another padding": files.pad_token is not None and not known.causal and pad != known.pad_id,
    }
    return [what for what, differs in wrong.items() if differs]


def _bare(tokenizer: Tokenizer) -> str:
    """A tokenizer in its own words, without padding and cutting, which an import sets."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return str(tokenizer.to_str())


def _other_answers(bundle: Bundle, opened: OpenedTowers) -> list[str]:
    """Towers whose embedding is another output of the same file."""
    info = bundle.manifest.tokenizer
    ids = TextTokenizer(bundle.tokenizer, info)([TRIAL_TEXT])
    mask = None if info.causal or info.pad_id is None else (ids != info.pad_id).astype(np.int64)
    asked: dict[str, tuple[OriginalTower, Path, np.ndarray, np.ndarray | None]] = {
        "image": (
            OriginalTower(opened.image.original),
            bundle.image_encoder,
            trial_pixels(bundle.manifest.preprocess),
            None,
        ),
        "text": (OriginalTower(opened.text.original), bundle.text_encoder, ids, mask),
    }
    wrong = []
    for tower, (original, path, batch, hidden) in asked.items():
        expected, found = original.raw(batch, hidden), EncoderSession(path).run(batch)
        try:
            if expected.shape == found.shape:
                check_same(tower, expected, found)
                continue
        except (CheckFailed, BundleError):  # the latter: what is not finite
            pass
        wrong.append(f"another output of the {tower} tower")
    return wrong
