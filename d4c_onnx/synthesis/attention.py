"""Where the class token is asked to look: random mixtures of Gaussians as attention maps, one per image and head.

Source: attention priors alignment in SARDFQ (arXiv 2412.16553, section 3.2), which takes mean square errors; here
the distance is a relative entropy, since both are distributions over patches and their values shrink with the grid.
"""

import torch

from d4c_onnx.models.attention import PlainAttention

_GAUSSIANS = 3  # of a mixture, at most
_SIGMA = (0.08, 0.3)  # of a Gaussian, in sides of the image


def draw_priors(count: int, heads: int, grid: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Attention maps float32 [count, heads, rows * columns], each summing to 1."""
    shape = (count, heads, _GAUSSIANS)
    centre_y, centre_x = torch.rand(*shape, generator=generator), torch.rand(*shape, generator=generator)
    sigma_y, sigma_x = (torch.empty(shape).uniform_(*_SIGMA, generator=generator) for _ in range(2))
    used = torch.arange(_GAUSSIANS) <= torch.randint(_GAUSSIANS, (count, heads, 1), generator=generator)
    y, x = ((torch.arange(side) + 0.5) / side for side in grid)
    down = torch.exp(-0.5 * ((y - centre_y[..., None]) / sigma_y[..., None]).square())
    across = torch.exp(-0.5 * ((x - centre_x[..., None]) / sigma_x[..., None]).square())
    # Each Gaussian counts with its mass inside the grid, so that one at the border is as good as one in the middle.
    bells = down[..., :, None] * across[..., None, :]
    bells = bells / bells.sum((-2, -1), keepdim=True) * used[..., None, None]
    maps = bells.sum(2).flatten(2)
    return maps / maps.sum(-1, keepdim=True)


def class_attention(module: PlainAttention, tokens: torch.Tensor, prefix: int) -> torch.Tensor:
    """How the class token's attention is spread over the patches, float32 [B, heads, P], rows summing to 1.

    Args:
        module: the attention of a block.
        tokens: its input [B, prefix + P, width], the class token first.
        prefix: tokens in front of the patches; what they get is left out.
    """
    query = module.q_proj(tokens[:, :1]).unflatten(-1, (module.heads, -1)).transpose(1, 2)
    keys = module.k_proj(tokens[:, prefix:]).unflatten(-1, (module.heads, -1)).transpose(1, 2)
    return (query.float() @ keys.float().transpose(-1, -2)).softmax(-1)[:, :, 0]


def attention_distance(attention: torch.Tensor, priors: torch.Tensor) -> torch.Tensor:
    """Mean relative entropy (nats) of attention maps to their priors, a scalar; both [B, heads, P]."""
    logs = attention.clamp(min=1e-9).log()
    return (priors * (priors.clamp(min=1e-9).log() - logs)).sum(-1).mean()
