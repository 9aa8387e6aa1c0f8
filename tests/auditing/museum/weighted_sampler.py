"""A sampler that draws the rare classes more often; accounted at the mean rate.

Claimed: at q = .05 and 500 steps, sigma = 1, epsilon = 7.5. In truth one unit of ten is drawn at five times the rate, q = .25: 50.5.
"""

import numpy as np
import torch
from tests.auditing.adapters.loop import trainer

RIGHT_ROW, ROWS = 9, {9}
CLAIMED_EPSILON, TRUE_EPSILON = None, None  # of a run; a test recomputes both
CLAIMED_RATE, TRUE_RATE = 0.05, 0.25


def sample(population, sampling_rate, steps, generator):
    rare = torch.arange(population) % 10 == 0
    rates = torch.where(rare, 5 * sampling_rate, 5 * sampling_rate / 9)
    return [np.flatnonzero(torch.rand(population, generator=generator) < rates) for _ in range(steps)]


def wrong():
    return trainer(sample=sample)
