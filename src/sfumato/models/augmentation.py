"""Copies of a picture that say the same: moved, turned, enlarged or mirrored a little, by chance. Pure functions of tensors.

Claim (augmentation multiplicity; De et al. 2022, arXiv:2204.13650, section 3.2): M copies of a record's *own* picture are
averaged inside that record's loss, before its gradient is clipped. So a unit's gradient stays one vector of norm at most C,
whatever M is and whatever was drawn: sensitivity, sampling and what is charged are those of M = 1. What may be done to a
picture is a public setting, fitted to nothing; what was done is the loss's own chance, as noise levels are, and is not released.

Shapes: R records, M copies, C channels, H x W pixels.
"""

import math

import torch
from torch import Tensor

from sfumato.models.settings import Augmentation


def copies(pictures: Tensor, how: Augmentation, count: int, generator: torch.Generator | None = None) -> Tensor:
    """``count`` copies of every picture, each changed by chance of its own: (R, C, H, W) -> (R, M, C, H, W).

    Copy i of record r is made of picture r alone. Chance is from ``generator``, or torch's global one.
    """
    rows, shape = len(pictures), pictures.shape[1:]
    drawn = torch.rand(rows * count, 5, generator=generator)
    repeated = pictures[:, None].expand(rows, count, *shape).reshape(rows * count, *shape)
    even = drawn * 2 - 1  # in [-1, 1)
    changed = moved(
        repeated,
        shift=even[:, :2] * how.shift,
        angle=even[:, 2] * math.radians(how.rotation),
        zoom=(even[:, 3] * math.log1p(how.zoom)).exp(),
    )
    if how.flip:
        changed = torch.where(drawn[:, 4, None, None, None] < 0.5, changed.flip(-1), changed)
    return changed.reshape(rows, count, *shape)


def moved(pictures: Tensor, *, shift: Tensor, angle: Tensor, zoom: Tensor) -> Tensor:
    """Each picture about its centre enlarged, turned to the left, then moved; what comes in from outside repeats the edge.

    Values between pixels are bilinear; a whole shift alone moves pixels as they are.

    Args: pictures (R, C, H, W); shift (R, 2) pixels down and to the right, angle (R,) radians, zoom (R,) factor.
    """
    if not len(pictures):
        return pictures
    height, width = pictures.shape[-2:]
    down = torch.arange(height) - (height - 1) / 2
    right = torch.arange(width) - (width - 1) / 2
    y = (down[None, :, None] - shift[:, 0, None, None]) / zoom[:, None, None]  # where a pixel comes from
    x = (right[None, None, :] - shift[:, 1, None, None]) / zoom[:, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    from_y, from_x = cos * y + sin * x, cos * x - sin * y
    grid = torch.stack([from_x * 2 / width, from_y * 2 / height], dim=-1)  # -1 and 1 are the outer edges
    return torch.nn.functional.grid_sample(
        pictures, grid.to(pictures), mode="bilinear", padding_mode="border", align_corners=False
    )
