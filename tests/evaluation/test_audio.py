"""Sounds: what is measured on the waveform, held against what the phantom was drawn from."""

import numpy as np
import pytest

from sfumato.data import phantom
from sfumato.data.spectrogram import BANDS, FRAMES, spectrograms, stack
from sfumato.errors import UsageError
from sfumato.evaluation import audio


def hearts(count, seed, sample_rate=4000, murmur=None):
    rng = np.random.default_rng(seed)
    rates = rng.integers(58, 121, count).astype(float)
    rough = rng.random(count) < 0.4 if murmur is None else np.full(count, murmur)
    sounds = phantom.sounds(rates, rough, rng.random(count) < 0.35, rng, sample_rate=sample_rate)
    return sounds.astype(float), rates, rough


@pytest.mark.parametrize("sample_rate", [2000, 4000, 8000])
def test_the_heart_rate_is_read_from_one_second(sample_rate):
    sounds, rates, _ = hearts(120, seed=0, sample_rate=sample_rate)
    found = audio.beats(sounds, sample_rate)
    assert np.corrcoef(found.rate, rates)[0, 1] > 0.95
    assert np.abs(found.rate - rates).mean() < 2.5
    assert (found.fit > 0.6).mean() > 0.95


def test_a_beat_that_is_longer_than_its_sound_is_read_by_its_pause():
    """At 58 a minute the second has at most one whole beat: only first and second sound tell the rate."""
    slow = phantom.sounds(np.full(40, 58.0), np.zeros(40, bool), np.zeros(40, bool), np.random.default_rng(1))
    assert np.median(np.abs(audio.beats(slow.astype(float), 4000).rate - 58)) <= 3


def test_where_there_is_no_heart_nothing_fits():
    noise = np.random.default_rng(0).normal(0, 0.1, (40, 4000))
    tone = np.sin(2 * np.pi * 300 * np.arange(4000) / 4000)[None].repeat(3, 0)
    silence = np.zeros((2, 4000))
    assert audio.beats(noise, 4000).fit.mean() < 0.5
    assert (audio.beats(tone, 4000).fit < 0.5).all()
    assert (np.abs(audio.beats(silence, 4000).fit) < 1e-6).all()


def test_murmurs_are_told_from_wheezes_by_energy_between_the_beats():
    learnt, _, told = hearts(100, seed=0)
    sounds, _, murmur = hearts(150, seed=1)
    cut = audio.threshold(audio.murmurs(learnt, 4000, audio.beats(learnt, 4000)), told)
    scores = audio.murmurs(sounds, 4000, audio.beats(sounds, 4000))
    assert ((scores > cut) == murmur).mean() > 0.95
    with pytest.raises(UsageError, match="needs sounds with and without"):
        audio.threshold(scores, np.ones(len(scores), bool))


def test_the_threshold_has_the_highest_balanced_accuracy():
    scores, present = np.array([0.0, 1, 2, 3, 4, 5]), np.array([0, 0, 1, 0, 1, 1], bool)
    found = audio.threshold(scores, present)
    best = max((scores[present] > cut).mean() + (scores[~present] <= cut).mean() for cut in np.linspace(-1, 6, 701))
    assert (scores[present] > found).mean() + (scores[~present] <= found).mean() == pytest.approx(best)


def test_a_tone_is_bright_at_its_own_note_and_time():
    rate = 4000
    time = np.arange(rate) / rate
    low, high = np.sin(2 * np.pi * 150 * time), np.sin(2 * np.pi * 1500 * time)
    sounds = np.stack([low, np.where(time < 0.5, high, 0)])
    pictures = spectrograms(sounds, rate)
    assert pictures.shape == (2, BANDS, FRAMES, 1) and pictures.dtype == np.uint8
    assert pictures[0].mean(1).argmax() > 0.7 * BANDS  # low notes at the bottom
    assert pictures[1, :, :10].max(0).min() > 180
    assert pictures[1, :, -10:].max() == 0
    assert pictures[1, :, 5].argmax() < 0.35 * BANDS


def test_sounds_of_several_lengths_end_in_silence_and_broken_ones_are_refused():
    assert stack([np.ones(3), np.ones(1)]).tolist() == [[1, 1, 1], [1, 0, 0]]
    for broken in (None, np.zeros(0), np.array([np.nan]), np.zeros((2, 2))):
        with pytest.raises(UsageError, match="sound 0"):
            stack([broken])
    assert spectrograms(stack([]), 4000).shape == (0, BANDS, FRAMES, 1)
