"""What a manifest calls its model is a stranger's word: nothing is fetched or opened by it unasked."""

from dataclasses import replace
from pathlib import Path

import pytest
from killed_runs import FP32

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import ModelError
from d4c_onnx.pipeline.lazy_model import LazyModel
from d4c_onnx.progress import silent


@pytest.mark.parametrize("name", ["hf-hub:somebody/model", "local-dir:/srv/model", "/srv/model", "../model", "a:b"])
def test_a_bundles_word_is_not_followed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("d4c_onnx.pipeline.source.load", lambda model, *_: loaded.append(model))
    info = replace(FP32.model, name=name, pretrained="hub")
    with pytest.raises(ModelError, match="not fetched or opened unasked"):
        LazyModel(Bundle(tmp_path, replace(FP32, model=info)), None).load(silent)
    assert not loaded
