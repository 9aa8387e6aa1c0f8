"""A popular wrong version: clamp each element of the averaged gradient to [-c, c], and add noise sigma c.

Claimed: one Gaussian with sigma = 1, epsilon = 4.38 at delta = 1e-5. In truth one unit can move every one of d elements
from +c to -c: the sensitivity is 2 c sqrt(d), so that the guarantee is vacuous at the size of any model: epsilon grows
as 2 d. Without noise, as it is often written, epsilon is infinite.
"""

import torch

from sfumato.privacy.noise import gaussian

NOISE_MULTIPLIER = 1.0
CLAIMED_EPSILON = 4.38
TRUE_EPSILON = 1000.0  # at least, for the small model of the test (d > 500)


def step(model, losses, batch, *, max_grad_norm, noise_multiplier, expected_batch_size, random):
    model.zero_grad()
    losses(model, batch).mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            gradient = parameter.grad.clamp(-max_grad_norm, max_grad_norm)
            noise = gaussian(parameter.numel(), noise_multiplier * max_grad_norm, random).view(parameter.shape)
            parameter -= gradient + noise.to(parameter.dtype)
    model.zero_grad()
