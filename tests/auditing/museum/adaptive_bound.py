"""Clip to the median norm of the batch before, which is taken as it is, without noise.

Claimed: one Gaussian a step with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth the bound of the next step shows the
norms of this one exactly: epsilon is infinite.
"""

import math

import torch
from tests.auditing.adapters.loop import EXPECTED, C, clipped, gaussian, gradient_of, move, trainer

from sfumato.auditing.conformance import Run

RIGHT_ROW, ROWS = 12, {12}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, math.inf


def train(model, batches, noise_multiplier, generator):
    bound, steps = C, 0
    for inputs in batches:
        total, norms = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64), []
        for row in range(len(inputs)):
            gradient = gradient_of(model, inputs[row : row + 1]).double()
            total += clipped(gradient, bound)
            norms.append(float(gradient.norm()))
        move(model, (total + gaussian(len(total), noise_multiplier * bound, generator)) / EXPECTED)
        bound = sorted(norms)[len(norms) // 2] if norms else bound
        steps += 1
    return Run(charged=steps, noise_multiplier=noise_multiplier)


def wrong():
    return trainer(train=train)
