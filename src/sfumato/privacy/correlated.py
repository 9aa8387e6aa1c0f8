"""Correlated noise: banded matrix factorisation, whose noise partly takes itself back over the steps.

A model's weights follow the *sums* of its gradients. So the matrix A of all prefix sums is factored, A = (A C^-1) C, with C
lower triangular, of ``bands`` = b diagonals, no column longer than 1. In the ideal, C G + w is released, for G (T, d) the
clipped sums of T steps and w independent normals; C^-1 of it is G + C^-1 w: each step as always, with noise whose sum
grows more slowly. b = 1 is DP-SGD (C = I). The mean squared error of a prefix sum is std^2 |A C^-1|_F^2 / T, and C is chosen
to make that small.

The claim. Units are assigned to b groups, each by its own die, before the first step of a block; step t draws from group
t mod b alone, every unit with probability b B / N (``sampling.CyclicPoisson``). ``Stream`` adds noise of standard deviation
std / C_tt, with std >= ``widened(sigma bound, bound, d)``. A block of T steps is then, for adding, removing or zeroing out
one unit, no worse than ceil(T / b) times the Poisson-sampled Gaussian mechanism with rate b B / N and noise multiplier
sigma. A stop ends the block: what goes on is a new one, with new groups and fresh noise, composed with it, and a cycle of b
steps that was cut off has cost as much as a whole one. The past noise stays in the memory of the process; it is never
written down. A forked process would have a copy of it, and of the groups, within a cycle that was charged once: it is refused
(``require_process``).

Proof, the arithmetic included. Everything is counted in one step h of the grid. The released numbers are y_t = G'_t + z_t, with G'_t
the rounded sum, w_t the source's noise (whole numbers), and z_t = w_t - R_t(z), where R_t(z) rounds
sum_{k=1}^{b-1} (C_{t,t-k} / C_tt) z_{t-k}, as float64 computes it: whole numbers, added exactly. Fix a unit, its group, and
all coins but its own. It takes part at steps s, s + b, ... at most, one coin each. Say that it joins at s: G'_s moves by
delta, |delta| <= bound + 2 sqrt(d). Given all earlier output, and thereby z, the output of step t = s .. s + b - 1 is
a_t + w_t with a_t known, and delta moves a_t by v_t = R_t(z) - R_t(z - delta at s) (by delta for t = s), which differs from
(C_ts / C_tt) delta by at most 1 for the roundings and 1 for float64, in each coordinate: |z| < 2^38 (20 of its standard
deviations, checked below: the exception, below 10^-80 for each number, is far below any delta), and float64 errs by less
than b sum |C_{t,t-k} / C_tt| 2^-53 2^38 <= 1/2 (checked below), twice.
v_t depends on earlier output only, and after s + b - 1 nothing of delta is left. So in units of the noise, std / C_tt:
sum_t |v_t C_tt / std|^2 <= mu^2 with mu = (|C_s| (bound + 2 sqrt(d)) + 2 sqrt(b d)) / std <= 1 / sigma.

    Lemma. Normals whose means are moved by v_t, which may depend on the past, with sum |v_t|^2 <= mu^2 always, are
    post-processing of one number from N(mu, 1); of N(0, 1) where nothing is moved, the post-processing being the same.
    Proof. Pad with one more normal, moved by v = (mu^2 - sum |v_t|^2)^(1/2): then the sum is mu^2. The partial
    sums of <v_t, noise_t> are values of a Brownian motion at the times sum |v_i|^2, with drift 1 or 0, which ends at time
    mu^2; its end, divided by mu, is N(mu, 1) or N(0, 1), and given the end the bridge to it has no drift. The parts of noise_t across v_t
    are independent normals. So everything can be drawn, in order, from the end alone.

Under the unit's coin the end is drawn from (1 - q) N(0, 1) + q N(mu, 1), against N(0, 1): one Poisson-sampled Gaussian. Steps s,
s + b, ... have disjoint windows, and each lemma holds given all before: they compose, ceil(T / b) of them. (Rounded normals
moved by whole numbers are rounded moved normals; the discrete source is within a factor 1 +- 10^-515 of such: ``discrete``.)
The group is independent of the data, so the bound for each group is one for the mixture. For replacing a unit by another the
lemma would need two ends at once: not claimed, and refused by the engine.

Sources: Choquette-Choo et al. 2023, arXiv:2306.08153, Theorem 4 (the event) and section 4 (banded C); McKenna 2024,
arXiv:2405.15913 (banded Toeplitz C at scale, optimised on the exact error); Denisov et al. 2022, arXiv:2202.08312, Theorem 2.1
(adaptive inputs). Differs: groups by dice, not of equal size; sums and noise on one grid.
"""

import math
import os
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato import checks
from sfumato.errors import LedgerError, PrivacyRefused, UsageError
from sfumato.privacy.noise import GRID_BITS, Source
from sfumato.randomness import Random

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_GENERAL = 1024  # steps: beyond, a general C is too slow to find
_CHUNK = 1 << 15  # coordinates at once, so that the work stays in the processor's cache
_LARGEST_SPREAD = 6.0  # 20 x 6 x 2^31 steps of the grid are below 2^38
_SEARCH = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 30}
_FLOAT_BOUND = 2.0**14  # of b sum |C_{t,t-k} / C_tt|


@dataclass(frozen=True, eq=False)
class Strategy:
    """C, lower triangular with b diagonals, positive on the main one, and no column longer than 1.

    Attributes:
      rows: (1, b) or (T, b) float64; rows[t, k] = C[t, t - k], and the one row of a Toeplitz matrix is every row.
      steps: T, what it was made for; the Toeplitz one may be used for fewer.
    """

    rows: np.ndarray
    steps: int

    def __post_init__(self) -> None:
        checks.positive(steps=self.steps)
        rows = self.rows
        if rows.ndim != 2 or rows.shape[0] not in (1, self.steps) or not 1 <= rows.shape[1] <= self.steps:
            raise UsageError(
                f"rows = {rows.shape} · must be (1, b) or (T, b) with b at most T = {self.steps}", next="Correct it."
            )
        if not (np.isfinite(rows).all() and (rows[:, 0] > 0).all()):
            raise UsageError("rows · must be finite, and positive on the diagonal", next="Correct the strategy.")
        if self.sensitivity > 1 + 1e-12:
            raise UsageError(
                f"longest column of C = {self.sensitivity:.6g} · must be at most 1", next="Divide C by it."
            )
        if self.bands * float((np.abs(rows).sum(axis=1) / rows[:, 0]).max()) > _FLOAT_BOUND:
            raise UsageError(
                f"bands = {self.bands} · more than float64 adds up with an error below the grid",
                next="Take at most 256 bands.",
            )
        spread = math.sqrt(float(variances(self).max())) * float(rows[:, 0].max())
        if not spread <= _LARGEST_SPREAD:
            raise UsageError(
                f"C^-1 · makes noise that is {spread:.3g} times as large as independent noise; numbers of 64 bits admit "
                f"{_LARGEST_SPREAD}",
                next="Take a C whose inverse does not grow.",
            )

    @property
    def bands(self) -> int:
        return self.rows.shape[1]

    @property
    def sensitivity(self) -> float:
        """The longest column: how far a unit of norm 1 that takes part once moves C G."""
        if len(self.rows) == 1:
            return float(np.linalg.norm(self.rows[0]))
        squares = np.zeros(self.steps + self.bands)
        for k in range(self.bands):
            squares[: self.steps - k] += self.rows[k:, k] ** 2  # C[t, t - k] is in column t - k
        return math.sqrt(float(squares.max()))

    def row(self, step: int) -> np.ndarray:
        """(b,): C[t, t], C[t, t - 1], ..."""
        if not 0 <= step < self.steps:
            raise UsageError(f"step = {step} · the strategy is for {self.steps} steps", next="Begin a new block.")
        return self.rows[0] if len(self.rows) == 1 else self.rows[step]

    def dense(self) -> np.ndarray:
        """(T, T) C; for small T."""
        matrix = np.zeros((self.steps, self.steps))
        for t in range(self.steps):
            width = min(self.bands, t + 1)
            matrix[t, t - width + 1 : t + 1] = self.row(t)[:width][::-1]
        return matrix


def prefix_sums(steps: int) -> np.ndarray:
    """(T,), the first column of the workload A that adds up: plain gradient descent."""
    return np.ones(steps)


def momentum_sums(steps: int, momentum: float) -> np.ndarray:
    """(T,), the first column of A for gradient descent with momentum: the weights after step t are A G."""
    checks.probability(momentum=momentum)
    return np.cumsum(momentum ** np.arange(steps))


def error(strategy: Strategy, workload: np.ndarray | None = None) -> float:
    """|A C^-1|_F / sqrt(T): the root mean square error of the rows of A G, for noise of standard deviation 1."""
    steps = strategy.steps
    first = prefix_sums(steps) if workload is None else _checked(workload, steps)
    if len(strategy.rows) == 1:
        answers = _divided(first, strategy.rows[0])
        return math.sqrt(float(np.arange(steps, 0, -1) @ answers**2) / steps)
    return math.sqrt(float((_general_factor(strategy.dense(), first) ** 2).sum()) / steps)


def variances(strategy: Strategy) -> np.ndarray:
    """(T,): the variance of a coordinate's noise at every step, for independent normals of variance 1: rows of C^-1, squared."""
    first = np.zeros(strategy.steps)
    first[0] = 1.0
    if len(strategy.rows) == 1:
        return np.cumsum(_divided(first, strategy.rows[0]) ** 2)
    return (np.linalg.inv(strategy.dense()) ** 2).sum(axis=1)


@lru_cache(maxsize=16)
def toeplitz(bands: int, steps: int, momentum: float = 0.0) -> Strategy:
    """The banded Toeplitz C of the least error for the sums of ``steps`` steps, by L-BFGS from the best C without bands
    (the square root of A: Fichtenberger et al. 2022, arXiv:2202.11205), cut off. McKenna 2024, section 3."""
    _check_bands(bands, steps)
    first = momentum_sums(steps, momentum)
    start = _divided_root(momentum, bands)
    if bands == 1:
        return Strategy(rows=np.ones((1, 1)), steps=steps)
    from scipy.optimize import minimize

    def value(rest: np.ndarray) -> tuple[float, np.ndarray]:
        total, slope = _toeplitz_error(np.concatenate([[1.0], rest]), first)
        return math.log(total), slope / total  # of the error itself, the first step may go far too far

    found = minimize(value, start[1:], jac=True, method="L-BFGS-B", options=_SEARCH)
    best = np.concatenate([[1.0], found.x]) if found.fun <= value(start[1:])[0] else start
    return Strategy(rows=(best / np.linalg.norm(best) / (1 + 1e-15))[None], steps=steps)


@lru_cache(maxsize=16)
def general(bands: int, steps: int, momentum: float = 0.0) -> Strategy:
    """The banded C of the least error, no two rows alike; for at most 1024 steps. Every column has norm 1."""
    _check_bands(bands, steps)
    if steps > LARGEST_GENERAL:
        raise UsageError(
            f"steps = {steps} · a general C is found for at most {LARGEST_GENERAL}", next="Take the Toeplitz one."
        )
    from scipy.optimize import minimize

    first = momentum_sums(steps, momentum)
    inside = np.array([[k <= t for k in range(bands)] for t in range(steps)])
    row, lag = np.nonzero(inside)
    column = row - lag

    def value(entries: np.ndarray) -> tuple[float, np.ndarray]:
        norms = np.sqrt(np.bincount(column, entries**2, steps))
        unit = entries / norms[column]
        matrix = np.zeros((steps, steps))
        matrix[row, column] = unit
        with np.errstate(all="ignore"):
            factor = _general_factor(matrix, first)
            total = float((factor**2).sum())
            if not (math.isfinite(total) and (np.diag(matrix) > 0).all()):
                return math.log(1e300), np.zeros_like(entries)
            # d |A C^-1|^2 = -2 <factor' factor C^-T, dC>
            slope = (-2 * np.linalg.solve(matrix, factor.T @ factor).T)[row, column]
        along = np.bincount(column, slope * unit, steps)  # the norm of a column stays 1
        return math.log(total), (slope - along[column] * unit) / norms[column] / total

    start = np.broadcast_to(toeplitz(bands, steps, momentum).rows, (steps, bands))[row, lag]
    found = minimize(value, start, jac=True, method="L-BFGS-B", options=_SEARCH)
    norms = np.sqrt(np.bincount(column, found.x**2, steps))
    rows = np.zeros((steps, bands))
    rows[row, lag] = found.x / norms[column] / (1 + 1e-15)
    return Strategy(rows=rows, steps=steps)


def widened(std: float, bound: float, dimension: int, strategy: Strategy) -> float:
    """The standard deviation std' that makes up for all rounding: with h its step, std' = (std / bound) (bound + 4 h sqrt(b d)).

    Raises: PrivacyRefused where that would double the noise.
    """
    if std == 0:
        return 0.0
    # the last factor pays for a column that is longer than 1 by rounding, and for the rounding here
    lost = (
        4.0 * math.sqrt(strategy.bands * dimension) * (std / bound) * 2.0**-GRID_BITS / float(strategy.rows[:, 0].max())
    )
    if lost > 0.5:
        raise PrivacyRefused(
            f"dimension = {dimension:,}, bands = {strategy.bands} · is too many for noise of multiplier {std / bound:g}: "
            "rounding would double it",
            next="Take fewer bands, or less noise and fewer steps.",
            code="correlated_noise",
        )
    return std / (1.0 - lost) * (1.0 + 2e-12)


class Stream:
    """The noise of one block for d coordinates, step by step. It cannot be copied, stored or rewound.

    Args:
      count: d.
      std: of w, the independent normals: ``widened(sigma bound, bound, d, ...)``. That of the noise at step t is about std / C_tt.
      source: whether w is Gaussian or discrete.
    Memory: 8 (b - 1) d bytes once b steps were taken.
    """

    def __init__(self, strategy: Strategy, count: int, std: float, source: Source) -> None:
        checks.non_negative(count=count, std=std)
        self._strategy, self._count, self.std, self._source = strategy, count, std, source
        self._grid = source.spacing(std / float(strategy.rows[:, 0].max())) if std > 0 else 0.0
        self._process = os.getpid()
        self._past: deque[Tensor] = deque(maxlen=strategy.bands - 1)  # z_{t-1}, z_{t-2}, ... in steps of the grid
        self.taken = 0  # steps

    def next(self, random: Random, plus: "Tensor | None" = None) -> "Tensor":
        """(d,) float64 on the CPU: z_t, or, rounded to its grid, ``plus`` + z_t. Raises LedgerError in a forked process."""
        import torch

        require_process(self._process)
        row = self._strategy.row(self.taken)
        self.taken += 1
        if self.std == 0:
            return torch.zeros(self._count, dtype=torch.float64) if plus is None else plus.double()
        out = torch.empty(self._count, dtype=torch.float64)
        full = len(self._past) == self._past.maxlen
        newest = (
            self._past[-1] if self._past and full else torch.empty_like(out)
        )  # the oldest is needed no more, piece by piece
        weights = [float(weight) for weight in row[1:] / row[0]]
        for start in range(0, self._count, _CHUNK):
            here = slice(start, start + _CHUNK)
            part = out[here]
            part.copy_(self._source.whole(len(part), self.std / float(row[0]), self._grid, random))
            if self._past:
                taken_back = torch.zeros_like(part)
                for weight, past in zip(weights, self._past, strict=False):
                    taken_back.add_(past[here], alpha=weight)
                part.sub_(taken_back.round_())
            newest[here] = part
            if plus is not None:
                part.add_(self._source.rounded(plus[here], self._grid))
            part.mul_(self._grid)
        if self._past and full:
            self._past.rotate(1)
        else:
            self._past.appendleft(newest)
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "Stream · cannot be copied, pickled or put into a checkpoint: noise drawn twice cancels exactly",
            next="Begin a new block after a resume: new groups, fresh noise, composed with the old one.",
        )


def require_process(began: int) -> None:
    """Raises LedgerError in a process other than ``began``: a forked copy of a block has the groups and the past noise of the
    original, and its steps would be charged to nobody."""
    if os.getpid() != began:
        raise LedgerError(
            f"process = {os.getpid()} · has a forked copy of a block of correlated noise that process {began} began",
            next=f"Train in the process that began, {began}.",
            code="ledger_forked",
        )


def check_memory(bands: int, dimension: int, limit: int | None = None) -> None:
    """Raises PrivacyRefused if past noise, 8 (b - 1) d bytes, needs more than ``limit`` (half of this machine's memory)."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if limit is None else limit
    needed = 8 * (bands - 1) * dimension
    if needed > limit:
        raise PrivacyRefused(
            f"bands = {bands} · the past noise of {dimension:,} coordinates needs {needed / 2**30:.2f} GiB, of which "
            f"{limit / 2**30:.2f} may be used",
            next="Take fewer bands, or train fewer parameters.",
            code="memory",
        )


# -- inside --


def _check_bands(bands: int, steps: int) -> None:
    checks.positive(bands=bands, steps=steps)
    if bands > steps:
        raise UsageError(f"bands = {bands} · must be at most the number of steps, {steps}", next="Take fewer bands.")


def _checked(workload: np.ndarray, steps: int) -> np.ndarray:
    if workload.shape != (steps,):
        raise UsageError(f"workload = {workload.shape} · must be ({steps},)", next="Give the first column of A.")
    return workload


def _divided(first: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    """The first column of A C^-1 for Toeplitz A and C: division of power series."""
    from scipy.signal import lfilter

    return np.asarray(lfilter([1.0], coefficients, first))


def _toeplitz_error(coefficients: np.ndarray, first: np.ndarray) -> tuple[float, np.ndarray]:
    """|C's column|^2 |A C^-1|_F^2 / T and its slope in all coefficients but the first, which is 1."""
    steps, bands = len(first), len(coefficients)
    counts = np.arange(steps, 0, -1) / steps
    with np.errstate(all="ignore"):
        answers = _divided(first, coefficients)
        total = float(counts @ answers**2)
        length = float(coefficients @ coefficients)
        if not math.isfinite(total * length):
            return 1e300, np.zeros(bands - 1)
        # answers = C^-1 a; their change is -C^-1 (dC answers), and C^-T is division backwards
        back = _divided((counts * answers)[::-1], coefficients)[::-1]
        slope = np.array([-2.0 * float(back[k:] @ answers[: steps - k]) for k in range(1, bands)])
        return length * total, length * slope + 2.0 * coefficients[1:] * total


def _divided_root(momentum: float, bands: int) -> np.ndarray:
    """The first b coefficients of ((1 - x) (1 - momentum x))^(-1/2), the square root of the workload."""
    root = np.cumprod(np.concatenate([[1.0], 1.0 - 0.5 / np.arange(1, bands)]))
    return np.convolve(root, root * momentum ** np.arange(bands))[:bands]


def _general_factor(matrix: np.ndarray, first: np.ndarray) -> np.ndarray:
    """A C^-1 for a dense C and Toeplitz A with this first column."""
    from scipy import linalg

    workload = linalg.toeplitz(first, np.zeros(len(first)))
    return np.asarray(linalg.solve_triangular(matrix.T, workload.T, lower=False).T)
