"""A popular wrong version: clip every unit's gradient tensor by tensor, each to C, and account the noise sigma C as if the
whole had been clipped to C.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth one unit moves each of L tensors by C, so the
sensitivity is C sqrt(L), the effective noise multiplier sigma / sqrt(L); with L = 6, epsilon = 12.9. Right is C / sqrt(L).
"""

import torch
from tests.auditing.adapters.loop import EXPECTED, C, clipped, gaussian, move, trainer

RIGHT_ROW, ROWS = 4, {4}
CLAIMED_EPSILON, TRUE_EPSILON = 4.38, 12.87
TENSORS = 6
TRUE_NOISE_MULTIPLIER = 1 / TENSORS**0.5


def step(model, inputs, noise_multiplier, generator):
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for row in range(len(inputs)):
        gradients = torch.autograd.grad(model(inputs[row : row + 1]).sum(), list(model.parameters()))
        total += torch.cat([clipped(gradient.double().flatten()) for gradient in gradients])
    move(model, (total + gaussian(len(total), noise_multiplier * C, generator)) / EXPECTED)


def wrong():
    return trainer(step=step, train=None)
