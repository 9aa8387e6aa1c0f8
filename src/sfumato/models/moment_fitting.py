"""Gaussians whose pictures, once they are changed a little and cut to the range of grey levels, have given moments.

Pictures are not Gaussian: most grey levels of a digit are exactly black. A Gaussian with a picture's mean and covariance, cut to
[-1, 1], has other moments than were asked for, and grey noise where there was none. So the Gaussian is sought whose *cut* draws
have them; its mean then lies far below black where a picture is black. Turning, shearing, scaling and shifting each draw by a
random little (``Changes``) explains in a few numbers what would take a Gaussian much covariance, and what is left is sharper. All of it
is post-processing of the moments.

The search is a stochastic approximation (Robbins & Monro 1951): draw, change, cut, compare, move mean and covariance by the difference.

Shapes: R pictures, C channels, H W pixels, D entries of a picture.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.models.settings import Changes

_STEP, _SLOWER = 0.7, 10.0  # of the difference; halved after so many passes


def changed(pictures: Tensor, changes: Changes, generator: torch.Generator) -> Tensor:
    """Every picture turned, sheared, scaled, shifted and brightened by normal draws of its own; bilinear, the border repeated.

    Args: pictures (R, C, H, W), grey levels from -1. Returns: the same shape; the same tensor where nothing is to be changed.
    """
    if changes == Changes():
        return pictures
    rows, _, height, width = pictures.shape
    stds = (math.radians(changes.turn), changes.shear, changes.scale, changes.scale, changes.shift, changes.shift)
    turn, shear, tall, wide, down, over, light = (
        torch.randn(rows, 7, generator=generator) * torch.tensor([*stds, changes.brightness])
    ).unbind(1)
    window = torch.zeros(rows, 2, 3)
    window[:, 0, 0] = turn.cos() * wide.exp()
    window[:, 0, 1] = (shear - turn.sin()) * wide.exp()
    window[:, 1, 0] = turn.sin() * tall.exp()
    window[:, 1, 1] = turn.cos() * tall.exp()
    window[:, :, 2] = 2 * torch.stack([over, down], 1)  # the side is 2 long
    grid = torch.nn.functional.affine_grid(window, [rows, 1, height, width], align_corners=False)
    seen = torch.nn.functional.grid_sample(
        pictures, grid.to(pictures), mode="bilinear", padding_mode="border", align_corners=False
    )
    return (seen + 1) * light.exp().to(seen)[:, None, None, None] - 1


def fitted(
    mean: Tensor,
    covariance: Tensor,
    seen: Callable[[Tensor], Tensor],
    *,
    passes: int,
    draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The mean and the symmetric root of a Gaussian g for which ``seen(g)`` has this mean and covariance, as well as there is one.

    Args: mean (D,), covariance (D, D), float64; seen: (R, D) -> (R, D), what becomes of draws. passes: 0 takes the moments as they are.
      draws: of a pass, half of them mirrored.
    Returns: (D,), (D, D).
    """
    at, spread = mean.clone(), covariance.clone()
    for step in range(passes):
        half = torch.randn(-(-draws // 2), len(mean), generator=generator, dtype=torch.float64)
        found = seen(at + torch.cat([half, -half]) @ root(spread))
        rate = _STEP / (1 + step / _SLOWER)
        at = at + rate * (mean - found.mean(0))
        spread = positive(spread + rate * (covariance - torch.cov(found.T)))
    return at, root(spread)


def root(matrix: Tensor) -> Tensor:
    """The symmetric root of the part of a symmetric matrix that is a covariance."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def positive(matrix: Tensor) -> Tensor:
    """The part of a symmetric matrix that is a covariance."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp(min=0)) @ vectors.T
