"""Label-preserving changes of pictures and sounds: pure functions of tensors, each row by draws of its own.

Used inside one example's loss (augmentation multiplicity: the mean over several changed copies, before its gradient is
clipped), they cost no privacy: De et al. 2022, arXiv:2204.13650, section 3.2. A unit's gradient stays one vector, at most C long, whatever
K is and whatever was drawn: sampling, sensitivity and charge are those of one copy. Which kinds there are is a public setting; what
was done is the loss's own chance, and is not released. No row is changed by what another row is;
the draws come from the generator in a fixed number a row, whichever kinds are asked for, so that a kind more does not
shift the draws of the others.

Shapes: R rows, C channels, H height, W width, T samples, K copies.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from sfumato.errors import UsageError
from sfumato.models.settings import PictureKind

SoundKind = Literal["gain", "time_shift", "invert"]
SHIFT = 0.125  # of the side, at most
CROP = 0.8  # of the side, at least
TURN = 0.26  # radians, about 15 degrees, at most
BRIGHTNESS = 0.1  # of the range from -1 to 1 or 0 to 1, at most
GAIN = 6.0  # decibels, at most


def augment(pictures: Tensor, kinds: Sequence[PictureKind], generator: torch.Generator) -> Tensor:
    """Changed copies of pictures, one each.

    - flip: left and right are exchanged with probability 1/2. Not label-preserving where the side matters (a chest, a
      letter): it is the caller who knows.
    - shift: by whole pixels, up to SHIFT of the side; the border is repeated.
    - crop: a square of CROP to 1 of the side, scaled up again (bilinear).
    - rotate: by up to TURN.
    - brightness: one number up to BRIGHTNESS is added; values are not cut.

    Args: pictures (R, C, H, W), floating point, any range.
    Returns: (R, C, H, W); the same tensor where ``kinds`` is empty. Differentiable.
    Raises UsageError for an unknown kind, the same kind twice, or another shape.
    """
    _check(kinds, get_args(PictureKind))
    if pictures.ndim != 4 or not pictures.is_floating_point():
        raise UsageError(
            f"pictures = {pictures.dtype}, shape {tuple(pictures.shape)} · must be floating point, (R, C, H, W)",
            next="Convert them first.",
        )
    if not kinds or not len(pictures):
        return pictures
    rows, _, height, width = pictures.shape
    u = _draws(rows, 8, generator, pictures)
    changed = pictures
    if "flip" in kinds:
        changed = torch.where(u[:, 0, None, None, None] < 0.5, changed.flip(-1), changed)
    if "shift" in kinds:
        changed = _shifted(changed, _whole(u[:, 1], SHIFT * height), _whole(u[:, 2], SHIFT * width))
    if "crop" in kinds or "rotate" in kinds:
        scale = CROP + (1 - CROP) * u[:, 3] if "crop" in kinds else torch.ones_like(u[:, 3])
        angle = (2 * u[:, 6] - 1) * TURN if "rotate" in kinds else torch.zeros_like(u[:, 6])
        changed = _sampled(changed, scale, (2 * u[:, 4:6] - 1) * (1 - scale[:, None]), angle)
    if "brightness" in kinds:
        changed = changed + ((2 * u[:, 7] - 1) * BRIGHTNESS)[:, None, None, None]
    return changed


def augment_sounds(sounds: Tensor, kinds: Sequence[SoundKind], generator: torch.Generator) -> Tensor:
    """Changed copies of sounds, one each.

    - gain: louder or softer by up to GAIN decibels; cut at -1 and 1.
    - time_shift: round and round, by any number of samples: for sounds without a beginning (a heartbeat, not a word).
    - invert: the sign is exchanged with probability 1/2, which nobody hears.

    Args: sounds (R, T), floating point in [-1, 1]. Returns: (R, T).
    """
    _check(kinds, get_args(SoundKind))
    if sounds.ndim != 2 or not sounds.is_floating_point():
        raise UsageError(
            f"sounds = {sounds.dtype}, shape {tuple(sounds.shape)} · must be floating point, (R, T)",
            next="Convert them first.",
        )
    if not kinds:
        return sounds
    rows, length = sounds.shape
    u = _draws(rows, 3, generator, sounds)
    changed = sounds
    if "time_shift" in kinds and length:
        start = (u[:, 0] * length).long().clamp(max=length - 1)
        index = (torch.arange(length, device=sounds.device) + start[:, None]) % length
        changed = changed.gather(1, index)
    if "invert" in kinds:
        changed = torch.where(u[:, 1, None] < 0.5, -changed, changed)
    if "gain" in kinds:
        changed = (changed * 10 ** ((2 * u[:, 2, None] - 1) * GAIN / 20)).clamp(-1, 1)
    return changed


def copies(
    pictures: Tensor, count: int, kinds: Sequence[PictureKind], generator: torch.Generator, *, keep_first: bool = True
) -> Tensor:
    """(R, K, C, H, W): ``count`` changed copies of each picture, the first one unchanged if ``keep_first``."""
    if count < 1:
        raise UsageError(f"count = {count} · must be at least 1", next="Give 1 or more.")
    many = augment(pictures.repeat_interleave(count, 0), kinds, generator)
    many = many.reshape(pictures.shape[0], count, *pictures.shape[1:])
    return torch.cat([pictures[:, None], many[:, 1:]], 1) if keep_first else many


def _check(kinds: Sequence[str], known: tuple[str, ...]) -> None:
    unknown = [kind for kind in kinds if kind not in known]
    if unknown or len(set(kinds)) != len(kinds):
        raise UsageError(
            f"kinds = {', '.join(kinds)} · each one of {', '.join(known)}, and once", next="Correct the list."
        )


def _draws(rows: int, count: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """(R, count) uniform in [0, 1), drawn where the generator lives."""
    drawn = torch.rand(rows, count, generator=generator, device=generator.device)
    return drawn.to(device=like.device, dtype=like.dtype)


def _whole(u: Tensor, most: float) -> Tensor:
    """Whole numbers from -most to most, each as likely. Args: u (R,) in [0, 1)."""
    steps = int(most)
    return (u * (2 * steps + 1)).floor().clamp(max=2 * steps).long() - steps


def _shifted(pictures: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Each row's picture moved by whole pixels; where nothing comes from, the border is repeated."""
    rows, channels, height, width = pictures.shape
    y = (torch.arange(height, device=pictures.device) - down[:, None]).clamp(0, height - 1)
    x = (torch.arange(width, device=pictures.device) - right[:, None]).clamp(0, width - 1)
    moved = pictures.gather(2, y[:, None, :, None].expand(rows, channels, height, width))
    return moved.gather(3, x[:, None, None, :].expand(rows, channels, height, width))


def _sampled(pictures: Tensor, scale: Tensor, centre: Tensor, angle: Tensor) -> Tensor:
    """A turned and scaled window of each picture. Args: scale (R,), centre (R, 2) in [-1, 1], angle (R,)."""
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    top = torch.stack([cosine, -sine, centre[:, 0]], 1)
    bottom = torch.stack([sine, cosine, centre[:, 1]], 1)
    grid = functional.affine_grid(torch.stack([top, bottom], 1), list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
