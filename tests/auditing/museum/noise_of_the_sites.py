"""Every site adds its share of the noise, sigma S / sqrt(n) for n sites; some drop out, and take their share along.

Claimed: client-level privacy with noise sigma S, epsilon = 4.38 for one round. In truth, where two of eight sites answer, the noise
multiplier is sigma / 2, epsilon = 9.99; where one does, 15.5.
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, C, claim, clipped, gaussian, gradient_of, move, trainer

RIGHT_ROW, ROWS = 19, {3, 8, 10, 19}  # nobody answers, no noise
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 9.99
TRUE_NOISE_MULTIPLIER = 1 / 2
SITES = 8


def step(model, inputs, noise_multiplier, generator):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in range(len(inputs)):
        total += clipped(gradient_of(model, inputs[row : row + 1]).double())
        total += gaussian(len(total), noise_multiplier * C / SITES**0.5, generator)
    move(model, total / EXPECTED)


def wrong():
    return trainer(claim=claim(unit="site"), step=step, train=None)
