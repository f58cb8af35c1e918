"""Packages: each stack's contract, as far as it can be read off the files; and the same numbers."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from toys import MERGES, PAD, Toy, bundle_of, changed, json_of, right, tokens

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256
from d4c_onnx.graph.model import load_model
from d4c_onnx.packaging import STACKS, PackageReport, package_bundle, verify_package
from d4c_onnx.runtime import ClipSession
from d4c_onnx.runtime.golden import read_golden
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.trial import trial_pixels

TOY = Toy()


def _io(report: PackageReport, file: str) -> tuple[list[tuple[str, str, tuple]], list[tuple[str, tuple]]]:
    io = next(model.io for model in report.content.models if model.file == file)
    return [(entry.name, entry.dtype, entry.shape) for entry in io.inputs], [(e.name, e.shape) for e in io.outputs]


@pytest.mark.parametrize("target", STACKS)
def test_files_are_listed_with_their_hashes_and_nothing_else_is_there(
    target: str, packages: dict[str, PackageReport]
) -> None:
    report = packages[target]
    manifest = json_of(report.path / "d4c-package.json")
    found = {file.relative_to(report.path).as_posix() for file in report.path.rglob("*") if file.is_file()}
    assert found == {*manifest["files"], "d4c-package.json"}
    assert all(sha256(report.path / name) == entry["sha256"] for name, entry in manifest["files"].items())
    assert manifest["target"] == target
    assert "golden/golden.json" in found
    assert str(report.path.parent) not in json.dumps(manifest)


@pytest.mark.parametrize("target", STACKS)
def test_answers_are_the_bundles(target: str, packages: dict[str, PackageReport], toys: dict[str, Bundle]) -> None:
    bundle, report = toys[target], packages[target]
    ids = [text.input_ids for text in read_golden(bundle.path).texts]
    feeds = {"image": trial_pixels(bundle.manifest.preprocess), "text": np.array(ids[:1])}
    for model in report.content.models:
        session = EncoderSession(report.path / model.file)
        given = {}
        for entry in model.io.inputs:
            values = feeds["image" if entry.dtype == "float32" else "text"]
            given[entry.name] = values.astype(entry.dtype)
        answers = session.run_named(given)
        for tower in model.towers:
            name = model.io.outputs[0].name if len(model.towers) == 1 else f"{tower}_embeds"
            expected = EncoderSession(bundle.encoders[tower]).run(feeds[tower])
            np.testing.assert_allclose(answers[name].reshape(expected.shape), expected, atol=1e-6)


def test_transformersjs(packages: dict[str, PackageReport]) -> None:
    report = packages["transformersjs"]
    side = ("batch", 3, 8, 8)
    vision = ([("pixel_values", "float32", side)], [("image_embeds", ("batch", 4))])
    text = ([("input_ids", "int64", ("batch", "sequence"))], [("text_embeds", ("batch", 4))])
    assert _io(report, "onnx/vision_model_quantized.onnx") == vision
    assert _io(report, "onnx/text_model_quantized.onnx") == text
    inputs, outputs = _io(report, "onnx/model_quantized.onnx")
    assert [name for name, *_ in inputs] == ["input_ids", "pixel_values"]
    assert [name for name, _ in outputs] == ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"]
    config = json_of(report.path / "config.json")
    assert config["model_type"] == "clip"
    assert config["transformers.js_config"] == {"dtype": "q8"}
    tokenizer = json_of(report.path / "tokenizer_config.json")
    assert tokenizer["model_max_length"] == TOY.context
    assert tokenizer["pad_token"] == "a"
    pixels = json_of(report.path / "preprocessor_config.json")
    assert pixels["size"] == {"shortest_edge": 8}
    assert pixels["crop_size"] == {"height": 8, "width": 8}
    assert pixels["resample"] == 3
    for model in report.content.models:  # browsers have no kernel for INT4
        loaded = load_model(report.path / model.file)
        assert model.io.opset <= 18
        assert loaded.ir_version == 8
        assert "INT4" not in {value.dtype.name for value in loaded.graph.initializers.values()}


@pytest.mark.parametrize(("bits", "suffix", "dtype"), [("fp32", "", "fp32"), ("fp16", "_fp16", "fp16")])
def test_transformersjs_finds_other_widths(bits: str, suffix: str, dtype: str, tmp_path: Path) -> None:
    report = package_bundle(
        bundle_of(tmp_path / "toy", changed(TOY, bits=bits)).path, "transformersjs", tmp_path / "to"
    )
    assert (report.path / f"onnx/vision_model{suffix}.onnx").is_file()
    assert json_of(report.path / "config.json")["transformers.js_config"] == {"dtype": dtype}


def test_immich(packages: dict[str, PackageReport]) -> None:
    report, name = packages["immich"], "ViT-B-32__laion2b-s34b-b79k"
    given = [("image", "float32", ("batch", 3, 8, 8))]
    assert _io(report, f"{name}/visual/model.onnx") == (given, [("image_embeds", ("batch", 512))])
    inputs, _ = _io(report, f"{name}/textual/model.onnx")
    assert inputs == [("text", "int32", ("batch", "sequence"))]
    assert json_of(report.path / name / "config.json")["text_cfg"]["context_length"] == TOY.context
    pixels = json_of(report.path / name / "visual" / "preprocess_cfg.json")
    assert {"size", "interpolation", "mean", "std", "resize_mode"} <= set(pixels)
    assert json_of(report.path / name / "textual" / "tokenizer_config.json")["pad_token"] == "a"
    assert (report.path / name / "textual" / "tokenizer.json").is_file()


def test_fastembed(packages: dict[str, PackageReport]) -> None:
    report = packages["fastembed"]
    assert [len(model.io.outputs) for model in report.content.models] == [1, 1]  # the first one is used, silently
    assert _io(report, "text/model.onnx")[0] == [("input_ids", "int64", ("batch", "sequence"))]
    assert {"model.onnx", "preprocessor_config.json"} == {file.name for file in (report.path / "image").iterdir()}
    wanted = {"model.onnx", "tokenizer.json", "tokenizer_config.json", "config.json"}
    assert wanted == {file.name for file in (report.path / "text").iterdir()}


def test_triton(packages: dict[str, PackageReport]) -> None:
    repository = packages["triton"].path / "model_repository"
    names = {folder.name for folder in repository.iterdir()}
    assert names == {"image_encoder", "text_encoder", "image_pixels", "text_ids", "embed_image", "embed_text"}
    for name in names:
        config = (repository / name / "config.pbtxt").read_text()
        assert f'name: "{name}"' in config
        assert config.count("{") == config.count("}")
        assert (repository / name / "1").is_dir()
    assert not any((repository / "embed_text" / "1").iterdir())  # an ensemble has no file
    assert "dims: [ 3, 8, 8 ]" in (repository / "image_encoder" / "config.pbtxt").read_text()
    assert "dims: [ -1 ]" in (repository / "text_ids" / "config.pbtxt").read_text()
    for model in packages["triton"].content.models:
        assert all(entry.shape[0] == "batch" for entry in (*model.io.inputs, *model.io.outputs))


@pytest.mark.parametrize("name", ["image_pixels", "text_ids"])
def test_tritons_python_models_answer(
    name: str, packages: dict[str, PackageReport], toys: dict[str, Bundle], tmp_path: Path
) -> None:
    """What Triton calls, with tensors of the form that it hands over."""
    golden = toys["triton"].path / "golden" / read_golden(toys["triton"].path).images[0].file
    code = """
import sys, types, numpy as np
folder, given = sys.argv[1], {"image": open(sys.argv[2], "rb").read(), "text": b"the cat"}
class Tensor:
    def __init__(self, name, value): self.name, self.value = name, value
    def as_numpy(self): return self.value
class Response:
    def __init__(self, tensors=(), error=None): self.tensors, self.error = tensors, error
pb = types.ModuleType("triton_python_backend_utils")
class Error:
    INVALID_ARG = 3
    def __init__(self, message, code): self.message, self.code = message, code
pb.Tensor, pb.InferenceResponse, pb.TritonError = Tensor, Response, Error
pb.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
sys.modules["triton_python_backend_utils"] = pb
sys.path.insert(0, folder)
import model
served = model.TritonPythonModel(); served.initialize({})
made = lambda value: {name: np.array([[value]] * 2, object) for name in given}
[good] = served.execute([{name: np.array([[value]] * 2, object) for name, value in given.items()}])
print(good.tensors[0].name, *good.tensors[0].value.shape)
for wrong in (b"\\xff\\xfe", *(open(file, "rb").read() for file in sys.argv[3:])):
    [bad] = served.execute([made(wrong)])
    print("refused", bad.error.code == Error.INVALID_ARG, len(bad.tensors))
"""
    folder = packages["triton"].path / "model_repository" / name / "1"
    odd: list[Path] = []
    if name == "image_pixels":  # what pillow itself would read: many pixels in a small file, a format of no use
        odd = [tmp_path / "large.png", tmp_path / "odd.pcx"]
        Image.new("1", (8200, 8200)).save(odd[0])
        Image.new("RGB", (20, 20)).save(odd[1])
    asked = [sys.executable, "-c", code, folder, golden, *odd]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    shown = {"image_pixels": "pixel_values 2 3 8 8", "text_ids": "input_ids 2 7"}[name]
    assert done.stdout.splitlines() == [shown, *["refused True 0"] * (1 + len(odd))]


def test_optimum(packages: dict[str, PackageReport], toys: dict[str, Bundle]) -> None:
    report, bundle = packages["optimum"], toys["optimum"]
    rng = np.random.default_rng(0)
    pixels, ids = rng.standard_normal((2, 3, 8, 8), np.float32), tokens([4, 5, 6])
    answers = EncoderSession(report.path / "model.onnx").run_named({"pixel_values": pixels, "input_ids": ids})
    image, text = EncoderSession(bundle.image_encoder).run(pixels), EncoderSession(bundle.text_encoder).run(ids)
    np.testing.assert_allclose(answers["logits_per_image"], 10 * image @ text.T, rtol=1e-5)
    np.testing.assert_array_equal(answers["logits_per_text"], answers["logits_per_image"].T)
    assert {"config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"} <= {
        *report.content.files
    }


def test_a_bias_is_added_to_similarities(tmp_path: Path) -> None:
    made = bundle_of(tmp_path / "toy", changed(TOY, logit_bias=-3.0))
    report = package_bundle(made.path, "optimum", tmp_path / "to")
    feed = {"pixel_values": np.ones((1, 3, 8, 8), np.float32), "input_ids": tokens([4])}
    found = EncoderSession(report.path / "model.onnx").run_named(feed)
    np.testing.assert_allclose(
        found["logits_per_image"], 10 * found["image_embeds"] @ found["text_embeds"].T - 3, rtol=1e-5
    )


def test_openvino(packages: dict[str, PackageReport]) -> None:
    repository = packages["openvino"].path / "model_repository"
    served = json_of(repository / "config.json")["model_config_list"]
    for entry in served:
        assert (repository / entry["config"]["name"] / "1" / "model.onnx").is_file()
        assert entry["config"]["base_path"] == f"/models/{entry['config']['name']}"
    assert len(served) == 2


def test_librephotos(packages: dict[str, PackageReport]) -> None:
    folder = packages["librephotos"].path / "clip_vit_b32"
    assert {file.name for file in folder.iterdir()} == {"vision_model.onnx", "text_model.onnx", "tokenizer.json"}
    assert all(len(model.io.inputs) == len(model.io.outputs) == 1 for model in packages["librephotos"].content.models)


def test_rclip(packages: dict[str, PackageReport]) -> None:
    report = packages["rclip"]
    for tower in ("visual", "textual"):
        inputs, outputs = _io(report, f"ViT-B-32-256-datacomp_s34b_b86k/{tower}.onnx")
        assert [name for name, *_ in inputs] == ["input"]
        assert [name for name, _ in outputs] == ["output"]
    lines = gzip.decompress((report.path / "tokenizer/bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    assert lines[1 : 1 + len(MERGES)] == [" ".join(pair) for pair in MERGES]


def test_frigate(packages: dict[str, PackageReport]) -> None:
    folder = packages["frigate"].path / "model_cache" / "jinaai" / "jina-clip-v1"
    assert {"text_model_fp16.onnx", "vision_model_quantized.onnx", "preprocessor_config.json"} <= {
        file.name for file in folder.iterdir()
    }
    tree = folder / "tokenizer" / "models--jinaai--jina-clip-v1"
    revision = (tree / "refs" / "main").read_text()
    assert {"tokenizer.json", "tokenizer_config.json"} <= {
        file.name for file in (tree / "snapshots" / revision).iterdir()
    }


def test_vespa(packages: dict[str, PackageReport]) -> None:
    inputs, outputs = _io(packages["vespa"], "models/text_encoder.onnx")
    shape = ("batch", "sequence")
    assert inputs == [("input_ids", "int64", shape), ("attention_mask", "int64", shape)]
    assert outputs == [("last_hidden_state", ("batch", 1, 4))]
    names = EncoderSession(packages["vespa"].path / "models/text_encoder.onnx").input_names
    assert names == ["input_ids", "attention_mask"]  # onnxruntime keeps it, read or not


def test_the_example_of_onnxruntime_says_what_the_bundle_says(
    packages: dict[str, PackageReport], toys: dict[str, Bundle]
) -> None:
    folder, bundle = packages["onnxruntime"].path, toys["onnxruntime"]
    lines = (folder / "example.py").read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 30
    image = folder / "golden" / read_golden(folder).images[0].file
    done = subprocess.run(
        [sys.executable, folder / "example.py", image, "the", "cat is in"], capture_output=True, text=True, check=True
    )
    shown = np.array([[float(value) for value in done.stdout.replace("[", " ").replace("]", " ").split()]])
    ids = [tokens_of(folder, text) for text in ("the", "cat is in")]
    image_embeds = ClipSession(bundle).embed_images([image])
    text_embeds = np.concatenate([EncoderSession(bundle.text_encoder).run(row) for row in ids])
    np.testing.assert_allclose(shown, image_embeds @ text_embeds.T, atol=1e-4)


@pytest.mark.parametrize("side", [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize(
    ("mode", "interpolation"), [("shortest", "bilinear"), ("squash", "random"), ("longest", "box")]
)
def test_pixels_of_the_example_are_the_bundles(
    side: tuple[int, int], mode: str, interpolation: str, tmp_path: Path
) -> None:
    """Bit by bit, whatever the image's shape and mode; and the package says nothing that its bundle does not."""
    bundle = bundle_of(tmp_path / "toy", changed(TOY, side=side, resize_mode=mode, interpolation=interpolation))
    report = package_bundle(bundle.path, "onnxruntime", tmp_path / "to")
    assert verify_package(report.path).ok
    in_javascript = {"example.mjs", "config.json", "preprocessor_config.json"} & set(report.content.files)
    assert len(in_javascript) == (3 if mode == "squash" or (mode == "shortest" and side == (8, 8)) else 0)
    source = (report.path / "example.py").read_text().rpartition("print(")[0]
    example: dict[str, object] = {"__file__": str(report.path / "example.py")}
    exec(compile(source, "example.py", "exec"), example)
    fed: list[np.ndarray] = []
    example["image_encoder"] = SimpleNamespace(run=lambda _, feed: fed.append(feed["pixel_values"]) or [None])
    rng, session = np.random.default_rng(0), ClipSession(bundle)
    for color in ("RGB", "RGBA", "L", "P"):
        for width, height in ((16, 9), (9, 17), (31, 30), (8, 5), (3, 40)):
            channels = len(Image.new(color, (1, 1)).getbands())
            pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
            image = Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels)
            if color == "P":
                image = image.convert("P")
            image.save(tmp_path / "image.png")
            example["embed_image"](tmp_path / "image.png")  # type: ignore[operator]
            np.testing.assert_array_equal(fed.pop()[0], session.pixels(tmp_path / "image.png"), f"{color} {width}")


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_web(mode: str, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "toy", changed(TOY, resize_mode=mode, logit_scale=None))
    report = package_bundle(bundle.path, "web", tmp_path / "to")
    config = json_of(report.path / "web.json")
    assert config["model"] == "toy"
    assert config["bundle"] == "w4a8"
    assert (config["logit_scale"], config["logit_bias"]) == (100.0, None)  # CLIP's own, where the bundle does not say
    assert config["preprocess"] == {
        "size": [8, 8],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "resize_mode": mode,
        "interpolation": "bicubic",
        "fill_color": 0,
    }
    libraries = json_of(report.path / "package.json")["dependencies"]
    page = (report.path / "index.html").read_text("utf-8")
    imported = set(re.findall(r'from "\./node_modules/((?:@[\w-]+/)?[\w-]+)/', page))
    assert imported == set(libraries)
    assert "http" not in page  # nothing from elsewhere


def tokens_of(folder: Path, text: str) -> np.ndarray:
    from tokenizers import Tokenizer

    return np.array([Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids], np.int64)


GUARDED = {
    "transformersjs": "onnx/text_model_quantized.onnx",
    "frigate": "model_cache/jinaai/jina-clip-v1/text_model_fp16.onnx",
    "optimum": "model.onnx",
    "onnxruntime": "text_encoder.onnx",  # its example in JavaScript tokenises with transformers.js
    "web": "text_encoder.onnx",
}


@pytest.mark.parametrize("target", STACKS)
def test_the_guard_is_on_where_a_stack_needs_it_and_off_elsewhere(
    target: str, packages: dict[str, PackageReport]
) -> None:
    guarded = {
        model.file for model in packages[target].content.models if any("ids cut" in words for words in model.edits)
    }
    assert (GUARDED[target] in guarded) if target in GUARDED else not guarded


@pytest.mark.parametrize("target", GUARDED)
@pytest.mark.parametrize("lengths", [[20], [8, 12, 3], [4, 6], [9, 5], [2]])
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "without an end"])
def test_ids_that_servers_get_wrong(
    target: str, lengths: list[int], ended: bool, packages: dict[str, PackageReport], toys: dict[str, Bundle]
) -> None:
    """Rows over the context, cut or not, have the answer of open_clip's tokenizer; others keep theirs."""
    ids, context = tokens(lengths, ended), TOY.context
    file = packages[target].path / GUARDED[target]
    expected = EncoderSession(toys[target].text_encoder)
    for given in (ids, ids[:, :context]):
        feed = {"input_ids": given}
        if target == "optimum":
            feed["pixel_values"] = np.zeros((1, 3, 8, 8), np.float32)
        found = EncoderSession(file).run_named(feed)["text_embeds"]
        np.testing.assert_allclose(found, expected.run(right(given, context)), atol=1e-6)


@pytest.mark.parametrize("target", ["transformersjs", "fastembed", "optimum", "vespa", "onnxruntime", "web"])
def test_towers_of_a_fixed_length_take_what_stacks_feed(target: str, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "toy", changed(TOY, dynamic=False))
    report = package_bundle(bundle.path, target, tmp_path / "to")
    model = next(model for model in report.content.models if "text" in model.towers)
    [ids] = [entry for entry in model.io.inputs if entry.name == "input_ids"]
    assert ids.shape[1] == "sequence"
    for lengths in ([3, 5], [8], [12]):
        given = tokens(lengths)
        feeds = {"input_ids": given, "attention_mask": given, "pixel_values": np.zeros((1, 3, 8, 8), np.float32)}
        found = EncoderSession(report.path / model.file).run_named({e.name: feeds[e.name] for e in model.io.inputs})
        embeds = found["last_hidden_state" if target == "vespa" else "text_embeds"].reshape(len(given), -1)
        whole = right(np.pad(given, ((0, 0), (0, 8)), constant_values=PAD), TOY.context)
        np.testing.assert_allclose(embeds, EncoderSession(bundle.text_encoder).run(whole), atol=1e-6)


def test_a_refused_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    source = bundle_of(tmp_path / "toy", Toy()).path
    package_bundle(source, "onnxruntime", tmp_path / "package")
    (tmp_path / ".lock-package").touch()  # killed at its very last step
    with pytest.raises(BundleError, match="already exists"):
        package_bundle(source, "onnxruntime", tmp_path / "package")
    assert {path.name for path in tmp_path.iterdir()} == {"toy", "package"}
