"""Augmentations: what each kind does, held against loops; a row never depends on another."""

import pytest
import torch

from sfumato.errors import UsageError
from sfumato.models.augmentation import BRIGHTNESS, GAIN, SHIFT, augment, augment_sounds, copies

KINDS = ("flip", "shift", "crop", "rotate", "brightness")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(rows: int, size: int = 16) -> torch.Tensor:
    return torch.randn(rows, 2, size, size, generator=seeded(7))


@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS] + [KINDS])
def test_a_row_does_not_depend_on_the_rows_beside_it(kinds):
    """Exactly: another picture in row 1, and every other row is the same to the last bit."""
    one = pictures(5)
    other = one.clone()
    other[1] = 100.0
    a, b = augment(one, kinds, seeded()), augment(other, kinds, seeded())
    rest = [0, 2, 3, 4]
    assert torch.equal(a[rest], b[rest])
    assert a.shape == one.shape
    assert not torch.equal(a[1], b[1])


def test_a_flip_is_the_mirror_picture_or_the_picture():
    """Of 400 rows, binomial(400, .5) are mirrored; false-alarm probability 1e-6."""
    from scipy.stats import binom

    one = pictures(400, size=4)
    changed = augment(one, ["flip"], seeded())
    mirrored = [torch.equal(c, p.flip(-1)) for c, p in zip(changed, one, strict=True)]
    same = [torch.equal(c, p) for c, p in zip(changed, one, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert binom.ppf(5e-7, 400, 0.5) <= sum(mirrored) <= binom.ppf(1 - 5e-7, 400, 0.5)


def slow_shift(picture: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Oracle: pixel by pixel."""
    _, height, width = picture.shape
    out = torch.empty_like(picture)
    for y in range(height):
        for x in range(width):
            out[:, y, x] = picture[:, min(max(y - down, 0), height - 1), min(max(x - right, 0), width - 1)]
    return out


def test_a_shift_is_by_whole_pixels_and_takes_every_value():
    one = pictures(300)
    most = int(SHIFT * 16)
    changed = augment(one, ["shift"], seeded())
    seen = set()
    for picture, moved in zip(one, changed, strict=True):
        found = [
            (down, right)
            for down in range(-most, most + 1)
            for right in range(-most, most + 1)
            if torch.equal(slow_shift(picture, down, right), moved)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == (2 * most + 1) ** 2


def test_a_crop_stays_within_the_values_and_a_flat_picture_stays_flat():
    one = pictures(50)
    changed = augment(one, ["crop", "rotate"], seeded())
    assert (changed.amax((1, 2, 3)) <= one.amax((1, 2, 3)) + 1e-5).all()
    assert (changed.amin((1, 2, 3)) >= one.amin((1, 2, 3)) - 1e-5).all()
    flat = torch.full((3, 1, 8, 8), 0.3)
    torch.testing.assert_close(augment(flat, ["crop", "rotate", "shift", "flip"], seeded()), flat)


def test_a_crop_magnifies_and_a_turn_keeps_the_middle():
    ramp = torch.linspace(-1, 1, 32).expand(20, 1, 32, 32)
    slope = (augment(ramp, ["crop"], seeded())[:, 0, 16, 20] - augment(ramp, ["crop"], seeded())[:, 0, 16, 12]) / (
        ramp[:, 0, 16, 20] - ramp[:, 0, 16, 12]
    )
    assert (slope >= 0.8 - 1e-4).all()
    assert (slope <= 1 + 1e-4).all()
    turned = augment(ramp, ["rotate"], seeded())
    torch.testing.assert_close(turned[:, 0, 15:17, 15:17].mean((1, 2)), torch.zeros(20), atol=1e-3, rtol=0)
    assert (turned - ramp).abs().max() > 0.05


def test_brightness_adds_one_number():
    one = pictures(100)
    added = (augment(one, ["brightness"], seeded()) - one).flatten(1)
    assert (added.amax(1) - added.amin(1)).max() < 1e-5
    assert added.abs().max() <= BRIGHTNESS + 1e-6
    assert added[:, 0].std() > BRIGHTNESS / 3


def test_a_kind_more_leaves_the_draws_of_the_others():
    one = pictures(6)
    shifted = augment(one, ["shift"], seeded())
    both = augment(one, ["shift", "brightness"], seeded())
    difference = (both - shifted).flatten(1)
    assert (difference.amax(1) - difference.amin(1)).max() < 1e-5


def test_gradients_go_through_and_nothing_asked_is_nothing_done():
    one = pictures(3).requires_grad_()
    augment(one, KINDS, seeded()).sum().backward()
    assert one.grad is not None
    assert one.grad.abs().sum() > 0
    assert augment(one, [], seeded()) is one
    assert augment(torch.zeros(0, 1, 8, 8), KINDS, seeded()).shape == (0, 1, 8, 8)


def test_the_same_seed_gives_the_same_and_another_another():
    one = pictures(4)
    assert torch.equal(augment(one, KINDS, seeded(1)), augment(one, KINDS, seeded(1)))
    assert not torch.equal(augment(one, KINDS, seeded(1)), augment(one, KINDS, seeded(2)))


def test_copies_are_k_of_each_and_the_first_may_stay():
    one = pictures(3)
    many = copies(one, 4, ["shift", "flip"], seeded())
    assert many.shape == (3, 4, 2, 16, 16)
    assert torch.equal(many[:, 0], one)
    assert not torch.equal(many[:, 1], many[:, 2])
    assert not torch.equal(copies(one, 4, ["brightness"], seeded(), keep_first=False)[:, 0], one)
    with pytest.raises(UsageError, match="count = 0"):
        copies(one, 0, ["flip"], seeded())


def sounds(rows: int, length: int = 64) -> torch.Tensor:
    return torch.rand(rows, length, generator=seeded(3)) * 0.4 - 0.2


@pytest.mark.parametrize("kinds", [("gain",), ("time_shift",), ("invert",), ("gain", "time_shift", "invert")])
def test_a_sound_does_not_depend_on_the_sounds_beside_it(kinds):
    one = sounds(4)
    other = one.clone()
    other[2] = 0.9
    a, b = augment_sounds(one, kinds, seeded()), augment_sounds(other, kinds, seeded())
    assert torch.equal(a[[0, 1, 3]], b[[0, 1, 3]])


def test_sounds_are_scaled_turned_round_or_inverted():
    one = sounds(200)
    ratio = augment_sounds(one, ["gain"], seeded()) / one
    assert (ratio.amax(1) - ratio.amin(1)).max() < 1e-4
    decibels = 20 * ratio[:, 0].log10()
    assert decibels.abs().max() <= GAIN + 1e-3
    assert decibels.std() > GAIN / 3
    rolled = augment_sounds(one, ["time_shift"], seeded())
    for sound, moved in zip(one[:20], rolled, strict=False):
        assert any(torch.equal(sound.roll(-k), moved) for k in range(64))
    inverted = augment_sounds(one, ["invert"], seeded())
    assert {round(float(v)) for v in (inverted / one).flatten()} == {-1, 1}
    assert augment_sounds(torch.ones(1, 4), ["gain"], seeded()).max() <= 1
    assert augment_sounds(torch.zeros(2, 0), ["time_shift"], seeded()).shape == (2, 0)


@pytest.mark.parametrize(
    ("values", "kinds", "said"),
    [
        (torch.zeros(1, 1, 4, 4), ["mirror"], "kinds = mirror"),
        (torch.zeros(1, 1, 4, 4), ["flip", "flip"], "kinds = flip, flip"),
        (torch.zeros(1, 4, 4), ["flip"], "shape"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), ["flip"], "uint8"),
    ],
)
def test_what_cannot_be_is_refused(values, kinds, said):
    with pytest.raises(UsageError, match=said):
        augment(values, kinds, seeded())


def test_sounds_of_another_shape_are_refused():
    with pytest.raises(UsageError, match="shape"):
        augment_sounds(torch.zeros(1, 1, 4), ["gain"], seeded())
