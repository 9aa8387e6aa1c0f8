"""What is measured on the waveform of sounds: heart rate, murmur. (``data/spectrogram.py``: what networks look at.)

The heart's sounds of the clinic (``data/phantom.py``): a beat has a first sound, and a second one ``SYSTOLE`` sqrt(beat) later,
both below 100 Hz; a murmur is rough noise between the first and the second; a wheeze is a tone that goes with the breath.
Nothing here is trained; the one threshold (of a murmur) is set on public sounds.

Shapes: N sounds, T samples, F frames.
"""

from dataclasses import dataclass

import numpy as np

from sfumato.errors import UsageError

RATES = np.arange(50, 131)  # beats a minute that are tried
SYSTOLE = 0.32  # seconds at one beat a second, first to second sound
ENVELOPE_RATE = 200  # values a second
LOW, HIGH = 25.0, 110.0  # hertz, where the heart sounds are


@dataclass(frozen=True, slots=True)
class Beats:
    """Attributes:
    rate: (N,) beats a minute.
    start: (N,) seconds, when the first beat begins, in [0, 60 / rate).
    fit: (N,) correlation of the loudness with that of an ideal heart at this rate; near 0 there is no heart to hear.
    """

    rate: np.ndarray
    start: np.ndarray
    fit: np.ndarray


def beats(sounds: np.ndarray, sample_rate: int) -> Beats:
    """The heart rate of each sound: the loudness of the low notes beside that of ideal hearts at all rates and starts.

    Autocorrelation needs two beats, and a second of sound may hold one: the pause between first and second sound tells then.
    Args: sounds (N, T).
    """
    envelope = _loudness(sounds, sample_rate, LOW, HIGH)  # (N, F)
    time = np.arange(envelope.shape[1]) / ENVELOPE_RATE
    rates, starts, templates = [], [], []
    for rate in RATES:
        beat = 60.0 / rate
        for start in np.arange(0, beat, 0.02):
            phase = np.mod(time - start, beat)
            later = phase - SYSTOLE * np.sqrt(beat)
            templates.append(np.exp(-phase / 0.03) + 0.7 * np.where(later > 0, np.exp(-np.abs(later) / 0.022), 0))
            rates.append(float(rate))
            starts.append(start)
    score = _unit(envelope) @ _unit(np.array(templates)).T  # (N, templates)
    best = score.argmax(1)
    rows = np.arange(len(best))
    return Beats(rate=np.array(rates)[best], start=np.array(starts)[best], fit=score[rows, best])


def murmurs(sounds: np.ndarray, sample_rate: int, heart: Beats) -> np.ndarray:
    """How much louder rough noise is between first and second sound than after the second, in decibels, (N,).

    The median over the notes between 200 Hz and most of what the sample rate can hold: tones (a wheeze) do not count.
    """
    window = 1 << round(np.log2(sample_rate * 0.032))
    hop = window // 4
    count = 1 + max(0, (sounds.shape[1] - window) // hop)
    shape = np.hanning(window)
    hertz = np.arange(window // 2 + 1) * sample_rate / window
    inside = (hertz >= 200) & (hertz <= 0.45 * sample_rate)
    power = np.stack(
        [
            np.median(
                np.abs(np.fft.rfft(sounds[:, i * hop : i * hop + window] * shape, axis=1))[:, inside] ** 2, axis=1
            )
            for i in range(count)
        ],
        axis=1,
    )  # (N, count)
    decibels = 10 * np.log10(power + 1e-9)
    middle = (np.arange(count) * hop + window / 2) / sample_rate
    beat = (60.0 / heart.rate)[:, None]
    phase = np.mod(middle[None, :] - heart.start[:, None], beat)
    second = SYSTOLE * np.sqrt(beat)
    systole = (phase > 0.07) & (phase < second - 0.03)
    diastole = (phase > second + 0.10) & (phase < beat - 0.03)
    return _mean_where(decibels, systole) - _mean_where(decibels, diastole)


def threshold(scores: np.ndarray, present: np.ndarray) -> float:
    """Where to cut so that both kinds are told apart best: the highest balanced accuracy, the middle of the widest gap."""
    order = np.unique(scores)
    cuts = (order[1:] + order[:-1]) / 2 if len(order) > 1 else order
    if present.all() or not present.any():
        raise UsageError("threshold · needs sounds with and without", next="Give more public sounds.")
    balanced = np.array([(scores[present] > cut).mean() + (scores[~present] <= cut).mean() for cut in cuts])
    best = np.flatnonzero(balanced == balanced.max())
    return float(cuts[best[np.diff(order)[best].argmax()]]) if len(order) > 1 else float(cuts[0])


def _loudness(sounds: np.ndarray, sample_rate: int, low: float, high: float) -> np.ndarray:
    """The envelope of a band, ``ENVELOPE_RATE`` values a second, (N, F): the length of the analytic signal."""
    length = sounds.shape[1]
    spectrum = np.fft.fft(sounds, axis=1)
    hertz = np.fft.fftfreq(length, 1 / sample_rate)
    spectrum[:, (hertz < low) | (hertz > high)] = 0  # negative frequencies too: what is left is analytic
    envelope = 2 * np.abs(np.fft.ifft(spectrum, axis=1))
    step = sample_rate / ENVELOPE_RATE
    frames = max(2, int(length / step))
    edges = (np.arange(frames + 1) * step).astype(int)
    sums = np.concatenate([np.zeros((len(sounds), 1)), np.cumsum(envelope, axis=1)], axis=1)
    return (sums[:, edges[1:]] - sums[:, edges[:-1]]) / np.diff(edges)


def _unit(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def _mean_where(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Row means over the chosen entries; the row's own mean where none is."""
    counts = chosen.sum(1)
    sums = np.where(chosen, values, 0).sum(1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), values.mean(1))
