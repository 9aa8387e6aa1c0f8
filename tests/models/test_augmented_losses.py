"""Copies of a picture inside one record's loss: the mean over them, of nobody else's record, at the same clip and charge."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.models.conftest import SHAPE, TINY, disturbed, records
from tests.models.test_model import losses, whole

from sfumato.errors import UsageError
from sfumato.models import augmentation
from sfumato.models import model as models
from sfumato.models.codecs.image import PictureCodec
from sfumato.models.settings import Cosine, Diffusion, Flow, ModelSettings, Pixels
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom
from sfumato.records import Record

KINDS = ("flip", "shift", "crop", "rotate")
DIFFUSION = replace(TINY, objective=Diffusion(noise_multiplicity=2, augmentations=KINDS, augmentation_multiplicity=3))
FLOW = replace(TINY, objective=Flow(noise_multiplicity=2, augmentations=KINDS, augmentation_multiplicity=3))
BOTH = pytest.mark.parametrize("settings", [DIFFUSION, FLOW], ids=["diffusion", "flow"])


def built(settings: ModelSettings) -> Any:
    return disturbed(models.build(settings, picture_shape=SHAPE))


def pixels_of(record: Record) -> np.ndarray:
    assert record.image is not None
    return record.image


@pytest.mark.parametrize("kept", [4, 8])
def test_a_flip_of_cosine_coefficients_is_the_other_sign_of_the_odd_columns(kept):
    codec = PictureCodec(Cosine(kept=kept), (8, 8, 1), 0.5)
    latents = torch.randn(50, kept * kept, generator=torch.Generator().manual_seed(1))
    flipped = latents.view(50, kept, kept) * torch.where(torch.arange(kept) % 2 == 1, -1.0, 1.0)
    made = codec.augmented(latents, ["flip"], 1, torch.Generator().manual_seed(2))[:, 0]
    is_flipped = (made - flipped.flatten(1)).abs().amax(1) < 1e-4
    is_same = (made - latents).abs().amax(1) < 1e-4
    assert (is_flipped ^ is_same).all()
    assert 8 < int(is_flipped.sum()) < 42  # outside: less than 1e-6 by chance, of a fixed seed


@pytest.mark.parametrize("settings", [Pixels(), Cosine(kept=5)], ids=["pixels", "cosine"])
def test_copies_of_latents_are_those_of_their_pixels(settings):
    codec = PictureCodec(settings, (8, 8, 1), 0.5)
    latents = torch.randn(4, codec.scale.numel(), generator=torch.Generator().manual_seed(1))
    fast = codec.augmented(latents, KINDS, 3, torch.Generator().manual_seed(2))
    pixels = codec.coder.pictures(latents.view(4, *codec.shape))
    slow = augmentation.copies(pixels, 3, KINDS, torch.Generator().manual_seed(2))
    assert fast.shape == (4, 3, codec.scale.numel())
    for copy in range(3):
        torch.testing.assert_close(fast[:, copy], codec.coder.latents(slow[:, copy]).flatten(1))
    torch.testing.assert_close(fast[:, 0], latents)  # the first is the picture itself
    assert codec.augmented(latents[:0], KINDS, 3).shape == (0, 3, codec.scale.numel())


@BOTH
def test_the_loss_of_a_record_is_the_mean_over_its_copies_and_their_draws(settings):
    model = built(settings)
    batch = whole(model.encode(records([2, 1])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        keep = torch.rand(3) >= model.settings.objective.condition_dropout
        drawn = model.codecs["image"].augmented(batch.tensors["image"], KINDS, 3)
        levels = model.levels((3, 6))
        noise = torch.randn(3, 6, 16)
    with torch.no_grad():
        condition = model.condition(batch.tensors, {"text": batch.present["text"] & keep})
        single = [
            model.latent_losses(drawn[:, k // 2], condition, levels[:, k : k + 1], noise[:, k : k + 1])
            for k in range(6)
        ]
    torch.testing.assert_close(losses(model, batch), batch.per_unit(torch.stack(single).mean(0)))


@BOTH
def test_no_units_loss_moves_with_anothers_picture(settings):
    model = built(settings)
    given = records([2, 1, 3])
    other = replace(given[2], image=255 - pixels_of(given[2]))  # the only record of unit 1
    before = losses(model, whole(model.encode(given)))
    after = losses(model, whole(model.encode([*given[:2], other, *given[3:]])))
    assert before[[0, 2]].tolist() == pytest.approx(after[[0, 2]].tolist(), rel=1e-6)
    assert before[1].item() != pytest.approx(after[1].item(), rel=1e-3)


@BOTH
def test_a_units_clipped_gradient_keeps_its_bound_and_an_empty_batch_is_noise(settings):
    """However many copies there are, a unit moves the sum by at most C: the private step with one unit and no noise."""
    model = built(settings)
    table = model.encode(records([1, 1]))
    engine = DifferentialPrivacyEngine(
        model,
        max_grad_norm=1e-3,
        noise_multiplier=0.0,
        expected_batch_size=1.0,
        sampling_rate=0.5,
        random=TestRandom(0),
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    try:
        for units, bound in (([0], 1e-3), ([1], 1e-3), ([], 0.0)):
            before = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
            model.losses(table.batch(units, records_per_unit=1)).mean().backward()
            optimizer.step()
            after = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
            assert float((after - before).norm()) == pytest.approx(bound, rel=1e-2, abs=1e-9)  # of float32 weights
            optimizer.zero_grad()
    finally:
        engine.detach()


@BOTH
def test_an_attack_looks_at_the_picture_as_it_is(settings):
    objective = replace(settings.objective, augmentations=(), augmentation_multiplicity=1)
    plain = built(replace(settings, objective=objective))
    many = built(settings)
    rows = [m.row_losses(whole(m.encode(records([1, 1]))), 8, torch.Generator().manual_seed(0)) for m in (plain, many)]
    assert rows[0].tolist() == pytest.approx(rows[1].tolist())


def test_settings_that_make_no_sense_are_refused():
    for wrong in (
        {"augmentation_multiplicity": 2},
        {"augmentations": ("flip", "flip")},
        {"augmentations": ("shift",), "target": "audio"},
    ):
        with pytest.raises(UsageError, match="copies of a picture that"):
            Diffusion(**wrong)  # pyright: ignore[reportArgumentType]
