"""A ViT that looks at smaller pictures: what open_clip and timm make of the same weights at that size."""

from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import resize_pos_embed
from torch import nn

from d4c_onnx.models.smaller_input import shrink_input
from d4c_onnx.models.towers import ImageTower

_TEXT = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 1, "layers": 1}


class _Model(nn.Module):
    """What a tower is made of: an image encoder with a name."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual


def _clip(side: int | tuple[int, int], **vision: Any) -> nn.Module:
    torch.manual_seed(0)
    config = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": side} | vision
    model: nn.Module = open_clip.CLIP(16, config, open_clip.CLIPTextCfg(**_TEXT)).eval()
    return model


def test_it_is_the_model_that_open_clip_makes_for_that_size() -> None:
    large, small = _clip(64), _clip(32)
    state = large.state_dict()
    resize_pos_embed(state, small)
    small.load_state_dict(state)
    tower = ImageTower(large)
    assert shrink_input(tower, 4) == (32, 32)
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(tower(pixels), ImageTower(small)(pixels), atol=1e-6)
    assert shrink_input(tower, 4) is None


def test_pictures_that_are_not_square_keep_their_shape() -> None:
    tower = ImageTower(_clip((64, 32)))
    assert shrink_input(tower, 4) == (32, 16)
    assert tower(torch.randn(1, 3, 32, 16)).shape == (1, 16)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224", "eva02_tiny_patch14_224", "deit_tiny_patch16_224"]
)
def test_vits_of_timm_are_resampled_by_timm(name: str) -> None:
    model = timm.create_model(name, num_classes=0, img_size=128, patch_size=16, depth=1, embed_dim=32, num_heads=2)
    visual = nn.Module()
    visual.trunk = model.eval()
    visual.forward = model.forward  # type: ignore[method-assign]
    tower = ImageTower(_Model(visual))
    before = model.pos_embed.shape[1]
    assert shrink_input(tower, 4) == (64, 64)
    assert before - model.pos_embed.shape[1] == 8 * 8 - 4 * 4
    assert bool(tower(torch.randn(2, 3, 64, 64)).isfinite().all())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto", "vit_relpos_small_patch16_224"])
def test_other_towers_stay_as_they_are(name: str) -> None:
    visual = nn.Module()
    visual.trunk = timm.create_model(name, num_classes=0)
    before = {key: value.shape for key, value in visual.state_dict().items()}
    assert shrink_input(ImageTower(_Model(visual)), 4) is None
    assert {key: value.shape for key, value in visual.state_dict().items()} == before
    resnet = ImageTower(_clip(64, layers=[1, 1, 1, 1], width=8))
    assert shrink_input(resnet, 1) is None
