"""Sounds as pictures: what networks that read sounds look at, and people in a report.

Shapes: N sounds, T samples.
"""

from collections.abc import Sequence

import numpy as np

from sfumato.errors import UsageError

BANDS, FRAMES = 32, 32  # of a spectrogram picture
FLOOR_DB = -70.0  # below full scale; darker is black


def stack(sounds: Sequence[np.ndarray | None]) -> np.ndarray:
    """(N, T) float64; shorter ones end in silence. Raises UsageError where one is missing, empty, or not finite."""
    if not len(sounds):
        return np.zeros((0, 0))
    rows = []
    for number, sound in enumerate(sounds):
        row = np.zeros(0) if sound is None else np.asarray(sound, np.float64)
        if row.ndim != 1 or not len(row) or not np.isfinite(row).all():
            raise UsageError(
                f"sound {number} · must be a row of finite numbers, at least one", next="Give (T,) float32 in [-1, 1]."
            )
        rows.append(row)
    out = np.zeros((len(rows), max(map(len, rows))))
    for row, place in zip(rows, out, strict=True):
        place[: len(row)] = row
    return out


def spectrograms(sounds: np.ndarray, sample_rate: int, *, bands: int = BANDS, frames: int = FRAMES) -> np.ndarray:
    """Log-mel spectrograms as pictures, low notes at the bottom, (N, bands, frames, 1) uint8: what networks and people look at.

    Power in triangular mel bands (HTK's scale, Young et al. 2006, eq. 5.13) of Hann windows, in decibels from ``FLOOR_DB`` to 0.
    """
    count, length = sounds.shape
    if not count:
        return np.zeros((0, bands, frames, 1), np.uint8)
    hop = max(1, length // frames)
    window = 1 << max(6, int(np.ceil(np.log2(4 * hop))) - 1)
    padded = np.pad(sounds, ((0, 0), (window // 2, window)))
    shape = np.hanning(window)
    mel = _mel(sample_rate, window, bands)  # (bins, bands)
    out = np.empty((count, frames, bands))
    for frame in range(frames):
        part = padded[:, frame * hop : frame * hop + window] * shape
        out[:, frame] = np.abs(np.fft.rfft(part, axis=1) / (0.5 * shape.sum())) ** 2 @ mel
    decibels = 10 * np.log10(np.maximum(out, 1e-12))
    grey = np.clip((decibels - FLOOR_DB) / -FLOOR_DB, 0, 1) * 255
    return np.round(grey).astype(np.uint8).transpose(0, 2, 1)[:, ::-1, :, None].copy()


def _mel(sample_rate: int, window: int, bands: int) -> np.ndarray:
    """Triangles over the bins of a Fourier transform, (bins, bands)."""
    hertz = np.arange(window // 2 + 1) * sample_rate / window
    edges = np.linspace(_to_mel(40.0), _to_mel(sample_rate / 2), bands + 2)
    centres = 700 * (10 ** (edges / 2595) - 1)
    # A band narrower than a bin is widened to one, so that none is empty.
    half = np.maximum(np.diff(centres), sample_rate / window)
    up = (hertz[:, None] - centres[None, 1:-1] + half[None, :-1]) / half[None, :-1]
    down = (centres[None, 1:-1] + half[None, 1:] - hertz[:, None]) / half[None, 1:]
    return np.clip(np.minimum(up, down), 0, 1)


def _to_mel(hertz: float) -> float:
    return 2595 * np.log10(1 + hertz / 700)
