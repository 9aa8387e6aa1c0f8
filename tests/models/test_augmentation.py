"""Copies of a picture inside one record's loss: against slow twins, and that nobody else's record enters."""

from dataclasses import replace

import pytest
import torch
from tests.models.conftest import SHAPE, TINY, disturbed, records
from tests.models.test_model import losses, whole

from sfumato.errors import UsageError
from sfumato.models import augmentation
from sfumato.models import model as models
from sfumato.models.codecs.image import PictureCodec
from sfumato.models.objectives import diffusion
from sfumato.models.settings import Augmentation, Cosine, Diffusion, Pixels
from sfumato.privacy.engine import DifferentialPrivacyEngine
from sfumato.randomness import TestRandom

HOW = Augmentation(shift=1.5, rotation=10, zoom=0.1, flip=True)
MANY = replace(TINY, objective=Diffusion(noise_multiplicity=2, augmentation=HOW, augmentation_multiplicity=3))


def pictures(rows: int = 3, channels: int = 2, side: int = 6) -> torch.Tensor:
    return torch.rand(rows, channels, side, side + 1, generator=torch.Generator().manual_seed(0))


def still(rows: int) -> dict[str, torch.Tensor]:
    return {"shift": torch.zeros(rows, 2), "angle": torch.zeros(rows), "zoom": torch.ones(rows)}


def test_a_whole_shift_moves_pixels_and_repeats_the_edge():
    given = pictures()
    shift = torch.tensor([[0.0, 0.0], [2.0, -1.0], [-3.0, 1.0]])
    fast = augmentation.moved(given, **{**still(3), "shift": shift})
    height, width = given.shape[-2:]
    slow = torch.empty_like(given)
    for r in range(3):
        for y in range(height):
            for x in range(width):
                from_y = min(max(y - int(shift[r, 0]), 0), height - 1)
                from_x = min(max(x - int(shift[r, 1]), 0), width - 1)
                slow[r, :, y, x] = given[r, :, from_y, from_x]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


def test_a_quarter_turn_is_to_the_left_and_a_zoom_keeps_the_centre():
    given = pictures(side=7)[..., :7]
    turned = augmentation.moved(given, **{**still(3), "angle": torch.full((3,), torch.pi / 2)})
    torch.testing.assert_close(turned, given.rot90(1, (-2, -1)), atol=1e-5, rtol=0)
    twice = augmentation.moved(given, **{**still(3), "zoom": torch.full((3,), 2.0)})
    torch.testing.assert_close(twice[..., 3, 3], given[..., 3, 3])
    torch.testing.assert_close(twice[..., 3, 5], given[..., 3, 4])  # two from the centre now shows one from it


@pytest.mark.parametrize("kept", [4, 8])
def test_a_flip_of_cosine_coefficients_is_the_other_sign_of_the_odd_columns(kept):
    codec = PictureCodec(Cosine(kept=kept), (8, 8, 1), 0.5)
    latents = torch.randn(50, kept * kept, generator=torch.Generator().manual_seed(1))
    flipped = latents.view(50, kept, kept) * torch.where(torch.arange(kept) % 2 == 1, -1.0, 1.0)
    made = codec.augmented(latents, Augmentation(flip=True), 1)[:, 0]
    is_flipped = (made - flipped.flatten(1)).abs().amax(1) < 1e-4
    is_same = (made - latents).abs().amax(1) < 1e-4
    assert (is_flipped ^ is_same).all()
    assert 10 < int(is_flipped.sum()) < 40  # outside: 1e-5 by chance, of a fixed seed none


@pytest.mark.parametrize("settings", [Pixels(), Cosine(kept=5)], ids=["pixels", "cosine"])
def test_copies_of_latents_are_those_of_their_pixels(settings):
    codec = PictureCodec(settings, (8, 8, 1), 0.5)
    latents = torch.randn(4, codec.scale.numel(), generator=torch.Generator().manual_seed(1))
    fast = codec.augmented(latents, HOW, 3, torch.Generator().manual_seed(2))
    pixels = codec.coder.pictures(latents.view(4, *codec.shape))
    slow = augmentation.copies(pixels, HOW, 3, torch.Generator().manual_seed(2))
    assert fast.shape == (4, 3, codec.scale.numel())
    for copy in range(3):
        torch.testing.assert_close(fast[:, copy], codec.coder.latents(slow[:, copy]).flatten(1))
    if isinstance(settings, Pixels):
        assert codec.augmented(latents[:0], HOW, 3).shape == (0, 3, 64)


def test_no_copy_is_made_of_another_row():
    given = pictures(4)
    other = given.clone()
    other[2] = 5.0
    one, two = (augmentation.copies(of, HOW, 3, torch.Generator().manual_seed(3)) for of in (given, other))
    assert one[[0, 1, 3]].equal(two[[0, 1, 3]])
    assert not one[2].equal(two[2])
    assert not one[0, 0].equal(one[0, 1])


def test_the_loss_of_a_record_is_the_mean_over_its_copies_and_their_draws():
    model = disturbed(models.build(MANY, picture_shape=SHAPE))
    batch = whole(model.encode(records([2, 1])))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        keep = torch.rand(3) >= model.settings.objective.condition_dropout
        drawn = model.image.augmented(batch.tensors["image"], HOW, 3)
        sigma = diffusion.noise_levels(model.settings.objective, (3, 6))
        noise = torch.randn(3, 6, 16)
    with torch.no_grad():
        condition = model.condition(batch.tensors["text"], batch.present["text"] & keep)
        single = [
            diffusion.record_losses(
                model.denoiser, drawn[:, k // 2], condition, sigma[:, k : k + 1], noise[:, k : k + 1], model.scale,
                model.settings.objective.sigma_data,
            )
            for k in range(6)
        ]  # fmt: skip
    torch.testing.assert_close(losses(model, batch), batch.per_unit(torch.stack(single).mean(0)))


def test_no_units_loss_moves_with_anothers_picture():
    model = disturbed(models.build(MANY, picture_shape=SHAPE))
    given = records([2, 1, 3])
    other = replace(given[2], image=255 - given[2].image)  # the only record of unit 1
    before = losses(model, whole(model.encode(given)))
    after = losses(model, whole(model.encode([*given[:2], other, *given[3:]])))
    assert before[[0, 2]].tolist() == pytest.approx(after[[0, 2]].tolist(), rel=1e-6)
    assert before[1].item() != pytest.approx(after[1].item(), rel=1e-3)


def test_a_units_clipped_gradient_keeps_its_bound_and_an_empty_batch_is_noise():
    """However many copies there are, a unit moves the sum by at most C: the private step with one unit and no noise."""
    model = disturbed(models.build(MANY, picture_shape=SHAPE))
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


def test_an_attack_looks_at_the_picture_as_it_is():
    plain = disturbed(models.build(replace(MANY, objective=Diffusion(noise_multiplicity=2)), picture_shape=SHAPE))
    many = disturbed(models.build(MANY, picture_shape=SHAPE))
    rows = [m.row_losses(whole(m.encode(records([1, 1]))), 8, torch.Generator().manual_seed(0)) for m in (plain, many)]
    assert rows[0].tolist() == pytest.approx(rows[1].tolist())


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(UsageError, match="changes nothing"):
        Augmentation()
    with pytest.raises(UsageError, match="copies that are all the same"):
        replace(TINY, objective=Diffusion(augmentation_multiplicity=2))
