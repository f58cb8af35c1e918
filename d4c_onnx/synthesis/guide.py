"""What steers the images: the frozen image tower, the prompts' embeddings, and the objective."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from d4c_onnx.calibration.method import Method
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.models.smaller_input import shrink_input
from d4c_onnx.recipe import SynthesisConfig
from d4c_onnx.synthesis.compute import prepare_tower
from d4c_onnx.synthesis.hooks import TowerHooks, keeps_statistics
from d4c_onnx.synthesis.objectives import Objective, build_objective
from d4c_onnx.synthesis.perturb import Perturbation, published


@dataclass(frozen=True, slots=True)
class Guide:
    """What steers the images.

    Attributes:
        method: the constants of the optimisation.
        tower: the frozen image tower.
        encode: the tower as a function: pixel_values [B, 3, H, W] -> embeds [B, D]; a ViT may look at them smaller.
        texts: float32 [K, D], the prompts' unit vectors.
        objective: the weighted sum of losses.
        perturbations: PAE's list; empty without PAE. They act on SCG's box, without SCG on the whole image.
        hooks: what the objective asks of the tower's activations.
    """

    method: Method
    tower: nn.Module
    encode: Callable[[torch.Tensor], torch.Tensor]
    texts: torch.Tensor
    objective: Objective
    perturbations: tuple[Perturbation, ...]
    hooks: TowerHooks


def build_guide(
    loaded: LoadedModel,
    method: Method,
    config: SynthesisConfig,
    nouns: tuple[str, ...],
    device: torch.device,
    precision: torch.dtype,
) -> Guide:
    """A model's guide.

    Raises:
        RecipeError: the method or the recipe asks for what the tower does not have.
    """
    # The deployed form of the tower: the same numbers, and on CPUs its backward pass is about three times faster
    # than torch's fused attention.
    tower, _ = loaded.deployed_towers()
    size = shrink_input(tower, method.patches) if method.patches else None
    mean, std = (value.to(device) for value in loaded.normalization())
    objective = build_objective(method, keeps_statistics(tower))
    return Guide(
        method=method,
        tower=tower,
        encode=prepare_tower(tower, device, precision, size),
        texts=embed_prompts(loaded, config.template, nouns).to(device),
        objective=objective,
        perturbations=published(mean, std) if method.pae and method.loss == "d4c" else (),
        hooks=TowerHooks(tower, objective.activation_terms),
    )


def embed_prompts(loaded: LoadedModel, template: str, nouns: tuple[str, ...]) -> torch.Tensor:
    """Unit vectors of one prompt a noun, float32 [K, D], on the CPU."""
    ids = torch.from_numpy(loaded.tokenize([template.format(noun) for noun in nouns]))
    with torch.no_grad():
        return torch.cat([F.normalize(loaded.model.encode_text(part), dim=-1) for part in ids.split(64)])
