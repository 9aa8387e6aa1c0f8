"""The clipped gradients of the step before are not cleared: every unit is released once more, under one charge.

Claimed: one Gaussian a step with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth a unit is in two releases, and in all
later ones if nothing is ever cleared: sigma / sqrt(2), epsilon 6.6, for two steps.
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, C, clipped_sum, gaussian, move, trainer

from sfumato.auditing.conformance import Run

RIGHT_ROW, ROWS = 11, {11}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 6.6
TRUE_NOISE_MULTIPLIER = 1 / 2**0.5


def train(model, batches, noise_multiplier, generator):
    total, steps = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64), 0
    for inputs in batches:
        total = total + clipped_sum(model, inputs)
        move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)
        steps += 1
    return Run(charged=steps, noise_multiplier=noise_multiplier)


def wrong():
    return trainer(train=train)
