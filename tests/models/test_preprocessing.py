"""Which pixels and which GELU weights are for: open_clip's own for every published tag, or a question."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.models.beside import configs_beside
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.models.preprocessing import Settings, settings_of_file, settings_of_random, settings_of_tag
from d4c_onnx.models.settings import ModelSettings

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def _own(name: str, tag: str) -> tuple[Preprocess, bool]:
    """What open_clip's own functions make of a tag, and the GELU that its weights were trained with."""
    cfg = open_clip.get_pretrained_cfg(name, tag)
    merged = PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), cfg))
    architecture = open_clip.get_model_config(name)
    size = architecture["vision_cfg"]["image_size"]
    preprocess = Preprocess(
        (size, size), tuple(merged.mean), tuple(merged.std), merged.interpolation, merged.resize_mode, merged.fill_color
    )
    return preprocess, cfg.get("quick_gelu", False) or architecture.get("quick_gelu", False)


def test_like_gives_open_clips_own_preprocessing_for_every_published_tag() -> None:
    published = open_clip.list_pretrained()
    assert len(published) >= 190
    kinds = set()
    for name, tag in published:
        like = ModelOptions(like=tag)
        for made in (
            settings_of_random(name, like),
            settings_of_file(name, "mine.pt", like, []),
            settings_of_tag(name, tag, ModelOptions()),
        ):
            assert (made.preprocess(), made.values.quick_gelu) == _own(name, tag), (name, tag)
        kinds.add((made.values.mean, made.values.std, made.values.interpolation, made.values.resize_mode))
    assert len(kinds) >= 7


def test_a_file_without_a_word_gets_what_every_tag_agrees_in_or_a_question() -> None:
    """Never anything else than each of the architecture's tags has."""
    asked = []
    for name in sorted({name for name, _ in open_clip.list_pretrained()}):
        own = {_own(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
        try:
            made = settings_of_file(name, "mine.pt", ModelOptions(), [])
        except ModelError:
            asked.append(name)
            assert len(own) > 1
        else:
            assert {(made.preprocess(), made.values.quick_gelu)} == own
    assert asked == ["ViT-B-16", "ViT-B-32", "ViT-H-14", "ViT-H-14-quickgelu", "ViT-L-14", "ViT-bigG-14"]


@pytest.mark.parametrize("name", ["MobileCLIP-S1", "ViT-B-16-SigLIP", "PE-Core-B-16", "ViT-L-14-CLIPA"])
def test_the_families_that_differ_from_openai_are_not_asked_about(name: str) -> None:
    made = settings_of_file(name, "mine.pt", ModelOptions(), [])
    assert (made.values.mean, made.values.std) != OPENAI
    assert made.sources["mean"] == f"the one published tag of {name}"
    assert made.sources["size"] == f"architecture {name}"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "ViT-L-14",
            {},
            r"mine\.pt: nothing says which mean, std and GELU .*published tags of ViT-L-14 differ(.|\n)*"
            r"--like openai .*QuickGELU \(also metaclip_400m.*\n(.|\n)*"
            r"--like laion2b_s32b_b82k  mean 0\.5, 0\.5, 0\.5, std 0\.5, 0\.5, 0\.5, plain GELU\n"
            r".*\(--mean, --std, --quick-gelu or --no-quick-gelu\)",
        ),
        ("ViT-H-14", {"quick_gelu": True}, r"which resize mode these(.|\n)*--like dfn5b +squash"),
        ("ViT-L-14", {"mean": (0.5,) * 3, "quick_gelu": False}, r"which std these"),  # half said is not said
        ("ViT-B-32", {"like": "dfn5b"}, r"ViT-B-32 has no such published tag \(it has: openai, .*MODEL:TAG"),
        ("ViT-B-32", {"like": "ViT-X:dfn5b"}, r"ViT-X has no such published tag \(it has: none\)"),
    ],
)
def test_what_nobody_says_is_asked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        settings_of_file(name, "mine.pt", ModelOptions(**options), [])


def test_the_order_is_options_configs_the_checkpoint_the_tag_and_the_architecture() -> None:
    options = ModelOptions(mean=(0.1,) * 3, image_size=(32, 48), like="ViT-H-14:dfn5b")
    config = ModelSettings(mean=(0.2,) * 3, std=(0.2,) * 3)
    file = ModelSettings(mean=(0.3,) * 3, std=(0.3,) * 3, interpolation="bilinear")
    made = settings_of_file("ViT-L-14", "mine.pt", options, [("config", config), ("file", file)])
    preprocess = Preprocess((32, 48), (0.1,) * 3, (0.2,) * 3, "bilinear", "squash", 0)
    assert (made.preprocess(), made.values.quick_gelu) == (preprocess, True)
    like = "tag ViT-H-14:dfn5b, by --like"
    told = {"size": "--image-size", "mean": "--mean", "std": "config", "interpolation": "file"}
    assert made.sources == told | dict.fromkeys(("resize_mode", "fill_color", "quick_gelu"), like)


def test_without_published_tags_open_clips_default_holds_and_says_so() -> None:
    made = settings_of_file("ViT-S-32", "mine.pt", ModelOptions(), [])
    assert made.preprocess() == Preprocess((224, 224), *OPENAI)
    assert made.sources["mean"] == "open_clip's default, ViT-S-32 has no published tags"
    named = settings_of_file("ViT-L-14-worldwide-quickgelu", "mine.pt", ModelOptions(), [])
    assert named.values.quick_gelu


def test_random_weights_are_not_asked_about() -> None:
    made: Settings = settings_of_random("ViT-L-14", ModelOptions())
    assert (made.preprocess(), made.values.quick_gelu) == (Preprocess((224, 224), *OPENAI), False)
    assert made.sources["mean"] == "open_clip's default, for random weights"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (0.5,)}, "--mean .*three numbers from -1e"),
        ({"mean": (0.5, float("nan"), 0.5)}, "--mean"),
        ({"std": (0.5, 0.0, 0.5)}, "--std .*from 1e-06"),
        ({"interpolation": "sinc"}, "--interpolation sinc.*bicubic"),
        ({"resize_mode": "crop"}, "--resize-mode crop.*squash"),
        ({"image_size": (0, 32)}, "--image-size"),
    ],
)
def test_options_that_no_preprocessing_can_have_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelOptions(**given)


SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 256},
}
CLIP = {**SIGLIP, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 224}}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
PREPROCESSOR, OPEN_CLIP = "preprocessor_config.json", "open_clip_config.json"


@pytest.mark.parametrize(
    ("file", "config", "said"),
    [
        (PREPROCESSOR, SIGLIP, {**HALF, "size": (224, 256), "interpolation": "bicubic", "resize_mode": "squash"}),
        (PREPROCESSOR, CLIP, {**HALF, "size": (224, 224), "interpolation": "bicubic", "resize_mode": "shortest"}),
        (
            PREPROCESSOR,
            {"size": 32, "crop_size": 32, "do_center_crop": True, "resample": 1, "do_normalize": False},
            {
                **{"mean": (0.0,) * 3, "std": (1.0,) * 3, "size": (32, 32)},
                **{"interpolation": "lanczos", "resize_mode": "shortest"},
            },
        ),
        (
            PREPROCESSOR,
            {"size": 32, "image_mean": 0.5},
            {"size": (32, 32), "resize_mode": "squash", "mean": (0.5,) * 3},
        ),
        (PREPROCESSOR, {}, {}),
        (
            OPEN_CLIP,
            {
                "model_cfg": {"quick_gelu": True, "vision_cfg": {"image_size": 336}},
                "preprocess_cfg": {"mean": [0, 0, 0], "std": None, "size": 224, "interpolation": "bilinear"},
            },
            {
                **{"mean": (0.0,) * 3, "std": OPENAI[1], "interpolation": "bilinear", "resize_mode": "shortest"},
                **{"fill_color": 0, "size": (336, 336), "quick_gelu": True},
            },
        ),
        (OPEN_CLIP, {"embed_dim": 8, "vision_cfg": {"image_size": [32, 48]}}, {"size": (32, 48), "quick_gelu": False}),
    ],
)
def test_configs_beside_the_weights_are_read(tmp_path: Path, file: str, config: object, said: dict[str, Any]) -> None:
    (tmp_path / file).write_text(json.dumps(config))
    assert configs_beside(tmp_path / "mine.pt") == [(file, ModelSettings(**said))]


def test_open_clips_config_goes_before_the_other(tmp_path: Path) -> None:
    assert configs_beside(tmp_path / "mine.pt") == []
    for file in (PREPROCESSOR, OPEN_CLIP):
        (tmp_path / file).write_text("{}")
    assert [file for file, _ in configs_beside(tmp_path / "mine.pt")] == [OPEN_CLIP, PREPROCESSOR]


@pytest.mark.parametrize(
    ("file", "config", "message"),
    [
        (
            PREPROCESSOR,
            {**CLIP, "size": {"shortest_edge": 256}},
            "resizes to 256 x 256 and crops 224 x 224.*cannot say",
        ),
        (PREPROCESSOR, {"size": {"shortest_edge": 224}}, "does not crop"),
        (PREPROCESSOR, {"size": {"max_pixels": 224}}, "neither height and width nor shortest_edge"),
        (PREPROCESSOR, {**SIGLIP, "rescale_factor": 1 / 127.5}, "otherwise than by 1/255"),
        (PREPROCESSOR, {**SIGLIP, "do_resize": False}, "does not resize"),
        (PREPROCESSOR, {**SIGLIP, "resample": 9}, r"at resample: expected a whole number from 0 to 5, found 9.*--mean"),
        (PREPROCESSOR, {**SIGLIP, "image_std": [1, 1, 0]}, r"image_std\.2: expected a number from 1e-06 to 1e"),
        (PREPROCESSOR, [], "expected an object"),
        (OPEN_CLIP, {"preprocess_cfg": {"mean": ["x" * 999, 0, 0]}}, r"preprocess_cfg\.mean\.0"),
        (OPEN_CLIP, {"vision_cfg": {"image_size": 10**9}}, r"vision_cfg\.image_size"),
        (OPEN_CLIP, {"model_cfg": 3}, "model_cfg: expected an object"),
    ],
)
def test_configs_that_cannot_be_are_refused(tmp_path: Path, file: str, config: object, message: str) -> None:
    (tmp_path / file).write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        configs_beside(tmp_path / "mine.pt")
    assert str(tmp_path / file) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_config_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / OPEN_CLIP).write_text("{")
    with pytest.raises(ModelError, match=rf"{OPEN_CLIP}: cannot be read .*Mend it, or move it away"):
        configs_beside(tmp_path / "mine.pt")
