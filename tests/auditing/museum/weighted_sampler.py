"""A sampler that draws the rare classes more often; accounted at the mean rate.

Claimed: at q = .05 and 2,000 steps, sigma = 1, epsilon = 22.4. In truth one unit of ten is drawn at five times the rate, q = .25: 166.
"""

import numpy as np
import torch
from tests.auditing.adapters.loop import trainer

RIGHT_ROW, ROWS = 9, {9}
CLAIMED_EPSILON, TRUE_EPSILON = None, None  # computed in the test from the two rates
CLAIMED_RATE, TRUE_RATE = 0.05, 0.25


def sample(population, sampling_rate, steps, generator):
    rare = torch.arange(population) % 10 == 0
    rates = torch.where(rare, 5 * sampling_rate, 5 * sampling_rate / 9)
    return [np.flatnonzero(torch.rand(population, generator=generator) < rates) for _ in range(steps)]


def wrong():
    return trainer(sample=sample)
