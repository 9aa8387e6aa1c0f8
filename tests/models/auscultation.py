"""Heart rate and murmur of a sound, measured on its waveform: slow, obvious, and knowing nothing of codecs or models."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.signal import butter, sosfiltfilt

RATE_HZ = 4000
STEP = 20  # samples between values of an envelope


@dataclass(frozen=True)
class Heard:
    heart_rate: float  # beats a minute
    murmur_db: float  # hiss between first and second sound over hiss after the second


def listen(sound: np.ndarray) -> Heard:
    """The heart whose beats fit the envelope of the low notes best: all rates of 56 to 122, all starts."""
    low, rough = _envelope(sound, 25, 110), _envelope(sound, 1200, 1900)
    hearts, templates = _templates(len(low))
    rate, start = hearts[int((templates @ (low - low.mean())).argmax())]
    time = np.arange(len(low)) * STEP / RATE_HZ
    beat = 60 / rate
    phase = np.mod(time - start, beat)
    systole = (phase > 0.08) & (phase < 0.32 * beat**0.5 - 0.04)
    diastole = (phase > 0.32 * beat**0.5 + 0.08) & (phase < beat - 0.04)
    power = rough**2
    return Heard(rate, 10 * float(np.log10(power[systole].mean() / power[diastole].mean())))


@lru_cache(maxsize=2)
def _templates(length: int) -> tuple[list[tuple[float, float]], np.ndarray]:
    """(rate, start) of every heart that is tried, and its envelope, centred and of unit length."""
    time = np.arange(length) * STEP / RATE_HZ
    hearts = [
        (rate, start) for rate in np.arange(56.0, 122.5).tolist() for start in np.arange(0, 60 / rate, 0.01).tolist()
    ]
    rows = np.array([_beats(np.mod(time - start, 60 / rate), 60 / rate) for rate, start in hearts])
    rows -= rows.mean(1, keepdims=True)
    return hearts, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _beats(phase: np.ndarray, beat: float) -> np.ndarray:
    later = phase - 0.32 * beat**0.5
    return np.exp(-phase / 0.03) + 0.7 * np.where(later > 0, np.exp(-np.abs(later) / 0.022), 0)


def _envelope(sound: np.ndarray, low: float, high: float) -> np.ndarray:
    """Root mean square of a band, every ``STEP`` samples."""
    band = sosfiltfilt(butter(4, (low, high), "bandpass", fs=RATE_HZ, output="sos"), sound.astype(np.float64))
    square = np.concatenate([[0.0], np.cumsum(band**2)])
    edges = np.arange(0, len(sound) + 1, STEP)
    return np.sqrt(np.diff(square[edges]) / STEP)
