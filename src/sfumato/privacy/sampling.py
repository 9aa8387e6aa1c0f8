"""Which units take part in a step: Poisson sampling, its two relatives, and its cutting into parts that fit in memory.

Amplification by sampling (Abadi et al. 2016, arXiv:1607.00133) is proved for *this* sampler: every unit joins every
step by its own coin, independently, so that the size of a batch varies and may be 0. Shuffling through the data in
batches of one size is another mechanism with a weaker guarantee, and is not offered.

*Cyclic* Poisson sampling is what correlated noise is proved for: a unit is drawn in every b-th step only. *Truncated*
Poisson sampling bounds the batch; it is a mechanism of its own, with its own event.
"""

from typing import Any, NoReturn

import numpy as np

from sfumato import checks
from sfumato.errors import UsageError
from sfumato.randomness import Random


def poisson_units(num_units: int, sampling_rate: float, random: Random) -> np.ndarray:
    """Draws the units of one step.

    Guarantee: each of the ``num_units`` units is drawn with probability ``sampling_rate``, rounded up to a multiple of
    2^-53, independently of all others and of all other steps. The result is secret: it is never written anywhere.

    Returns: (b,) int64, ascending, 0 <= b <= num_units.
    """
    checks.probability(sampling_rate=sampling_rate)
    checks.non_negative(num_units=num_units)
    return np.flatnonzero(random.uniform(num_units) < sampling_rate).astype(np.int64)


class CyclicPoisson:
    """Draws the units of the steps 0, 1, 2, ... of one block, each from one of ``bands`` groups.

    Guarantee: before the first step every unit gets a group from 0 .. bands - 1, uniform and independent of the others.
    Step t draws each unit of group t mod bands with probability ``sampling_rate``, rounded up to a multiple of 2^-53,
    independently of everything else, and no other unit. So any two steps that a unit takes part in are ``bands`` apart,
    and a step has N ``sampling_rate`` / ``bands`` units on average. Groups and units are secret: never written anywhere.

    Args: sampling_rate: of a unit in its own group's steps: b B / N for an expected batch of B.
    Source: Choquette-Choo et al. 2023, Algorithm 2, arXiv:2306.08153. Differs: groups by dice, not of equal size.
    """

    def __init__(self, num_units: int, bands: int, sampling_rate: float, random: Random) -> None:
        checks.probability(sampling_rate=sampling_rate, next="Take fewer bands: bands * B must be at most N.")
        checks.non_negative(num_units=num_units)
        checks.positive(bands=bands)
        self._sampling_rate, self._bands, self._random = sampling_rate, bands, random
        groups = random.integers(num_units, bands)
        order = np.argsort(groups, kind="stable")
        self._members = np.split(order, np.searchsorted(groups[order], np.arange(1, bands)))
        self._step = 0

    def next(self) -> np.ndarray:
        """Returns: (b,) int64, ascending, the units of the next step; perhaps none."""
        members = self._members[self._step % self._bands]
        self._step += 1
        return members[poisson_units(len(members), self._sampling_rate, self._random)].astype(np.int64)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "CyclicPoisson · cannot be copied, pickled or put into a checkpoint: who is in which group is secret",
            next="Begin a new block after a resume, with new groups.",
        )


def truncated_poisson_units(num_units: int, sampling_rate: float, max_units: int, random: Random) -> np.ndarray:
    """Draws the units of one step by truncated Poisson sampling.

    Guarantee: ``poisson_units``; if these are more than ``max_units``, a subset of exactly so many, each such subset being
    equally likely, independently of all other steps. Other units decide whether a unit is cut away, so this is not
    Poisson sampling: it has an event of its own, for replacing or zeroing out one of N units, N public.

    Returns: (b,) int64, ascending, 0 <= b <= max_units.
    Source: arXiv:2508.15089; the event is dp_accounting's TruncatedSubsampledGaussianDpEvent.
    """
    checks.positive(max_units=max_units)
    units = poisson_units(num_units, sampling_rate, random)
    while len(units) > max_units:
        words = np.frombuffer(random.bytes(8 * len(units)), dtype="<u8")
        if len(np.unique(words)) == len(words):  # else drawn again: without ties every order is equally likely
            return np.sort(units[np.argsort(words)[:max_units]])
    return units


def physical_parts(units: np.ndarray, max_physical: int | None) -> list[np.ndarray]:
    """Cuts one sampled batch into parts of at most ``max_physical`` units, of nearly one size.

    The parts are summed before the noise, so the mechanism is the same as without cutting. An empty batch is one empty
    part: its step consists of noise alone, and happens.
    """
    if max_physical is not None and max_physical < 1:
        raise UsageError(
            f"max_physical_batch_size = {max_physical} · must be at least 1", next="Leave it out to take whole batches."
        )
    if max_physical is None or len(units) <= max_physical:
        return [units]
    return np.array_split(units, -(-len(units) // max_physical))
