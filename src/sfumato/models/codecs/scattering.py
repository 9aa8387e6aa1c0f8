"""What a linear reader sees of a picture: how strong its edges are, by place, direction and size. Fixed, fitted to nothing.

Two layers of Morlet wavelets with moduli, averaged over places: the scattering transform of Bruna & Mallat 2013
(arXiv:1203.1513, section 2), with J = 2 sizes and L = 8 directions: each picture's channel becomes 1 + J L + L^2 J (J - 1) / 2 = 81
maps, a quarter as high and as wide. Groups of maps are then brought to mean 0 and variance 1, within one picture, and all entries
to length 1. A linear layer over them is the best private classifier known where data are few (Tramèr & Boneh 2021,
arXiv:2011.11660, who take group norm too).

Differs: averages are sums with a Gaussian, taken exactly where they are wanted.

Shapes: R pictures, C channels, H W pixels, F features.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import UsageError

SIZES, DIRECTIONS = 2, 8  # J, L
SHRINK = 2**SIZES
MAPS = 1 + SIZES * DIRECTIONS + DIRECTIONS**2 * SIZES * (SIZES - 1) // 2
GROUPS = 27  # of 3 maps each, as Tramèr & Boneh have them
_AT_ONCE = 128
_FLOOR = 1e-3  # added to a group's standard deviation: a blank picture has none


def width(picture_shape: tuple[int, int, int]) -> int:
    """F, of a picture (H, W, C). Raises UsageError where the picture is too small."""
    height, across, channels = picture_shape
    if min(height, across) < 2 * SHRINK:
        raise UsageError(
            f"picture = {height} x {across} · a reader's features need {2 * SHRINK} pixels a side",
            next="Enlarge data.image_size, or leave out model.reader.",
        )
    return channels * MAPS * -(-height // SHRINK) * -(-across // SHRINK)


@torch.no_grad()
def features(pictures: Tensor) -> Tensor:
    """(R, C, H, W) grey levels in [-1, 1] -> (R, F) float32 of length 1, each of its own picture alone."""
    rows, channels, height, across = pictures.shape
    made = torch.empty(rows, width((height, across, channels)))
    for start in range(0, rows, _AT_ONCE):
        part = pictures[start : start + _AT_ONCE]
        maps = scatter((part.flatten(0, 1).float() + 1) / 2)  # (R C, 81, h, w)
        grouped = maps.reshape(len(part), channels * GROUPS, -1)
        spread = grouped.std(2, keepdim=True, correction=0) + _FLOOR
        level = ((grouped - grouped.mean(2, keepdim=True)) / spread).flatten(1)
        made[start : start + len(part)] = torch.nn.functional.normalize(level, dim=1)
    return made


def scatter(pictures: Tensor) -> Tensor:
    """(R, H, W) -> (R, 81, ceil(H / 4), ceil(W / 4)): averages, then first-order moduli, then second-order ones.

    What the larger wavelets give varies slowly: it is made at every second place only.
    """
    _, height, across = pictures.shape
    below, beside = height % 2, across % 2  # every second place needs an even number of places
    edges = (SHRINK, SHRINK + beside, SHRINK, SHRINK + below)
    padded = torch.nn.functional.pad(pictures[:, None], edges, mode="reflect")[:, 0]
    shape = padded.shape[1], padded.shape[2]
    small, large = _wavelets(*shape).split(DIRECTIONS)
    down, over = _averaging(height, shape[0], 1), _averaging(across, shape[1], 1)
    coarse_down, coarse_over = _averaging(height, shape[0], 2), _averaging(across, shape[1], 2)
    spectrum = torch.fft.fft2(padded)[:, None]
    fine = torch.fft.ifft2(spectrum * small).abs()
    coarse = torch.fft.ifft2(_every_second(spectrum * large)).abs()
    found = [down @ padded[:, None] @ over.T, down @ fine @ over.T, coarse_down @ coarse @ coarse_over.T]
    for turn in range(DIRECTIONS):  # the second wavelet is larger than the first
        second = torch.fft.ifft2(_every_second(torch.fft.fft2(fine[:, turn, None]) * large)).abs()
        found.append(coarse_down @ second @ coarse_over.T)
    return torch.cat(found, 1)


def _every_second(spectrum: Tensor) -> Tensor:
    """The spectrum of every second place, in both directions."""
    rows, columns = spectrum.shape[-2:]
    return spectrum.unflatten(-1, (2, columns // 2)).mean(-2).unflatten(-2, (2, rows // 2)).mean(-3)


@lru_cache(maxsize=8)
def _wavelets(height: int, across: int) -> Tensor:
    """In Fourier space: (J L, height, across), those of the smaller size first."""
    wavelets = []
    for size in range(SIZES):
        for turn in range(DIRECTIONS):
            angle = math.pi * turn / DIRECTIONS
            std, wave = 0.8 * 2**size, 0.75 * math.pi / 2**size
            oscillating = _gabor(height, across, std, angle, wave)
            hull = _gabor(height, across, std, angle, 0.0)
            morlet = oscillating - oscillating.sum() / hull.sum() * hull  # of mean 0
            wavelets.append(np.fft.fft2(morlet).real)  # Hermitian in space: real
    return torch.from_numpy(np.stack(wavelets)).float()


@lru_cache(maxsize=16)
def _averaging(pixels: int, length: int, step: int) -> Tensor:
    """(ceil(pixels / 4), length / step): Gaussian averages around every fourth pixel, of a periodic line after its border."""
    centres = SHRINK + np.arange(0, pixels, SHRINK)[:, None, None]
    places = np.arange(0, length, step)[None, :, None] + length * np.arange(-2, 3)[None, None]
    std = 0.8 * 2 ** (SIZES - 1)
    weights = np.exp(-((places - centres) ** 2) / (2 * std**2)).sum(2) * step / (math.sqrt(2 * math.pi) * std)
    return torch.from_numpy(weights).float()


def _gabor(height: int, across: int, std: float, angle: float, wave: float) -> np.ndarray:
    """A Gaussian hull of sum 1, twice as long along its edge, times a plane wave; periodic, centred on (0, 0)."""
    slant = 4 / DIRECTIONS
    rows = np.arange(-2 * height, 3 * height)[:, None].astype(float)
    columns = np.arange(-2 * across, 3 * across)[None].astype(float)
    onward = rows * math.cos(angle) + columns * math.sin(angle)
    aside = columns * math.cos(angle) - rows * math.sin(angle)
    values = np.exp(-(onward**2 + slant**2 * aside**2) / (2 * std**2) + 1j * wave * onward)
    periodic = values.reshape(5, height, 5, across).sum((0, 2))
    return periodic * slant / (2 * math.pi * std**2)
