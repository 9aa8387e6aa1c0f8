"""Clip the mean of every micro-batch of two, because per-example gradients are slow.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth one unit turns its micro-batch from +C to -C:
the noise multiplier is sigma / 2, epsilon 9.99.
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, C, clipped, gaussian, gradient_of, move, trainer

RIGHT_ROW, ROWS = 5, {5, 17}  # a unit that overflows takes its micro-batch along
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 9.99
TRUE_NOISE_MULTIPLIER = 1 / 2


def step(model, inputs, noise_multiplier, generator):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for start in range(0, len(inputs), 2):
        pair = inputs[start : start + 2]
        total += clipped(gradient_of(model, pair).double() / len(pair))
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
