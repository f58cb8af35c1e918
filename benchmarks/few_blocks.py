"""open_clip's configs with few blocks a tower: widths, images, vocabularies and heads stay as published.

Blocks of a tower are alike, so that what the second one goes through, the fortieth does, too; what is lost is the time
that forty take, their memory, and the error that they add up. Networks in stages keep so many blocks a stage.
"""

import copy
import functools
from typing import Any

import timm
from timm.models import register_model

_DEPTH = ("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "eva", "vitamin")
# by the file of timm's that holds a model: the argument with the blocks of each stage
_STAGES = {"convnext": "depths", "swin_transformer": "depths", "fastvit": "layers"}
_FIVE_STAGES = ("fastvit_mci3", "fastvit_mci4")
_OF_TEXT_TOWERS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")


def with_few_blocks(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """A config whose towers have at most so many blocks; a timm tower of just so many is registered.

    Raises:
        KeyError: a timm tower that nothing is known of.
    """
    small = copy.deepcopy(config)
    vision = small["vision_cfg"]
    if "timm_model_name" in vision:
        vision["timm_model_name"] = _registered(vision["timm_model_name"], blocks)
    elif isinstance(vision["layers"], list):
        vision["layers"] = [min(layers, blocks) for layers in vision["layers"]]
    else:
        vision["layers"] = min(vision["layers"], blocks)
    for part in ("text_cfg", "multimodal_cfg"):
        if part in small and "hf_model_name" not in small[part]:
            small[part]["layers"] = min(small[part].get("layers", 12), blocks)
    return small


def text_tower_of(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """A transformers `config.json` with at most so many blocks."""
    return config | {key: min(config[key], blocks) for key in _OF_TEXT_TOWERS if key in config}


def _registered(tower: str, blocks: int) -> str:
    """The name of a function of timm's with fewer blocks."""
    name, make = f"{tower}_of_{blocks}_blocks", timm.model_entrypoint(tower)
    family = make.__module__.rpartition(".")[2]
    if family in _DEPTH:
        fewer: dict[str, Any] = {"depth": blocks}
    else:
        fewer = {_STAGES[family]: (blocks,) * (5 if tower in _FIVE_STAGES else 4)}

    @functools.wraps(make)
    def shortened(pretrained: bool = False, **options: Any) -> Any:
        return make(pretrained=pretrained, **{**fewer, **options})

    if not timm.is_model(name):
        shortened.__name__, shortened.__module__ = name, __name__
        register_model(shortened)
    return name
