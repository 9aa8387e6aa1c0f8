"""A reader of pictures: fixed features, answers of public questions, one of several pictures for a text, texts for a picture."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tests.models.combinations import records
from tests.models.conftest import TINY

from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.codecs import scattering
from sfumato.models.families.denoising import Denoising
from sfumato.models.families.reading import ANSWERS, FEATURES, Bank, PictureReader
from sfumato.models.settings import Autoregressive, Question, Reader, Sampling, TermAxis
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.privacy.gradients.groups import Part
from sfumato.randomness import TestRandom
from sfumato.records import Record, UnitTable, prompt


def _question(name: str, *answers: str) -> Question:
    return Question(name=name, answers=tuple(TermAxis(name=one, more=(one,)) for one in answers))


SIDE, HEIGHT = _question("side", "left", "right"), _question("height", "upper", "lower")
READING = replace(TINY, reader=Reader(questions=(SIDE, HEIGHT)))


def corner(text: str, rng: np.random.Generator) -> np.ndarray:
    """8 x 8: a spot where the text says, in noise."""
    picture = rng.integers(0, 60, (8, 8, 1), dtype=np.uint8)
    row, column = 4 * ("lower" in text), 4 * ("right" in text)
    picture[row + 1 : row + 3, column + 1 : column + 3] = 255
    return picture


def corners(count: int, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    said = [f"{rng.choice(['upper', 'lower'])} {rng.choice(['left', 'right'])}" for _ in range(count)]
    return [Record(id=str(i), unit=f"u{i:04d}", text=text, image=corner(text, rng)) for i, text in enumerate(said)]


def built(settings=READING) -> Denoising:
    model = models.build(settings, picture_shape=(8, 8, 1))
    assert isinstance(model, Denoising)
    return model


def reader_of(model: Denoising) -> PictureReader:
    assert model.reader is not None
    return model.reader


# ---- features ----


def test_first_and_second_maps_are_convolutions_with_wavelets_written_out():
    """Oracle: sums over pixels, in float64, on a periodic grid with reflected borders."""
    side = 8
    picture = np.random.default_rng(0).uniform(0, 1, (side, side))
    padded = np.pad(picture, scattering.SHRINK, mode="reflect")
    n = len(padded)

    def wavelet(std: float, angle: float, wave: float, slant: float) -> np.ndarray:
        values = np.zeros((n, n), complex)
        for row in range(-2 * n, 3 * n):
            for column in range(-2 * n, 3 * n):
                onward = row * math.cos(angle) + column * math.sin(angle)
                aside = column * math.cos(angle) - row * math.sin(angle)
                far = (onward**2 + (slant * aside) ** 2) / (2 * std**2)
                if far < 60:
                    values[row % n, column % n] += np.exp(-far + 1j * wave * onward)
        return values * slant / (2 * math.pi * std**2)

    def morlet(size: int, turn: int) -> np.ndarray:
        told = (0.8 * 2**size, math.pi * turn / scattering.DIRECTIONS)
        oscillating = wavelet(*told, 0.75 * math.pi / 2**size, 0.5)
        hull = wavelet(*told, 0.0, 0.5)
        return oscillating - oscillating.sum() / hull.sum() * hull

    def convolved(values: np.ndarray, by: np.ndarray) -> np.ndarray:
        return sum(
            by[i, j] * np.roll(values, (i, j), (0, 1)) for i in range(n) for j in range(n) if abs(by[i, j]) > 1e-12
        )

    def averaged(values: np.ndarray, step: int) -> np.ndarray:
        """Around every fourth pixel, over every step-th place."""
        thinned = np.zeros((n, n))
        thinned[::step, ::step] = values[::step, ::step] * step**2
        kept = slice(scattering.SHRINK, scattering.SHRINK + side, scattering.SHRINK)
        return convolved(thinned, wavelet(1.6, 0.0, 0.0, 1.0)).real[kept, kept]

    first = abs(convolved(padded, morlet(0, 3)))
    second = abs(convolved(first, morlet(1, 6)))
    expected = [averaged(padded, 1), averaged(first, 1), averaged(second, 2)]
    maps = scattering.scatter(torch.tensor(picture[None]).float())[0].numpy()
    assert maps.shape == (scattering.MAPS, 2, 2)
    one_and_two = 1 + 2 * scattering.DIRECTIONS + 3 * scattering.DIRECTIONS + 6
    for found, wanted in zip((maps[0], maps[1 + 3], maps[one_and_two]), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 14, 3)])
def test_features_have_length_one_and_are_of_one_picture_alone(shape):
    pictures = torch.rand(5, shape[2], *shape[:2], generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = scattering.features(pictures)
    assert found.shape == (5, scattering.width(shape))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    for row in range(5):
        torch.testing.assert_close(scattering.features(pictures[row : row + 1])[0], found[row], rtol=0, atol=1e-6)
    assert torch.isfinite(scattering.features(torch.zeros(1, shape[2], *shape[:2]))).all()


def test_a_picture_too_small_to_be_read_is_refused():
    with pytest.raises(UsageError, match="pixels a side"):
        models.build(READING, picture_shape=(6, 8, 1))


# ---- answers and losses ----


def test_answers_are_those_of_the_text_and_the_last_one_where_it_does_not_say():
    reader = reader_of(built())
    found = reader.answers(["upper left", "something on the right", None, "lower"])
    assert found.tolist() == [[0, 0], [1, 2], [2, 2], [2, 1]]


def test_a_records_reading_loss_is_the_cross_entropy_of_its_answers():
    model = built()
    reader = reader_of(model)
    torch.nn.init.normal_(reader.layer.weight, generator=torch.Generator().manual_seed(0))
    table = model.encode(corners(4))
    found = reader.losses(table.tensors[FEATURES], table.tensors[ANSWERS])
    logits = reader.layer(table.tensors[FEATURES].float()).detach().double()
    for row in range(4):
        side, height = logits[row, :3].softmax(0), logits[row, 3:].softmax(0)
        answers = table.tensors[ANSWERS][row]
        assert found[row].item() == pytest.approx(-math.log(side[answers[0]] * height[answers[1]]), rel=1e-5)


@pytest.mark.parametrize("lacking", ["text", "image"])
def test_without_a_picture_or_a_text_nothing_is_read(lacking):
    """The reader has no gradient of such a record."""
    model = built()
    found = [replace(record, **{lacking: None}) for record in corners(3)]
    model.losses(model.encode(found).batch(range(3), records_per_unit=1)).sum().backward()
    gradient = reader_of(model).layer.weight.grad
    assert gradient is None or not gradient.any()


def test_with_parts_the_reader_is_clipped_by_itself():
    """At noise 0 each unit's reader gradient in the released sum has its own bound, whatever the denoiser's is."""
    model = built()
    parts = {"reader": Part(modules=("reader",), max_grad_norm=0.01), "rest": Part(modules=("",), max_grad_norm=1.0)}
    engine = DifferentialPrivacyEngine(model, noise_multiplier=0.0, parts=parts, random=TestRandom(0))
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    for batch in engine.batches(model.encode(corners(1)), expected_batch_size=1, steps=1):
        model.losses(batch).mean().backward()
        optimizer.step()
    weight = reader_of(model).layer
    moved = torch.cat([weight.weight.detach().flatten(), weight.bias.detach()])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# ---- what it is used for ----


def test_one_of_the_candidates_is_taken_as_likely_as_its_picture_is_read():
    """Two pictures, 4,000 draws; false alarm 1e-6."""
    model = built()
    reader = reader_of(model)
    torch.nn.init.normal_(reader.layer.weight, std=0.4, generator=torch.Generator().manual_seed(1))
    two = model.encode(corners(2, seed=3)).tensors["image"]
    answers = reader.answers(["upper left"])
    told = [part.detach().double() for part in reader.log_probabilities(reader.features(two))]
    said = torch.stack([part[:, 0].exp() / part[:, :2].exp().sum(1) for part in told]).prod(0)  # given that it is said
    expected = float(said[0] / said.sum())
    assert 0.05 < expected < 0.95
    taken = reader.chosen(two.expand(4_000, 2, -1), answers.expand(4_000, -1), torch.Generator().manual_seed(0))
    first = int((taken == two[0]).all(1).sum())
    assert int((taken == two[1]).all(1).sum()) == 4_000 - first
    assert stats.binomtest(first, 4_000, expected).pvalue > 1e-6


def test_what_a_text_does_not_say_does_not_count():
    """Oracle: the softmax over a question's answers, without "not said"."""
    model = built()
    reader = reader_of(model)
    torch.nn.init.normal_(reader.layer.weight, generator=torch.Generator().manual_seed(0))
    features = reader.features(model.encode(corners(3)).tensors["image"])
    logits = reader(features).detach()
    upper = logits[:, 3:5].softmax(1)[:, 0].log()
    found = reader.agreement(features, reader.answers(["upper"] * 3))
    torch.testing.assert_close(found.detach(), upper)
    assert not reader.agreement(features, reader.answers([None] * 3)).any()


def test_texts_are_drawn_as_likely_as_their_answers_shared_by_those_that_say_the_same():
    """Oracle: probabilities of every text, by a loop; chi square over 6,000 draws, false alarm 1e-6."""
    model = built()
    reader, bank = reader_of(model), Bank()
    torch.nn.init.normal_(reader.layer.weight, std=4.0, generator=torch.Generator().manual_seed(2))
    said = ["upper left", "left, upper", "lower left", "right", "nothing of it"]
    bank.take([prompt(text=text) for text in said])
    features = reader.features(model.encode(corners(1)).tensors["image"])
    told = [part[0].detach().exp() for part in reader.log_probabilities(features)]
    weights = []
    for text in bank.texts():
        answers = reader.answers([text])[0]
        alike = sum(bool((reader.answers([other])[0] == answers).all()) for other in bank.texts())
        weights.append(float(told[0][answers[0]] * told[1][answers[1]]) / alike)
    drawn = reader.texts(features.expand(6_000, -1), bank, 1.0, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=5).numpy()
    assert stats.chisquare(counts, 6_000 * np.array(weights) / sum(weights)).pvalue > 1e-6
    likeliest = reader.texts(features.expand(50, -1), bank, 0.0, torch.Generator().manual_seed(0))
    patterns = {tuple(reader.answers([bank.texts()[i]])[0].tolist()) for i in likeliest.tolist()}
    assert len(patterns) == 1


def test_a_bank_keeps_every_text_once_and_its_letters(tmp_path):
    model = built()
    texts = ["Erguß links", "上 left", "left", "left"]
    model.tell_public([prompt(text=text) for text in texts])
    assert sorted(model.reader_texts.texts()) == sorted(set(texts))
    model.save(tmp_path)
    assert models.load(tmp_path).reader_texts.texts() == model.reader_texts.texts()


def trained(settings=READING) -> Denoising:
    """600 plain steps on corners."""
    model = built(settings)
    table = model.encode(corners(200))
    model.tell_public(corners(40, seed=1))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(300):
        chosen = np.random.default_rng(0).permutation(200)[:64]
        loss = model.losses(table.batch(chosen, records_per_unit=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_it_learns_to_read_and_better_pictures_are_taken():
    model = trained()
    unseen = corners(100, seed=5)
    read = model.sample(
        [prompt(image=one.image) for one in unseen], ("text",), seed=0, sampling=Sampling(temperature=0)
    )
    right = [one.text == got.text for one, got in zip(unseen, read, strict=True)]
    assert np.mean(right) > 0.9  # guessing: 0.25

    def said(candidates: int) -> float:
        sampling = Sampling(steps=2, guidance=0.0, candidates=candidates)  # two steps: blurred pictures
        drawn = model.sample([prompt(text=one.text) for one in unseen], ("image",), seed=0, sampling=sampling)
        found = model.encode(drawn).tensors["image"]
        reader = reader_of(model)
        answers = reader.answers([one.text for one in unseen])
        return float(reader.agreement(reader.features(found), answers).mean().detach())

    assert said(8) > said(1)


# ---- refused ----


def test_what_cannot_be_read_is_refused():
    with pytest.raises(UsageError, match="not autoregressive"):
        replace(READING, objective=Autoregressive())
    with pytest.raises(UsageError, match="candidates = 2"):
        replace(TINY, sampling=Sampling(candidates=2))
    with pytest.raises(UsageError, match="this model has none"):
        built(TINY).sample([prompt(text="left")], ("image",), seed=0, sampling=Sampling(candidates=2))
    with pytest.raises(UsageError, match="at least two"):
        Question(name="side", answers=(TermAxis(name="left", more=("left",)),))
    with pytest.raises(UsageError, match="public texts = none"):
        model = built()
        model.sample([prompt(image=records([1], ["image"])[0].image)], ("text",), seed=0)
    with pytest.raises(UsageError, match="candidates = 0"):
        Sampling(candidates=0)


def test_encoded_records_hold_what_is_read_for_pairs_only():
    model = built()
    found = corners(3)
    table = model.encode([found[0], replace(found[1], text=None), replace(found[2], image=None)])
    assert isinstance(table, UnitTable)
    assert table.present[ANSWERS].tolist() == [True, False, False]
    assert table.present[FEATURES].tolist() == [True, False, False]
    assert table.tensors[FEATURES][1].any()
    assert not table.tensors[FEATURES][2].any()
