"""Which units take part in a step: Poisson sampling, and its cutting into parts that fit in memory.

Amplification by sampling (Abadi et al. 2016, arXiv:1607.00133) is proved for *this* sampler: every unit joins every
step by its own coin, independently, so that the size of a batch varies and may be 0. Shuffling through the data in
batches of one size is another mechanism with a weaker guarantee, and is not offered.
"""

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
