"""Fully connected networks, a denoiser and a plain one: small, fast on two cores, and cheap to train privately.

Every layer is ``nn.Linear``, so a unit's gradient norm costs a few inner products (privacy/gradients), and the K noise
draws of a record are one more dimension of the same matrix product.
Shapes: R records, K draws, D latent entries, E condition width.
"""

import math

import torch
from torch import Tensor, nn


class ResidualMlp(nn.Module):
    """Residual blocks of two linear layers, each told the noise level and the condition by addition.

    Called with latents (R, K, D), noise-level features ``level`` (R, K) = log(sigma)/4, condition (R, K, E);
    returns (R, K, D). The last layer starts at zero, so an untrained model returns EDM's linear part alone.
    """

    def __init__(self, dimension: int, condition: int, *, width: int, depth: int, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        joint = 2 * frequencies + condition
        self.inward = nn.Linear(dimension, width)
        self.told = nn.ModuleList(nn.Linear(joint, width) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outward = nn.Linear(width, dimension)
        for layer in [*self.down, self.outward]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, latents: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        told = torch.cat([fourier(level, self.frequencies), condition], dim=-1)
        hidden = self.inward(latents)
        for told_layer, up, down in zip(self.told, self.up, self.down, strict=True):
            inside = up(normalised(hidden)) + told_layer(told)
            hidden = hidden + down(nn.functional.silu(inside))
        return self.outward(normalised(hidden))


class Stack(nn.Module):
    """(..., I) -> (..., O): a layer in, ``depth`` residual layers, a layer out, and a linear map beside them.

    The linear map starts at zero; what is learnt first, under noise, is what a linear map can do.

    Args: first_std: of the first layer's random weights, so that sparse inputs come out at unit scale; None is torch's.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int, depth: int, first_std: float | None = None) -> None:
        super().__init__()
        self.inward = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outward = nn.Linear(width, outputs)
        self.straight = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.straight.weight)
        if first_std is not None:
            nn.init.normal_(self.inward.weight, std=first_std)
            nn.init.zeros_(self.inward.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inward(x)
        for layer in self.layers:
            hidden = hidden + nn.functional.silu(layer(normalised(hidden)))
        return self.outward(nn.functional.silu(normalised(hidden))) + self.straight(x)


def normalised(x: Tensor) -> Tensor:
    """Layer norm without parameters (Ba et al. 2016): nothing to train, nothing to protect."""
    return nn.functional.layer_norm(x, x.shape[-1:])


def fourier(level: Tensor, frequencies: int) -> Tensor:
    """Sines and cosines of a number, (…) -> (…, 2 * frequencies); frequencies 1/4 ... 16 cycles, geometric."""
    scale = torch.exp(torch.linspace(math.log(0.25), math.log(16.0), frequencies, device=level.device))
    angle = 2 * math.pi * level[..., None] * scale
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
