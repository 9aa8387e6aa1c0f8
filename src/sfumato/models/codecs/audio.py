"""Sounds to numbers and back, by fixed public maps.

A sound has a fixed length, ``Shapes.samples`` at ``Shapes.sample_rate``: shorter ones are padded with silence at the end, longer
ones cut there. One at another rate is resampled first by a polyphase filter.

Shapes: R records, T samples, B bands, N frames, D numbers.
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
from sfumato.models.codecs.image import cosine_matrix
from sfumato.models.codecs.spectrogram import Spectrogram
from sfumato.models.settings import MelSpectrogram, SoundNumbers, Waveform
from sfumato.records import Modality, Record

_AT_ONCE = 256  # sounds encoded together
_LARGEST_RATIO = 4096  # of a resampling, in lowest terms: its filter has about 20 times as many taps


@dataclass(frozen=True)
class SoundCodec:
    """Records' sounds as flat latents (R, D), and back.

    ``waveform``: D = T, the samples as they are.
    ``mel``: D = B N, decibels of each band and frame, from ``floor_db`` to 0 mapped to [-1, 1]; with ``kept`` the lowest
    cosine frequencies of that picture over (bands, frames), scaled as ``codecs.image`` scales them.
    """

    settings: SoundNumbers
    samples: int
    sample_rate: int
    modality: ClassVar[Modality] = "audio"

    def __post_init__(self) -> None:
        match self.settings:
            case Waveform():
                pass
            case MelSpectrogram(kept=kept, bands=bands, aligned_below=below):
                if below is not None and not len(self.low):
                    raise UsageError(
                        f"aligned_below = {below} · is below every band: the first is loudest at {float(self.peaks[0]):.0f} hertz",
                        next="Raise it, or leave it out.",
                    )
                if kept is not None and not (1 <= kept[0] <= bands and 1 <= kept[1] <= self.spectrogram.frames):
                    raise UsageError(
                        f"model.audio.kept = {kept} · must be at most {bands} bands and {self.spectrogram.frames} frames",
                        next="Keep fewer, or shorten model.audio.hop.",
                    )

    @property
    def kind(self) -> Literal["continuous"]:
        return "continuous"

    @cached_property
    def spectrogram(self) -> Spectrogram:
        assert isinstance(self.settings, MelSpectrogram)
        of = self.settings
        return Spectrogram(self.samples, self.sample_rate, of.window, of.hop, of.bands, of.iterations)

    @property
    def shape(self) -> tuple[int, int]:
        match self.settings:
            case Waveform():
                return 1, self.samples
            case MelSpectrogram(kept=kept, bands=bands):
                return kept or (bands, self.spectrogram.frames)

    @cached_property
    def scale(self) -> Tensor:
        match self.settings:
            case Waveform(std=std) | MelSpectrogram(kept=None, std=std):
                return torch.full((math.prod(self.shape),), std)
            case MelSpectrogram(amplitude=amplitude, decay=decay):
                i, j = (torch.arange(length, dtype=torch.float32) for length in self.shape)
                return (amplitude * (1.0 + (i[:, None] ** 2 + j[None, :] ** 2).sqrt()) ** -decay).flatten()

    def encode(self, records: Sequence[Record]) -> tuple[Tensor, Tensor]:
        latents = self.blank(len(records))
        there = [row for row, record in enumerate(records) if record.audio is not None]
        for start in range(0, len(there), _AT_ONCE):
            rows = there[start : start + _AT_ONCE]
            sounds = torch.from_numpy(np.stack([self._sound(records[row]) for row in rows]))
            latents[rows] = self._latents(sounds)
        present = torch.tensor([record.audio is not None for record in records], dtype=torch.bool)
        return latents, present

    def blank(self, rows: int) -> Tensor:
        return torch.zeros(rows, math.prod(self.shape))

    def decode(self, encoded: Tensor) -> Sequence[np.ndarray]:
        sounds = [self._sounds(part) for part in encoded.detach().float().split(_AT_ONCE)] if len(encoded) else []
        return [sound for part in sounds for sound in part.clamp(-1.0, 1.0).numpy()]

    def _latents(self, sounds: Tensor) -> Tensor:
        """(R, T) -> (R, D)."""
        match self.settings:
            case Waveform():
                return sounds
            case MelSpectrogram(floor_db=floor_db, kept=kept):
                decibels = 10.0 * self.spectrogram.power(sounds).clamp(min=10.0 ** (floor_db / 10)).log10()
                picture = 1.0 - 2.0 * decibels / floor_db
                if self.settings.aligned_below is not None:
                    picture = turned(picture, picture.shape[2] // 2 - self.loudest(picture))
                if kept is not None:
                    down, across = self._cosines
                    picture = down @ picture @ across.T
                return picture.flatten(1)

    def _sounds(self, latents: Tensor) -> Tensor:
        """(R, D) -> (R, T)."""
        match self.settings:
            case Waveform():
                return latents
            case MelSpectrogram(floor_db=floor_db, kept=kept):
                picture = latents.reshape(-1, *self.shape)
                if kept is not None:
                    down, across = self._cosines
                    gain = math.prod(kept) / (self.settings.bands * self.spectrogram.frames)
                    picture = down.T @ picture @ across / gain
                decibels = ((1.0 - picture) * (floor_db / 2)).clamp(max=_LOUDEST_DB)
                power = 10.0 ** (decibels / 10.0)
                return self.spectrogram.sound(torch.where(decibels > floor_db, power, torch.zeros_like(power)))

    @cached_property
    def peaks(self) -> Tensor:
        """(B,) hertz, the middle of each band's triangle."""
        filters = self.spectrogram.filters
        return filters.argmax(dim=1) * (self.sample_rate / 2) / (filters.shape[1] - 1)

    @cached_property
    def low(self) -> Tensor:
        """Bands whose middle is not above ``aligned_below``."""
        assert isinstance(self.settings, MelSpectrogram)
        below = self.settings.aligned_below
        return torch.nonzero(self.peaks <= (math.inf if below is None else below))[:, 0]

    def loudest(self, pictures: Tensor, low: Tensor | None = None) -> Tensor:
        """(R,) int64: the frame of most power in the low bands. Args: pictures (R, B, N), decibels mapped to [-1, 1]."""
        assert isinstance(self.settings, MelSpectrogram)
        decibels = (1 - pictures[:, self.low if low is None else low]) * (self.settings.floor_db / 2)
        return (10.0 ** (decibels / 10)).sum(dim=1).argmax(dim=1)

    @cached_property
    def _cosines(self) -> tuple[Tensor, Tensor]:
        """(kept bands, B) and (kept frames, N), scaled so that an entry has the scale of one of the shrunk picture."""
        sizes = zip(self.shape, (self.spectrogram.bands, self.spectrogram.frames), strict=True)
        down, across = (cosine_matrix(length, kept).float() * math.sqrt(kept / length) for kept, length in sizes)
        return down, across

    def _sound(self, record: Record) -> np.ndarray:
        """(T,) float32. Raises DataError naming a record whose sound is none."""
        sound, rate = np.asarray(record.audio), record.sample_rate
        if sound.ndim != 1 or not np.issubdtype(sound.dtype, np.floating) or not np.isfinite(sound).all():
            raise DataError(
                f"record {record.id}: audio = {sound.dtype} {sound.shape} · must be finite floats of one channel",
                next="Give (T,) float32 in [-1, 1].",
            )
        if rate is None or rate <= 0:
            raise DataError(f"record {record.id}: sample_rate = {rate} · must be hertz", next="Give the sound's rate.")
        if rate != self.sample_rate:
            sound = _resampled(record.id, sound, rate, self.sample_rate)
        fitted = np.zeros(self.samples, np.float32)
        fitted[: len(sound)] = np.clip(sound[: self.samples], -1.0, 1.0)
        return fitted


def turned(pictures: Tensor, by: Tensor) -> Tensor:
    """Each picture's frames, moved later by its number of them; what passes the end comes in at the beginning. (R, B, N), (R,)."""
    frames = pictures.shape[2]
    source = (torch.arange(frames) - by[:, None]) % frames
    return pictures.gather(2, source[:, None].expand(-1, pictures.shape[1], -1))


_LOUDEST_DB = 6.0  # a sampled latent may be anything; what is louder than full scale would be clipped anyway


def _resampled(name: str, sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """By a polyphase filter (zero phase, Kaiser window). Raises DataError for rates without a small common ratio."""
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    up, down = wanted // common, rate // common
    if max(up, down) > _LARGEST_RATIO:
        raise DataError(
            f"record {name}: sample_rate = {rate} · cannot be resampled to {wanted}: the ratio is {up}/{down}",
            next=f"Resample it to {wanted} hertz before.",
        )
    return resample_poly(sound.astype(np.float64), up, down) if len(sound) else sound
