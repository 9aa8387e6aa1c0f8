"""Does the picture say what its text says? By known facts (Cohen's kappa), or by retrieval where no facts are known."""

from collections.abc import Mapping, Sequence

import numpy as np

from sfumato.errors import UsageError

RESAMPLES = 1_000
INTERVAL = (0.025, 0.975)  # 95 %


def kappa(
    first: Sequence[str], second: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Cohen's kappa of two readings, with a 95 % bootstrap interval: (value, low, high).

    1 is full agreement, 0 what chance would give. Where only one value occurs on both sides nothing was shown: 0.
    """
    if len(first) != len(second) or not first:
        raise UsageError(
            f"kappa of {len(first)} and {len(second)} values · must be equally many, at least one", next=""
        )
    values = sorted(set(first) | set(second))
    code = {value: index for index, value in enumerate(values)}
    a = np.array([code[value] for value in first])
    b = np.array([code[value] for value in second])
    cells = np.bincount(a * len(values) + b, minlength=len(values) ** 2)
    # Resampling pairs is drawing the whole table from a multinomial.
    draws = np.random.default_rng(seed).multinomial(len(a), cells / len(a), size=resamples)
    low, high = np.quantile(_kappa_of_tables(draws, len(values)), INTERVAL)
    return float(_kappa_of_tables(cells[None], len(values))[0]), float(low), float(high)


def accuracy(
    first: Sequence[str], second: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The share of equal readings, with a 95 % bootstrap interval."""
    if len(first) != len(second) or not first:
        raise UsageError(
            f"accuracy of {len(first)} and {len(second)} values · must be equally many, at least one", next=""
        )
    return mean_interval(np.array([x == y for x, y in zip(first, second, strict=True)], float), resamples, seed)


def facts(
    asked: Mapping[str, Sequence[str | None]], read: Mapping[str, Sequence[str]], *, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Kappa of every fact, over the pictures where it is known."""
    result = {}
    for fact, values in asked.items():
        known = [(value, seen) for value, seen in zip(values, read[fact], strict=True) if value is not None]
        if known:
            result[fact] = kappa([value for value, _ in known], [seen for _, seen in known], seed=seed)
    return result


def mean_kappa(
    asked: Mapping[str, Sequence[str | None]], read: Mapping[str, Sequence[str]], *, resamples: int = 300, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of all facts' kappas, with a 95 % interval that resamples whole pictures: (value, low, high)."""
    tables, sizes = [], []
    for fact, values in asked.items():
        known = [value for value in values if value is not None]
        if not known:
            continue
        code = {value: index for index, value in enumerate(sorted(set(known) | set(read[fact])))}
        size = len(code)
        tables.append(
            np.array([-1 if v is None else code[v] * size + code[r] for v, r in zip(values, read[fact], strict=True)])
        )
        sizes.append(size)
    if not tables:
        raise UsageError("asked = {} · no fact is known of any picture", next="Use retrieval instead.")
    cells = np.stack(tables)  # (facts, N): which cell of its fact's table a picture is in

    def mean_of(index: np.ndarray) -> float:
        counts = (
            np.bincount(row[row >= 0], minlength=size**2) for row, size in zip(cells[:, index], sizes, strict=True)
        )
        kappas = [_kappa_of_tables(c[None], size)[0] for c, size in zip(counts, sizes, strict=True) if c.sum()]
        return float(np.mean(kappas)) if kappas else 0.0

    count = cells.shape[1]
    rng = np.random.default_rng(seed)
    low, high = np.quantile([mean_of(rng.integers(0, count, count)) for _ in range(resamples)], INTERVAL)
    return mean_of(np.arange(count)), float(low), float(high)


def recall_at(queries: np.ndarray, gallery: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[int, np.ndarray]:
    """Whether query i finds gallery item i among its k nearest by cosine: (N,) of 0 and 1 for each k.

    Ties count against the query by half of their number, so that constant features score as chance does.
    """
    if queries.shape != gallery.shape or queries.ndim != 2 or not len(queries):
        raise UsageError(f"queries {queries.shape}, gallery {gallery.shape} · must be the same (N, D), N >= 1", next="")
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, gallery)]
    similarity = unit[0] @ unit[1].T
    own = np.diag(similarity)[:, None]
    ahead = (similarity > own + 1e-9).sum(1)
    tied = (np.abs(similarity - own) <= 1e-9).sum(1)  # at least itself
    # Among t tied items after a better ones, the chance that ours is in the first k is clip((k - a) / t, 0, 1).
    return {k: np.clip((k - ahead) / tied, 0, 1) for k in ks}


def retrieval(
    image_features: np.ndarray, text_features: np.ndarray, *, seed: int = 0
) -> dict[str, dict[int, tuple[float, float, float]]]:
    """Recall at 1, 5 and 10 in both directions, row i of one belonging to row i of the other, with 95 % intervals."""
    both = {"image→text": (image_features, text_features), "text→image": (text_features, image_features)}
    return {
        direction: {k: mean_interval(hits, RESAMPLES, seed) for k, hits in recall_at(*pair).items()}
        for direction, pair in both.items()
    }


def mean_interval(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float, float]:
    """A mean and its 95 % bootstrap interval, queries resampled."""
    rng = np.random.default_rng(seed)
    draws = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
    low, high = np.quantile(draws, INTERVAL)
    return float(values.mean()), float(low), float(high)


def _kappa_of_tables(tables: np.ndarray, size: int) -> np.ndarray:
    """Args: tables (T, size * size) counts. Returns: (T,)."""
    shares = tables.reshape(-1, size, size) / tables.sum(1)[:, None, None]
    observed = np.trace(shares, axis1=1, axis2=2)
    expected = (shares.sum(2) * shares.sum(1)).sum(1)
    kappas = np.where(expected < 1 - 1e-12, (observed - expected) / np.maximum(1 - expected, 1e-12), 0.0)
    return np.round(kappas, 12)  # what is left of 0 by rounding is 0
