"""Tiny CLIPs of open_clip and transformers, exported as others do: by both of torch's exporters, under their names."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

SIDE, CONTEXT, WORDS = 32, 12, 99
START, END = 97, 98
PIXELS = {"size": [SIDE, SIDE], "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.6], "resize_mode": "squash"}
_SENTENCES = "a photo of cat . two words red boat on lake the small blue house and river 7"


@dataclass(frozen=True, slots=True)
class Export:
    """Two files in a folder with the configs that such exports have beside them."""

    image: Path
    text: Path

    @property
    def folder(self) -> Path:
        return self.image.parent


def write_configs(folder: Path, pad: str | None = "</s>") -> None:
    """Tokenizer, its config, and preprocessing."""
    words = ["<pad>", "<unk>", *(f"word{number}" for number in range(2, START)), "<s>", "</s>"]
    for number, word in enumerate(_SENTENCES.split(), 3):
        words[number] = word
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    ends = [("<s>", START), ("</s>", END)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_max_length": CONTEXT, **({} if pad is None else {"pad_token": pad})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "preprocess_cfg.json").write_text(json.dumps(PIXELS))


class Tower(nn.Module):
    """One call of a model as a module."""

    def __init__(self, model: nn.Module, call: Any) -> None:
        super().__init__()
        self.model, self.call = model, call
        self.eval()  # or the exporter would leave the model in training

    def forward(self, *given: torch.Tensor) -> Any:
        return self.call(self.model, *given)


def open_clip_model(quick_gelu: bool = True, layers: int = 2) -> nn.Module:
    """Of random weights."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    vision = {"image_size": SIDE, "layers": layers, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": WORDS, "width": 32, "heads": 2, "layers": layers}
    return CLIP(16, vision, text, quick_gelu=quick_gelu).eval()


def transformers_model(attention: str = "sdpa", layers: int = 2) -> nn.Module:
    """Of random weights, with plain GELU."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 2}
    text = {**size, "vocab_size": WORDS, "max_position_embeddings": CONTEXT, "eos_token_id": END, "bos_token_id": START}
    config = CLIPConfig(
        text_config={**text, "hidden_act": "gelu"},
        vision_config={**size, "image_size": SIDE, "patch_size": 8, "hidden_act": "gelu"},
        projection_dim=16,
    )
    return CLIPModel._from_config(config, attn_implementation=attention).eval()


def export_open_clip(folder: Path, model: nn.Module, dynamo: bool, opset: int) -> Export:
    """As Immich does: ids int32 and of fixed length, unit vectors."""
    write_configs(folder)
    ids = torch.tensor([[START, 3, 4, END] + [0] * 8, [START, 5, 6, 7, 8, END] + [0] * 6], dtype=torch.int32)
    image = Tower(model, lambda clip, given: clip.encode_image(given, normalize=True))
    text = Tower(model, lambda clip, given: clip.encode_text(given, normalize=True))
    made = Export(folder / "visual.onnx", folder / "textual.onnx")
    export(image, (torch.randn(2, 3, SIDE, SIDE),), made.image, {"image": ["batch"]}, "embeds", dynamo, opset)
    export(text, (ids,), made.text, {"text": ["batch"]}, "embeds", dynamo, opset)
    return made


def export_transformers(folder: Path, model: Any, dynamo: bool, opset: int) -> Export:
    """As optimum does: ids of any length, an attention mask, embeddings of any length."""
    write_configs(folder)
    image = Tower(model, lambda clip, given: clip.visual_projection(clip.vision_model(given).pooler_output))
    text = Tower(model, lambda clip, *given: clip.text_projection(clip.text_model(*given).pooler_output))
    ids = torch.tensor([[START, 3, 4, 5, END, END, END], [START, 6, 7, 8, 9, 10, END]])
    axes = ["batch", "sequence"]
    made = Export(folder / "vision_model.onnx", folder / "text_model.onnx")
    pixels = (torch.randn(2, 3, SIDE, SIDE),)
    export(image, pixels, made.image, {"pixel_values": ["batch"]}, "image_embeds", dynamo, opset)
    masked = {"input_ids": axes, "attention_mask": axes}
    export(text, (ids, (ids != END).long()), made.text, masked, "text_embeds", dynamo, opset)
    return made


def export(
    module: nn.Module,
    given: tuple[torch.Tensor, ...],
    path: Path,
    inputs: dict[str, list[str]],
    output: str | list[str],
    dynamo: bool,
    opset: int,
) -> None:
    """One call of one of torch's exporters, with the first axes of each input dynamic."""
    outputs = [output] if isinstance(output, str) else output
    shared: dict[str, Any] = {"input_names": list(inputs), "output_names": outputs, "opset_version": opset}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            sizes = {"batch": torch.export.Dim("batch", min=1, max=999), "sequence": torch.export.Dim.DYNAMIC}
            shapes = tuple({axis: sizes[name] for axis, name in enumerate(names)} for names in inputs.values())
            # a module with *given takes its shapes as one more tuple
            shared |= {"dynamic_shapes": (shapes,), "verbose": False, "external_data": False}
        else:
            shared["dynamic_axes"] = {name: dict(enumerate(axes)) for name, axes in inputs.items()}
            shared["dynamic_axes"] |= {name: {0: "batch"} for name in outputs}
        torch.onnx.export(module, given, path, dynamo=dynamo, **shared)
