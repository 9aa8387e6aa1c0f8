"""Gaussians fitted through what happens to their draws, and the random little changes of pictures."""

import numpy as np
import pytest
import torch
from scipy import stats

from sfumato.errors import UsageError
from sfumato.models.moment_fitting import changed, fitted, positive, root
from sfumato.models.settings import Changes, ClassMoments, Cosine, TermAxis


def cut(draws: torch.Tensor) -> torch.Tensor:
    return draws.clamp(-1, 1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_cut_gaussian_is_found_again_from_its_moments():
    """Over six seeds the errors were .029 to .032 and .037 to .039: what 150 passes leave, not chance."""
    mean = torch.tensor([-1.1, 0.2, 0.8], dtype=torch.float64)
    mix = torch.tensor([[0.7, 0.0, 0.0], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.6]], dtype=torch.float64)
    covariance = mix @ mix.T
    draws = cut(mean + torch.randn(400_000, 3, generator=generator(1), dtype=torch.float64) @ mix.T)
    at, spread = fitted(draws.mean(0), torch.cov(draws.T), cut, passes=150, draws=20_000, generator=generator())
    torch.testing.assert_close(at, mean, rtol=0, atol=0.05)
    torch.testing.assert_close(spread @ spread, covariance, rtol=0, atol=0.05)
    # and taken as they are, the moments are far from it
    assert float((draws.mean(0) - mean).abs().max()) > 0.3


def test_without_passes_the_moments_are_taken():
    covariance = torch.diag(torch.tensor([0.5, 0.1], dtype=torch.float64))
    at, spread = fitted(torch.ones(2).double(), covariance, cut, passes=0, draws=10, generator=generator())
    assert at.equal(torch.ones(2).double())
    torch.testing.assert_close(spread @ spread, covariance)


def test_moments_that_no_cut_gaussian_has_end_at_finite_numbers():
    """A mean beyond the range, and a covariance with a negative part."""
    asked = torch.tensor([[0.2, 0.9], [0.9, 0.2]], dtype=torch.float64)
    at, spread = fitted(torch.tensor([1.4, 0.0]).double(), asked, cut, passes=30, draws=500, generator=generator())
    assert torch.isfinite(at).all() and torch.isfinite(spread).all()
    assert at[0] > 1


def test_the_positive_part_has_no_negative_eigenvalue_and_keeps_the_others():
    matrix = torch.diag(torch.tensor([4.0, -1.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(positive(matrix), torch.diag(torch.tensor([4.0, 0.0, 0.25]).double()))
    torch.testing.assert_close(root(matrix) @ root(matrix), positive(matrix))


def spot(rows: int) -> torch.Tensor:
    """A Gaussian spot in the middle of 32 x 32, on black."""
    axis = torch.arange(32) - 15.5
    one = torch.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / 8) * 2 - 1
    return one.expand(rows, 1, 32, 32).contiguous()


def centroid(pictures: torch.Tensor) -> np.ndarray:
    """(R, 2): row and column of the weight above black."""
    weight = (pictures[:, 0] + 1).double()
    axis = torch.arange(32).double()
    total = weight.sum((1, 2))
    return torch.stack([(weight.sum(2) * axis).sum(1) / total, (weight.sum(1) * axis).sum(1) / total], 1).numpy()


def test_nothing_to_change_is_the_same_tensor():
    pictures = spot(2)
    assert changed(pictures, Changes(), generator()) is pictures


def test_pictures_are_shifted_as_much_as_is_said_each_by_itself():
    """Variance of 600 centroids against (0.04 x 32)^2: chi square, two-sided, false alarm 1e-6 for each direction."""
    moved = centroid(changed(spot(600), Changes(shift=0.04), generator())) - 15.5
    for direction in range(2):
        statistic = (moved[:, direction] ** 2).sum() / (0.04 * 32) ** 2
        assert 5e-7 < stats.chi2.cdf(statistic, 600) < 1 - 5e-7
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.2  # 4.9 standard deviations
    assert len(np.unique(moved.round(6))) > 1_000


@pytest.mark.parametrize("kind", ["turn", "shear", "scale"])
def test_what_turns_or_scales_keeps_the_middle_and_moves_what_is_away(kind):
    changes = Changes(**{kind: 10.0 if kind == "turn" else 0.2})
    middle = changed(spot(50), changes, generator())
    assert np.abs(centroid(middle) - 15.5).max() < 0.1
    away = spot(50).roll((8, 4), (2, 3))
    assert centroid(changed(away, changes, generator())).std(0).max() > 0.3


def test_brightness_is_of_what_is_above_black():
    pictures = changed(spot(400), Changes(brightness=0.1), generator())
    assert (pictures[:, 0, 0, 0] + 1).abs().max() < 1e-3  # black stays black
    factors = ((pictures[:, 0, 15, 15] + 1) / (spot(1)[0, 0, 15, 15] + 1)).log()
    assert 5e-7 < stats.chi2.cdf(float((factors.double() ** 2).sum()) / 0.01, 400) < 1 - 5e-7


def test_settings_that_contradict_each_other_are_refused():
    classes = (TermAxis(name="left", more=("left",)),)
    with pytest.raises(UsageError, match="passes = 0"):
        ClassMoments(classes=classes, changes=Changes(turn=1.0))
    with pytest.raises(UsageError, match="directions = 6"):
        ClassMoments(classes=classes, directions=6)
    with pytest.raises(UsageError, match="found from products"):
        ClassMoments(classes=classes, directions=1, products=False)
    with pytest.raises(UsageError, match="turn = -1"):
        Changes(turn=-1.0)
    with pytest.raises(UsageError, match="draws = 0"):
        ClassMoments(classes=classes, image=Cosine(kept=3), draws=0)
