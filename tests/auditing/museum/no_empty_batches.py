"""An empty batch crashes the loop, so it is skipped: no step, no noise; the sampler drops it too.

Claimed: epsilon = 4.38 for one Gaussian step. In truth a batch of one unit makes a step that a batch of none does not: epsilon is
infinite.
"""

import math

from tests.auditing.adapters import loop

RIGHT_ROW, ROWS = 10, {10}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def step(model, inputs, noise_multiplier, generator):
    if len(inputs):
        loop.step(model, inputs, noise_multiplier, generator)


def sample(population, sampling_rate, steps, generator):
    batches = []
    while len(batches) < steps:
        batches += [batch for batch in loop.sample(population, sampling_rate, 100, generator) if len(batch)]
    return batches[:steps]


def wrong():
    return loop.trainer(step=step, sample=sample, train=None, resume=None)
