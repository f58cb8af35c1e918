"""What `hostile.py` spoils: small, whole, and made in seconds.

toy, toy-set           a bundle of two graphs of a few nodes, and a calibration set of it
foreign                the ONNX files of a CLIP that another exporter wrote, with its configs
imported, imported-set the bundle that they become, and a calibration set of it
weights                a checkpoint in three formats, and the config of its architecture
folder, published      the same as a folder of open_clip's, and a model as a folder of transformers'
images, images.tar, texts.txt  what `embed` reads
nouns.txt              what `synthesize` reads
labelled.parquet, labelled.parquet.classes.txt  what `evaluate` reads
"""

import json
import sys
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.calibration.dataset import save_calibration_set
from d4c_onnx.calibration.key import calibration_key
from d4c_onnx.calibration.set_file import SetManifest
from d4c_onnx.foreign import ForeignFiles
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.tokenizer import TextTokenizer

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "foreign")]

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
_WORDS = ("red boats", "old houses", "a dog", "dark clouds")


def make(origin: Path) -> None:
    """All of it."""
    from toys import Toy, bundle_of

    origin.mkdir()
    toy = bundle_of(origin / "toy", Toy(bits="fp32", name="toy"))
    _set_of(toy, origin / "toy-set")
    (origin / "foreign").mkdir()
    imported = _import(origin)
    _set_of(imported, origin / "imported-set")
    write_weights(origin / "weights", origin / "folder")
    _published(origin / "published")
    write_images(origin / "images")
    with tarfile.open(origin / "images.tar", "w") as tar:
        tar.add(origin / "images", "images")
    (origin / "nouns.txt").write_text("cat\ndog\nred boat\n")
    (origin / "labelled.parquet.classes.txt").write_text("cat\ndog\n")
    (origin / "texts.txt").write_text("\n".join((*_WORDS, "crème brûlée", "🐕")) + "\n")
    _parquet(origin / "images", origin / "labelled.parquet")


def _set_of(bundle: Bundle, target: Path) -> None:
    recipe, manifest = load_recipe(), bundle.manifest
    pixels = np.random.default_rng(0).random((6, 3, *manifest.preprocess.size), np.float32)
    ids = tuple(tuple(row) for row in TextTokenizer(bundle.tokenizer, manifest.tokenizer)(list(_WORDS)).tolist())
    key = calibration_key(bundle.weights_sha256, recipe.synthesis, recipe.text, _WORDS, 0)
    told = SetManifest(bundle.model_name, key, {"device": "cpu"}, {})
    made = CalibrationSet(pixels[:4], pixels[4:], _WORDS + _WORDS[:2], _WORDS, ids, ("a cat", "a bird"), told)
    save_calibration_set(target, made, pixels)


def _import(origin: Path) -> Bundle:
    from exports import export_open_clip, open_clip_model

    made = export_open_clip(origin / "foreign", open_clip_model(quick_gelu=False, layers=1), False, 14)
    return pipeline.import_bundle(ForeignFiles(made.image, made.text), origin, load_recipe(), name="imported")


def write_weights(folder: Path, beside: Path) -> None:
    """A CLIP of one layer a tower: checkpoints and a config in one folder, and all of it as open_clip saves a model."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    model = CLIP(CONFIG["embed_dim"], CONFIG["vision_cfg"], CONFIG["text_cfg"])
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "tiny.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, folder / "tiny.pt")
    with warnings.catch_warnings(action="ignore"):  # torch's own, about archives
        torch.jit.save(torch.jit.script(_holder(state)), folder / "script.pt")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    beside.mkdir()
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    told = {"model_cfg": {**CONFIG, "quick_gelu": False}, "preprocess_cfg": pixels}
    (beside / "open_clip_config.json").write_text(json.dumps(told))
    save_file(state, beside / "open_clip_model.safetensors")


def _holder(state: dict[str, Any]) -> Any:
    """A module that does nothing and has these weights, as TorchScript archives of a CLIP have them."""
    from torch import nn

    top = nn.Identity()
    for name, value in state.items():
        *above, last = name.split(".")
        place: nn.Module = top
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, nn.Identity())
            place = getattr(place, part)
        place.register_buffer(last, value.clone())
    return top


def _published(folder: Path) -> None:
    """A CLIP as transformers saves it, with a tokenizer of letters."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = ["<pad>", "<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(letters), "max_position_embeddings": 16, "bos_token_id": 2, "eos_token_id": 3}
    vision = {**size, "image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config={**size, **text, "pad_token_id": 0}, vision_config=vision)
    transformers.CLIPModel(config).save_pretrained(folder)
    pixels = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    pixels |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, [], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 3)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=16
    )
    fast.save_pretrained(folder)


def write_images(folder: Path) -> None:
    """A small image in each of several formats."""
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (24, 40, 3), np.uint8)
    for name in ("rgb.jpg", "rgb.png", "rgb.webp", "rgb.gif", "rgb.bmp"):
        Image.fromarray(pixels).save(folder / name)
    Image.fromarray(pixels[..., 0]).convert("P").save(folder / "palette.png")
    Image.fromarray((pixels[..., 0].astype(np.uint16)) * 257).save(folder / "deep.png")


def _parquet(images: Path, file: Path) -> None:
    rows = [{"bytes": (images / name).read_bytes(), "path": name} for name in ("rgb.png", "rgb.jpg", "palette.png")]
    table = pa.table({"image": rows, "label": pa.array([0, 1, 1], pa.int64())})
    names = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": names}})}
    pq.write_table(table.replace_schema_metadata(told), file)
