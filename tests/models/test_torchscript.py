"""TorchScript archives are read as data: the same tensors as torch's, and nothing in them runs."""

import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from d4c_onnx.errors import ModelError
from d4c_onnx.models.load import load_model
from d4c_onnx.models.torchscript import is_torchscript, read_torchscript


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, tiny_models: tuple[str, str]) -> Path:
    """As OpenAI publishes its models: traced, in float16, with three numbers beside the weights."""
    model = load_model(tiny_models[0], "random", 7).model
    for name, value in (("input_resolution", 32), ("context_length", 16), ("vocab_size", 49408)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 16, dtype=torch.long)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about sizes
        traced = torch.jit.trace_module(model, inputs, check_trace=False)
    file = tmp_path_factory.mktemp("archive") / "openai.pt"
    traced.half().save(str(file))
    return file


def test_the_tensors_are_torchs(archive: Path) -> None:
    assert is_torchscript(archive)
    own = torch.jit.load(str(archive)).state_dict()
    read = read_torchscript(archive)
    assert set(read) == set(own)
    assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in own.items())


def test_openais_archive_is_a_checkpoint_that_says_what_it_is(archive: Path, tiny_models: tuple[str, str]) -> None:
    loaded = load_model(tiny_models[0], str(archive))
    assert loaded.quick_gelu
    assert loaded.sources["mean"] == "OpenAI's input_resolution, context_length, vocab_size in the checkpoint"
    model = load_model(tiny_models[0], "random", 7).model.state_dict()
    assert all(torch.equal(value, model[name].half().float()) for name, value in loaded.model.state_dict().items())


def test_what_torch_saves_otherwise_is_none(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "w.pt")
    (tmp_path / "text.pt").write_text("nothing")
    assert not is_torchscript(tmp_path / "w.pt")
    assert not is_torchscript(tmp_path / "text.pt")


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def _rewritten(archive: Path, file: Path, pickled: bytes | None, **entries: bytes) -> Path:
    """An archive with another data.pkl, and other storages."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            name = entry.filename.partition("/")[2]
            content = pickled if name == "data.pkl" and pickled is not None else source.read(entry)
            target.writestr(entry.filename, entries.get(name.replace("data/", "data_"), content))
    return file


def test_nothing_in_an_archive_runs(tmp_path: Path, archive: Path, tiny_models: tuple[str, str]) -> None:
    """Neither what its pickle asks for, nor its code, which need not even be any."""
    mark = tmp_path / "ran"
    evil = _rewritten(archive, tmp_path / "evil.pt", pickle.dumps({"x": _Evil(mark)}, protocol=2))
    with pytest.raises(
        ModelError, match=r"evil\.pt: is a TorchScript archive .*tag: --pretrained openai.*torch\.jit\.load"
    ):
        load_model(tiny_models[0], str(evil))
    assert not mark.exists()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "broken.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, b"raise" if "/code/" in entry.filename else source.read(entry))
    assert load_model(tiny_models[0], str(tmp_path / "broken.pt")).quick_gelu


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\x80\x02", b"\x80\x02}.", b"\x80\x02K\x01\x85b."])
def test_damaged_archives_are_refused(tmp_path: Path, archive: Path, content: bytes) -> None:
    with pytest.raises(ModelError, match=r"damaged\.pt: is a TorchScript archive"):
        read_torchscript(_rewritten(archive, tmp_path / "damaged.pt", content))
    with pytest.raises(ModelError, match="larger than its storage"):
        read_torchscript(_rewritten(archive, tmp_path / "short.pt", None, data_0=b"\x00"))


def test_a_frozen_archive_names_the_way_out(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is an old form
        frozen = torch.jit.freeze(torch.jit.trace(nn.Linear(2, 2).eval(), torch.zeros(1, 2)))
    frozen.save(str(tmp_path / "frozen.pt"))
    with pytest.raises(ModelError, match="without tensors of its own"):
        read_torchscript(tmp_path / "frozen.pt")
