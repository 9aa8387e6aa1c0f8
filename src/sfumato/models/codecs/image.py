"""Pictures to numbers and back, by fixed public maps.

Shapes: R records, H W pixels, C channels, F frequencies kept per side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import DataError, UsageError
from sfumato.models import augmentation
from sfumato.models.settings import Cosine, PictureKind, PictureNumbers, Pixels
from sfumato.records import Modality, Record

_AT_ONCE = 4096  # pictures encoded together


@dataclass(frozen=True)
class PictureCodec:
    """Records' pictures as flat latents (R, D), and back."""

    settings: PictureNumbers
    picture_shape: tuple[int, int, int]
    sigma_data: float
    modality: ClassVar[Modality] = "image"

    @property
    def kind(self) -> Literal["continuous"]:
        return "continuous"

    @cached_property
    def coder(self) -> "ImageCoder":
        return ImageCoder(self.settings, *self.picture_shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.coder.latent_shape

    @cached_property
    def scale(self) -> Tensor:
        return self.coder.spectrum(self.sigma_data).flatten()

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        blank = np.zeros(self.picture_shape, np.uint8)
        latents = self.blank(len(records))
        for start in range(0, len(records), _AT_ONCE):
            part = records[start : start + _AT_ONCE]
            for record in part:
                if record.image is not None and record.image.shape != self.picture_shape:
                    raise DataError(
                        f"record {record.id}: image.shape = {record.image.shape} · must be {self.picture_shape}",
                        next="Prepare the records with the recipe's data.image_size and data.channels.",
                    )
            stacked = np.stack([blank if record.image is None else record.image for record in part])
            latents[start : start + len(part)] = self.coder.encode(torch.from_numpy(stacked)).flatten(1)
        present = torch.tensor([record.image is not None for record in records], dtype=torch.bool)
        return latents * present[:, None], present

    def blank(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.scale.numel())

    def augmented(
        self, encoded: Tensor, kinds: Sequence[PictureKind], count: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """``count`` copies of every picture, (R, D) -> (R, M, D), by way of its pixels, which are not kept: one changed copy, or
        the picture itself and changed ones.

        Every copy is made of its own row alone (``augmentation``); what a cosine codec leaves out stays left out.
        """
        pictures = self.coder.pictures(encoded.reshape(-1, *self.shape))
        chance = torch.default_generator if generator is None else generator
        changed = augmentation.copies(pictures, count, kinds, chance, keep_first=count > 1)
        return self.coder.latents(changed.flatten(0, 1)).reshape(len(encoded), count, self.scale.numel())

    def decode(self, encoded: Tensor) -> Sequence[np.ndarray]:
        return list(self.coder.decode(encoded.reshape(-1, *self.shape)).numpy())


@dataclass(frozen=True)
class ImageCoder:
    """Pictures (R, H, W, C) uint8 <-> latents (R, C, h, w) float32.

    ``pixels``: h = H, the value is the grey level in [-1, 1].
    ``cosine``: h = w = F, the lowest orthonormal DCT-II coefficients times F/H, so that a latent entry has the scale of a
    pixel of the picture shrunk to F x F. A picture is then band-limited: what is above frequency F is never modelled.
    """

    settings: PictureNumbers
    height: int
    width: int
    channels: int

    def __post_init__(self) -> None:
        match self.settings:
            case Pixels():
                pass
            case Cosine(kept=kept):
                if not 1 <= kept <= min(self.height, self.width):
                    raise UsageError(
                        f"model.image.kept = {kept} · must be between 1 and the picture's side, "
                        f"{min(self.height, self.width)}",
                        next="Keep fewer frequencies, or enlarge data.image_size.",
                    )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        match self.settings:
            case Pixels():
                return self.channels, self.height, self.width
            case Cosine(kept=kept):
                return self.channels, kept, kept

    def spectrum(self, sigma_data: float) -> Tensor:
        """The assumed standard deviation of each latent entry, (C, h, w): a public constant, fitted to nothing."""
        match self.settings:
            case Pixels():
                return torch.full(self.latent_shape, sigma_data)
            case Cosine(kept=kept, amplitude=amplitude, decay=decay):
                axis = torch.arange(kept, dtype=torch.float32)
                radius = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
                return (amplitude / (1.0 + radius) ** decay).expand(self.latent_shape).clone()

    def encode(self, pictures: Tensor) -> Tensor:
        """(R, H, W, C) uint8 -> (R, C, h, w) float32."""
        return self.latents(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1.0)

    def decode(self, latents: Tensor) -> Tensor:
        """(R, C, h, w) float -> (R, H, W, C) uint8, values outside the grey range clipped."""
        x = self.pictures(latents)
        return ((x.permute(0, 2, 3, 1) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def latents(self, x: Tensor) -> Tensor:
        """(R, C, H, W) grey levels in [-1, 1] -> (R, C, h, w). Linear."""
        match self.settings:
            case Pixels():
                return x.contiguous()
            case Cosine(kept=kept):
                down = cosine_matrix(self.height, kept).to(x) * math.sqrt(kept / self.height)
                across = cosine_matrix(self.width, kept).to(x) * math.sqrt(kept / self.width)
                return (down @ x @ across.T).contiguous()

    def pictures(self, latents: Tensor) -> Tensor:
        """(R, C, h, w) -> (R, C, H, W), not rounded and not clipped; ``latents`` of it gives them back. Linear."""
        match self.settings:
            case Pixels():
                return latents
            case Cosine(kept=kept):
                down = cosine_matrix(self.height, kept).to(latents) * math.sqrt(self.height / kept)
                across = cosine_matrix(self.width, kept).to(latents) * math.sqrt(self.width / kept)
                return down.T @ latents @ across


def cosine_matrix(length: int, kept: int) -> Tensor:
    """The first ``kept`` rows of the orthonormal DCT-II matrix, (kept, length) float64."""
    n = torch.arange(length, dtype=torch.float64)
    k = torch.arange(kept, dtype=torch.float64)[:, None]
    matrix = torch.cos(math.pi / length * (n + 0.5) * k) * math.sqrt(2.0 / length)
    matrix[0] /= math.sqrt(2.0)
    return matrix
