"""How far a set of pictures is from another: the Fréchet distance between Gaussians fitted to features.

It is called FID only for Inception's features; ours is always written with its extractor's name and sha256.
"""

import numpy as np

from sfumato.errors import UsageError


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Distance between the Gaussians fitted to two sets of features, each (N, D) with N >= 2.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2)`` (Dowson & Landau 1982, eq. 4); biased upwards where N is
    not much larger than D, so compare only figures of the same N.
    """
    _check(features_a, features_b)
    if max(len(features_a), len(features_b)) >= features_a.shape[1]:
        return gaussian_distance(*_moments(features_a), *_moments(features_b))
    # Fewer rows than columns: with C = X'X the trace of the root is the nuclear norm of X_a X_b', an N x N matrix.
    gap = features_a.mean(0) - features_b.mean(0)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (features_a, features_b))
    root_trace = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(gap @ gap + (a * a).sum() + (b * b).sum() - 2 * root_trace, 0.0))


def gaussian_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """The same from means (D,) and covariances (D, D).

    The symmetric form has real eigenvalues >= 0 even for singular covariances, where a general matrix root returns complex
    numbers; rounding below zero is cut.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root)
    gap = mean_a - mean_b
    distance = gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(max(distance, 0.0))


def crossed_distance(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], *, resamples: int = 60, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of the distances of the pairs (a, b) in ``first`` and in ``second``, with a 95 % interval: (value, low, high).

    With generated pictures split as the real ones are, ((generated A, real B), (generated B, real A)) has the sample size,
    and so the bias, of the baseline (real A, real B).
    A resample has repeated rows and so a larger distance: only the spread of the resamples is used, 1.96 standard deviations.
    """
    value = (frechet_distance(*first) + frechet_distance(*second)) / 2
    rng = np.random.default_rng(seed)
    draws = [
        (frechet_distance(*(_resample(x, rng) for x in first)) + frechet_distance(*(_resample(x, rng) for x in second)))
        / 2
        for _ in range(resamples)
    ]
    spread = 1.96 * float(np.std(draws, ddof=1))
    return value, max(value - spread, 0.0), value + spread


def _resample(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return features[rng.integers(0, len(features), len(features))]


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _check(features_a: np.ndarray, features_b: np.ndarray) -> None:
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_b.shape[-1]:
            raise UsageError(
                f"{name}.shape = {features.shape} · must be (N, D) with N >= 2 and the same D on both sides",
                next="Measure at least two pictures of each set.",
            )
        if not np.isfinite(features).all():
            raise UsageError(f"{name} · must be finite", next="Look at the pictures: the generator may have diverged.")
