"""Shuffle once an epoch and take batches of one size; account it as Poisson sampling.

Claimed: epsilon = 0.23 for 500 steps at q = .002. In truth nothing is known that is as good: every unit is in exactly one batch of an
epoch, so the only proof at hand is that of one Gaussian an epoch, here (one epoch) epsilon = 4.38.
"""

import torch
from tests.auditing.adapters.loop import trainer

RIGHT_ROW, ROWS = 7, {7, 10}  # batches of one size are never empty
CLAIMED_EPSILON, TRUE_EPSILON = None, 4.38
TRUE_NOISE_MULTIPLIER = 1.0


def sample(population, sampling_rate, steps, generator):
    size, batches = max(1, round(population * sampling_rate)), []
    while len(batches) < steps:
        order = torch.randperm(population, generator=generator).numpy()
        batches += [order[i : i + size] for i in range(0, population - size + 1, size)]
    return batches[:steps]


def wrong():
    return trainer(sample=sample)
