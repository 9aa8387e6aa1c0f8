import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from sfumato.errors import UsageError
from sfumato.evaluation import image


def random_covariance(dimension: int, rank: int, rng: np.random.Generator) -> np.ndarray:
    factor = rng.normal(size=(dimension, rank))
    return factor @ factor.T / rank


def test_the_distance_of_diagonal_gaussians_has_its_closed_form():
    """sum (m_a - m_b)^2 + sum (s_a - s_b)^2 where the covariances commute."""
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([3.0, 1.0, 0.0])
    std_a, std_b = np.array([1.0, 2.0, 0.0]), np.array([0.5, 2.0, 4.0])
    value = image.gaussian_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2))
    assert value == pytest.approx(9 + 4 + 0.25 + 16, rel=1e-12)


@pytest.mark.parametrize("dimension", [1, 5, 40])
def test_the_distance_equals_the_textbook_formula_with_a_general_matrix_root(dimension):
    rng = np.random.default_rng(dimension)
    mean_a, mean_b = rng.normal(size=(2, dimension))
    cov_a, cov_b = (random_covariance(dimension, dimension + 5, rng) for _ in range(2))
    oracle = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    assert image.gaussian_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(oracle, rel=1e-7)


def test_singular_covariances_give_a_real_finite_distance():
    rng = np.random.default_rng(0)
    few = rng.normal(size=(5, 64))
    assert image.frechet_distance(few, few) == pytest.approx(0, abs=1e-5)
    assert np.isfinite(image.frechet_distance(few, rng.normal(size=(6, 64))))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_the_distance_is_symmetric_not_negative_and_of_second_degree(seed, scale):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(12, 4)), rng.normal(1, 2, size=(15, 4))
    value = image.frechet_distance(a, b)
    assert value >= 0
    assert image.frechet_distance(b, a) == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert image.frechet_distance(a * scale, b * scale) == pytest.approx(value * scale**2, rel=1e-6, abs=1e-9)


def test_the_interval_holds_the_true_distance():
    """Two Gaussians a distance 4 apart, 60 repetitions of a 95 % interval: fewer than 48 hits has probability < 1e-5."""
    rng = np.random.default_rng(0)
    hits = 0
    for repetition in range(60):
        a, b = rng.normal(size=(400, 2)), rng.normal([2, 0], 1, size=(400, 2))
        halves = ((a[:200], b[200:]), (a[200:], b[:200]))
        value, low, high = image.crossed_distance(*halves, resamples=40, seed=repetition)
        assert low <= value <= high
        hits += low <= 4 <= high
    assert hits >= 48


def test_few_rows_of_many_columns_give_the_same_distance_by_the_shorter_way():
    """Oracle: the covariances in full."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(9, 30)), rng.normal(1, 2, size=(12, 30))
    full = image.gaussian_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    assert image.frechet_distance(a, b) == pytest.approx(full, rel=1e-6)


def test_one_picture_or_a_broken_feature_is_refused():
    with pytest.raises(UsageError, match="at least two"):
        image.frechet_distance(np.zeros((1, 3)), np.zeros((5, 3)))
    with pytest.raises(UsageError, match="finite"):
        image.frechet_distance(np.full((4, 3), np.nan), np.zeros((5, 3)))
