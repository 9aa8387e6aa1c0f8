"""Codes of texts and signs of pictures, and the mean that is made of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfumato.errors import UsageError
from sfumato.models import model as models
from sfumato.models.settings import Cosine, Mlp, ModelSettings, RandomFeatures, TermAxis, Terms
from sfumato.privacy import latents
from sfumato.randomness import TestRandom

AXES = (TermAxis(name="side", more=("left",), less=("right",)), TermAxis(name="view", more=("lateral",)))
SETTINGS = ModelSettings(
    image=Cosine(kept=2),
    text=Terms(axes=AXES),
    backbone=Mlp(width=8, depth=1),
    random_features=RandomFeatures(longest=2.0, signs=3, length=1.0),
)
SHAPE = (8, 8, 1)
ROWS = 15_000


@pytest.fixture(scope="module")
def model():
    return models.build_for_release("from_codes", SETTINGS, picture_shape=SHAPE)


@pytest.fixture(scope="module")
def values() -> dict[str, torch.Tensor]:
    """Pictures of length 1 whose direction depends on the side; one text in five is lateral."""
    generator = torch.Generator().manual_seed(0)
    text = torch.stack(
        [torch.rand(ROWS, generator=generator) < 0.5, torch.rand(ROWS, generator=generator) < 0.2], dim=1
    )
    image = torch.tensor([0.8, 0.0, 0.6, 0.0]).repeat(ROWS, 1)
    image[:, 1] = text[:, 0] * 0.8
    image[:, 0] *= 1 - text[:, 0].float()
    return {"image": image, "text": (text.float() * 2 - 1) / math.sqrt(2)}


def test_a_code_is_a_text_and_signs_in_directions_of_its_place(model, values):
    assert model.dimensions == {"categories": 32, "image": 4}
    places = np.arange(500)
    codes = model.code({name: value[:500] for name, value in values.items()}, places)
    assert codes.shape == (500, 1) and codes.min() >= 0 and codes.max() < 32
    assert ((codes[:, 0] & 1) == (values["text"][:500, 0] > 0).numpy()).all()
    assert torch.equal(model.rays(places), model.rays(places))
    assert not torch.equal(model.rays(places[:5]), model.rays(places[5:10]))
    same = model.code({name: value[:1].repeat(500, 1) for name, value in values.items()}, places)[:, 0]
    assert len(set(same.tolist())) == 8  # one text, all signs: a code says nothing without its place
    hostile = {"image": torch.full((3, 4), math.nan), "text": torch.full((3, 2), math.nan)}
    assert model.code(hostile, places[:3]).max() < 32


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_mean_of_features_follows_from_the_codes(model, values, noise):
    """15,000 codes, three in ten of them replaced by chance: the mean of phi x psi within 0.04 in every entry, which is 6 standard
    errors of about sqrt(pi/2 (1 + d/S)) / (longest sqrt(N) (1 - p)); false-alarm probability below 1e-6."""
    codes = model.code(values, np.arange(ROWS))
    released = latents.respond(codes, 32, noise, TestRandom(0))
    found = model.mean_feature(released[:, 0], noise, torch.zeros(4))
    told = model._of_bits(values["text"] > 0)
    expected = (model.features.of_pictures(values["image"]).T @ model.features.of_texts(told)).double() / ROWS
    assert float((found - expected).abs().max()) < 0.04
    if noise:  # without the correction the dependence comes out smaller by the share of chance
        naive = model.mean_feature(released[:, 0], 0.0, torch.zeros(4))
        assert float((naive[2, 1] - expected[2, 1]).abs()) > 0.3 * 0.7 * float(expected[2, 1].abs())


def test_a_centre_is_added_back(model, values):
    codes = model.code(values, np.arange(ROWS))[:, 0]
    plain, moved = (model.mean_feature(codes, 0.0, torch.full((4,), value)) for value in (0.0, 0.5))
    assert torch.equal(plain[0], moved[0])
    assert torch.allclose(moved[1:] - plain[1:], 0.5 * plain[:1] / 2.0, atol=1e-9)


def test_a_model_of_codes_is_read_back_and_too_many_bits_are_refused(model, tmp_path):
    model.receive(torch.randn(model.features.dimension).double(), ["left"])
    torch.nn.init.normal_(model.generator.outward.weight)
    model.save(tmp_path)
    assert np.array_equal(
        models.load(tmp_path).generate(["left", None], seed=1), model.generate(["left", None], seed=1)
    )
    wide = replace(SETTINGS, random_features=RandomFeatures(signs=15))
    with pytest.raises(UsageError, match="bits = 2 of a text"):
        models.build_for_release("from_codes", wide, picture_shape=SHAPE)
    waves = replace(SETTINGS, random_features=RandomFeatures(frequencies=2))
    with pytest.raises(UsageError, match="frequencies = 2"):
        models.build_for_release("from_codes", waves, picture_shape=SHAPE)
