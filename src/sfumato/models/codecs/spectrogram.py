"""Sounds to log-mel spectrograms and back to sounds: fixed public filters, nothing fitted, no chance.

Forward: Hann windows, discrete Fourier transform, power, triangular filters evenly spaced on the mel scale, decibels.
Back: what was lost is chosen so that it is nobody's. Power per frequency by non-negative least squares, phases by fast
Griffin-Lim from fixed ones; the same spectrogram gives the same sound.

Shapes: R sounds, T samples, F frequencies = window/2 + 1, B bands, N frames.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sfumato.errors import UsageError

FRAMES_STEP = 8  # the number of frames is a multiple: a U-Net of up to four levels halves it evenly
_LEAST = 1e-12
_MOMENTUM = 0.99
_UPDATES = 60  # of the non-negative least squares; more change no sound that one can hear


@dataclass(frozen=True)
class Spectrogram:
    """``power`` (R, T) -> (R, B, N) and ``sound`` back. A sine of amplitude 1 has power about 1 in its band.

    Sounds are padded with silence to a whole number of hops; frame n is centred on sample n * hop.
    """

    samples: int
    sample_rate: int
    window: int  # samples
    hop: int  # samples
    bands: int
    iterations: int  # of Griffin-Lim

    def __post_init__(self) -> None:
        empty = [band for band, row in enumerate(self.filters) if not row.any()]
        if empty:
            raise UsageError(
                f"model.audio.bands = {self.bands} · with a window of {self.window} samples bands {empty[:5]} hold no frequency",
                next="Take fewer bands, or a longer model.audio.window.",
            )

    @property
    def frames(self) -> int:
        needed = 1 + math.ceil(self.samples / self.hop)
        return math.ceil(needed / FRAMES_STEP) * FRAMES_STEP

    @cached_property
    def filters(self) -> Tensor:
        """(B, F): triangles on the mel scale 2595 log10(1 + f/700) (HTK), from 0 hertz to half the sample rate, peak 1."""
        top = _mel(self.sample_rate / 2)
        corners = 700.0 * (10.0 ** (torch.linspace(0.0, top, self.bands + 2, dtype=torch.float64) / 2595.0) - 1.0)
        frequency = torch.linspace(0.0, self.sample_rate / 2, self.window // 2 + 1, dtype=torch.float64)
        left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
        rising, falling = (frequency - left) / (middle - left), (right - frequency) / (right - middle)
        return torch.minimum(rising, falling).clamp(min=0.0).float()

    @cached_property
    def _hann(self) -> Tensor:
        return torch.hann_window(self.window)

    @cached_property
    def _pseudo_inverse(self) -> Tensor:
        return torch.linalg.pinv(self.filters.double()).float()

    def power(self, sounds: Tensor) -> Tensor:
        """(R, T) -> (R, B, N)."""
        amplitude = self._transformed(self._padded(sounds)).abs() * (2.0 / float(self._hann.sum()))
        return self.filters @ amplitude.square()

    def sound(self, power: Tensor) -> Tensor:
        """(R, B, N) -> (R, T). The inverse of ``power`` as far as there is one: bands blur frequencies, phases are lost."""
        if not len(power):
            return power.new_zeros(0, self.samples)
        amplitude = self._frequencies(power).sqrt() * (float(self._hann.sum()) / 2.0)
        return self._griffin_lim(amplitude)[:, : self.samples]

    def _frequencies(self, power: Tensor) -> Tensor:
        """(R, F, N) >= 0 whose bands are nearest to ``power``: from the pseudo-inverse by multiplicative updates, each of which
        lowers the squared error (Lee & Seung 2001, Theorem 1, for a fixed factor)."""
        x = (self._pseudo_inverse @ power).clamp(min=_LEAST)
        told = self.filters.T @ power
        gram = self.filters.T @ self.filters
        for _ in range(_UPDATES):
            x = x * (told / (gram @ x).clamp(min=_LEAST))
        return x

    def _griffin_lim(self, amplitude: Tensor) -> Tensor:
        """(R, F, N) -> (R, padded T). Perraudin, Balazs & Sondergaard 2013, algorithm 2, with momentum .99.

        The first phases are pseudo-random and fixed: equal ones would put a click into the middle of every frame.
        """
        first = torch.rand(amplitude.shape[1:], generator=torch.Generator().manual_seed(0)) * (2 * math.pi)
        spectrum = amplitude * torch.polar(torch.ones_like(first), first)
        before = spectrum
        for _ in range(self.iterations):
            consistent = self._transformed(self._back(spectrum))
            ahead = consistent + _MOMENTUM * (consistent - before)
            spectrum = amplitude * (ahead / ahead.abs().clamp(min=_LEAST))
            before = consistent
        return self._back(spectrum)

    def _padded(self, sounds: Tensor) -> Tensor:
        return torch.nn.functional.pad(sounds, (0, (self.frames - 1) * self.hop - self.samples))

    def _transformed(self, sounds: Tensor) -> Tensor:
        """(R, padded T) -> (R, F, N) complex."""
        return torch.stft(
            sounds, self.window, self.hop, window=self._hann, center=True, pad_mode="constant", return_complex=True
        )

    def _back(self, spectrum: Tensor) -> Tensor:
        return torch.istft(
            spectrum, self.window, self.hop, window=self._hann, center=True, length=(self.frames - 1) * self.hop
        )


def _mel(hertz: float) -> float:
    return 2595.0 * math.log10(1.0 + hertz / 700.0)
