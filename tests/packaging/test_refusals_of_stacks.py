"""What a stack cannot serve, and what lies in the way, is refused; nothing is left half-written."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from graphs import parse
from toys import Toy, bundle_of, changed, fitting, json_of

from d4c_onnx.bundle import Bundle
from d4c_onnx.cli.main import group
from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256
from d4c_onnx.graph.model import save_model
from d4c_onnx.packaging import package_bundle, proof
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stacks.openvino import OPENVINO, shifts_bits_out
from d4c_onnx.runtime.golden import read_golden
from d4c_onnx.runtime.session import EncoderSession

TOY = Toy()
IMMICHS, LIBREPHOTOS, RCLIPS = (asdict(fitting(stack)) for stack in ("immich", "librephotos", "rclip"))

REFUSED = [
    ("immich", {}, "toy__random is not on it"),
    ("immich", {"name": "RN50", "pretrained": "openai"}, "stores 1024 numbers"),
    ("immich", {"name": "ViT-B-32", "pretrained": "openai", "dimensions": 512, "side": (8, 6)}, "square"),
    ("immich", {**IMMICHS, "resize_mode": "longest"}, "padded"),
    ("librephotos", {"dimensions": 512}, "224 x 224 pixels, and this model takes 8 x 8"),
    ("rclip", {"side": (256, 256)}, "stores 512 numbers"),
    ("rclip", {**RCLIPS, "type": "HFTokenizer"}, "HFTokenizer"),
    ("rclip", {**RCLIPS, "context": 8}, "feeds 77 ids a text, and this model takes 8"),
    ("rclip", {**RCLIPS, "mean": (0.5,) * 3}, "makes pixels with CLIP's mean and deviation"),
    ("rclip", {**RCLIPS, "resize_mode": "squash"}, "crops, and this model wants squash, bicubic"),
    ("librephotos", {**LIBREPHOTOS, "std": (0.5,) * 3}, "makes pixels with CLIP's mean and deviation"),
    ("librephotos", {**LIBREPHOTOS, "interpolation": "bilinear"}, "this model wants shortest, bilinear"),
    ("librephotos", {**LIBREPHOTOS, "context": 248}, "cuts texts at 77 ids, and this model takes 248"),
    ("frigate", {}, "stores 768 numbers an embedding, and this model gives 4"),
    ("transformersjs", {"resize_mode": "longest"}, "padded"),
    ("transformersjs", {"has_file": False}, "tokenizer.json"),
    ("web", {"has_file": False}, "tokenizer.json"),
    ("fastembed", {"last_id": 3}, "cannot express this tokenizer"),
    ("fastembed", {"side": (8, 6)}, "square"),
    ("optimum", {"logit_scale": None}, "no logit scale"),
    ("optimum", {"normalized": False}, "without --raw"),
]


@pytest.mark.parametrize(("target", "values", "reason"), REFUSED)
def test_what_a_stack_cannot_serve_is_refused_with_the_reason(
    target: str, values: dict[str, object], reason: str, tmp_path: Path
) -> None:
    bundle = bundle_of(tmp_path / "toy", changed(TOY, **values))
    with pytest.raises(BundleError, match=reason):
        package_bundle(bundle.path, target, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"toy"}


SHIFTED = """shifted (uint8[n] x) => (uint8[n] y) {
    m = BitwiseAnd(x, mask)
    y = BitShift <direction = "RIGHT"> (SHIFTED, by)
}"""


@pytest.mark.parametrize(("shifted", "mask", "lost"), [("m", 240, False), ("m", 248, True), ("x", 240, True)])
def test_a_byte_that_loses_bits_is_refused_to_openvino(shifted: str, mask: int, lost: bool, tmp_path: Path) -> None:
    """It would answer 2 for 26 >> 4, without a word."""
    shifting = parse(SHIFTED.replace("SHIFTED", shifted), mask=np.uint8(mask), by=np.uint8(4))
    bundle = bundle_of(tmp_path / "toy", TOY)
    assert shifts_bits_out(shifting) == lost
    if lost:
        save_model(shifting, bundle.text_encoder)
        with pytest.raises(BundleError, match=r"rounds where bits are shifted out of bytes.*--overwrite"):
            OPENVINO.write(Job(bundle, tmp_path / "out", "openvino"))


def test_a_name_on_the_list_may_be_given(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "toy", changed(TOY, dimensions=512))
    report = package_bundle(bundle.path, "immich", tmp_path / "out", name="ViT-B-16__openai")
    assert (report.path / "ViT-B-16__openai" / "visual" / "model.onnx").is_file()


@pytest.mark.parametrize("target", ["triton", "transformersjs", "frigate"])
def test_a_folder_in_the_way_is_refused_and_replaced_on_demand(
    target: str, toys: dict[str, Bundle], tmp_path: Path
) -> None:
    bundle, out = toys[target].path, tmp_path / "out"
    report = package_bundle(bundle, target, out)
    before = (out / "d4c-package.json").read_bytes()
    with pytest.raises(BundleError, match="--overwrite"):
        package_bundle(bundle, target, out)
    for stray in (out / "stray", (out / report.content.models[0].file).parent / "stray"):
        stray.write_text("")
        with pytest.raises(BundleError, match="did not write"):
            package_bundle(bundle, target, out, overwrite=True)
        stray.unlink()
    package_bundle(bundle, target, out, overwrite=True)
    assert (out / "d4c-package.json").read_bytes() == before


def test_a_bundle_does_not_replace_itself(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "above" / "toy", TOY).path
    for place in (bundle, bundle.parent, bundle / "golden"):
        with pytest.raises(BundleError, match="would be replaced"):
            package_bundle(bundle, "openvino", place, overwrite=True)
    assert bundle.is_dir()


def test_a_package_that_answers_otherwise_is_not_left_behind(
    toys: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d4c_onnx.graph.values import constant, set_constant
    from d4c_onnx.packaging import edits

    def wrong(self: edits.RenameInput, model: object) -> None:
        scale = model.graph.initializers["scale"]
        set_constant(model.graph, "scale", -constant(scale))

    monkeypatch.setattr(edits.RenameInput, "apply", wrong)
    with pytest.raises(BundleError, match="answers otherwise"):
        package_bundle(toys["rclip"].path, "rclip", tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_command_prints_what_a_stack_does_badly(toys: dict[str, Bundle], tmp_path: Path) -> None:
    bundle, out = str(toys["frigate"].path), tmp_path / "out"
    arguments = ["package", bundle, "--target", "frigate", "-o"]
    shown = CliRunner().invoke(group, [*arguments, str(out), "--quiet"])
    assert shown.exit_code == 0, shown.output
    assert "ORT_ENABLE_BASIC" in shown.output
    made = CliRunner().invoke(group, [*arguments, str(tmp_path / "two"), "--quiet", "--json"])
    report = json.loads(made.stdout)
    assert set(report) == {"package", "target", "models", "files", "remarks", "use"}
    again = CliRunner().invoke(group, [*arguments, str(out), "--quiet"])
    assert again.exit_code == 2
    unknown = CliRunner().invoke(group, ["package", bundle, "--target", "nothing", "-o", str(tmp_path / "x")])
    assert unknown.exit_code == 2
    assert "transformersjs" in unknown.stderr


def test_packaging_needs_no_torch(toys: dict[str, Bundle], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from d4c_onnx.packaging import package_bundle as p; p(*sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", code, toys["openvino"].path, "openvino", tmp_path / "out"], check=True)


def test_pixels_go_through_an_image_tower_once(
    toys: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both lengths of texts are compared; towers of images do not see them."""
    runs: list[str] = []

    class Counted(EncoderSession):
        def run_named(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            runs.append(next(iter(feeds)))
            return super().run_named(feeds)

    monkeypatch.setattr(proof, "EncoderSession", Counted)
    package_bundle(toys["openvino"].path, "openvino", tmp_path / "out")
    rows = {len(text.input_ids) for text in read_golden(toys["openvino"].path).texts}
    ways = 2  # as the file says, and as onnxruntime optimises it
    assert runs.count("pixel_values") == ways
    assert runs.count("input_ids") >= ways * len(rows)


def test_what_is_in_the_way_is_told_before_anything_is_read(tmp_path: Path) -> None:
    """Hashing a large bundle takes its time."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(BundleError, match="already exists"):
        package_bundle(tmp_path / "no bundle", "openvino", tmp_path / "out")


@pytest.mark.parametrize("merges", [7, [["a"]], ["a\nb"], None])
def test_a_list_of_merges_is_not_trusted(merges: object, tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "toy", fitting("rclip"))
    content = json_of(bundle.tokenizer)
    content["model"]["merges"] = merges  # type: ignore[index]
    bundle.tokenizer.write_text(json.dumps(content))
    record = bundle.manifest.files[bundle.tokenizer.name]
    hashed = replace(record, sha256=sha256(bundle.tokenizer), size_bytes=bundle.tokenizer.stat().st_size)
    manifest = json_of(bundle.path / "manifest.json")
    manifest["files"][bundle.tokenizer.name] = asdict(hashed)  # type: ignore[index]
    (bundle.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        package_bundle(bundle.path, "rclip", tmp_path / "out")
