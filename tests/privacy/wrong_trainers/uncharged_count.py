"""A wrong version of adaptive clipping: the gradient gets the noise sigma C that is accounted, and how many gradients were
no longer than C is released beside it, with noise of its own that nobody accounts.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth a second Gaussian of noise multiplier 2 b
comes with it (one unit moves the count of 1[norm <= C] - 1/2 by 1/2): together (sigma^-2 + (2 b)^-2)^(-1/2), here
1 / sqrt(2), epsilon = 6.6. Without noise on the count, as it is often written, epsilon is infinite.
"""

import torch
from tests.oracles import only, vector

from sfumato.privacy.noise import gaussian

NOISE_MULTIPLIER = 1.0
CLAIMED_EPSILON = 4.38
COUNT_NOISE = 0.5
TRUE_EPSILON = 6.6


def step(model, losses, batch, *, max_grad_norm, noise_multiplier, expected_batch_size, random):
    total, count = torch.zeros_like(vector(model)), 0.0
    for unit in range(batch.num_units):
        model.zero_grad()
        losses(model, only(batch, unit)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        norm = float(gradient.norm())
        total += gradient * min(1.0, max_grad_norm / max(norm, 1e-300))
        count += 0.5 if norm <= max_grad_norm else -0.5
    model.zero_grad()
    total += gaussian(len(total), noise_multiplier * max_grad_norm, random)
    noise = gaussian(1, COUNT_NOISE if noise_multiplier else 0.0, random)
    return [total, count + noise]
