"""`verify` of packages: a whole one passes through its own files; each broken thing fails and is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from toys import Toy, bundle_of, changed, json_of

from d4c_onnx.cli.main import group
from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.graph.values import constant, node, prepend, readers, replace_input, set_constant
from d4c_onnx.manifest import TokenizerInfo
from d4c_onnx.packaging import STACKS, PackageReport, package_bundle, verification, verify_package
from d4c_onnx.runtime.golden import read_golden
from d4c_onnx.runtime.golden_check import Answers
from d4c_onnx.runtime.tokenizer import TextTokenizer


def _copied(package: PackageReport, place: Path) -> Path:
    return Path(shutil.copytree(package.path, place / "copy"))


def _failed(package: Path) -> list[str]:
    return [check.name for check in verify_package(package).checks if check.ok is False]


def _models(package: Path) -> list[Path]:
    return [package / model["file"] for model in json_of(package / "d4c-package.json")["models"]]


def _hashed_again(package: Path) -> Path:
    """What somebody does who edits files and wants nobody to know: hashes and sizes are those of today."""
    manifest = json_of(package / "d4c-package.json")
    for name, record in manifest["files"].items():
        record.update(sha256=sha256(package / name), size_bytes=(package / name).stat().st_size)
    (package / "d4c-package.json").write_text(json.dumps(manifest))
    return package


@pytest.mark.parametrize("target", STACKS)
def test_a_package_passes(target: str, packages: dict[str, PackageReport]) -> None:
    found = verify_package(packages[target].path)
    assert found.ok, found.checks
    names = [check.name for check in found.checks]
    for model in packages[target].content.models:
        assert any(name.endswith(f"embeddings of {model.file}") for name in names)


@pytest.mark.parametrize("target", STACKS)
def test_a_changed_byte_is_seen(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    copy = _copied(packages[target], tmp_path)
    file = next(copy / name for name in json_of(copy / "d4c-package.json")["files"] if not name.endswith(".onnx"))
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    assert "files" in _failed(copy)


def _other_weights(file: Path) -> None:
    """A file of the same contract that answers otherwise."""
    model = load_model(file)
    for name, value in list(model.graph.initializers.items()):
        if name.split("/")[-1] == "scale":
            set_constant(model.graph, name, -constant(value))
    save_model(model, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize("target", STACKS)
def test_another_models_file_is_seen(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    """By its hash, and hashed again by its answers."""
    copy = _copied(packages[target], tmp_path)
    model = _models(copy)[-1]
    _other_weights(model)
    found = verify_package(copy)
    file = model.relative_to(copy).as_posix()
    failed = {check.name for check in found.checks if check.ok is False}
    assert "files" in failed
    assert f"{file} is another file than the one that was packaged" in found.likeliest.values()
    assert failed - set(_failed(_hashed_again(copy))) == {"files"}
    assert any(name.endswith(f"embeddings of {file}") for name in failed)


@pytest.mark.parametrize("target", sorted(set(STACKS) - {"vespa", "transformersjs", "optimum"}))
def test_towers_in_each_others_place_are_seen(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    copy = _copied(packages[target], tmp_path)
    first, second = _models(copy)
    shutil.move(first, tmp_path / "first")
    shutil.move(second, first)
    shutil.move(tmp_path / "first", second)
    assert {"contract", "running"} <= set(_failed(_hashed_again(copy)))


@pytest.mark.parametrize("target", STACKS)
def test_a_missing_file_is_seen(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    copy = _copied(packages[target], tmp_path)
    _models(copy)[0].unlink()
    assert {"files", "running"} <= set(_failed(copy))


HUGGING_FACE = {
    "transformersjs": "preprocessor_config.json",
    "fastembed": "image/preprocessor_config.json",
    "optimum": "preprocessor_config.json",
    "frigate": "model_cache/jinaai/jina-clip-v1/preprocessor_config.json",
    "onnxruntime": "preprocessor_config.json",
}
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def _edited(package: Path, file: str, edit: Callable[[dict], object]) -> Path:
    content = json_of(package / file)
    edit(content)
    (package / file).write_text(json.dumps(content))
    return _hashed_again(package)


@pytest.mark.parametrize("target", HUGGING_FACE)
def test_another_mean_in_the_config_is_named(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    mean, std = IMAGENET
    file, copy = HUGGING_FACE[target], _copied(packages[target], tmp_path)
    found = verify_package(_edited(copy, file, lambda config: config.update(image_mean=mean, image_std=std)))
    [check] = [check for check in found.checks if check.ok is False]
    assert check.name == file
    assert check.detail.startswith("mean is 0.485, 0.456, 0.406, and the model's is 0.5, 0.5, 0.5; std is")
    assert found.likeliest == {"image": "mean and std of ImageNet", "text": None}


MANIFESTS = {
    "immich": ("ViT-B-32__laion2b-s34b-b79k/visual/preprocess_cfg.json", lambda config: config),
    "triton": ("model_repository/image_pixels/1/manifest.json", lambda config: config["preprocess"]),
    "web": ("web.json", lambda config: config["preprocess"]),
}


@pytest.mark.parametrize("target", MANIFESTS)
def test_another_mean_in_other_forms_is_named(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    mean, std = IMAGENET
    file, within = MANIFESTS[target]
    copy = _edited(_copied(packages[target], tmp_path), file, lambda config: within(config).update(mean=mean, std=std))
    found = verify_package(copy)
    assert [check.name for check in found.checks if check.ok is False] == [file]
    assert found.likeliest["image"] == "mean and std of ImageNet"


@pytest.mark.parametrize("target", MANIFESTS)
def test_another_colour_of_padding_is_told(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    file, within = MANIFESTS[target]
    copy = _edited(_copied(packages[target], tmp_path), file, lambda config: within(config).update(fill_color=7))
    [check] = [check for check in verify_package(copy).checks if check.ok is False]
    assert (check.name, check.detail) == (file, "fill_color is 7, and the model's is 0")


@pytest.mark.parametrize("target", ["web", "triton"])
@pytest.mark.parametrize(("interpolation", "side"), [("random", (8, 8)), ("bilinear", (8, 6)), ("box", (8, 8))])
def test_configs_say_the_filter_that_is_used(
    target: str, interpolation: str, side: tuple[int, int], tmp_path: Path
) -> None:
    """Bicubic for one that is drawn in training, and for open_clip's crop to what is no square."""
    toy = changed(Toy(), interpolation=interpolation, side=side)
    report = package_bundle(bundle_of(tmp_path / "toy", toy).path, target, tmp_path / "to")
    assert verify_package(report.path).ok
    if target == "web":
        used = "box" if interpolation == "box" else "bicubic"
        assert json_of(report.path / "web.json")["preprocess"]["interpolation"] == used
        for other in {"bilinear", "nearest", interpolation} - {used, "random"}:
            _edited(
                report.path, "web.json", lambda config, other=other: config["preprocess"].update(interpolation=other)
            )
            assert _failed(report.path) == ["web.json"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda config: config.update(do_rescale=False), "mean is 0.00196078"),
        (lambda config: config.update(do_normalize=False), "mean is 0, 0, 0"),
        (lambda config: config.update(resample=2), "interpolation is bilinear"),
        (lambda config: config.update(do_center_crop=False), "resize_mode is squash"),
        (lambda config: config.update(size={"shortest_edge": 9}), "resizes to 9 before it crops to 8"),
        (lambda config: config.update(crop_size={"height": 9, "width": 9}), "size is 9, 9"),
        (lambda config: config.update(do_resize=False), "does not resize"),
        (lambda config: config.update(image_std=[0, 0, 0]), "image_std"),
    ],
)
def test_whatever_a_config_says_otherwise_is_told(
    edit: Callable[[dict], object], said: str, packages: dict[str, PackageReport], tmp_path: Path
) -> None:
    found = verify_package(_edited(_copied(packages["optimum"], tmp_path), "preprocessor_config.json", edit))
    [check] = [check for check in found.checks if check.ok is False]
    assert check.name == "preprocessor_config.json"
    assert said in check.detail


def test_pixels_that_are_not_divided_are_named(packages: dict[str, PackageReport], tmp_path: Path) -> None:
    copy = _copied(packages["optimum"], tmp_path)
    found = verify_package(_edited(copy, "preprocessor_config.json", lambda config: config.update(do_rescale=False)))
    assert found.likeliest["image"] == "pixels of 0..255 that were not divided by 255"


TOKENIZERS = {
    "transformersjs": "tokenizer.json",
    "fastembed": "text/tokenizer.json",
    "triton": "model_repository/text_ids/1/tokenizer.json",
    "vespa": "models/tokenizer.json",
    "librephotos": "clip_vit_b32/tokenizer.json",
}


@pytest.mark.parametrize("target", TOKENIZERS)
def test_another_tokenizer_is_seen(target: str, packages: dict[str, PackageReport], tmp_path: Path) -> None:
    file, copy = TOKENIZERS[target], _copied(packages[target], tmp_path)

    def swapped(content: dict) -> None:
        words = content["model"]["vocab"]
        words["d"], words["x"] = words["x"], words["d"]

    assert _failed(_edited(copy, file, swapped)) == [file]


def test_each_tokenizer_is_read_once(packages: dict[str, PackageReport], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def counted(file: Path, info: TokenizerInfo) -> TextTokenizer:
        read.append(file)
        return TextTokenizer(file, info)

    monkeypatch.setattr(verification, "TextTokenizer", counted)
    assert verify_package(packages["triton"].path).ok
    assert len(read) == 1


def test_the_mistake_is_that_of_the_file_that_answers_otherwise(
    packages: dict[str, PackageReport], tmp_path: Path
) -> None:
    """Of two files with an image tower the second takes its channels the other way round."""
    copy = _copied(packages["transformersjs"], tmp_path)
    file = copy / "onnx" / "model_quantized.onnx"
    model = load_model(file)
    pixels = next(value for value in model.graph.inputs if value.name == "pixel_values")
    before = readers(pixels)
    order = set_constant(model.graph, "order", np.array([2, 1, 0], np.int64))
    turned = node("Gather", [pixels, order], "turned", attributes={"axis": 1})
    for reader in before:
        replace_input(reader, pixels, turned.outputs[0])
    prepend(model.graph, [turned])
    save_model(model, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    found = verify_package(_hashed_again(copy))
    failed = [check.name for check in found.checks if check.ok is False]
    assert failed == ["image embeddings of onnx/model_quantized.onnx"], found.checks
    assert found.likeliest["image"] == "channels in the order BGR"


def test_a_shorter_context_is_seen(packages: dict[str, PackageReport], tmp_path: Path) -> None:
    copy = _copied(packages["fastembed"], tmp_path)
    found = verify_package(
        _edited(copy, "text/tokenizer_config.json", lambda config: config.update(model_max_length=77))
    )
    assert [check.name for check in found.checks if check.ok is False] == ["text/tokenizer_config.json"]
    assert found.likeliest["text"] == "text/tokenizer_config.json: cuts texts at 77 ids, and the model takes 8"


def test_a_clients_answers_are_judged_beside_a_package(packages: dict[str, PackageReport]) -> None:
    golden = read_golden(packages["triton"].path)
    right = np.array([one.embeds for one in golden.images])
    assert verify_package(packages["triton"].path, Answers(images=right)).ok
    found = verify_package(packages["triton"].path, Answers(images=-right))
    assert [check.name for check in found.checks if check.ok is False] == ["client's image embeddings"]


def test_the_command_takes_packages(packages: dict[str, PackageReport], tmp_path: Path) -> None:
    copy, runner = _copied(packages["optimum"], tmp_path), CliRunner()
    done = runner.invoke(group, ["verify", str(copy), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (0, True), done.output
    mean, std = IMAGENET
    _edited(copy, "preprocessor_config.json", lambda config: config.update(image_mean=mean, image_std=std))
    done = runner.invoke(group, ["verify", str(copy), "--quiet"])
    assert done.exit_code == 1
    assert "likeliest for images: mean and std of ImageNet" in done.output


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest.update(format=2),
        lambda manifest: manifest.update(kind="bundle"),
        lambda manifest: manifest.update(models=[]),
        lambda manifest: manifest["models"][0].update(file="../model.onnx"),
        lambda manifest: manifest["models"][0].update(towers=["image", "image"]),
        lambda manifest: manifest["models"][0]["io"]["inputs"][0].update(dtype="complex64"),
        lambda manifest: manifest["models"][0]["io"].update(outputs=[]),
        lambda manifest: manifest["files"].pop("model.onnx"),
        lambda manifest: manifest["files"].pop("golden/golden.json"),
        lambda manifest: manifest["files"].update({"a/../../b": manifest["files"]["model.onnx"]}),
        lambda manifest: manifest["files"].update({"/etc/passwd": manifest["files"]["model.onnx"]}),
        lambda manifest: manifest["files"].update({"a/" * 20 + "b": manifest["files"]["model.onnx"]}),
        lambda manifest: manifest["preprocess"].update(std=[0, 1, 1]),
    ],
)
def test_a_packages_manifest_is_not_trusted(
    spoil: Callable[[dict], object], packages: dict[str, PackageReport], tmp_path: Path
) -> None:
    copy = _copied(packages["optimum"], tmp_path)
    manifest = json_of(copy / "d4c-package.json")
    spoil(manifest)
    (copy / "d4c-package.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"d4c-package\.json"):
        verify_package(copy)


def test_a_link_out_of_a_package_is_refused(packages: dict[str, PackageReport], tmp_path: Path) -> None:
    copy = _copied(packages["optimum"], tmp_path)
    shutil.move(copy / "model.onnx", tmp_path / "model.onnx")
    (copy / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(BundleError, match="link out of"):
        verify_package(copy)
