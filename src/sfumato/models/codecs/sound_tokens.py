"""Sounds as tokens: one a sample by the mu-law, or a few a frame of their mel spectrogram.

Shapes: R records, T samples, L tokens, B bands, N frames, S tokens a frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from sfumato.errors import DataError
from sfumato.models.codecs.audio import SoundCodec
from sfumato.models.codecs.image import cosine_matrix
from sfumato.models.codecs.lattice import Lattice
from sfumato.models.settings import MelTokens, MuLaw
from sfumato.records import Modality, Record


@dataclass(frozen=True)
class MuLawCodec:
    """Sounds (T,) <-> (R, T) tokens: sign(x) ln(1 + mu |x|) / ln(1 + mu), mu = levels - 1, on an even grid (ITU-T G.711).

    Sounds that are shorter than T end with silence, longer ones are cut.
    """

    settings: MuLaw
    samples: int
    sample_rate: int
    modality: ClassVar[Modality] = "audio"
    end: ClassVar[int | None] = None

    @property
    def kind(self) -> Literal["tokens"]:
        return "tokens"

    @property
    def vocabulary(self) -> int:
        return self.settings.levels

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.samples,)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return ((0, self.vocabulary),) * self.samples

    def coordinates(self) -> Tensor:
        level = torch.linspace(-1.0, 1.0, self.vocabulary)
        return torch.stack([torch.ones_like(level), 1.7 * level, 2.2 * level.square() - 0.7], 1)

    def places(self) -> Tensor | None:
        return None

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        table = self.blank(len(records))
        present = torch.zeros(len(records), dtype=torch.bool)
        for row, record in enumerate(records):
            if record.audio is None:
                continue
            if record.audio.ndim != 1 or record.sample_rate != self.sample_rate or not np.isfinite(record.audio).all():
                raise DataError(
                    f"record {record.id}: audio = {record.audio.shape} at {record.sample_rate} Hz · must be (T,) finite "
                    f"numbers at {self.sample_rate} Hz",
                    next="Prepare the records with the recipe's data.sample_rate.",
                )
            sound = torch.zeros(self.samples, dtype=torch.float64)
            sound[: len(record.audio)] = torch.from_numpy(record.audio[: self.samples].astype(np.float64))
            table[row], present[row] = self._tokens(sound), True
        return table, present

    def _tokens(self, sound: Tensor) -> Tensor:
        mu = self.vocabulary - 1
        bent = sound.sign() * torch.log1p(mu * sound.abs().clamp(max=1.0)) / np.log1p(mu)
        return ((bent + 1) / 2 * mu).round().long()

    def blank(self, rows: int) -> Tensor:
        return torch.full((rows, self.samples), self.vocabulary)

    def decode(self, encoded: Tensor) -> Sequence[np.ndarray]:
        mu = self.vocabulary - 1
        bent = encoded.clamp(0, mu).double() / mu * 2 - 1
        sounds = bent.sign() * torch.expm1(bent.abs() * np.log1p(mu)) / mu
        return list(sounds.float().numpy())


@dataclass(frozen=True)
class MelTokenCodec:
    """Sounds (T,) <-> (R, N S) tokens of their mel spectrograms; ``codecs.audio`` makes a spectrogram, and a sound of one."""

    settings: MelTokens
    samples: int
    sample_rate: int
    modality: ClassVar[Modality] = "audio"
    end: ClassVar[int | None] = None

    @property
    def kind(self) -> Literal["tokens"]:
        return "tokens"

    @cached_property
    def continuous(self) -> SoundCodec:
        """Sounds <-> spectrograms."""
        return SoundCodec(self.settings.mel, self.samples, self.sample_rate)

    @cached_property
    def lattice(self) -> Lattice:
        bands, frames = self.continuous.shape
        return Lattice(self.settings.levels, frames, bands)

    @property
    def vocabulary(self) -> int:
        return self.lattice.vocabulary

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        return self.lattice.ranges

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ranges),)

    def coordinates(self) -> Tensor:
        return self.lattice.coordinates()

    def places(self) -> Tensor | None:
        return None

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        latents, present = self.continuous.encode(records)
        spectrum = self._cosine @ latents.reshape(-1, *self.continuous.shape)  # (R, B, N)
        tokens = self.lattice.encode(spectrum.transpose(1, 2) / self._range)
        return torch.where(present[:, None], tokens, self.vocabulary), present

    def blank(self, rows: int) -> Tensor:
        return torch.full((rows, *self.shape), self.vocabulary)

    def decode(self, encoded: Tensor) -> Sequence[np.ndarray]:
        spectrum = (self.lattice.decode(encoded) * self._range).transpose(1, 2)
        bands = self.continuous.shape[0]
        return self.continuous.decode((bands * self._cosine.T @ spectrum).flatten(1))

    @cached_property
    def _cosine(self) -> Tensor:
        """(B, B): a frame's mean first, then its frequencies over the bands."""
        bands = self.continuous.shape[0]
        return cosine_matrix(bands, bands).float() * bands**-0.5

    @cached_property
    def _range(self) -> Tensor:
        """(B,) of the mean and of each frequency."""
        found = torch.full((self.continuous.shape[0],), self.settings.detail_range)
        found[0] = 1.0
        return found
