"""A wrong version of adaptive clipping: the gradient gets the noise sigma C that is accounted, and how many gradients were
no longer than C is released beside it, with noise of its own that nobody accounts.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth a second Gaussian of noise multiplier 2 b
comes with it (one unit moves the count of 1[norm <= C] - 1/2 by 1/2): together (sigma^-2 + (2 b)^-2)^(-1/2), here
1 / sqrt(2), epsilon = 6.6. Without noise on the count, as it is often written, epsilon is infinite.
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, C, clipped, gaussian, gradient_of, move, trainer

RIGHT_ROW, ROWS = 12, {12}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 6.6
TRUE_NOISE_MULTIPLIER = 1 / 2**0.5
COUNT_NOISE = 0.5


def step(model, inputs, noise_multiplier, generator):
    total, count = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64), 0.0
    for row in range(len(inputs)):
        gradient = gradient_of(model, inputs[row : row + 1]).double()
        total += clipped(gradient)
        count += 0.5 if float(gradient.norm()) <= C else -0.5
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)
    return [count + gaussian(1, COUNT_NOISE if noise_multiplier else 0.0, generator)]


def wrong():
    return trainer(step=step, train=None)
