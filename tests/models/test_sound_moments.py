"""Sounds drawn from one noisy sum: what is laid where, what a unit can move, what is made of it, what an attacker sees."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.from_sound_moments import FromSoundMoments
from sfumato.models.settings import Aspect, MelSpectrogram, ModelSettings, Question, SoundMoments, TermAxis
from sfumato.models.shapes import Shapes
from sfumato.models.sound_moments import SoundMomentsMaker, low_rank
from sfumato.privacy import latents
from sfumato.privacy.plan import MeanEmbedding
from sfumato.privacy.settings import MeanEmbeddingSettings, PrivacySettings
from sfumato.randomness import TestRandom
from sfumato.recipe import Recipe
from sfumato.records import Record, prompt

SAMPLES, RATE = 1_000, 4_000
MEL = MelSpectrogram(bands=10, window=128, hop=64)
SHAPES = Shapes(samples=SAMPLES, sample_rate=RATE)
PAUSE = Question(name="pause", answers=(TermAxis(name="short", more=("short",)), TermAxis(name="long", more=("long",))))
HISS = Question(name="hiss", answers=(TermAxis(name="none", more=("no hiss",)), TermAxis(name="hiss", more=("hiss",))))
MOMENTS = SoundMoments(
    aspects=(Aspect(name="beat", questions=(PAUSE,)), Aspect(name="breath", questions=(HISS,), tones=(900.0, 1_900.0))),
    outline=6,
    level=-0.5,
    longest=0.8,
    aligned_below=300.0,
)
SHORT, LONG = 0.06, 0.12  # seconds between the two beats of a sound


def built(**changes: Any) -> FromSoundMoments:
    settings = ModelSettings(image=None, audio=MEL, sound_moments=replace(MOMENTS, **changes))
    return models.build_for_release("from_sound_moments", settings, SHAPES)


def records(count: int, seed: int = 0) -> list[Record]:
    """A loud beat anywhere, a softer one after a short or a long pause; a hiss, or none."""
    rng = np.random.default_rng(seed)
    time = np.arange(SAMPLES) / RATE
    made = []
    for i in range(count):
        pause, hiss = (SHORT, LONG)[i % 2], (i // 2) % 2
        start = rng.uniform(0.01, 0.1)
        sound = 0.002 * rng.standard_normal(SAMPLES)
        for begins, loud in ((start, 0.8), (start + pause, 0.4)):
            away = time - begins
            sound += np.where(away > 0, loud * np.exp(-away / 0.01) * np.sin(2 * np.pi * 150 * away), 0)
        sound += hiss * 0.05 * np.sin(2 * np.pi * (1_100 + 600 * (i % 5) / 4) * time)
        text = f"{('short', 'long')[i % 2]} pause, {('no hiss', 'a hiss')[hiss]}"
        made.append(Record(id=str(i), unit=f"{i:05d}", text=text, audio=sound.astype(np.float32), sample_rate=RATE))
    return made


def sums(model: FromSoundMoments, given: list[Record], noise: float = 0.0, units: int = 0) -> torch.Tensor:
    dimension = model.dimensions["mean"]
    plan = MeanEmbedding(population=units or len(given), delta=1e-6, dimension=dimension, noise_multiplier=noise)
    return latents.release_class_sums(
        model.encode(given), model.features, plan, TestRandom(1), classes=model.maker.classes, products=False
    )


def received(given: list[Record], noise: float = 0.0, **changes: Any) -> FromSoundMoments:
    model = built(**changes)
    model.receive(sums(model, given, noise), noise / len(given))
    model.fit(0)
    return model


@pytest.mark.parametrize("longest", [0.8, 0.2])
def test_what_is_summed_is_each_sound_laid_where_it_is_loudest(longest):
    """Oracle: record by record and frame by frame in numpy, from the codec's bands alone; the shorter length cuts all of them."""
    given = records(12)
    given[3] = replace(given[3], text="a hiss")  # of no class of the first aspect
    given[4] = replace(given[4], audio=None, sample_rate=None)
    model = built(longest=longest)
    maker, of = model.maker, model.of
    bands, frames = maker.bands, maker.frames
    pictures = maker.codec.encode(given)[0].reshape(-1, bands, frames).numpy().astype(np.float64)
    n = np.arange(bands)
    cosines = np.stack([np.cos(np.pi / bands * (n + 0.5) * k) for k in range(of.outline)]) * math.sqrt(2 / bands)
    cosines[0] /= math.sqrt(2)
    tones = [b for b in range(bands) if 900 <= float(maker.codec.peaks[b]) <= 1_900]
    low = [b for b in range(bands) if float(maker.codec.peaks[b]) <= 300]
    assert len(tones) >= 2 and low
    expected = np.zeros((maker.classes, 1 + of.outline, 2 * frames - 1))
    for i, record in enumerate(given):
        if record.audio is None:
            continue
        picture = pictures[i]
        power = (10 ** ((1 - picture[low]) * (MEL.floor_db / 2) / 10)).sum(0)
        loudest = int(power.argmax())
        z = cosines @ (picture - of.level)
        z *= min(1.0, of.longest * math.sqrt(bands * frames) / np.linalg.norm(z))
        tone = int(picture[tones].mean(1).argmax())
        assert record.text is not None
        classes = [2 + len(tones) * ("no hiss" not in record.text) + tone]
        if "pause" in record.text:
            classes.append(int("long" in record.text))
        for number in classes:
            for t in range(frames):
                place = frames - 1 - loudest + t
                expected[number, 0, place] += 0.5 / math.sqrt(frames)
                expected[number, 1:, place] += math.sqrt(0.75) * z[:, t] / (of.longest * math.sqrt(bands * frames))
    expected /= math.sqrt(2) * len(given)
    found = sums(model, given).reshape(expected.shape).numpy()
    assert np.abs(found - expected).max() < 2e-5  # entries are cut to 2^-15


@pytest.mark.parametrize("which", ["last", "loud", "other classes", "one class", "two of one unit"])
def test_a_unit_more_moves_the_sums_by_one_at_most(which):
    """The sensitivity that is charged; features as long as they can be, since every sound is shortened. Exact."""
    given = records(20)
    model = built(longest=0.01)
    loud = (np.sin(np.arange(SAMPLES)) * 1e3).astype(np.float32)
    extra = {
        "last": [given[-1]],
        "loud": [replace(given[0], audio=loud)],
        "other classes": [replace(given[0], text="long pause, a hiss")],
        "one class": [replace(given[0], text="long pause")],
        "two of one unit": [given[0], given[1]],
    }[which]
    more = [*given, *(replace(one, id=f"more{i}", unit="zzz") for i, one in enumerate(extra))]
    plan = MeanEmbedding(population=1, delta=1e-6, dimension=model.dimensions["mean"], noise_multiplier=0.0)
    plan = replace(plan, records_per_unit=2, unit="person")
    moved = [
        latents.release_class_sums(
            model.encode(some), model.features, plan, TestRandom(1), classes=model.maker.classes, products=False
        )
        for some in (given, more)
    ]
    length = float((moved[1] - moved[0]).square().sum().sqrt())
    assert length <= 1.0
    assert length > {"one class": 0.69, "two of one unit": 0.5}.get(which, 0.98)


def test_without_noise_a_class_is_the_mean_of_its_sounds_where_they_lie():
    """Oracle: means over the records that cover a frame; effects of two balanced aspects add up to the mean of both."""
    given = records(200)
    model = received(given)
    table = model.encode(given)
    maker = model.maker
    z = table.tensors["audio"].reshape(200, MOMENTS.outline, -1).numpy()
    loudest = table.tensors["loudest"].numpy()
    frames = maker.frames
    total, count = np.zeros((MOMENTS.outline, 2 * frames - 1)), np.zeros(2 * frames - 1)
    for i in range(1, 200, 2):  # long pauses
        place = slice(frames - 1 - loudest[i], 2 * frames - 1 - loudest[i])
        total[:, place] += z[i]
        count[place] += 1
    seen = count > 20
    found = (model.get_buffer("middle") + model.get_buffer("effects")[1]).numpy()
    assert np.abs(found[:, seen] - (total / count.clip(1))[:, seen]).max() < 0.01
    shares = model.get_buffer("shares")
    assert shares[:2].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)
    assert float(shares[2:].sum()) == pytest.approx(1.0, abs=1e-3)


def test_noise_is_taken_out_of_what_is_drawn_from():
    """Mean squared error of classes' means against those without noise: told its standard deviation, under a third of that of one
    who takes the sums as they come (fixed seeds; over ten seeds it was .01 to .17)."""
    given = records(400)
    clean, told, not_told = (received(given, noise, level=-0.4) for noise in (0.0, 2.0, 2.0))
    not_told.receive(not_told.released, 0.0)
    not_told.fit(0)
    covered = sums(clean, given).unflatten(1, (-1, clean.maker.canvas))[:, 0] > 0.01
    errors = [
        float((of.get_buffer("effects") - clean.get_buffer("effects")).square().sum(1)[covered].mean())
        for of in (told, not_told)
    ]
    assert errors[0] < errors[1] / 3, errors


def test_sounds_begin_where_the_records_did():
    """Total variation between drawn and recorded beginnings; with 40 frames and 400 records chance alone gives about .1."""
    given = records(400)
    model = received(given)
    begins = model.get_buffer("begins")
    recorded = np.bincount(model.encode(given).tensors["loudest"].numpy(), minlength=len(begins)) / 400
    assert np.abs((begins / begins.sum()).numpy() - recorded).sum() / 2 < 0.02
    drawn = model.sample([prompt(text="short pause, no hiss")] * 200, ("audio",), seed=0)
    again = np.bincount(model.encode(drawn).tensors["loudest"].numpy(), minlength=len(begins)) / 200
    assert np.abs(again - recorded).sum() / 2 < 0.3


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_sounds_follow_their_texts(noise):
    """The pause between two beats, measured on the waveform, and the hiss: 40 sounds of each class."""
    model = received(records(1_200), noise)
    texts = [f"{pause} pause, {hiss}" for pause in ("short", "long") for hiss in ("no hiss", "a hiss")]
    drawn = model.sample([prompt(text=text) for text in texts for _ in range(40)], ("audio",), seed=0)
    sounds = np.stack([np.asarray(record.audio) for record in drawn])
    assert np.abs(sounds).max() <= 1 and sounds.shape == (160, SAMPLES)
    spectrum = np.abs(np.fft.rfft(sounds, axis=1))
    hertz = np.fft.rfftfreq(SAMPLES, 1 / RATE)
    hiss = spectrum[:, (hertz > 1_000) & (hertz < 1_800)].max(1) / spectrum[:, hertz < 300].max(1)
    hisses = np.tile(np.repeat([False, True], 40), 2)
    assert hiss[hisses].min() > 3 * np.median(hiss[~hisses])
    low = np.fft.irfft(np.fft.rfft(sounds, axis=1) * (hertz < 300), n=SAMPLES, axis=1)
    later = []
    for sound in low:
        loud = np.convolve(np.abs(sound), np.ones(40) / 40, mode="same")
        first = int(loud.argmax())
        after = {pause: loud[(at := first + round(pause * RATE)) - 30 : at + 30] for pause in (SHORT, LONG)}
        later.append(all(len(part) for part in after.values()) and after[LONG].mean() > after[SHORT].mean())
    longs = np.repeat([False, True], 80)
    assert np.mean(np.array(later) == longs) > 0.9


def test_a_text_that_leaves_an_answer_out_is_drawn_of_what_fits():
    model = received(records(200))
    fits = model.maker.fitting(["long pause", None, "a hiss"])
    tones = model.maker.sizes[1] // 2
    assert fits[0].tolist() == [[False, True], [True, True], [True, True]]
    assert fits[1].tolist() == [[True] * 2 * tones, [True] * 2 * tones, [False] * tones + [True] * tones]
    assert len(model.sample([prompt(text=None), prompt(text="long pause")], ("audio",), seed=0)) == 2


def test_the_same_seed_draws_the_same_and_what_is_saved_comes_back(tmp_path):
    model = received(records(60), 0.05)
    given = [prompt(text=text) for text in ("short pause, no hiss", None, "long pause, a hiss")]
    model.save(tmp_path)
    back = models.load(tmp_path)
    drawn = [[record.audio for record in of.sample(given, ("audio",), seed=3)] for of in (model, model, back)]
    for other in drawn[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(drawn[0], other, strict=True))
    other_seed = model.sample(given, ("audio",), seed=4)
    assert any(not np.array_equal(one, record.audio) for one, record in zip(drawn[0], other_seed, strict=True))
    assert model.sample([], ("audio",), seed=0) == []
    with pytest.raises(UsageError, match="this model knows text→audio"):
        model.sample(given, ("image",), seed=0)


def test_sounds_that_are_not_aligned_are_summed_where_they_are():
    given = records(40)
    model = received(given, aligned_below=None)
    assert model.maker.canvas == model.maker.frames
    assert not model.encode(given).tensors["loudest"].any()
    assert len(model.sample([prompt(text="short pause, a hiss")], ("audio",), seed=0)) == 1


def test_an_attacker_knows_members_by_sums_without_noise_and_not_by_noisy_ones():
    """AUC of 40 members of 40 records. Positive control above .7; the other bound: 5 standard deviations of a blind attacker,
    false alarm below 1e-6."""
    rng = np.random.default_rng(3)
    time = np.arange(SAMPLES) / RATE

    def melody() -> np.ndarray:
        """Ten notes of random pitch and loudness: no two are alike."""
        notes = np.sin(2 * np.pi * rng.uniform(100, 1_900, 10)[:, None] * time) * 10 ** rng.uniform(-3, 0, (10, 1))
        return (0.5 * notes[np.arange(SAMPLES) * 10 // SAMPLES, np.arange(SAMPLES)]).astype(np.float32)

    def told(name: str) -> list[Record]:
        return [
            replace(one, id=f"{name}{i}", unit=f"{name}{i:04d}", audio=melody()) for i, one in enumerate(records(40))
        ]

    inside, outside = told("in"), told("out")
    model = built()

    def auc() -> float:
        chance = torch.Generator().manual_seed(0)
        losses = [
            model.row_losses(model.encode(some).batch(range(40), records_per_unit=1), 1, chance).numpy()
            for some in (inside, outside)
        ]
        return float((losses[0][:, None] < losses[1][None]).mean())

    model.control_table(model.encode(inside))
    assert torch.allclose(model.released, sums(model, inside), atol=1e-4)
    assert auc() > 0.7
    model.receive(sums(model, inside, 20.0), 20 / 40)
    assert abs(auc() - 0.5) < 5 * (81 / (12 * 1600)) ** 0.5


def test_low_rank_keeps_the_signal_and_none_of_the_noise():
    """Oracle: eq. 7 of Gavish & Donoho 2017 for one singular value. Noise alone: its largest value is within the bulk's edge by
    Tracy-Widom fluctuations of about 1 %, and what is left of them is small."""
    rng = torch.Generator().manual_seed(0)
    u, v = torch.randn(60, 1, generator=rng).double(), torch.randn(900, 1, generator=rng).double()
    signal = 300 * (u / u.norm()) @ (v / v.norm()).T
    noise = torch.randn(60, 900, generator=rng).double()
    found = low_rank(signal + noise, 1.0)
    y = float(torch.linalg.matrix_norm(signal + noise, 2)) / 30
    beta = 60 / 900
    shrunk = 30 * math.sqrt((y * y - beta - 1) ** 2 - 4 * beta) / y
    assert float(torch.linalg.matrix_norm(found, 2)) == pytest.approx(shrunk, rel=1e-9)
    assert float((found - signal).norm()) < 0.2 * float(noise.norm())
    assert float(low_rank(noise, 1.0).norm()) < 0.05 * float(noise.norm())
    assert torch.equal(low_rank(signal, 0.0), signal)
    assert torch.allclose(low_rank((signal + noise).T, 1.0), found.T)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="aspects = "):
        SoundMoments()
    with pytest.raises(UsageError, match="level = -1"):
        replace(MOMENTS, level=-1.0)
    with pytest.raises(UsageError, match="tones = "):
        Aspect(name="x", questions=(HISS,), tones=(500.0, 250.0))
    with pytest.raises(UsageError, match="at least one"):
        Aspect(name="x", questions=())
    with pytest.raises(UsageError, match="by cosine frequencies"):
        ModelSettings(image=None, audio=replace(MEL, kept=(4, 8)), sound_moments=MOMENTS)
    with pytest.raises(UsageError, match="by cosine frequencies"):
        ModelSettings(image=None, audio=MEL, sound_moments=replace(MOMENTS, outline=11))
    with pytest.raises(UsageError, match="is below every band"):
        SoundMomentsMaker(replace(MOMENTS, aligned_below=1.0), MEL, SAMPLES, RATE)
    with pytest.raises(UsageError, match="holds 0 of 10 bands"):
        built(aspects=(replace(MOMENTS.aspects[1], tones=(1_999.0, 2_000.0)),))
    settings = ModelSettings(image=None, audio=MEL, sound_moments=MOMENTS)
    with pytest.raises(UsageError, match=r"sound_moments · must say"):
        models.build_for_release("from_sound_moments", replace(settings, sound_moments=None), SHAPES)
    with pytest.raises(UsageError, match=r"model\.sound_moments · is one sum"):
        Recipe(name="x", model=settings)
    private = PrivacySettings(mechanism="mean_embedding", epsilon=1.0, mean_embedding=MeanEmbeddingSettings(first=0.1))
    with pytest.raises(UsageError, match=r"model\.sound_moments · is one sum"):
        Recipe(name="x", model=settings, privacy=private)
