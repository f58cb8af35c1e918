"""Golden vectors: a right client passes, each usual mistake of a client fails and is named, damage is told."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from encoders import quantized_bundle
from PIL import Image

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.cli.main import group
from d4c_onnx.errors import BundleError
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.runtime.golden import read_golden
from d4c_onnx.runtime.golden_check import Answers
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.runtime.verify import verify_bundle


@dataclass(frozen=True)
class Client:
    """Preprocessing as somebody writes it who reads the manifest: pillow and numpy, nothing of d4c_onnx."""

    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    resample: Image.Resampling = Image.Resampling.BICUBIC
    bgr: bool = False
    mirrored: bool = False
    crop: str = "middle"
    resized_to: float = 1.0

    def pixels(self, image: Image.Image) -> np.ndarray:
        """float32 [1, 3, 48, 48]."""
        short = round(48 * self.resized_to)
        sides = (48, 48) if self.crop == "squash" else tuple(int(short * side / min(image.size)) for side in image.size)
        resized = image.resize(sides, self.resample)
        left, top = (round((side - 48) / 2) for side in sides) if self.crop == "middle" else (0, 0)
        values = np.asarray(resized.crop((left, top, left + 48, top + 48)).convert("RGB"), np.float32) / 255
        values = values[..., ::-1] if self.bgr else values
        values = values[:, ::-1] if self.mirrored else values
        values = (values - np.float32(self.mean)) / np.float32(self.std)
        return np.ascontiguousarray(values.transpose(2, 0, 1)[None], np.float32)


WRONG = {
    "mean and std of ImageNet": Client(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    "mean and std of Inception": Client(mean=(0.5,) * 3, std=(0.5,) * 3),
    "no mean and std": Client(mean=(0.0,) * 3, std=(1.0,) * 3),
    "BGR": Client(bgr=True),
    "mirrored": Client(mirrored=True),
    "squeezed": Client(crop="squash"),
    "top left": Client(crop="corner"),
    "256 for 224": Client(resized_to=8 / 7),
    "bilinear": Client(resample=Image.Resampling.BILINEAR),
    "nearest": Client(resample=Image.Resampling.NEAREST),
}


def _raw(bundle: Bundle, text: str) -> np.ndarray:
    from open_clip.tokenizer import SimpleTokenizer

    own = SimpleTokenizer(context_length=77)
    own.clean_fn = str
    row = own([text])[0].tolist()
    return np.array([row[: row.index(own.eot_token_id) + 1]], np.int64)


@cache
def _tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer(path)


def _right(bundle: Bundle, text: str) -> np.ndarray:
    return _tokenizer(bundle.tokenizer)([text])


def _no_end(bundle: Bundle, text: str) -> np.ndarray:
    return _right(bundle, text)[:, :-1]


def _cut(bundle: Bundle, text: str) -> np.ndarray:
    ids = _right(bundle, text)
    if ids.shape[1] == 77:
        ids[0, -1] = ids[0, -2]
    return ids


@pytest.fixture(scope="module")
def w4a8(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    target = tmp_path_factory.mktemp("golden") / "w4a8"
    return quantized_bundle(vit_bundle, vit_calibration[1], target, "rounding=nearest")


@pytest.fixture(params=["fp32", pytest.param("w4a8", marks=pytest.mark.slow)])
def bundle(request: pytest.FixtureRequest, vit_bundle: Bundle) -> Bundle:
    return vit_bundle if request.param == "fp32" else request.getfixturevalue("w4a8")


def _embed_images(bundle: Bundle, client: Client) -> np.ndarray:
    session = EncoderSession(bundle.image_encoder)
    images = [Image.open(bundle.path / "golden" / one.file) for one in read_golden(bundle.path).images]
    return np.concatenate([session.run(client.pixels(image)) for image in images])


def _embed_texts(bundle: Bundle, ids: Callable[[Bundle, str], np.ndarray]) -> np.ndarray:
    session = EncoderSession(bundle.text_encoder)
    return np.concatenate([session.run(ids(bundle, one.text)) for one in read_golden(bundle.path).texts])


def test_a_right_client_passes(bundle: Bundle) -> None:
    golden = read_golden(bundle.path)
    assert (len(golden.images), len(golden.texts), golden.unseen) == (3, 5, ())
    found = verify_bundle(bundle.path, Answers(_embed_images(bundle, Client()), _embed_texts(bundle, _right)))
    assert found.ok, found.checks
    assert [check.ok for check in found.checks] == [True] * 8
    assert found.likeliest == {"image": None, "text": None}


@pytest.mark.parametrize("mini", ["vit", "rn"])
def test_texts_longer_than_the_context(mini: str, request: pytest.FixtureRequest) -> None:
    """What the golden texts hold: one that every stack has to cut."""
    exported: Bundle = request.getfixturevalue(f"{mini}_bundle")
    longest = max(read_golden(exported.path).texts, key=lambda one: len(one.text))
    assert len(longest.input_ids) == exported.manifest.tokenizer.context_length


WRONG_TEXTS = {"not cleaned": _raw, "no end token": _no_end, "cut without the end token": _cut}


def test_each_mistake_fails(bundle: Bundle) -> None:
    golden = read_golden(bundle.path)
    images, texts = [one.embeds for one in golden.images], [one.embeds for one in golden.texts]

    def worst(found: np.ndarray, embeds: list[tuple[float, ...]]) -> float:
        return max(golden.distance(row, right) for row, right in zip(found, embeds, strict=True))

    passed = [name for name in WRONG if worst(_embed_images(bundle, WRONG[name]), images) <= golden.tolerance["image"]]
    heard = {name: worst(_embed_texts(bundle, ids), texts) for name, ids in WRONG_TEXTS.items()}
    passed += [name for name, distance in heard.items() if distance <= golden.tolerance["text"]]
    assert not passed


@pytest.mark.parametrize("name", ["mean and std of ImageNet", "256 for 224", "bilinear"])
def test_a_mistake_with_images_is_named(bundle: Bundle, name: str) -> None:
    found = verify_bundle(bundle.path, Answers(images=_embed_images(bundle, WRONG[name])))
    assert [check.name for check in found.checks if check.ok is False] == ["client's image embeddings"]
    assert name in (found.likeliest["image"] or "")


@pytest.mark.parametrize("name", ["not cleaned", "cut without the end token"])
def test_a_mistake_with_texts_is_named(bundle: Bundle, name: str) -> None:
    found = verify_bundle(bundle.path, Answers(texts=_embed_texts(bundle, WRONG_TEXTS[name])))
    assert [check.name for check in found.checks if check.ok is False] == ["client's text embeddings"]
    assert name in (found.likeliest["text"] or "")


def test_a_manifest_with_other_pixels_is_seen(own: Path, vit_bundle: Bundle) -> None:
    """Whoever edits a manifest by hand and hashes again gets told what golden vectors were made with."""
    wrong = replace(vit_bundle.manifest.preprocess, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    write_manifest(own, replace(vit_bundle.manifest, preprocess=wrong))
    found = verify_bundle(own)
    assert [check.name for check in found.checks if check.ok is False] == ["image embeddings"]
    assert found.likeliest["image"] == "mean and std of OpenAI"


def test_damage_is_told_by_the_command(own: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(group, ["verify", str(own), "--quiet"])
    assert (done.exit_code, done.output.count("ok ")) == (0, 6), done.output
    (own / "tokenizer.json").write_text((own / "tokenizer.json").read_text() + " ")
    done = runner.invoke(group, ["verify", str(own), "--quiet", "--provider", "cpu"])
    assert done.exit_code == 1
    assert "tokenizer.json" in done.output
    odd = tmp_path / "odd.npy"
    np.save(odd, np.zeros((2, 5), np.float32))
    assert runner.invoke(group, ["verify", str(own), "--images", str(odd)]).exit_code == 2
    assert runner.invoke(group, ["verify", str(tmp_path / "nothing")]).exit_code == 2


def test_older_golden_files_are_verified(own: Path, vit_bundle: Bundle) -> None:
    golden = read_golden(own)
    plain = {"image": golden.images[0].file, "text": golden.texts[0].text, "input_ids": golden.texts[0].input_ids}
    embeds = {"image_embeds": golden.images[0].embeds, "text_embeds": golden.texts[0].embeds}
    (own / "golden" / "golden.json").write_text(json.dumps({**plain, **embeds, "tolerance": 1e-4}))
    write_manifest(own, vit_bundle.manifest)
    assert read_golden(own).older
    assert verify_bundle(own).ok
    open_bundle(own)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda golden: golden.update(version=3),
        lambda golden: golden.update(images=[]),
        lambda golden: golden["images"][0].update(file="../victim.png"),
        lambda golden: golden["images"][0].update(image_embeds=[0.5]),
        lambda golden: golden["texts"][0].update(text="\ud800"),
        lambda golden: golden["texts"][0].update(input_ids=[-1]),
        lambda golden: golden["tolerance"].pop("text"),
        lambda golden: golden["tolerance"].update(image=float("nan")),
    ],
)
def test_golden_files_are_not_trusted(vit_bundle: Bundle, tmp_path: Path, spoil: Callable[[dict], object]) -> None:
    golden = json.loads((vit_bundle.path / "golden" / "golden.json").read_text("utf-8"))
    spoil(golden)
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden" / "golden.json").write_text(json.dumps(golden))
    with pytest.raises(BundleError, match=r"golden\.json"):
        read_golden(tmp_path)
