"""A folder as transformers publishes it: CLIP, SigLIP and Chinese CLIP as open_clip's architectures and names.

open_clip has no converter for them. Configs are filled up with transformers' defaults, because it leaves out what is
one; `transformers_names` has the tensors.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d4c_onnx.errors import ModelError
from d4c_onnx.files import temporary_folder
from d4c_onnx.manifest import LARGEST_SIDE
from d4c_onnx.models.beside import weights_in
from d4c_onnx.models.checkpoint import Checkpoint, read_checkpoint
from d4c_onnx.models.settings import ModelSettings
from d4c_onnx.models.transformers_names import renamed_chinese, renamed_clip, renamed_siglip
from d4c_onnx.untrusted_json import Node, integer, mapping, nullable, positive, quoted, read_json, text

TRANSFORMERS_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_MEND = "It takes the config.json of a CLIPModel, a SiglipModel or a ChineseCLIPModel."
_Config = dict[str, Any]

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_VISION: _Config = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224, "patch_size": 32} | dict(
    zip(_SIZES, (768, 3072, 12, 12), strict=True)
)
_DEFAULTS: dict[str, tuple[_Config, _Config]] = {
    "clip": (
        dict(zip(_SIZES, (512, 2048, 12, 8), strict=True))
        | {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        | {"eos_token_id": 49407},
        _VISION,
    ),
    "siglip": (
        dict(zip(_SIZES, (768, 3072, 12, 12), strict=True))
        | {"vocab_size": 32000, "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh"}
        | {"layer_norm_eps": 1e-6, "projection_size": None},
        _VISION | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16},
    ),
    "chinese_clip": (
        dict(zip(_SIZES, (768, 3072, 12, 12), strict=True))
        | {"vocab_size": 30522, "max_position_embeddings": 512, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
        | {"type_vocab_size": 2, "pad_token_id": 0},
        _VISION,
    ),
}
# timm's towers of SigLIP by width, layers, heads and inner width; patch and image size are in their names, too
SIGLIP_TOWERS: dict[tuple[int, int, int, int], str] = {
    (768, 12, 12, 3072): "base",
    (1024, 24, 16, 4096): "large",
    (1152, 27, 16, 4304): "so400m",
    (1536, 40, 16, 6144): "giantopt",
}
_GELU: dict[str, dict[str, str]] = {
    "gelu": {},
    "gelu_pytorch_tanh": {"approximate": "tanh"},
    "gelu_new": {"approximate": "tanh"},
}


@dataclass(frozen=True, slots=True)
class Converted:
    """A model of transformers as one of open_clip.

    Attributes:
        config: open_clip's `model_cfg`; a BERT's has an empty `hf_model_name`.
        bert: the config of its text tower, where that is a BERT.
        said: image size, and which GELU.
        rename: the state dict under open_clip's names.
        finish: sets what open_clip's config cannot say, before weights go in.
    """

    config: _Config
    bert: _Config | None
    said: ModelSettings
    rename: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
    finish: Callable[[Any], None]


def convert_config(file: Path) -> Converted:
    """Read a `config.json`.

    Raises:
        ModelError: it is damaged, or of a model that open_clip has no towers for: named.
    """
    top = read_json(file, ModelError, _MEND)
    kind = top.take("model_type", text)
    if kind not in _DEFAULTS:
        why = "its towers take any shape (NaFlex)" if kind == "siglip2" else "open_clip has no towers for it"
        raise ModelError(f"{file}: is a {kind} model, which is not converted: {why}. {_MEND}")
    texts, vision = (_tower(top, name, known) for name, known in zip(("text", "vision"), _DEFAULTS[kind], strict=True))
    if kind == "siglip":
        return _siglip(file, texts, vision)
    embed_dim = top.take("projection_dim", integer(1, 2**16), 512)
    visual = _vit(file, vision)
    quick = vision["hidden_act"] == "quick_gelu"
    said = ModelSettings(quick_gelu=quick, size=(vision["image_size"],) * 2)
    config = {"embed_dim": embed_dim, "quick_gelu": quick, "vision_cfg": visual}
    if kind == "chinese_clip":
        context = min(texts["max_position_embeddings"], 512)
        tower = {"hf_model_name": "", "hf_proj_type": "linear", "hf_pooler_type": "cls_last_hidden_state_pooler"}
        config["text_cfg"] = {**tower, "context_length": context}
        return Converted(config, {**texts, "model_type": "bert"}, said, renamed_chinese, lambda model: None)
    if quick != (texts["hidden_act"] == "quick_gelu"):
        raise ModelError(f"{file}: one tower runs quick_gelu and the other does not, which open_clip has no form for.")
    eos = texts["eos_token_id"]
    # 2 stands in old configs, whose models are pooled at the largest id, as transformers does
    pool = {"pool_type": "argmax"} if eos in (2, None) else {"pool_type": "eos", "eos_id": eos}
    config["text_cfg"] = {**_text(file, texts), **pool}
    return Converted(config, None, said, renamed_clip, lambda model: None)


def read_weights(folder: Path) -> Checkpoint:
    """The tensors of a folder, from one file or, by an index, from several.

    Raises:
        ModelError: a file is missing, damaged, or not in this folder.
    """
    index = folder / _INDEX
    if not index.is_file():
        return read_checkpoint(weights_in(folder))
    files = read_json(index, ModelError, "Download it again.").take("weight_map", mapping(text))
    state: dict[str, torch.Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise ModelError(f"{index}: names {quoted(name)}, which is no file of weights in {folder}.")
        state |= read_checkpoint(folder / name).state
    return Checkpoint(index, state, ())


def _tower(top: Node, name: str, known: _Config) -> _Config:
    """A tower's config with defaults; an older `text_config_dict` goes before, as transformers has it."""
    found = dict(known)
    for key in (f"{name}_config", f"{name}_config_dict"):
        node = top.take(key, lambda node: node, None)
        if node is None or node.value is None:
            continue
        taken = {key: node.take(key, _READERS[key], default) for key, default in known.items()}
        found |= taken
    return found


_READERS: dict[str, Callable[[Node], Any]] = {
    **dict.fromkeys(_SIZES, integer(1, 2**16)),
    "vocab_size": integer(1, 2**22),
    "type_vocab_size": integer(1, 2**10),
    "max_position_embeddings": integer(1, 2**16),
    "eos_token_id": nullable(integer(0, 2**22)),
    "pad_token_id": nullable(integer(0, 2**22)),
    "projection_size": nullable(integer(1, 2**16)),
    "image_size": integer(1, LARGEST_SIDE),
    "patch_size": integer(1, LARGEST_SIDE),
    "layer_norm_eps": positive,
    "hidden_act": text,
}


def _common(file: Path, tower: _Config) -> _Config:
    """What both of open_clip's own towers call alike."""
    width, inner, act = tower["hidden_size"], tower["intermediate_size"], tower["hidden_act"]
    if width % tower["num_attention_heads"]:
        raise ModelError(f"{file}: a width of {width} does not part into {tower['num_attention_heads']} heads. {_MEND}")
    if act != "quick_gelu" and act not in _GELU:
        raise ModelError(f"{file}: hidden_act {act!r} is one that open_clip's towers do not have.")
    ratio = inner / width
    common = {"width": width, "layers": tower["num_hidden_layers"]}
    # open_clip takes the whole part of their product
    common["mlp_ratio"] = ratio if int(width * ratio) == inner else (inner + 0.5) / width
    common["norm_kwargs"] = {"eps": tower["layer_norm_eps"]}
    return {**common, **({"act_kwargs": _GELU[act]} if _GELU.get(act) else {})}


def _vit(file: Path, vision: _Config) -> _Config:
    own = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    return {**_common(file, vision), **own, "head_width": vision["hidden_size"] // vision["num_attention_heads"]}


def _text(file: Path, texts: _Config) -> _Config:
    own = {"context_length": texts["max_position_embeddings"], "vocab_size": texts["vocab_size"]}
    return {**_common(file, texts), **own, "heads": texts["num_attention_heads"]}


def _siglip(file: Path, texts: _Config, vision: _Config) -> Converted:
    import timm

    size = SIGLIP_TOWERS.get(tuple(vision[name] for name in ("hidden_size", *_SIZES[2:], "intermediate_size")), "")
    name = f"vit_{size}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    if not size or not timm.is_model(name):
        raise ModelError(
            f"{file}: timm has no SigLIP tower of width {vision['hidden_size']}, {vision['num_hidden_layers']} layers, "
            f"patches of {vision['patch_size']} and images of {vision['image_size']} pixels, so open_clip has none."
        )
    for act in (vision["hidden_act"], texts["hidden_act"]):
        if act not in _GELU:
            raise ModelError(f"{file}: hidden_act {act!r} is one that open_clip's towers of SigLIP do not have.")
    tower = {"timm_model_name": name, "image_size": vision["image_size"], "timm_pool": "map", "timm_proj": "none"}
    own = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    config = {
        "embed_dim": texts["projection_size"] or texts["hidden_size"],
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": tower,
        "text_cfg": {**_text(file, texts), **own},
    }

    def finish(model: Any) -> None:  # timm's towers have one GELU and one eps each, which need not be the config's
        for module in model.visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = vision["layer_norm_eps"]
            if isinstance(getattr(module, "act", None), nn.Module):
                module.act = nn.GELU(**_GELU[vision["hidden_act"]])

    said = ModelSettings(quick_gelu=False, size=(vision["image_size"],) * 2)
    return Converted(config, None, said, renamed_siglip, finish)


@contextlib.contextmanager
def complete_config(converted: Converted) -> Iterator[_Config]:
    """open_clip's config, its text tower described by a file that is there for the moment, where that is a BERT.

    Raises:
        BundleError: there is no room for that file.
    """
    if converted.bert is None:
        yield converted.config
        return
    with temporary_folder() as folder:
        (folder / TRANSFORMERS_CONFIG).write_text(json.dumps(converted.bert), "utf-8")
        yield {**converted.config, "text_cfg": {**converted.config["text_cfg"], "hf_model_name": str(folder)}}
